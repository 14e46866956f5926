"""What each party to a federation has by the end of a run: for benchmarks/leaks.py.

`Opened` reads a run's store as it is, with a member's keys and no others: what a party cannot open there it does not
have. What a member can work out of the versions all silos get, knowing what it sent itself, is `Opened.subtracted`.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.leak_attacks import Floats
from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.payload import Tensors, changed_tensors
from pretrain.exchange.sealed import fetch_version, open_payload, take_group_key
from pretrain.exchange.store import StoreExchange, delivery_path
from pretrain.exchange.sums import Sums
from pretrain.federation.export import empty_model
from pretrain.federation.reading import found_configuration
from pretrain.merge.terms import sum_factor, sum_share, summed_moments
from pretrain.outer.codec import decoded
from pretrain.outer.quantize import Parts
from pretrain.outer.summed import in_stream
from pretrain.silo.data import Mixture
from pretrain.silo.texts import open_data
from pretrain.silo.vocabulary import vocabulary_size
from pretrain.trust.ledger import Manifest, RefusedError
from pretrain.trust.masks import Stream, add
from pretrain.trust.members import act_as

Named = dict[str, Tensor]
SEALED = "member, were it sealed"


@dataclass(frozen=True, kw_only=True)
class View:
    """What somebody has of one silo's delivery for a version."""

    base: Named
    """The published parameters that it was made against."""
    pseudo_gradient: Named
    """Base minus the silo's own parameters, as far as they can be known."""
    moments: Mapping[str, Parts]
    """The silo's moments; empty where none travel."""

    @cached_property
    def local(self) -> Named:
        """The silo's own parameters at the end of the round."""
        return {name: (value.double() - self.pseudo_gradient[name]).float() for name, value in self.base.items()}


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version as every member has it."""

    parameters: Named
    moments: Mapping[str, Parts]
    shares: Mapping[str, float]
    """Of each silo in the merge."""


def check_readable(config: RunConfig) -> None:
    """Raise ConfigError for what the attacks do not know how to read."""
    given = {
        "exchange.kind": (config.exchange.kind, ("store",)),
        "outer.optimizer": (config.outer.optimizer, ("sgd", "nesterov")),
        "outer.num_fragments": (config.outer.num_fragments, (1,)),
        "outer.overlap_steps": (config.outer.overlap_steps, (0,)),
        "membership.steps": (config.membership.steps, ("equal",)),
        "membership.sample": (config.membership.sample, (None,)),
        "membership.quorum": (config.membership.quorum, (None,)),
    }
    for key, (value, allowed) in given.items():
        if value not in allowed:
            names = ", ".join("null" if one is None else str(one) for one in allowed)
            raise ConfigError(f"{key}: {value} given; allowed where leaks are measured: {names}")


class Opened:
    """A finished run's store, read by one party."""

    def __init__(self, run: Path, party: str) -> None:
        """`party` is the operator, a silo, or "" for whoever reads the store and has no key."""
        self.config, self.party = found_configuration(str(run)), party
        self._exchange = StoreExchange(self.config.store_url)
        assert self._exchange.read_contract() is not None, run
        if party:
            act_as(self._exchange.members, self.config, party)
        if party not in ("", OPERATOR):
            take_group_key(self._exchange)

    @cached_property
    def versions(self) -> list[Version]:
        """All of them, from version 0 on. Raises RefusedError where they are sealed for others."""
        found: list[Version] = []
        with tempfile.TemporaryDirectory() as scratch:
            for version in range(self._exchange.newest_version() + 1):
                found.append(self._version(version, found[-1].parameters if found else {}, Path(scratch) / "payload"))
        return found

    def _version(self, version: int, before: Named, file: Path) -> Version:
        commit = self._exchange.read_commit(version)
        (payload,) = commit.payloads
        fetch_version(self._exchange, version, payload, file)
        tensors = Tensors(file)
        is_whole = not version or commit.codec == "fp32"
        values = changed_tensors(tensors, commit.codec, {} if is_whole else before)
        file.unlink()
        return Version(
            parameters=values,
            moments=_copied(tensors.moments),
            shares={one.silo: one.weight / commit.divisor for one in commit.contributors},
        )

    def delivery(self, silo: str, version: int) -> View:
        """What a silo delivered. Raises RefusedError where it is sealed for others, or masked."""
        commit = self._exchange.read_commit(version)
        one = next(one for one in commit.contributors if one.silo == silo)
        manifest, _ = self._exchange.contributed(one)
        (payload,) = manifest.payloads
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / payload.file
            self._exchange.fetch(delivery_path(silo, version), payload, file)
            open_payload(self._exchange, silo, version, payload, file)
            tensors, base = Tensors(file), self.versions[manifest.base_version].parameters
            if self.config.outer.secure_sum:
                return self._unmasked(manifest, tensors, base)
            pseudo = {name: decoded(manifest.codec, base[name], tensors.parts(name)) for name in tensors.names}
            return View(base=base, pseudo_gradient=pseudo, moments=_copied(tensors.moments))

    def _unmasked(self, manifest: Manifest, tensors: Tensors, base: Named) -> View:
        """What lies below the masks, which only the silo itself can take off."""
        if manifest.silo != self.party:
            raise RefusedError(f"the delivery of {manifest.silo} for version {manifest.version} is masked")
        sums, version, tokens = Sums(self.config, self._exchange), manifest.version, manifest.tokens
        masks = sums.masker(self.party, version).streams(sums.shares(manifest).salt)
        told = _copied(tensors.moments)
        values = _copied({name: tensors.parts(name) for name in tensors.names})
        add(in_stream(told, values), [], [Stream(mask.seed, not mask.is_added) for mask in masks])
        factor, share = sum_factor(self.config, version, tokens), sum_share(self.config, version, tokens)
        agreed = summed_moments(self.config, told, {name: value.shape for name, value in base.items()})
        return View(
            base=base,
            pseudo_gradient={name: parts["values"].double() / factor for name, parts in values.items()},
            moments={name: agreed[name].values(parts, share) for name, parts in told.items()},
        )

    def merged(self, version: int) -> Named:
        """The merged pseudo-gradient of a version, from the versions up to it: the outer step taken back.

        Of Nesterov's step, d + momentum (momentum velocity + d), whose velocity is known from the versions before.
        """
        outer, versions = self.config.outer, self.versions
        momentum = outer.momentum if outer.optimizer == "nesterov" else 0.0
        velocity = {
            name: torch.zeros_like(value, dtype=torch.float64) for name, value in versions[0].parameters.items()
        }
        for made in range(1, version + 1):
            before, after, lr = versions[made - 1].parameters, versions[made].parameters, self.config.outer_lr(made)
            steps = {name: (value.double() - after[name].double()) / lr for name, value in before.items()}
            found = {name: (step - momentum**2 * velocity[name]) / (1 + momentum) for name, step in steps.items()}
            velocity = {name: momentum * velocity[name] + value for name, value in found.items()}
        return found

    def subtracted(self, version: int, own: View) -> View:
        """What a silo can make of a version: the mean of the others, with what it sent itself taken out.

        Of two silos that is the other's delivery, but for what the merge adds to a mean by tokens and the codec of the
        versions leaves out; of more it is their mean.
        """
        of_all, share = self.versions[version], self.versions[version].shares[self.party]

        def others(merged: Tensor, mine: Tensor) -> Tensor:
            return (merged.double() - share * mine.double()) / (1 - share)

        moments = {
            name: {part: others(value, own.moments[name][part]).clamp_min(0) for part, value in parts.items()}
            for name, parts in of_all.moments.items()
            if "rows" in parts
        }
        pseudo = {name: others(value, own.pseudo_gradient[name]) for name, value in self.merged(version).items()}
        return View(base=own.base, pseudo_gradient=pseudo, moments=moments)


def _copied(moments: Mapping[str, Parts]) -> dict[str, Parts]:
    return {name: {part: value.clone() for part, value in parts.items()} for name, parts in moments.items()}


def readable(run: Path, party: str, silo: str, version: int) -> bool:
    """Whether a party can open a silo's delivery as it lies in the store."""
    try:
        Opened(run, party).delivery(silo, version)
    except RefusedError:
        return False
    return True


class Attacked:
    """One silo of a finished run, and what it really trained on."""

    def __init__(self, config: RunConfig, silo: str, attacker: str) -> None:
        """`attacker` is the silo that attacks."""
        self.config, self.silo, self.attacker = config, silo, attacker
        self.run, self.last = Path(config.directory), config.num_rounds
        self.operator = Opened(self.run, OPERATOR)

    @cached_property
    def can_read(self) -> bool:
        """Whether the attacking silo can open the other's deliveries."""
        return readable(self.run, self.attacker, self.silo, self.last)

    @cached_property
    def _member(self) -> Opened:
        return Opened(self.run, self.attacker)

    def views(self, version: int) -> dict[str, View]:
        """What aggregator and member have of the silo's delivery; of a secure sum the one has the mean of all."""
        own = self.own(version)
        if self.config.outer.secure_sum:
            merged, moments = self.operator.merged(version), self.operator.versions[version].moments
            delivered = View(base=own.base, pseudo_gradient=merged, moments=moments)
        else:
            delivered = self.operator.delivery(self.silo, version)
        who = "aggregator, member" if self.can_read else "aggregator"
        return {who: delivered, SEALED if self.can_read else "member": self._member.subtracted(version, own)}

    def own(self, version: int) -> View:
        """What the attacking silo delivered itself."""
        party = self._member if self.config.outer.secure_sum else self.operator
        return party.delivery(self.attacker, version)

    def mixture(self, silo: str) -> Mixture:
        """A silo's sequences in the order in which it reads them."""
        return open_data(self.config, silo)[0]

    def positions(self, silo: str, version: int) -> range:
        """Which of them a round was trained on."""
        num = self.config.outer.sync_interval_steps * self.config.silos[silo].global_batch_sequences
        return range((version - 1) * num, version * num)

    def counts(self, silo: str, version: int) -> Floats:
        """How often each token of the vocabulary occurred in a round, as input or as target. # (V,)"""
        batch = self.mixture(silo).batch(self.positions(silo, version))
        tokens = torch.cat([batch.inputs, batch.targets], 1).flatten()
        return np.bincount(tokens.numpy(), minlength=vocabulary_size(self.config.tokenizer_file)).astype(np.float64)

    def model(self, parameters: Named) -> nn.Module:
        """The model with these parameters."""
        model, filled = empty_model(self.config)
        for name, value in filled.items():
            value.copy_(parameters[name])
        return model.eval()
