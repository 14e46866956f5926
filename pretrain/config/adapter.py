"""The keys of an adapter: what is trained in place of the model's own parameters. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any

ALL_LINEAR = "all-linear"
PROMPT = "prompt"
OF_PROMPT = ("tokens", "text")  # the keys of this kind; all others are those of lora


@dataclass(kw_only=True)
class AdapterConfig:
    """An adapter beside a model that stays as `model.checkpoint` has it; it alone is trained and travels
    (docs/adapters.md)."""

    kind: str = "none"
    """none: all of the model is trained; lora: two thin factors A and B beside each target (arXiv 2106.09685); prompt:
    virtual tokens before each document, of which only the vectors are trained (arXiv 2104.08691)."""
    rank: int = 8
    """Rows of A and columns of B."""
    alpha: float = 16.0
    """The product B A counts alpha / rank times."""
    targets: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    """Layers by their names or the ends of them, as q_proj; all-linear: all that multiply by a matrix, but the last."""
    dropout: float = 0.0
    """Share of what goes into A that is left out in a training step."""
    merge: str = "factors"
    """factors: both factors are averaged, and the error of it is in every commit; alternate: they are trained in turns,
    so that the mean of the silos' products is exact, and each sync has half the bytes (arXiv 2502.01755)."""
    tokens: int = 20
    """Of a prompt: how many; so many positions of a sequence are its own."""
    text: str = ""
    """What a prompt begins as: the vectors of this text's tokens, from its beginning again where they are fewer, cut
    where they are more."""

    @property
    def is_on(self) -> bool:
        """Whether there is one."""
        return self.kind != "none"

    @property
    def prompt_tokens(self) -> int:
        """Virtual tokens before each document."""
        return self.tokens if self.kind == PROMPT else 0

    @property
    def terms(self) -> dict[str, Any]:
        """What a contract says of it: the keys of its kind."""
        return {key: value for key, value in vars(self).items() if not self.is_of_another_kind(key)}

    def is_of_another_kind(self, key: str) -> bool:
        """Whether a key does nothing for this kind."""
        return key != "kind" and not (self.is_on and (key in OF_PROMPT) == (self.kind == PROMPT))

    @property
    def takes_turns(self) -> bool:
        """Whether one factor trains at a time."""
        return self.is_on and self.merge == "alternate"
