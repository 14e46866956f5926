"""The floor of quality: the real aggregator in this process, deliveries with losses that are written by hand."""

import dataclasses
import io
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launch.show.status import print_status
from launch.show.status_reader import store_status
from pretrain.aggregate import OuterState
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.store import StoreExchange
from pretrain.federation.revoke import Revoker
from pretrain.federation.verify import StoreVerifier
from pretrain.sync.through_store import ThroughStore
from pretrain.trust.ledger import Commit, Manifest
from pretrain.trust.members import with_keys
from pretrain.trust.quality import below
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.test_aggregate import Hand, one_version, start, times
from tests.unit.test_aggregate_restart import assert_same_state
from tests.unit.test_signed import as_member, begin, manifest_file

GAMMA = {"gamma": {}}
LOSSES = {"alpha": 3.0, "beta": 3.3, "gamma": 5.2}


@pytest.fixture
def make(tiny_config: TinyConfig, tmp_path: Path) -> Callable[..., RunConfig]:
    """A configuration of three silos and four versions, with all keys in the run directory."""

    def make(floor: float | None = 1.5, name: str = "", **changes: Any) -> RunConfig:
        usual = {"inner": {"num_steps": 16}, "exchange": {"snapshot_versions": 4}, "trust": {"directory": ""}}
        outer = {"lr": 0.5, "quality_floor": floor} | changes.pop("outer", {})
        return with_keys(tiny_config(tmp_path / name, silos=GAMMA, outer=outer, **usual | changes), make=True)

    return make


def deliver(config: RunConfig, state: OuterState, losses: dict[str, float], *, gammas: float = 4.0) -> None:
    """All silos' deliveries, signed, for the terms that hold at the version."""
    version = state.version + 1
    for factor, (silo, loss) in enumerate(losses.items(), start=2):
        hand = Hand(manifest=lambda manifest, loss=loss: manifest.update(metrics={"loss": loss}))
        hand.deliver(config, silo, state, times(state, gammas if silo == "gamma" else factor))
        member, file = as_member(config, silo), manifest_file(config, silo, version)
        manifest = Manifest.from_bytes(file.read_bytes())
        manifest = dataclasses.replace(manifest, contract_sha256=member.terms_sha256(version))
        file.write_bytes(member.members.sign(manifest).to_bytes())


def found(config: RunConfig, scratch: Path) -> list[tuple[int | None, str]]:
    scratch.mkdir()
    findings = StoreVerifier(StoreExchange(config.store_url), scratch, tell=lambda line: None).verify().findings
    return [(finding.version, finding.what) for finding in findings]


def waiting(config: RunConfig, silo: str) -> ThroughStore:
    """A silo that has been here before."""
    exchange = ThroughStore(config, silo)
    exchange._store.read_contract()
    exchange._delivered.begin(9)
    return exchange


WORDS = "version 1: the delivery of silo gamma does not count: its loss is 5.2, too far above the others; counted are"


def test_who_is_below_the_floor_has_weight_0_and_goes_on(
    make: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it sent: the parameters are those without it. All can tell why, from commit, ledger and status."""
    digests = []
    for name, gammas in (("one", 4.0), ("other", -50.0)):
        config = make(name=name)
        aggregator, state = begin(config)
        deliver(config, state, LOSSES, gammas=gammas)
        one_version(aggregator, state)
        digests.append(state.parameters_digest)
    assert digests[0] == digests[1]
    commit = as_member(config, "beta").read_commit(1)
    assert [(one.silo, one.weight) for one in commit.contributors] == [("alpha", 100), ("beta", 100), ("gamma", 0)]
    assert commit.divisor == 200
    assert {key: value for key, value in commit.metrics.items() if "loss" in key} == {
        f"loss/{silo}": loss for silo, loss in LOSSES.items()
    }
    assert capsys.readouterr().out.count(f"{WORDS} 3 to 3.3\n") == 2
    assert (
        f'"not_counted": {{"gamma": "{WORDS.partition("count: ")[2]} 3 to 3.3"}}'
        in (Path(config.directory) / "metrics.jsonl").read_text()
    )
    told = store_status(config.store_url)
    assert [(one.num_commits, one.tokens_contributed) for one in told.silos.values()] == [(1, 100), (1, 100), (1, 0)]
    text = io.StringIO()
    print_status(config.store_url, console=Console(file=text, width=200))
    assert f"silo gamma did not count in {WORDS.replace('the delivery of silo gamma does not count: ', '')}" in (
        text.getvalue()
    )
    gamma = waiting(config, "gamma")
    assert gamma.receive(1, None, state.parameters).commit == commit  # it goes on
    aggregator, state = start(config)
    assert state.parameters_digest == digests[0], "replayed"
    deliver(config, state, {"alpha": 3.0, "beta": 3.3, "gamma": 3.4})
    one_version(aggregator, state)
    assert [one.weight for one in as_member(config, "beta").read_commit(2).contributors] == [100] * 3
    gamma.receive(2, None, state.parameters)
    assert found(config, tmp_path / "scratch") == []
    (tmp_path / "revoke").mkdir()
    revoker = Revoker(config, as_member(config, "alpha"), tmp_path / "revoke", tell=lambda line: None)
    first = revoker.revoke("gamma", 1, 1).record.parameters_digest
    assert first == digests[0], "without gamma, version 1 is what it is with it"
    assert_same_state(start(config)[1], state)


def resigned(config: RunConfig, version: int, **changes: Any) -> Commit:
    """The operator's commit in place of the one that was there."""
    operator, name = as_member(config, OPERATOR), f"global/{version:06d}/commit.json"
    commit = operator.members.sign(dataclasses.replace(operator.read_commit(version), **changes))
    operator.objects.delete(name)
    operator.objects.write(name, commit.to_bytes())
    return commit


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ([100, 100, 100], "weight 100, where its loss is 5.2, more than outer.quality_floor=1.5 times 3.3, the median"),
        ([100, 0, 0], "weight 0, where its loss is 3.3, and it is not below the floor"),
    ],
)
def test_a_commit_against_the_floor_is_refused_by_name(
    weights: list[int], reason: str, make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """By every silo and by atoll verify, from the commit alone."""
    config = make()
    aggregator, state = begin(config)
    deliver(config, state, LOSSES)
    one_version(aggregator, state)
    parts = as_member(config, OPERATOR).read_commit(1).contributors
    changed = [dataclasses.replace(one, weight=weight) for one, weight in zip(parts, weights, strict=True)]
    resigned(config, 1, contributors=changed, divisor=sum(weights))
    silo = "gamma" if weights[2] else "beta"
    line = one_line_error(waiting(config, "alpha").receive, 1, None, state.parameters)
    expected = f"commit 1 gives silo {silo} {reason}"
    assert line.startswith(f"silo alpha: version 1 in the store cannot be used: {expected}")
    assert any(what.startswith(expected) for _, what in found(config, tmp_path / "scratch"))


def test_a_loss_that_no_manifest_tells_is_found(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The operator has gamma count by another loss than gamma's own: gamma, a few others, and atoll verify say so."""
    config = make()
    aggregator, state = begin(config)
    gamma = waiting(config, "gamma")
    for version in (1, 2):
        deliver(config, state, LOSSES)
        one_version(aggregator, state)
        if version == 2:
            told = as_member(config, OPERATOR).read_commit(2).metrics
            resigned(config, 2, metrics=told | {"loss/gamma": 7.0})
        gamma.receive(version, None, state.parameters)
    line = one_line_error(gamma.receive, 3, None, state.parameters)
    expected = "commit 2 says that the loss of silo gamma is 7.0; its manifest, 5.2"
    assert line == f"silo gamma: version 2 in the store cannot be used: {expected}"
    assert found(config, tmp_path / "scratch") == [(2, expected)]


def test_a_floor_by_amendment(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """From version 2 on: replayed over the border to the same bits, and judged by the silos with the terms of then."""
    from tests.unit.test_contract_amended import propose, sign

    config = make(None)
    aggregator, state = begin(config)
    propose(config, "alpha", 2, "outer.quality_floor=1.5")
    for silo in ("beta", "gamma"):
        sign(config, silo)
    gamma, weights = waiting(config, "gamma"), []
    for version in (1, 2):
        deliver(config, state, LOSSES)
        one_version(aggregator, state)
        gamma.receive(version, None, state.parameters)
        commit = as_member(config, "beta").read_commit(version)
        weights.append([one.weight for one in commit.contributors])
    assert weights == [[100] * 3, [100, 100, 0]]
    assert_same_state(start(config)[1], state)
    assert found(config, tmp_path / "scratch") == []


def test_who_does_not_say_its_loss_is_refused(tiny_config: TinyConfig, tmp_path: Path) -> None:
    """Or says one that no cross-entropy can be; the others are enough, and of two nobody is judged."""
    rules = {"quorum": 2, "deadline_floor_seconds": 0.0, "deadline_ceiling_seconds": 0.5}
    config = tiny_config(tmp_path, silos=GAMMA, outer={"quality_floor": 2.0}, membership=rules)
    aggregator, state = start(config)
    exchange = StoreExchange(config.store_url)
    exchange.read_contract()
    for version, told in ((1, {}), (2, {"loss": -1.0})):
        for silo, metrics in (("alpha", {"loss": 1.0}), ("beta", {"loss": 9.0}), ("gamma", told)):
            exchange.announce(silo, left=False, version=0)
            hand = Hand(manifest=lambda manifest, metrics=metrics: manifest.update(metrics=metrics))
            hand.deliver(config, silo, state, times(state, 2))
        one_version(aggregator, state)
        (refusal,) = exchange.refusals("gamma", version)
        assert refusal.reason == "it does not say its loss, which outer.quality_floor needs, as a number of 0 or more"
        parts = exchange.read_commit(version).contributors
        assert [(one.silo, one.weight) for one in parts] == [("alpha", 100), ("beta", 100)]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"outer": {"quality_floor": 0.9}}, "outer.quality_floor: 0.9 given; allowed: null, or 1 or more"),
        (
            {"outer": {"quality_floor": 2.0, "merge": "median"}},
            "outer.quality_floor: 2.0 given; allowed: null with outer.merge=median, which",
        ),
        (
            {"outer": {"quality_floor": 2.0}, "silos": {"gamma": None}},
            "outer.quality_floor: 2.0 given; allowed: null with a roster of 2: of fewer than 3 nobody can say",
        ),
        (
            {"outer": {"quality_floor": 2.0}, "membership": {"sample": 2}},
            "outer.quality_floor: 2.0 given; allowed: null with a membership.sample of 2: of fewer than 3",
        ),
        (
            {"outer": {"quality_floor": 2.0}, "trust": {"metrics": {"loss": "member"}}},
            "trust.metrics.loss: 'member' given; allowed: public, consortium with outer.quality_floor=2.0, for which",
        ),
    ],
)
def test_what_a_floor_cannot_be(changes: dict[str, Any], error: str, tiny_config: TinyConfig, tmp_path: Path) -> None:
    assert one_line_error(tiny_config, tmp_path, **{"silos": GAMMA} | changes).startswith(error)


# ---- the law


def by_hand(floor: float, told: list[tuple[str, int, float]]) -> set[int]:
    newest = max(version for _, version, _ in told)
    in_time = {silo: loss for silo, version, loss in told if version == newest}
    return {
        place
        for place, (silo, _, loss) in enumerate(told)
        if len(in_time) >= 3 and loss > floor * statistics.median_high(v for s, v in in_time.items() if s != silo)
    }


@given(
    st.lists(st.floats(0, 9), min_size=1, max_size=7),
    st.lists(st.tuples(st.integers(0, 8), st.floats(0, 9)), max_size=3),
    st.floats(1, 3),
)
def test_the_median_of_the_others(in_time: list[float], late: list[tuple[int, float]], floor: float) -> None:
    """Those that came too late are judged, and judge nobody; at least half of the others count."""
    told = [(f"s{place}", 7, loss) for place, loss in enumerate(in_time)]
    found = below(floor, told + [(f"s{silo}", 6, loss) for silo, loss in late])
    assert {*found} == by_hand(floor, told + [(f"s{silo}", 6, loss) for silo, loss in late])
    assert 2 * sum(place < len(told) for place in found) <= len(told)


@given(st.lists(st.floats(1, 9), min_size=2, max_size=6), st.lists(st.floats(0, 1e9), max_size=5))
def test_liars_in_the_minority_throw_nobody_out(honest: list[float], lies: list[float]) -> None:
    """Who has no more than the least loss that an honest silo tells counts, whatever the others say."""
    lies = lies[: len(honest) - 1]
    told = [(f"s{place}", 7, loss) for place, loss in enumerate(honest + lies)]
    assert honest.index(min(honest)) not in below(1.0, told)
