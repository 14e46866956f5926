"""A silo's side of a secure sum: masks on what it delivers, shares of their seeds, and one answer a version."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import RunConfig
from pretrain.config.privacy import FEWEST_SUMMED
from pretrain.exchange.base import Outgoing
from pretrain.exchange.store import StoreExchange, delivery_path
from pretrain.exchange.sums import Sums, answer_path, shares_path, survivors_path
from pretrain.host.identity import known_identity, own_identity
from pretrain.merge.terms import contributor, merge_weight, sum_factor, sum_share, summed_moments
from pretrain.outer.fixed_point import OutOfRangeError, Whole, code
from pretrain.outer.quantize import Parts
from pretrain.outer.summed import in_stream
from pretrain.sync.answered import Answered
from pretrain.sync.delivered import Delivered
from pretrain.sync.noised import Noised, Pair
from pretrain.trust.ledger import Commit, Contributor, Manifest, Payload, RefusedError, sha256_bytes
from pretrain.trust.masks import Stream, add
from pretrain.trust.member import member_budget
from pretrain.trust.policy import Policy
from pretrain.trust.sums import Answer, Shares, Survivors, laid_open


class MaskedSum:
    """One silo's; trust/sums.py has the protocol."""

    def __init__(self, config: RunConfig, silo: str, exchange: StoreExchange, delivered: Delivered, policy: Policy):
        self._config, self._silo, self._exchange, self._sums = config, silo, exchange, Sums(config, exchange)
        self._delivered, self._policy, self._directory = delivered, policy, config.silo_directory(silo)
        self._salts: dict[int, str] = {}  # of versions that are being coded
        self._answers: dict[int, bytes] = {}  # to what was asked for versions that are not committed yet
        budget = member_budget(config)
        self._noised = Noised(config, budget, config.silo_directory(silo) / "private") if budget else None

    @cached_property
    def _answered(self) -> Delivered:
        """The hash of what was asked for, in this run directory; a later contract begins anew."""
        return Delivered(self._directory / f"answered-{self._exchange.contract_sha256[:12]}.txt")

    @cached_property
    def _summed(self) -> Delivered:
        """And of what a commit of that says."""
        return Delivered(self._directory / f"summed-{self._exchange.contract_sha256[:12]}.txt")

    @property
    def _note(self) -> Answered:
        """What the key's holder has answered, once the contract was read."""
        return Answered(self._config.key_file(self._silo), self._exchange.contract_sha256, self._silo)

    def check(self) -> None:
        """Raise ConfigError unless this run directory may deliver under the contract."""
        has_answered = not self._answered.is_empty
        self._note.check(known_identity(self._directory), self._directory, has_answered=has_answered)

    def begin(self) -> None:
        """Note that this run directory, and no other, delivers under the contract. Raises ConfigError."""
        self._note.begin(own_identity(self._directory), self._directory)

    def mask(
        self,
        version: int,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        moments: Mapping[str, Parts],
        tokens: int,
        num_threads: int,
    ) -> tuple[dict[str, Parts], dict[str, Parts]]:
        """What leaves of a fragment, of each tensor's base and local value, and of its moments.

        Raises ConfigError, with the range.
        """
        names = sorted(pairs)
        shapes = {name: base.shape for name, (base, _) in pairs.items()}
        told = self._whole_moments(version, moments, shapes, tokens, num_threads)
        coded = self._whole_changes(version, names, [pairs[name] for name in names], tokens, num_threads)
        values = {
            name: {"values": torch.from_numpy(one).view(pairs[name][0].shape)}
            for name, one in zip(names, coded, strict=True)
        }
        whole = in_stream(told, values)
        content = blake3()
        for one in whole:
            content.update(one.view(np.uint8).data)
        masker = self._sums.masker(self._silo, version)
        self._salts[version] = salt = masker.salt(content.digest())
        add(whole, [], masker.streams(salt), num_threads)
        return values, told

    def _whole_changes(
        self,
        version: int,
        names: Sequence[str],
        pairs: Sequence[tuple[Tensor, Tensor]],
        tokens: int,
        num_threads: int,
    ) -> Sequence[Whole]:
        """Pseudo-gradients as whole numbers. Raises ConfigError."""
        outer = self._config.outer
        try:
            return self._coded(version, pairs, sum_factor(self._config, version, tokens), num_threads)
        except OutOfRangeError as error:
            number, peak = error.args
            raise ConfigError(
                f"outer.sum_range: {outer.sum_range:g} given; silo {self._silo}: version {version}: {names[number]} "
                f"has a change of {peak:g}; allowed: up to the range, or a new run with a larger one; nothing was sent"
            ) from None

    def _whole_moments(
        self,
        version: int,
        moments: Mapping[str, Parts],
        shapes: Mapping[str, torch.Size],
        tokens: int,
        num_threads: int,
    ) -> dict[str, Parts]:
        """What we tell of our gradients, as whole numbers. Raises ConfigError."""
        share, clip, found = sum_share(self._config, version, tokens), self._config.inner.clip_norm, {}
        for name, moment in summed_moments(self._config, moments, shapes).items():
            try:
                found[name] = moment.whole(moments[name], share, num_threads)
            except OutOfRangeError as error:
                part, peak = error.args
                raise ConfigError(
                    f"inner.clip_norm: {clip:g} given; silo {self._silo}: version {version}: what is told of the "
                    f"gradients of {name} ({part}) has {peak:g}; allowed: up to {moment.largest(part):g}, for which a "
                    "sum of gradients that are clipped so has room; nothing was sent"
                ) from None
        return found

    def told(self, sent: Outgoing, base: Mapping[str, Tensor], num_threads: int) -> dict[str, Parts]:
        """What we have told of our gradients with a delivery that lies in the outbox, without its masks."""
        manifest, masked = sent.manifest, sent.coded.moments
        moments = summed_moments(self._config, masked, {name: value.shape for name, value in base.items()})
        found = {name: {part: value.clone() for part, value in parts.items()} for name, parts in masked.items()}
        salt = Shares.from_bytes(_beside(sent.file).read_bytes()).salt
        masks = self._sums.masker(self._silo, manifest.version).streams(salt)
        add(in_stream(found, {}), [], [Stream(mask.seed, not mask.is_added) for mask in masks], num_threads)
        share = sum_share(self._config, manifest.version, manifest.tokens)
        return {name: moments[name].values(parts, share) for name, parts in found.items()}

    def _coded(self, version: int, pairs: Sequence[Pair], factor: float, num_threads: int) -> Sequence[Whole]:
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
        """Lay open what the aggregator asks for, once it does; for one set of deliveries alone. What somebody puts in
        the place of the answer gives way.

        Raises ConfigError if it asks for another, for too few, or for what nobody has delivered.
        """
        if self._silo not in self._sums.silos(version):
            return
        if version not in self._answers:
            try:
                survivors = self._sums.survivors(version)
                found = self._shares(version, survivors) if survivors else None
            except RefusedError as error:
                raise ConfigError(f"silo {self._silo}: version {version} was not answered: {error}") from None
            if not survivors or not found:
                return
            shares, contributors = found
            self._check_only(version, sha256 := sha256_bytes(survivors.to_bytes()))
            self._summed.add(version, _hash(contributors))
            answer = Answer(
                contract_sha256=self._exchange.terms_sha256(version),
                silo=self._silo,
                version=version,
                survivors_sha256=sha256,
                shares=shares,
            )
            self._answers[version] = self._exchange.members.sign(answer).to_bytes()
        data, name = self._answers[version], answer_path(self._silo, version)
        if self._exchange.found(name) != data:
            self._exchange.write_over(name, data, lambda: False)

    def check_merged(self, commit: Commit) -> None:
        """Raise RefusedError unless a commit is of just what we have answered for, if we have."""
        self._answers.pop(commit.version, None)
        known, silos = self._summed.of(commit.version), named([one.silo for one in commit.contributors])
        if known and _hash(commit.contributors) not in known:
            raise RefusedError(
                f"its commit has the deliveries of {silos}, and they, or what they count, are not what silo "
                f"{self._silo} has answered for: what was added up is another sum"
            )
        if commit.divisor != (total := sum(one.weight for one in commit.contributors)):
            raise RefusedError(f"its divisor is {commit.divisor}, and not the sum of the weights of {silos}, {total}")

    def _check_only(self, version: int, sha256: str) -> None:
        """Note a set of deliveries, for ever, before it is answered. Raises ConfigError if another one was."""
        said = self._sums.answered(self._silo, version)
        is_other = said is not None and said.survivors_sha256 != sha256
        if is_other or not self._note.add_only(version, sha256) or not self._answered.add_only(version, sha256):
            raise ConfigError(
                f"exchange.url: {self._exchange.objects.url} given; silo {self._silo} has answered for version "
                f"{version}, and is asked for another set of deliveries, with which one silo's could be told: find out "
                "who runs the aggregator"
            )

    def _shares(self, version: int, survivors: Survivors) -> tuple[list[str], list[Contributor]] | None:
        """Ours of what is asked for, and what a commit says of it; None while something is missing that its author has
        to write once more.

        Raises RefusedError unless all is as those who delivered have signed it.
        """
        least = max(FEWEST_SUMMED, self._policy.least_silos or 0)
        if len(survivors.silos) < least:
            raise RefusedError(f"a sum of {len(survivors.silos)} silos was asked for; allowed: {least} or more")
        masker, silos = self._sums.masker(self._silo, version), self._sums.silos(version)
        found, contributors = {}, []
        for silo, sha256 in zip(survivors.silos, survivors.manifests, strict=True):
            if (data := self._exchange.delivered(silo, version)) is None:
                self._say_missing(version, f"{delivery_path(silo, version)}/manifest.json")
                return None
            if sha256_bytes(data) != sha256:
                raise RefusedError(f"{delivery_path(silo, version)}/manifest.json is not the one that is asked about")
            if silo == self._silo and not self._delivered.may_be_ours(version, sha256):
                raise RefusedError(f"manifest {sha256[:12]} of this silo is none that it delivered")
            manifest = Manifest.from_bytes(data)
            if (shares := self._sums.shares_if_there(manifest)) is None:
                self._deal_again(manifest)
                self._say_missing(version, shares_path(silo, version))
                return None
            found[silo] = masker.open(silo, shares.salt, shares.sealed)
            weight = merge_weight(manifest.tokens, self._config.outer.weight_power)
            contributors.append(contributor(manifest, data, weight))
        return [found[dealer][about].hex() for dealer, about in laid_open(survivors, silos)], contributors

    def _say_missing(self, version: int, name: str) -> None:
        """Once; whoever has written it waits as we do, and sees that, too."""
        self._exchange.pass_over(survivors_path(version), f"{name} is not there, or not its silo's; it may come again")

    def _deal_again(self, manifest: Manifest) -> None:
        """Write our own shares in the place of what is not ours, if they lie in the outbox."""
        file = _beside(self._directory / "outbox" / f"{manifest.version:06d}.safetensors")
        if manifest.silo != self._silo or not file.is_file():
            return
        data = file.read_bytes()
        if Shares.from_bytes(data).blake3 == manifest.payloads[0].blake3:
            self._exchange.write_over(shares_path(self._silo, manifest.version), data, lambda: False)


def _beside(file: Path) -> Path:
    """Where the shares lie in the outbox."""
    return file.with_suffix(".shares")


def _hash(contributors: Sequence[Contributor]) -> str:
    return sha256_bytes(json.dumps([dataclasses.asdict(one) for one in contributors], sort_keys=True).encode())
