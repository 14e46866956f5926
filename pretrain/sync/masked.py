"""A silo's side of a secure sum: masks on what it delivers, shares of their seeds, and one answer a version."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.config.privacy import FEWEST_SUMMED
from pretrain.exchange.store import StoreExchange, delivery_path
from pretrain.exchange.sums import Sums, answer_path, shares_path
from pretrain.merge.terms import sum_factor
from pretrain.outer.fixed_point import OutOfRangeError, code
from pretrain.outer.quantize import Parts
from pretrain.sync.delivered import Delivered
from pretrain.sync.noised import Noised, Pair
from pretrain.trust.ledger import Manifest, Payload, RefusedError, sha256_bytes
from pretrain.trust.masks import add
from pretrain.trust.member import member_budget
from pretrain.trust.policy import Policy
from pretrain.trust.sums import Answer, Shares, Survivors, laid_open


class MaskedSum:
    """One silo's; trust/sums.py has the protocol."""

    def __init__(self, config: RunConfig, silo: str, exchange: StoreExchange, delivered: Delivered, policy: Policy):
        self._config, self._silo, self._exchange, self._sums = config, silo, exchange, Sums(config, exchange)
        self._delivered, self._policy = delivered, policy
        self._answered = Delivered(config.silo_directory(silo) / "answered.txt")
        self._salts: dict[int, str] = {}  # of versions that are being coded
        self._done: set[int] = set()
        budget = member_budget(config)
        self._noised = Noised(config, budget, config.silo_directory(silo) / "private") if budget else None

    def mask(
        self, version: int, pairs: Mapping[str, tuple[Tensor, Tensor]], tokens: int, num_threads: int
    ) -> dict[str, Parts]:
        """What leaves of a fragment, of each tensor's base and local value. Raises ConfigError, with the range."""
        outer, names = self._config.outer, sorted(pairs)
        factor = sum_factor(self._config, version, tokens)
        try:
            coded = self._coded(version, [pairs[name] for name in names], factor, num_threads)
        except OutOfRangeError as error:
            number, peak = error.args
            raise ConfigError(
                f"outer.sum_range: {outer.sum_range:g} given; silo {self._silo}: version {version}: {names[number]} "
                f"has a change of {peak:g}; allowed: up to the range, or a new run with a larger one; nothing was sent"
            ) from None
        content = blake3()
        for one in coded:
            content.update(one.view(np.uint8).data)
        masker = self._sums.masker(self._silo, version)
        self._salts[version] = salt = masker.salt(content.digest())
        add([one.view(np.uint32) for one in coded], [], masker.streams(salt), num_threads)
        return {
            name: {"values": torch.from_numpy(one).view(pairs[name][0].shape)}
            for name, one in zip(names, coded, strict=True)
        }

    def _coded(
        self, version: int, pairs: Sequence[Pair], factor: float, num_threads: int
    ) -> "list[np.ndarray[tuple[int], np.dtype[np.int32]]]":
        """Whole numbers, clipped and noised where the contract has a budget. Raises OutOfRangeError."""
        largest = self._config.outer.sum_range
        if not self._noised:
            return code(pairs, factor, largest, num_threads)
        threshold, terms = self._sums.threshold(version), self._exchange.terms_sha256(version)
        noised = self._noised.pairs(pairs, version, terms, threshold)
        return [one for pair in noised for one in code([pair], factor, largest, num_threads)]

    def deal(self, payload: Payload, file: Path, version: int) -> None:
        """Write beside a payload in the outbox what goes with it."""
        masker, salt = self._sums.masker(self._silo, version), self._salts.pop(version)
        sealed, seeds = masker.deal(salt)
        shares = Shares(
            contract_sha256=self._exchange.terms_sha256(version),
            silo=self._silo,
            version=version,
            blake3=payload.blake3,
            salt=salt,
            sealed=sealed,
            seeds=seeds,
        )
        _beside(file).write_bytes(self._exchange.members.sign(shares).to_bytes())

    def deliver(self, manifest: Manifest, file: Path) -> None:
        """Write the shares, unless a delivery of ours stands, with which they go."""
        if not self._exchange.is_delivered(self._silo, manifest.version):
            name = shares_path(self._silo, manifest.version)
            self._exchange.write_over(name, _beside(file).read_bytes(), lambda: False)

    def answer(self, version: int) -> None:
        """Lay open what the aggregator asks for, once it does; for one set of deliveries alone.

        Raises ConfigError if it asks for another, for too few, or for what nobody has delivered.
        """
        if version in self._done or self._silo not in self._sums.silos(version):
            return
        try:
            if (survivors := self._sums.survivors(version)) is None:
                return
            shares = self._shares(version, survivors)
        except RefusedError as error:
            raise ConfigError(f"silo {self._silo}: version {version} was not answered: {error}") from None
        sha256 = sha256_bytes(survivors.to_bytes())
        self._check_only(version, sha256)
        answer = Answer(
            contract_sha256=self._exchange.terms_sha256(version),
            silo=self._silo,
            version=version,
            survivors_sha256=sha256,
            shares=shares,
        )
        data, name = self._exchange.members.sign(answer).to_bytes(), answer_path(self._silo, version)
        if self._exchange.found(name) != data:
            self._exchange.write_over(name, data, lambda: False)
        self._done.add(version)

    def _check_only(self, version: int, sha256: str) -> None:
        """Note a set of deliveries, for ever, before it is answered. Raises ConfigError if another one was."""
        if not self._answered.add_only(version, sha256):
            raise ConfigError(
                f"exchange.url: {self._exchange.objects.url} given; silo {self._silo} has answered for version "
                f"{version}, and is asked for another set of deliveries, with which one silo's could be told: find out "
                "who runs the aggregator"
            )

    def _shares(self, version: int, survivors: Survivors) -> list[str]:
        """Ours of what is asked for. Raises RefusedError unless all is as those who delivered have signed it."""
        least = max(FEWEST_SUMMED, self._policy.least_silos or 0)
        if len(survivors.silos) < least:
            raise RefusedError(f"a sum of {len(survivors.silos)} silos was asked for; allowed: {least} or more")
        masker, silos = self._sums.masker(self._silo, version), self._sums.silos(version)
        found = {}
        for silo, sha256 in zip(survivors.silos, survivors.manifests, strict=True):
            data = self._exchange.delivered(silo, version)
            if data is None or sha256_bytes(data) != sha256:
                raise RefusedError(f"{delivery_path(silo, version)}/manifest.json is not the one that is asked about")
            if silo == self._silo and not self._delivered.may_be_ours(version, sha256):
                raise RefusedError(f"manifest {sha256[:12]} of this silo is none that it delivered")
            shares = self._sums.shares(Manifest.from_bytes(data))
            found[silo] = masker.open(silo, shares.salt, shares.sealed)
        return [found[dealer][about].hex() for dealer, about in laid_open(survivors, silos)]


def _beside(file: Path) -> Path:
    """Where the shares lie in the outbox."""
    return file.with_suffix(".shares")
