"""A silo's sequences with those of its practice among them, still a function of the position alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pretrain.silo.data import Mixture, Order, PackedTokens


@dataclass(frozen=True)
class _Phase:
    """From one practice to the next."""

    begin: int  # the position
    share: Fraction
    num_base: int  # sequences of the silo's own data before it
    num_practised: int  # of all practice before it
    corpus: int
    order: Order


class Practised(Mixture):
    """`Mixture` of a silo's data, and from each practice on, a share of the newest kept trajectories.

    Its data go on where they were: what is practised in between takes no turn of theirs.
    """

    def __init__(self, corpora: Sequence[PackedTokens], *, seed: int, silo: str, **options: Any) -> None:
        """As of `Mixture`."""
        super().__init__(corpora, seed=seed, silo=silo, **options)
        self._key: tuple[int, str] = seed, f"{silo}/practice"
        self._phases: list[_Phase] = []

    def begin(self, position: int, tokens: PackedTokens, share: float) -> None:
        """From `position` on, `share` of the sequences are of these trajectories."""
        num_base, num_practised = self._before(position)
        seed, silo = self._key
        order = Order(seed=seed, silo=silo, corpus=len(self._phases) + 1, num_sequences=tokens.num_sequences)
        exact = Fraction(str(share))
        self._phases.append(_Phase(position, exact, num_base, num_practised, len(self.corpora), order))
        self.corpora.append(tokens)

    def _phase(self, position: int) -> _Phase | None:
        return next((phase for phase in reversed(self._phases) if phase.begin <= position), None)

    def _before(self, position: int) -> tuple[int, int]:
        """How many sequences of the data, and of practice, lie before a position."""
        phase = self._phase(position)
        if phase is None:
            return position, 0
        inside = position - phase.begin
        practised = inside * phase.share.numerator // phase.share.denominator
        return phase.num_base + inside - practised, phase.num_practised + practised

    def locate(self, position: int) -> tuple[int, int]:
        """Corpus at `position`, and which of its sequences."""
        num_base, num_practised = self._before(position)
        phase = self._phase(position)
        if phase is None or self._before(position + 1)[1] == num_practised:
            return super().locate(num_base)
        return phase.corpus, phase.order.index(num_practised - phase.num_practised)

    def read(self, position: int) -> list[int]:
        """How many of the first `position` sequences come from each corpus of the data; of practice in the last."""
        num_base, num_practised = self._before(position)
        return [*self.draws(num_base), num_practised]
