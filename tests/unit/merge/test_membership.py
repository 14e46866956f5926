"""A version without the whole roster: who is waited for and how long, what is late, absurd or malicious."""

import json
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config.keys import RunConfig
from pretrain.exchange.store import StoreExchange
from pretrain.trust.ledger import RefusedError
from tests.conftest import TinyConfig
from tests.support import TinyText, one_line_error, tiny_silo
from tests.unit.test_aggregate import GOOD, Hand, commit_of, one_version, plus_noise, start, times
from tests.waiting import PATIENCE_SECONDS, wait_for

ROSTER = ("alpha", "beta", "gamma")
SOON = {"quorum": 2, "deadline_floor_seconds": 0.4, "deadline_ceiling_seconds": 0.4}


@pytest.fixture
def make(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> Any:
    """A run of three silos with one fragment and plain averaging."""

    def make(outer: dict[str, Any] | None = None, **membership: Any) -> RunConfig:
        return tiny_config(
            tmp_path,
            inner={"num_steps": 24},
            outer={"optimizer": "sgd", "lr": 1.0} | (outer or {}),
            silos={"gamma": tiny_silo(tiny_text, "gamma")},
            membership=membership,
            exchange={"keep_versions": 4},
        )

    return make


def join(config: RunConfig, silos: Sequence[str] = ROSTER, version: int = 0) -> StoreExchange:
    exchange = StoreExchange(config.store_url)
    exchange.read_contract()
    for silo in silos:
        exchange.announce(silo, left=False, version=version)
    return exchange


def silos_of(commit: dict[str, Any]) -> list[str]:
    return [contributor["silo"] for contributor in commit["contributors"]]


def test_nobody_waits_for_a_silo_that_never_joined(make: Any) -> None:
    config = make(quorum=2, deadline_ceiling_seconds=600.0)
    aggregator, state = start(config)
    join(config, ["alpha", "beta"])
    for index, silo in enumerate(("alpha", "beta")):
        GOOD.deliver(config, silo, state, plus_noise(state, seed=index), tokens=100 * (index + 1))
    began = time.monotonic()
    one_version(aggregator, state)
    assert time.monotonic() - began < 60
    commit = commit_of(config, 1)
    assert (silos_of(commit), commit["divisor"]) == (["alpha", "beta"], 300)


def test_a_quorum_waits_until_the_deadline_and_not_longer(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = make(**SOON)
    aggregator, state = start(config)
    join(config)
    for silo in ("alpha", "beta"):
        GOOD.deliver(config, silo, state, plus_noise(state))
    began = time.monotonic()
    one_version(aggregator, state)
    assert time.monotonic() - began >= 0.4
    assert silos_of(commit_of(config, 1)) == ["alpha", "beta"]
    assert "waiting for silo gamma: delivery for version 1; 2 are enough 0 s after the commit before" in (
        capsys.readouterr().out
    )
    GOOD.deliver(config, "alpha", state, plus_noise(state))  # one is not enough, however long it takes
    thread = threading.Timer(1.0, lambda: GOOD.deliver(config, "gamma", state, plus_noise(state)))
    thread.start()
    one_version(aggregator, state)
    thread.join()
    assert silos_of(commit_of(config, 2)) == ["alpha", "gamma"]


def test_away_left_and_back(make: Any) -> None:
    """Two missed commits are enough; a new word of the silo, or a delivery, and it is waited for again."""
    config = make(**SOON, away_after_versions=2)
    aggregator, state = start(config)
    exchange, collector = join(config), aggregator._collector

    def commit_without_gamma() -> None:
        for silo in ("alpha", "beta"):
            GOOD.deliver(config, silo, state, plus_noise(state))
        one_version(aggregator, state)

    for expected in ([*ROSTER], [*ROSTER], ["alpha", "beta"]):
        assert collector.members() == expected
        commit_without_gamma()
    assert start(config)[0]._collector.members() == ["alpha", "beta"]  # an aggregator that was restarted knows it too
    join(config, ["gamma"], version=3)
    assert collector.members() == [*ROSTER]
    exchange.announce("gamma", left=True, version=3)
    commit_without_gamma()
    assert collector.members() == ["alpha", "beta"]  # it was asked before the commit
    join(config, ["gamma"], version=4)
    GOOD.deliver(config, "gamma", state, plus_noise(state))
    commit_without_gamma()
    assert silos_of(commit_of(config, 5)) == [*ROSTER]
    assert collector.members() == [*ROSTER]


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_what_is_late_counts_less_in_the_next_commit_and_only_once(make: Any, codec: str) -> None:
    config = make({"codec": codec}, **SOON, stale_weight=0.5)
    aggregator, state = start(config)
    join(config)
    first = {name: value.double() for name, value in state.parameters.items()}
    for silo in ("alpha", "beta"):
        GOOD.deliver(config, silo, state, times(state, 0.5))
    late = {name: value.clone() for name, value in times(state, 3.0).items()}
    begun = type(state)(version=0, parameters={n: v.float() for n, v in first.items()}, kept={}, rows=dict(state.rows))
    one_version(aggregator, state)
    GOOD.deliver(config, "gamma", begun, late)  # 100 tokens for version 1, which is committed
    second = {name: value.double() for name, value in state.parameters.items()}
    for silo in ("alpha", "beta"):
        GOOD.deliver(config, silo, state, dict(state.parameters))  # they have not moved
    one_version(aggregator, state)
    commit = commit_of(config, 2)
    assert [(c["silo"], c["version"], c["weight"]) for c in commit["contributors"]] == [
        ("alpha", 2, 100),
        ("beta", 2, 100),
        ("gamma", 1, 50),
    ]
    assert commit["divisor"] == 250
    for name, value in state.parameters.items():  # gamma's pseudo-gradient is -2 times the first parameters
        expected = second[name] + 2 * first[name] * 50 / 250
        assert torch.allclose(
            value.double(), expected, atol=1e-5 if codec == "fp32" else 2e-2 * float(first[name].max())
        )
    for silo in ("alpha", "beta"):
        GOOD.deliver(config, silo, state, plus_noise(state))
    one_version(aggregator, state)
    assert silos_of(commit_of(config, 3)) == ["alpha", "beta"]


def test_late_is_dropped_unless_the_contract_gives_it_a_weight(make: Any) -> None:
    config = make(**SOON)
    aggregator, state = start(config)
    join(config)
    begun = type(state)(
        version=0, parameters={n: v.clone() for n, v in state.parameters.items()}, kept={}, rows=dict(state.rows)
    )
    for _ in range(2):
        for silo in ("alpha", "beta"):
            GOOD.deliver(config, silo, state, plus_noise(state))
        one_version(aggregator, state)
        if state.version == 1:
            GOOD.deliver(config, "gamma", begun, times(begun, 3.0))
    assert silos_of(commit_of(config, 2)) == ["alpha", "beta"]


def test_an_absurd_pseudo_gradient_is_refused_for_good(make: Any) -> None:
    config = make(**SOON, max_norm_ratio=10.0)
    aggregator, state = start(config)
    exchange = join(config)
    for index, silo in enumerate(ROSTER):
        GOOD.deliver(config, silo, state, plus_noise(state, seed=index))
    one_version(aggregator, state)
    assert silos_of(commit_of(config, 1)) == [*ROSTER]
    norms = {key: value for key, value in commit_of(config, 1)["metrics"].items() if key.startswith("norm/")}
    assert sorted(norms) == ["norm/alpha", "norm/beta", "norm/gamma"]
    for index, silo in enumerate(ROSTER):
        local = plus_noise(state, seed=index) if silo != "beta" else times(state, 100.0)
        GOOD.deliver(config, silo, state, local)
    one_version(aggregator, state)
    assert silos_of(commit_of(config, 2)) == ["alpha", "gamma"]
    (refusal,) = exchange.refusals("beta", 2)
    assert refusal.final
    assert "more than 10 times what is usual" in refusal.reason


def test_who_is_refused_for_good_where_all_are_needed_ends_the_run_in_one_line(make: Any) -> None:
    config = make(max_norm_ratio=10.0)
    aggregator, state = start(config)
    for index, silo in enumerate(ROSTER):
        GOOD.deliver(config, silo, state, plus_noise(state, seed=index) if silo != "beta" else times(state, 100.0))
    with pytest.raises(RefusedError) as caught:
        aggregator.collect(state)
    assert re.fullmatch(
        r"version 1: it needs the deliveries of 3 silos, and that of beta is refused for good: its norm is [\d.]+, "
        "more than 10 times what is usual in this round",
        str(caught.value),
    )


def test_who_is_absurdly_fast_is_refused_for_good(make: Any) -> None:
    config = make(**SOON, steps="speed")
    aggregator, state = start(config)
    exchange = join(config)
    for silo, seconds in zip(ROSTER, (1.0, 1e-300, 0.01), strict=True):
        told = {"seconds_per_step": seconds}
        Hand(manifest=lambda manifest, told=told: manifest.update(metrics=told)).deliver(
            config, silo, state, plus_noise(state)
        )
    one_version(aggregator, state)
    assert silos_of(commit_of(config, 1)) == ["alpha", "gamma"]
    (refusal,) = exchange.refusals("beta", 1)
    assert refusal.final
    assert refusal.reason == "its seconds_per_step is 1e-300, where that of the others is 0.505"


def test_who_claims_more_tokens_than_the_largest_batch_makes_is_refused(make: Any) -> None:
    config = make({"max_batch_sequences": 4}, **SOON)
    aggregator, state = start(config)
    exchange = join(config)
    for silo, tokens in zip(ROSTER, (4 * 4 * 16, 4 * 4 * 16 + 1, 1), strict=True):  # steps x batch x sequence
        GOOD.deliver(config, silo, state, plus_noise(state), tokens=tokens)
    one_version(aggregator, state)
    assert silos_of(commit_of(config, 1)) == ["alpha", "gamma"]
    (refusal,) = exchange.refusals("beta", 1)
    expected = "it counts 257 tokens, not 1 to 256: 4 steps of outer.max_batch_sequences=4"
    assert (refusal.reason, refusal.final) == (expected, False)


@pytest.mark.parametrize(("outer", "most"), [({"max_share": 0.6}, 768), ({}, 2048)])  # of 1280; by itself: of 2560
def test_no_silo_has_more_than_its_share_of_a_commit(make: Any, outer: dict[str, float], most: int) -> None:
    config = make(outer)
    aggregator, state = start(config)
    for silo, tokens in zip(ROSTER, (256, 10**6, 256), strict=True):
        GOOD.deliver(config, silo, state, plus_noise(state), tokens=tokens)
    one_version(aggregator, state)
    commit = commit_of(config, 1)
    assert [c["weight"] for c in commit["contributors"]] == [256, most, 256]
    assert commit["divisor"] == 512 + most


def test_robust_merges_by_hand(make: Any) -> None:
    """Two honest silos and one that sends a hundred times as much: what the mean becomes, and what these do not."""
    for merge, expected, weights in (
        ("mean", (1 + 1 + 100) / 3, [100] * 3),
        ("clip", 1.0, [100] * 3),
        ("trimmed_mean", 1.0, [1] * 3),
        ("median", 1.0, [1] * 3),
    ):
        config = make({"merge": merge})
        config.directory = f"{config.directory}-{merge}"
        aggregator, state = start(config)
        before = {name: value.double() for name, value in state.parameters.items()}
        for silo, factor in zip(ROSTER, (0.99, 0.99, 0.0), strict=True):  # pseudo-gradients of 1 % and of 100 %
            GOOD.deliver(config, silo, state, times(state, factor))
        one_version(aggregator, state)
        assert [c["weight"] for c in commit_of(config, 1)["contributors"]] == weights
        for name, value in state.parameters.items():
            assert torch.allclose(value.double(), before[name] * (1 - 0.01 * expected), atol=1e-6)


def test_krum_takes_one_of_the_honest(make: Any, tiny_text: TinyText, tiny_config: TinyConfig, tmp_path: Path) -> None:
    names = [*ROSTER, "delta", "epsilon"]
    silos = {name: tiny_silo(tiny_text, "alpha") for name in names}
    config = tiny_config(tmp_path, outer={"optimizer": "sgd", "lr": 1.0, "merge": "krum"}, silos=silos)
    aggregator, state = start(config)
    local = {name: plus_noise(state, seed=index) for index, name in enumerate(names)}
    local["beta"] = times(state, -1.0)
    for name in names:
        GOOD.deliver(config, name, state, local[name])
    one_version(aggregator, state)
    weights = {c["silo"]: c["weight"] for c in commit_of(config, 1)["contributors"]}
    assert sorted(weights.values()) == [0, 0, 0, 0, 1]
    (chosen,) = [name for name, weight in weights.items() if weight]
    assert chosen != "beta"
    for name, value in state.parameters.items():
        assert torch.allclose(value, local[chosen][name], atol=1e-6)


def test_what_waits_is_in_the_store(make: Any) -> None:
    exchange = StoreExchange(make(quorum=2).store_url)
    exchange.say_waiting(3, ["gamma"], deadline_seconds=60.0)
    exchange.say_waiting(3, ["gamma"], deadline_seconds=70.0)
    assert json.loads(exchange.objects.read("waiting/000003.json")) == {"silos": ["gamma"], "deadline_seconds": 60.0}


MISTAKES = {
    "quorum above the roster": ({"quorum": 4}, {}, "membership.quorum: 4 given; allowed: null, or 1 to the 3 silos"),
    "quorum above the sample": ({"quorum": 3, "sample": 2}, {}, "membership.quorum: 3 given; allowed: null, or 1 to"),
    "sample above the roster": ({"sample": 4}, {}, "membership.sample: 4 given; allowed: null, or 1 to the 3 silos"),
    "sample in turn": ({"sample": 2}, {"num_fragments": 2}, "membership.sample: 2 given; allowed: null with outer."),
    "speed in turn": ({"steps": "speed"}, {"overlap_steps": 1}, "membership.steps: 'speed' given; allowed: equal with"),
    "grace without quorum": ({"stale_weight": 0.5}, {}, "membership.stale_weight: 0.5 given; allowed: 0.0 without"),
    "deadline without quorum": (
        {"deadline_mads": 3.0},
        {},
        "membership.deadline_mads: 3.0 given;",
    ),
    "ceiling below floor": (
        {"quorum": 2, "deadline_ceiling_seconds": 1.0},
        {},
        "membership.deadline_ceiling_seconds: 1.0 given; allowed: 60.0 or more",
    ),
    "median of two": (
        {"quorum": 2},
        {"merge": "median"},
        "membership.quorum: 2 given; allowed: 3 or more",
    ),
    "krum of three": ({}, {"merge": "krum"}, "silos: 3 given; allowed: 5 or more with outer.merge=krum and outer.num_"),
    "median that counts one twice": (
        {"quorum": 3, "stale_weight": 0.5},
        {"merge": "median"},
        "membership.stale_weight: 0.5 given; allowed: 0 with outer.merge=median, among which a silo must not count",
    ),
    "unknown merge": (
        {},
        {"merge": "mode"},
        "outer.merge: 'mode' given; allowed: mean, importance, clip",
    ),
    "negative ratio": (
        {"max_norm_ratio": -1.0},
        {},
        "membership.max_norm_ratio: -1.0 given; allowed: null",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_rules_that_cannot_be(make: Any, mistake: str) -> None:
    membership, outer, expected = MISTAKES[mistake]
    assert one_line_error(lambda: make(outer, **membership)).startswith(expected)


def test_a_join_with_another_contract_is_refused(make: Any) -> None:
    start(make(quorum=2))
    message = one_line_error(lambda: start(make(quorum=3)))
    assert "it holds a run with another contract: membership.quorum is 3 here and 2 there" in message


def test_many_silos_deliver_at_once_and_are_counted_in_lines(
    tiny_config: TinyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [f"s{index:02d}" for index in range(40)]
    config = tiny_config(tmp_path, outer={"optimizer": "sgd", "lr": 1.0}, roster=["alpha", "beta", *others])
    aggregator, state = start(config)
    for silo in ("alpha", *others):
        GOOD.deliver(config, silo, state, times(state, 2.0))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(one_version, aggregator, state)
        wait_for(lambda: "waiting for silo beta" in capsys.readouterr().out)
        GOOD.deliver(config, "beta", state, times(state, 2.0))
        waiting.result(PATIENCE_SECONDS)
    assert silos_of(commit_of(config, 1)) == sorted(["alpha", "beta", *others])
    assert f"silos alpha, beta, {', '.join(others[:10])}, ... (42 in all)  divisor" in capsys.readouterr().out
