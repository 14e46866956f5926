"""The aggregator's side of a secure sum: whose deliveries it adds up, what silos lay open, and the sum."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.config.errors import named
from pretrain.config.keys import RunConfig
from pretrain.exchange.store import REQUESTS_AT_ONCE, StoreExchange
from pretrain.exchange.sums import Sums, survivors_path
from pretrain.host.journal import Journal
from pretrain.merge.collect import Delivery
from pretrain.merge.terms import merge_weight, most_tokens, summed_moments
from pretrain.outer.fixed_point import scale
from pretrain.outer.placing import InMemory, let_go_pages
from pretrain.outer.quantize import Parts
from pretrain.outer.summed import in_stream
from pretrain.outer.threads import in_threads
from pretrain.trust.ledger import RefusedError, sha256_bytes
from pretrain.trust.masks import Stream, add, is_added
from pretrain.trust.shamir import SHARE_BYTES, join
from pretrain.trust.sums import Answer, Survivors, laid_open


@dataclass(frozen=True, kw_only=True)
class Total:
    """The sum of a version."""

    changes: dict[str, Parts]
    """Of pseudo-gradients."""
    factor: float
    """What their whole numbers are multiplied by, to be their weighted mean."""
    moments: dict[str, Parts]
    """Of the moments the weighted mean itself, as all silos are told it."""


class Unmasker:
    """Of one store; trust/sums.py has the protocol.

    Memory: the sum of a fragment, 4 bytes an element, and as much for the matrices whose mean gradients are in it; of
    each payload, which is mapped, a range a thread.
    """

    def __init__(self, config: RunConfig, exchange: StoreExchange, place: InMemory, num_threads: int) -> None:
        self._config, self._exchange, self._sums = config, exchange, Sums(config, exchange)
        self._place, self._num_threads = place, num_threads

    def chosen(self, version: int) -> list[str]:
        """Whose deliveries a version adds up, if that is decided; else none. Raises RefusedError."""
        survivors = self._sums.survivors(version)
        return survivors.silos if survivors else []

    def decide(self, version: int, deliveries: Sequence[Delivery], check: Callable[[], None]) -> Survivors:
        """Write down that these are added up, unless that is done. `check` raises if we may not write any more.

        Raises RefusedError if others are.
        """
        ours = Survivors(
            contract_sha256=self._exchange.terms_sha256(version),
            version=version,
            silos=[delivery.manifest.silo for delivery in deliveries],
            manifests=[sha256_bytes(delivery.manifest_bytes) for delivery in deliveries],
        )
        if self._sums.survivors(version) is None:
            check()
            data = self._exchange.members.sign(ours).to_bytes()
            self._exchange.write_over(survivors_path(version), data, lambda: bool(self.chosen(version)))
        return self._agreed(version, deliveries)

    def wait(
        self,
        version: int,
        deliveries: Sequence[Delivery],
        journal: Journal,
        *,
        check: Callable[[], None],
        look: Callable[[], None],
    ) -> None:
        """Ask for the sum of these, until as many silos have answered as it takes; `look` is called again and again."""
        said = ""
        while True:
            answers = self._answers(version, self.decide(version, deliveries, check))
            needed = self._sums.threshold(version)
            if len(answers) >= needed:
                return
            missing = [silo for silo in self._sums.silos(version) if silo not in answers]
            words = f"silo {named(missing)}: shares of the masks of version {version}; {needed - len(answers)} needed"
            if words != said:
                said = words
                journal.status("waiting", round=self._config.round_of(version), waiting_for=words)
            look()
            time.sleep(self._config.exchange.poll_seconds)

    def total(
        self, version: int, deliveries: Sequence[Delivery], weights: Sequence[int], shapes: Mapping[str, torch.Size]
    ) -> Total:
        """The sum of the deliveries. Raises RefusedError if it cannot be known, or is none."""
        streams, names = self._streams(version, deliveries), sorted(shapes)
        moments = summed_moments(self._config, names, shapes)
        changes = {name: {"values": self._zeros(torch.int32, shapes[name])} for name in names}
        told = {
            name: {part: self._zeros(dtype, torch.Size(size)) for part, (dtype, size) in moment.layout.items()}
            for name, moment in moments.items()
        }
        num_told = sum(map(len, told.values()))
        delivered = [{name: one.tensors.parts(name) for name in names} for one in deliveries]

        def let_go(number: int, elements: slice) -> None:
            if number >= num_told:
                for of_silo in delivered:
                    let_go_pages(of_silo[names[number - num_told]]["values"].view(-1)[elements])

        values = [in_stream(one.tensors.moments, parts) for one, parts in zip(deliveries, delivered, strict=True)]
        add(in_stream(told, changes), values, streams, self._num_threads, added=let_go)
        outer = self._config.outer
        most = merge_weight(most_tokens(self._config, version), outer.weight_power)
        factor = most / sum(weights) / scale(len(self._config.full_roster), outer.sum_range)
        merged = {}
        for name, moment in moments.items():
            try:
                merged[name] = moment.merged(told.pop(name), sum(weights) / most)
            except ValueError as error:
                raise RefusedError(
                    f"version {version}: what {named([one.manifest.silo for one in deliveries])} tell of the gradients "
                    f"of {name} is no sum of what they may tell: {error}; one of them has sent what it may not"
                ) from None
        return Total(changes=changes, factor=factor, moments=merged)

    def _zeros(self, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """Wide ones are few."""
        if dtype == torch.int64:
            return torch.zeros(shape, dtype=dtype)
        return self._place.zeros(shape).view(torch.int32)

    def _agreed(self, version: int, deliveries: Sequence[Delivery]) -> Survivors:
        """Whose deliveries are added up. Raises RefusedError unless it is these."""
        survivors = self._sums.survivors(version)
        if survivors is None:
            raise RefusedError(f"{survivors_path(version)}, which says whose deliveries are added up, is missing")
        given = {one.manifest.silo: sha256_bytes(one.manifest_bytes) for one in deliveries}
        if given != dict(zip(survivors.silos, survivors.manifests, strict=True)):
            raise RefusedError(
                f"version {version}: {survivors_path(version)} has the deliveries of {named(survivors.silos)}, and "
                f"there are others of {named(sorted(given))}: a sum is of those that silos have answered for"
            )
        return survivors

    def _answers(self, version: int, survivors: Survivors) -> dict[str, Answer]:
        silos = self._sums.silos(version)
        sha256 = sha256_bytes(survivors.to_bytes())
        found = in_threads(lambda silo: self._sums.answer(silo, version, survivors, sha256), silos, REQUESTS_AT_ONCE)
        return {silo: answer for silo, answer in zip(silos, found, strict=True) if answer}

    def _streams(self, version: int, deliveries: Sequence[Delivery]) -> list[Stream]:
        """What is to be taken from the sum of what was delivered. Raises RefusedError."""
        survivors, silos = self._agreed(version, deliveries), self._sums.silos(version)
        needed, answers = self._sums.threshold(version), self._answers(version, survivors)
        if len(answers) < needed:
            raise RefusedError(f"version {version}: {len(answers)} silos have answered; it takes {needed} of them")
        hashes = {
            one.manifest.silo: dict(zip(silos, self._sums.shares(one.manifest).seeds, strict=True))
            for one in deliveries
        }
        chosen, streams = dict(sorted(answers.items())[:needed]), []
        for place, (dealer, about) in enumerate(laid_open(survivors, silos)):
            try:
                shares = {silos.index(silo) + 1: _share(answer.shares[place]) for silo, answer in chosen.items()}
                if sha256_bytes(seed := join(shares)) != hashes[dealer][about]:
                    raise ValueError("they lead to another seed than it has signed")
            except ValueError as error:
                raise RefusedError(
                    f"version {version}: the shares of silo {dealer}'s mask that {named([*chosen])} have laid open "
                    f"cannot be used: {error}; one of these silos does not say what it has"
                ) from None
            streams.append(Stream(seed, not is_added(dealer, about)))
        return streams


def _share(text: str) -> bytes:
    if len(share := bytes.fromhex(text)) != SHARE_BYTES:
        raise ValueError(f"one has {len(share)} bytes")
    return share
