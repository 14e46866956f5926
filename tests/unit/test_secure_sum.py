"""A secure sum through a store: the real aggregator in this process, and the silos' real exchanges."""

import copy
import dataclasses
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.aggregate import Aggregator, OuterState
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.base import Outgoing
from pretrain.exchange.payload import Tensors, save_tensors
from pretrain.exchange.rollback import roll_back_store
from pretrain.exchange.sealed import fetch_version, read_as_a_member
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.sums import answer_path, shares_path
from pretrain.federation.bundle import BundleVerifier
from pretrain.federation.contract import Agreed, rotate
from pretrain.federation.exit import write_bundle
from pretrain.federation.relay import Relay
from pretrain.federation.revoke import Revoker
from pretrain.merge.terms import sum_share, summed_moments
from pretrain.outer.digest import digest_tensors
from pretrain.outer.fixed_point import code, scale
from pretrain.outer.moments import MeanGradient, SecondMoment
from pretrain.outer.quantize import Parts
from pretrain.sync.masked import MaskedSum
from pretrain.sync.through_store import ThroughStore
from pretrain.trust.amendment import amended
from pretrain.trust.ledger import Commit, Manifest, RefusedError, sha256_bytes
from pretrain.trust.members import with_keys
from pretrain.trust.policy import Policy
from pretrain.trust.sums import Answer, Shares, Survivors
from tests.conftest import TinyConfig
from tests.support import CORPORA, TinyText, one_line_error, tiny_silo
from tests.unit.federation.test_verify import verified
from tests.unit.test_aggregate import fragment_names, plus_noise, start
from tests.unit.test_aggregate_restart import assert_same_state
from tests.unit.test_signed import as_member, begin, manifest_file
from tests.waiting import PATIENCE_SECONDS, wait_for

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


@pytest.fixture
def config(tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path) -> RunConfig:
    return make(tiny_config, tiny_text, tmp_path)


def shapes_of(state: OuterState) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.parameters.items()}


def gradients(config: RunConfig, state: OuterState, names: list[str], silo: str) -> dict[str, Parts]:
    """What a silo would tell of its gradients, before it is rounded: of rows of very different size."""
    agreed, generator = (
        summed_moments(config, sorted(names), shapes_of(state)),
        torch.Generator().manual_seed(ord(silo[0])),
    )
    found = {}
    for name, moment in agreed.items():
        value = 0.01 * torch.randn(moment.moment.shape, generator=generator)
        value[0] *= 1e-6
        is_second = isinstance(moment.moment, SecondMoment)
        found[name] = moment.encode(value.square() if is_second else value)
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
        parts = {}
        for part, (dtype, size) in moment.layout.items():
            factor = scale(len(config.full_roster), moment.largest(part), 8 * dtype.itemsize)
            total, share = torch.zeros(size, dtype=torch.int64), sum(TOKENS[silo] for silo in silos) / most
            for silo in silos:
                total += (told[silo][name][part].double() * (factor * (TOKENS[silo] / most))).round().long()
            parts[part] = (total.double() * (1 / (factor * share))).float()
        is_second = isinstance(moment.moment, SecondMoment)
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


@pytest.mark.parametrize(
    ("seal", "told"),
    [(False, {}), (True, {}), (False, ADAMW), (True, MUON)],
    ids=["plain", "sealed", "AdamW's moments", "Muon's gradients, sealed"],
)
def test_a_version_is_the_plain_sum_to_the_last_bit_and_goes_on_after_a_restart(
    seal: bool, told: dict[str, Any], tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    config = make(tiny_config, tiny_text, tmp_path, trust={"seal": seal}, **copy.deepcopy(told))
    aggregator, state = begin(config)
    before = dataclasses.replace(state, parameters={name: value.clone() for name, value in state.parameters.items()})
    wanted = plain_step(config, before, ["alpha", "beta", "gamma"])
    commit = advance(config, aggregator, state)
    assert all(torch.equal(state.parameters[name], value) for name, value in wanted.items())
    moments = published(config, 1)
    assert moments.keys() == (wanted.keys() if told else set())
    for name, parts in plain_moments(config, before, ["alpha", "beta", "gamma"]).items():
        assert all(torch.equal(moments[name][part], value) for part, value in parts.items()), name
    assert [(c.silo, c.weight) for c in commit.contributors] == [("alpha", 100), ("beta", 300), ("gamma", 200)]
    assert commit.divisor == 600
    assert commit.metrics.keys() == {"update_norm"}
    advance(config, aggregator, state)
    aggregator.stop()
    again = start(config)[1]  # from version 0 and what was delivered and answered since
    assert_same_state(again, state)


# ---- what is refused before anything starts

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a collective": (
        {"exchange": {"kind": "collective", "url": "tcp://127.0.0.1:29500"}},
        "exchange.kind: 'collective' given; allowed: store with outer.secure_sum: silos of a collective merge each",
    ),
    "another merge": (
        {"outer": {"merge": "median"}},
        "outer.merge: 'median' given; allowed: mean with outer.secure_sum: all other ways look at each delivery",
    ),
    "a codec": (
        {"outer": {"codec": "int4"}},
        "outer.codec: 'int4' given; allowed: fp32 with outer.secure_sum: a sum takes one scale for all",
    ),
    "a largest share": (
        {"outer": {"max_share": 0.8}},
        "outer.max_share: 0.8 given; allowed: 1.0 with outer.secure_sum: a silo weighs its delivery before it knows",
    ),
    "a floor": (
        {"outer": {"quality_floor": 1.5}},
        "outer.quality_floor: 1.5 given; allowed: null with outer.secure_sum: no delivery can be left out",
    ),
    "moments without a bound": (
        {"outer": {"second_moments": "shared"}, "inner": {"clip_norm": 0.0}},
        "inner.clip_norm: 0.0 given; allowed: above 0 with outer.secure_sum and shared moments: it bounds what is told",
    ),
    "mean gradients without one": (
        {"outer": {"control_variates": 0.5}, "inner": {"optimizer": "muon", "clip_norm": 0.0}},
        "inner.clip_norm: 0.0 given; allowed: above 0 with outer.secure_sum and shared moments",
    ),
    "moments in the merge": (
        {"outer": {"second_moments": "shared", "merge": "importance"}},
        "outer.merge: 'importance' given; allowed: mean with outer.secure_sum",
    ),
    "late ones": (
        {"membership": {"quorum": 3, "stale_weight": 0.5}},
        "membership.stale_weight: 0.5 given; allowed: 0.0 with outer.secure_sum: masks are of one version",
    ),
    "a sample": ({"membership": {"sample": 3}}, "membership.sample: 3 given; allowed: null with outer.secure_sum"),
    "speed": ({"membership": {"steps": "speed"}}, "membership.steps: 'speed' given; allowed: equal with"),
    "norms": (
        {"membership": {"max_norm_ratio": 4.0}, "trust": {"metrics": TIERS | {"pseudo_gradient_norm": "public"}}},
        "membership.max_norm_ratio: 4.0 given; allowed: null with outer.secure_sum: nobody knows how long a delivery",
    ),
    "a norm that is told": (
        {"trust": {"metrics": TIERS | {"pseudo_gradient_norm": "public"}}},
        "trust.metrics.pseudo_gradient_norm: 'public' given; allowed: member with outer.secure_sum: it tells of a",
    ),
    "no largest batch": (
        {"outer": {"max_batch_sequences": None}},
        "outer.max_batch_sequences: None given; allowed: a number with outer.secure_sum: weights are shares of the",
    ),
    "two silos": ({"silos": {"gamma": None}}, "roster: 'alpha, beta' given; allowed: 3 to 100 silos with"),
    "a small quorum": (
        {"membership": {"quorum": 2}},
        "membership.quorum: 2 given; allowed: null, or 3 or more of 3 with outer.secure_sum, so that no two sets of",
    ),
    "a few who amend": (
        {"trust": {"amend": "2"}},
        "trust.amend: '2' given; allowed: all, or 3 or more with outer.secure_sum: fewer could put keys of their own",
    ),
    "no keys": (
        {"trust": {"keys": {}}, "roster": ["alpha", "beta", "gamma", "far"]},
        "outer.secure_sum: True given; allowed: false without trust.keys: it is the members' keys that masks follow",
    ),
    "no range": ({"outer": {"sum_range": 0}}, "outer.sum_range: 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_with_the_reason(
    what: str, tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    changes, message = REFUSED[what]
    assert message in one_line_error(make, tiny_config, tiny_text, tmp_path, **copy.deepcopy(changes))
    assert not (tmp_path / "run").exists()


def test_what_has_no_meaning_for_a_sum_is_refused(config: RunConfig, tmp_path: Path) -> None:
    aggregator, state = begin(config)
    advance(config, aggregator, state)
    aggregator.stop()
    store = StoreExchange(config.store_url)
    store.read_contract()
    assert "no silo answers twice for a version" in one_line_error(roll_back_store, store, to=0)
    assert "nobody has one silo's part of a sum" in one_line_error(Revoker, config, store, tmp_path)
    assert "a relay does not carry" in one_line_error(Relay, config, str(tmp_path / "there"))
    settings: dict[str, float | None] = {"outer.weight_power": 0.5}
    assert "silos compute with it" in one_line_error(amended, config, settings, {})


def test_a_site_can_demand_a_sum(config: RunConfig, tiny_config: TinyConfig, tmp_path: Path) -> None:
    Policy(codecs=["sum32"], least_silos=3).check_config(config)
    message = one_line_error(Policy(codecs=["sum32"], file="here").check_config, tiny_config(tmp_path / "plain"))
    assert "its codecs is sum32, and the contract's outer.codec is fp32" in message


def test_what_would_leave_the_range_stops_the_silo_before_it_wraps(config: RunConfig) -> None:
    aggregator, state = begin(config)
    silo = Silo(config, "alpha")
    name = fragment_names(config, state, 1)[0]
    local = {name: state.parameters[name] + 1.5}
    message = one_line_error(silo.through.masked, 1, state.parameters, local, {}, 100)
    assert message.startswith(f"outer.sum_range: 1 given; silo alpha: version 1: {name} has a change of 1.5")
    assert not list(config.silo_directory("alpha").rglob("*.safetensors"))
    aggregator.stop()


def test_what_a_silo_has_told_is_known_to_it_again_without_its_masks(
    tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    """As it counts in the sum, rounding and all, so that corrections of all silos add up to nothing."""
    config = make(tiny_config, tiny_text, tmp_path, **copy.deepcopy(MUON))
    aggregator, state = begin(config)
    silo = Silo(config, "alpha")
    sent, again = silo.coded(state), Silo(config, "alpha")  # started again
    told, share = again.through.told(sent, state.parameters), sum_share(config, 1, TOKENS["alpha"])
    before = gradients(config, state, [*state.parameters], "alpha")
    for name, moment in summed_moments(config, before, shapes_of(state)).items():
        wanted = moment.values(moment.whole(before[name], share), share)
        assert told[name].keys() == wanted.keys()
        for part, value in wanted.items():
            assert torch.equal(told[name][part], value)
            masked = sent.coded.moments[name][part]
            assert (masked != moment.whole(before[name], share)[part]).all()
    for one in (silo, again):
        one.through.close("")
    aggregator.stop()


@pytest.mark.parametrize("told", [ADAMW, MUON], ids=["AdamW", "Muon"])
def test_what_clipped_gradients_cannot_make_stops_the_silo_before_it_wraps(
    told: dict[str, Any], tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    config = make(tiny_config, tiny_text, tmp_path, **copy.deepcopy(told))
    aggregator, state = begin(config)
    silo, moments = Silo(config, "alpha"), gradients(config, state, [*state.parameters], "alpha")
    agreed = summed_moments(config, moments, shapes_of(state))
    for kind, part in ((SecondMoment, "rows"), *([(MeanGradient, "values")] if told is MUON else [])):
        name = next(n for n, one in agreed.items() if isinstance(one.moment, kind) and part in one.layout)
        most = agreed[name].largest(part)
        bad = {key: value.clone() for key, value in moments[name].items()}
        bad[part].view(-1)[3] = 1.5 * most
        message = one_line_error(
            silo.through.masked, 1, state.parameters, silo.local(state), moments | {name: bad}, 100
        )
        assert message == (
            f"inner.clip_norm: 1 given; silo alpha: version 1: what is told of the gradients of {name} ({part}) has "
            f"{1.5 * most:g}; allowed: up to {most:g}, for which a sum of gradients that are clipped so has room; "
            "nothing was sent"
        )
    assert not list(config.silo_directory("alpha").rglob("*.safetensors"))
    silo.through.close("")
    aggregator.stop()


def test_a_sum_of_moments_that_none_can_be_ends_the_aggregator_in_one_line(
    tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    """Nobody knows whose part it is; silos would be told second moments below zero."""

    class Liar(Silo):
        def told(self, state: OuterState, names: list[str]) -> dict[str, Parts]:
            honest = super().told(state, names)
            return {name: {part: -3 * value for part, value in parts.items()} for name, parts in honest.items()}

    config = make(tiny_config, tiny_text, tmp_path, **copy.deepcopy(ADAMW))
    asked = Asked(config, beta=Liar)
    for silo in asked.silos:
        asked.answer(silo)
    said = "version 1: what alpha, beta, gamma tell of the gradients of .* is no sum of what they may tell: its .* add "
    with pytest.raises(RefusedError, match=said):
        asked.aggregator.merge(asked.state, asked.deliveries)
    asked.close()


# ---- who is missing, and who lies


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


@pytest.mark.parametrize("told", [{}, MUON], ids=["plain", "streaming, moments told"])
def test_a_silo_may_be_missing_at_any_phase(
    told: dict[str, Any], tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    config = four(tiny_config, tiny_text, tmp_path, **streaming(told))
    aggregator, state = begin(config)
    for silo in config.full_roster:
        as_member(config, silo).announce(silo, left=False, version=0)
    before = dataclasses.replace(state, parameters={name: value.clone() for name, value in state.parameters.items()})
    wanted = plain_step(config, before, ["alpha", "beta", "delta"])
    silos = {name: Silo(config, name) for name in config.full_roster}
    sent = {name: silos[name].deliver(state) for name in ("alpha", "beta", "delta")}  # gamma never does
    with ThreadPoolExecutor(1) as pool:
        collecting = pool.submit(summed, aggregator, state)
        wait_for((Path(config.store_url) / "sums/000001.json").exists)
        late = silos["gamma"].deliver(before)  # it shares masks with all of them, and comes too late
        for name in ("gamma", "alpha", "delta"):  # and beta has died since
            silos[name].sum.answer(1)
        collecting.result(PATIENCE_SECONDS)
    assert late.manifest.silo == "gamma"
    assert sent.keys() == {c.silo for c in Commit.from_bytes(commit_bytes(config, 1)).contributors}
    assert all(torch.equal(state.parameters[name], value) for name, value in wanted.items())
    moments, plain = published(config, 1), plain_moments(config, before, ["alpha", "beta", "delta"])
    assert moments.keys() == plain.keys() == (wanted.keys() if told else set())
    assert all(torch.equal(moments[name][part], value) for name, of in plain.items() for part, value in of.items())
    for silo in silos.values():
        silo.through.close("")
    for _ in range(3):
        advance(config, aggregator, state, without=("beta",))
    aggregator.stop()
    assert_same_state(start(config)[1], state)
    found = verified(config, tmp_path / "scratch")
    assert (found.findings, found.merged) == ([], [1, 2, 3, 4])


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


@pytest.fixture
def asked(config: RunConfig) -> Iterator[Asked]:
    found = Asked(config)
    yield found
    found.close()


def test_below_the_threshold_there_is_no_sum(asked: Asked) -> None:
    for silo in ("alpha", "beta"):
        asked.answer(silo)
    with pytest.raises(RefusedError, match="version 1: 2 silos have answered; it takes 3 of them"):
        asked.aggregator.merge(asked.state, asked.deliveries)
    asked.answer("gamma")
    assert asked.aggregator.merge(asked.state, asked.deliveries).weights == [100, 300, 200]


def test_a_silo_answers_for_one_set_alone(asked: Asked) -> None:
    asked.answer("alpha")
    first = asked.noted("alpha")[0].read_text()
    asked.answer("alpha")  # the same again: killed before it was heard
    file = manifest_file(asked.config, "gamma", 1)
    other = dataclasses.replace(Manifest.from_bytes(file.read_bytes()), metrics={"loss": 2.0})
    file.write_bytes(as_member(asked.config, "gamma").members.sign(other).to_bytes())
    manifests = [sha256_bytes(manifest_file(asked.config, name, 1).read_bytes()) for name in asked.silos]
    asked.ask(manifests=manifests)
    message = one_line_error(asked.answer, "alpha")
    assert "silo alpha has answered for version 1, and is asked for another set of deliveries" in message
    assert asked.noted("alpha")[0].read_text() == first
    asked.answer("beta")  # which had not answered


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "two silos": ({"silos": ["alpha", "beta"], "manifests": ["0" * 64] * 2}, "has 2 silos; allowed: 3 or more"),
    "a silo twice": (
        {"silos": ["alpha", "beta", "beta"], "manifests": ["0" * 64] * 3},
        "does not name silos of this run, each once",
    ),
    "a stranger": (
        {"silos": ["alpha", "beta", "sybil"], "manifests": ["0" * 64] * 3},
        "does not name silos of this run, each once",
    ),
    "what nobody delivered": ({"manifests": ["0" * 64] * 3}, "is not the one that is asked about"),
}


def test_an_aggregator_that_asks_for_what_is_no_sum_of_all_is_refused(asked: Asked, tmp_path: Path) -> None:
    honest = Survivors.from_bytes((Path(asked.config.store_url) / "sums/000001.json").read_bytes())
    for lie, (changes, message) in LIES.items():
        asked.ask(**{"silos": honest.silos, "manifests": honest.manifests} | changes)
        said = one_line_error(asked.answer, "alpha")
        assert said.startswith("silo alpha: version 1 was not answered: "), lie
        assert message in said, lie
        assert not asked.noted("alpha"), lie
    asked.ask(silos=honest.silos, manifests=honest.manifests)
    (tmp_path / "policy.yaml").write_text("least_silos: 4\n")
    asked.config.trust.policy = str(tmp_path / "policy.yaml")
    assert "a sum of 3 silos was asked for; allowed: 4 or more" in one_line_error(asked.answer, "alpha")


def test_a_share_that_is_not_what_was_dealt_is_found(asked: Asked) -> None:
    for silo in asked.silos:
        asked.answer(silo)
    file = Path(asked.config.store_url) / answer_path("beta", 1)
    answer = Answer.from_bytes(file.read_bytes())
    lie = dataclasses.replace(answer, shares=[answer.shares[1], *answer.shares[1:]])
    file.write_bytes(as_member(asked.config, "beta").members.sign(lie).to_bytes())
    with pytest.raises(RefusedError, match="the shares of silo alpha's mask that alpha, beta, gamma have laid open"):
        asked.aggregator.merge(asked.state, asked.deliveries)


def test_a_delivery_without_its_shares_is_refused_and_comes_again(asked: Asked) -> None:
    verify = functools.partial(asked.aggregator._merger.verify, state=asked.state, version=1)
    data = manifest_file(asked.config, "beta", 1).read_bytes()
    file = Path(asked.config.store_url) / shares_path("beta", 1)
    there = file.read_bytes()
    file.unlink()
    with pytest.raises(RefusedError, match=r"silos/beta/000001/shares.json is missing"):
        verify("beta", data)
    shares = Shares.from_bytes(there)
    for changed, reason in (
        (dataclasses.replace(shares, blake3="0" * 64), "its blake3 is 000000"),
        (dataclasses.replace(shares, sealed=shares.sealed[:2]), "has not just one row for each silo"),
    ):
        file.write_bytes(as_member(asked.config, "beta").members.sign(changed).to_bytes())
        with pytest.raises(RefusedError, match=reason):
            verify("beta", data)
    manifest_file(asked.config, "beta", 1).unlink()  # as the aggregator does when it refuses
    asked.silos["beta"].through.deliver(asked.sent["beta"])
    assert file.read_bytes() == there
    assert verify("beta", data).manifest.silo == "beta"


def test_killed_and_coded_again_it_is_the_same_and_with_other_values_another_mask(asked: Asked) -> None:
    silo, file = asked.silos["alpha"], asked.sent["alpha"].file
    payload, shares = file.read_bytes(), file.with_suffix(".shares").read_bytes()
    assert silo.coded(asked.state).manifest == asked.sent["alpha"].manifest
    assert (file.read_bytes(), file.with_suffix(".shares").read_bytes()) == (payload, shares)
    name = fragment_names(asked.config, asked.state, 1)[0]
    first = Tensors(file).parts(name)["values"].clone()
    local = silo.local(asked.state)
    local[name].view(-1)[0] += 1e-3
    masked = silo.through.masked(1, asked.state.parameters, local, {}, 100)
    assert masked
    assert (masked[0][name]["values"].view(-1)[1:] == first.view(-1)[1:]).float().mean() < 1e-3


def test_masks_follow_the_keys_of_their_version(config: RunConfig, tmp_path: Path) -> None:
    aggregator, state = begin(config)
    keys = Path(config.directory) / "keys"
    for member in ("alpha", OPERATOR):
        rotate(Agreed.at(config.store_url), member, keys, 2)
    for _ in range(3):
        advance(config, aggregator, state)
    aggregator.stop()
    found = verified(config, tmp_path / "scratch")
    assert (found.findings, found.merged, found.num_amendments) == ([], [1, 2, 3], 2)


def test_a_member_takes_along_what_its_versions_are_made_of(config: RunConfig, tmp_path: Path) -> None:
    aggregator, state = begin(config)
    advance(config, aggregator, state)
    aggregator.stop()
    write_bundle(config, "alpha", tmp_path / "bundle", tell=lambda line: None)
    (tmp_path / "scratch").mkdir()
    found = BundleVerifier(tmp_path / "bundle", tmp_path / "scratch", tell=lambda line: None).verify()
    assert found.store
    assert (found.findings, found.store.findings, found.store.merged) == ([], [], [1])


def test_verify_finds_what_was_changed_afterwards(config: RunConfig, tmp_path: Path) -> None:
    aggregator, state = begin(config)
    advance(config, aggregator, state)
    aggregator.stop()
    store = Path(config.store_url)
    found = verified(config, tmp_path / "scratch")
    assert (found.findings, found.merged) == ([], [1])
    file = store / "sums/000001.json"
    there = file.read_bytes()
    file.unlink()
    said = {(one.version, one.name): one.what for one in verified(config, tmp_path / "scratch").findings}
    assert said[1, "sums/000001.json"] == "its silos were not asked about just those deliveries that its commit names"
    file.write_bytes(there)
    (store / answer_path("beta", 1)).write_bytes((store / answer_path("alpha", 1)).read_bytes())
    (store / "sums/000009.json").write_bytes(there)
    names = {one.name for one in verified(config, tmp_path / "scratch").findings}
    assert {answer_path("beta", 1), "sums/000009.json"} <= names
