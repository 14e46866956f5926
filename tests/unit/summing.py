"""A secure sum for tests: three silos, what they deliver and tell, and what the plain sum of it is."""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.aggregate import Aggregator, OuterState
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.base import Outgoing
from pretrain.exchange.payload import Tensors, save_tensors
from pretrain.exchange.sealed import fetch_version, read_as_a_member
from pretrain.exchange.store import StoreExchange
from pretrain.merge.terms import shared_moments, summed_moments
from pretrain.outer.digest import digest_tensors
from pretrain.outer.fixed_point import code, scale
from pretrain.outer.moments import SecondMoment
from pretrain.outer.quantize import Parts
from pretrain.sync.masked import MaskedSum
from pretrain.sync.through_store import ThroughStore
from pretrain.trust.ledger import Commit, Manifest, sha256_bytes
from pretrain.trust.members import with_keys
from pretrain.trust.sums import Survivors
from tests.conftest import TinyConfig
from tests.support import CORPORA, TinyText, tiny_silo
from tests.unit.test_aggregate import fragment_names, plus_noise
from tests.unit.test_signed import as_member, begin, manifest_file
from tests.waiting import PATIENCE_SECONDS

TIERS = {"loss": "public", "pseudo_gradient_norm": "member", "seconds_per_step": "public", "tokens": "public"}
SECURE = {"secure_sum": True, "max_share": 1.0, "max_batch_sequences": 16, "lr": 0.5, "momentum": 0.5}
ADAMW: dict[str, Any] = {"outer": {"second_moments": "shared"}}
MUON: dict[str, Any] = {
    "outer": {"second_moments": "shared", "control_variates": 0.8},
    "inner": {"num_steps": 40, "optimizer": "muon"},
}
TOKENS = {"alpha": 100, "beta": 300, "gamma": 200, "delta": 50}


def make(tiny_config: TinyConfig, tiny_text: TinyText, directory: Path, **changes: Any) -> RunConfig:
    """Three silos; four with a corpus twice."""
    silos = {name: tiny_silo(tiny_text, name) for name in CORPORA} | changes.pop("silos", {})
    usual: dict[str, Any] = {"inner": {"num_steps": 40}, "exchange": {"snapshot_versions": 4, "poll_seconds": 0.02}}
    outer = SECURE | changes.pop("outer", {})
    trust = {"directory": "", "metrics": TIERS} | changes.pop("trust", {})
    return with_keys(tiny_config(directory, silos=silos, outer=outer, trust=trust, **usual | changes), make=True)


def shapes_of(state: OuterState) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.parameters.items()}


def gradients(config: RunConfig, state: OuterState, names: list[str], silo: str) -> dict[str, Parts]:
    """What a silo tells of its gradients, before it is masked: of rows of very different size."""
    found, generator = {}, torch.Generator().manual_seed(ord(silo[0]))
    for name, moment in shared_moments(config, sorted(names), shapes_of(state)).items():
        value = 0.01 * torch.randn(moment.shape, generator=generator)
        value[0] *= 1e-6
        found[name] = moment.encode(value.square() if isinstance(moment, SecondMoment) else value)
    return found


class Silo:
    """One silo's exchange, and what its loop makes of it."""

    def __init__(self, config: RunConfig, name: str) -> None:
        self.config, self.name = config, name
        self.through = ThroughStore(config, name)
        assert self.through._store.read_contract()
        self.sum.begin()

    @property
    def sum(self) -> MaskedSum:
        assert self.through._sum
        return self.through._sum

    def local(self, state: OuterState) -> dict[str, torch.Tensor]:
        return plus_noise(state, ord(self.name[0]))

    def told(self, state: OuterState, names: list[str]) -> dict[str, Parts]:
        return gradients(self.config, state, names, self.name)

    def coded(self, state: OuterState) -> Outgoing:
        """As SiloSync._code."""
        version, store = state.version + 1, Path(self.config.store_url)
        names = fragment_names(self.config, state, version)
        local, tokens = self.local(state), TOKENS[self.name]
        told = self.told(state, names)
        masked = self.through.masked(version, state.parameters, {name: local[name] for name in names}, told, tokens)
        assert masked
        file = self.config.silo_directory(self.name) / "outbox" / f"{version:06d}.safetensors"
        fragment = self.config.schedule.fragment(version)
        payload = save_tensors(masked[0], file, fragment=fragment, moments=masked[1])
        manifest = Manifest(
            contract_sha256=self.through.terms_sha256(version),
            silo=self.name,
            version=version,
            base_version=self.config.schedule.base(version),
            base_digest=digest_tensors((name, state.parameters[name]) for name in names),
            cosigned=sha256_bytes((store / f"global/{version - 1:06d}/commit.json").read_bytes()),
            codec="sum32",
            payloads=[self.through.sealed(payload, file, version)],
            tokens=tokens,
            steps=self.config.schedule.steps(version),
            tokens_total=tokens * version,
            metrics={"loss": 1.0, "pseudo_gradient_norm": 1.0},
        )
        return Outgoing(manifest, file)

    def deliver(self, state: OuterState) -> Outgoing:
        sent = self.coded(state)
        self.through.deliver(sent)
        return sent


def published(config: RunConfig, version: int) -> dict[str, Parts]:
    """The moments that a version tells its silos."""
    store, file = StoreExchange(config.store_url), Path(config.directory) / "published"
    assert store.read_contract()
    read_as_a_member(store, config)
    fetch_version(store, version, store.read_commit(version).payloads[0], file)
    return {name: dict(parts) for name, parts in Tensors(file).moments.items()}


def advance(config: RunConfig, aggregator: Aggregator, state: OuterState, *, without: tuple[str, ...] = ()) -> Commit:
    """One version: all silos deliver, and answer while they wait for the commit."""
    silos = [Silo(config, name) for name in config.full_roster if name not in without]
    sent = {silo: silo.deliver(state) for silo in silos}
    with ThreadPoolExecutor(len(silos)) as pool:
        waiting = [pool.submit(silo.through._wait_for_commit, state.version + 1, sent[silo]) for silo in silos]
        try:
            deliveries = aggregator.collect(state)
            aggregator.commit(state, deliveries, aggregator.merge(state, deliveries))
            aggregator.finish()
            for one in waiting:
                one.result(PATIENCE_SECONDS)
        finally:
            for silo in silos:
                silo.through.close("")
    return Commit.from_bytes((Path(config.store_url) / f"global/{state.version:06d}/commit.json").read_bytes())


def plain_moments(config: RunConfig, before: OuterState, silos: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """What version 1 tells of gradients: the plain sum of whole numbers of 32 or 64 bits."""
    names, most, found = fragment_names(config, before, 1), config.schedule.steps(1) * 16 * config.sequence_tokens, {}
    told = {silo: gradients(config, before, names, silo) for silo in silos}
    for name, moment in summed_moments(config, names, shapes_of(before)).items():
        parts, is_second = {}, isinstance(moment.moment, SecondMoment)
        for part, (dtype, size) in moment.layout.items():
            factor = scale(len(config.full_roster), moment.largest(part), 8 * dtype.itemsize)
            total, share = torch.zeros(size, dtype=torch.int64), sum(TOKENS[silo] for silo in silos) / most
            for silo in silos:
                value = told[silo][name][part] if is_second else moment.moment.decode(told[silo][name])
                total += (value.double() * (factor * (TOKENS[silo] / most))).round().long()
            parts[part] = (total.double() * (1 / (factor * share))).float()
        found[name] = parts if is_second else moment.moment.encode(parts["values"])
    return found


def plain_step(config: RunConfig, before: OuterState, silos: list[str]) -> dict[str, torch.Tensor]:
    """What the outer step of SGD with momentum makes of the plain sum of whole numbers: version 1."""
    factor, found = scale(len(config.full_roster), 1.0), {}
    most = config.schedule.steps(1) * 16 * config.sequence_tokens
    for name in fragment_names(config, before, 1):
        total = np.zeros(before.parameters[name].numel(), np.int64)
        for silo in silos:
            local = plus_noise(before, ord(silo[0]))[name]
            [one] = code([(before.parameters[name], local)], factor * (TOKENS[silo] / most), 1.0)
            total += one
        mean = torch.from_numpy(total).double() * (most / sum(TOKENS[silo] for silo in silos) / factor)
        velocity = mean.view(before.parameters[name].shape)
        found[name] = (before.parameters[name].double() - 0.5 * (velocity + 0.5 * velocity)).float()
    return found


def four(tiny_config: TinyConfig, tiny_text: TinyText, directory: Path, **changes: Any) -> RunConfig:
    """Four silos, of which three are enough."""
    rules = {"quorum": 3, "deadline_floor_seconds": 0.0, "deadline_ceiling_seconds": 0.3}
    silos = {"delta": tiny_silo(tiny_text, "alpha")}
    return make(tiny_config, tiny_text, directory, silos=silos, membership=rules, **changes)


def streaming(told: dict[str, Any]) -> dict[str, Any]:
    """The same in two fragments, with overlap; of nothing, nothing."""
    return {**told, "outer": told["outer"] | {"num_fragments": 2, "overlap_steps": 1}} if told else {}


def summed(aggregator: Aggregator, state: OuterState) -> None:
    deliveries = aggregator.collect(state)
    aggregator.commit(state, deliveries, aggregator.merge(state, deliveries))
    aggregator.finish()


def commit_bytes(config: RunConfig, version: int) -> bytes:
    return (Path(config.store_url) / f"global/{version:06d}/commit.json").read_bytes()


class Asked:
    """Version 1 of three silos that have delivered, and were asked to answer."""

    def __init__(self, config: RunConfig, **kinds: type[Silo]) -> None:
        self.config = config
        self.aggregator, self.state = begin(config)
        self.silos = {name: kinds.get(name, Silo)(config, name) for name in config.full_roster}
        self.sent = {name: silo.deliver(self.state) for name, silo in self.silos.items()}
        merger = self.aggregator._merger
        self.unmasker = merger.unmasker
        assert self.unmasker
        verify = functools.partial(merger.verify, state=self.state, version=1)
        self.deliveries = [verify(name, manifest_file(config, name, 1).read_bytes()) for name in self.silos]
        self.unmasker.decide(1, self.deliveries, lambda: None)

    def ask(self, **changes: Any) -> None:
        """Another set, signed by the operator in the place of the one that stands."""
        file = Path(self.config.store_url) / "sums/000001.json"
        record = dataclasses.replace(Survivors.from_bytes(file.read_bytes()), **changes)
        file.write_bytes(as_member(self.config, OPERATOR).members.sign(record).to_bytes())

    def noted(self, silo: str) -> list[Path]:
        return list(self.config.silo_directory(silo).glob("answered-*.txt"))

    def answer(self, silo: str) -> None:
        through = ThroughStore(self.config, silo)  # started again
        through._store.read_contract()
        assert through._sum
        try:
            through._sum.answer(1)
        finally:
            through.close("")

    def close(self) -> None:
        for silo in self.silos.values():
            silo.through.close("")
        self.aggregator.stop()
