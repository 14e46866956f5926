"""The gate of a signed run: the real aggregator in this process, results and deliveries that are written by hand."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.aggregate import Aggregator, OuterState
from pretrain.config.errors import ConfigError
from pretrain.config.gate import GateConfig
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.gated import Gated, decision_path, judged_path
from pretrain.exchange.words import Decision, Evaluation
from pretrain.federation.current import current_version
from pretrain.federation.export import export_global_model
from pretrain.federation.verify import StoreVerifier
from pretrain.trust.contract import build_contract, check_same_contract
from pretrain.trust.gate import faults
from pretrain.trust.ledger import RefusedError
from tests.gates import decisions, gate_data
from tests.support import TinyText, one_line_error
from tests.unit.test_signed import as_member, begin, deliver

RULE = {"every_versions": 1, "max_mean_rise": 0.0, "max_silo_rise": 0.1}
Make = Callable[..., RunConfig]


@pytest.fixture
def config(make: Make, tiny_text: TinyText) -> RunConfig:
    return make(gate=RULE | {"data": gate_data(tiny_text, "alpha", "beta")})


def tell(config: RunConfig, version: int, silo: str, loss: float, *, signer: str = "") -> None:
    """A silo's result, as it would write it."""
    exchange = as_member(config, signer or silo)
    digest = exchange.read_commit(version).parameters_digest
    result = Evaluation(version=version, parameters_digest=digest, losses={silo: loss}, sequences={silo: 64.0})
    Gated(exchange, config.gate).tell(silo, result)


def tell_all(config: RunConfig, version: int, **losses: float) -> None:
    for silo, loss in losses.items():
        tell(config, version, silo, loss)


def make_version(config: RunConfig, aggregator: Aggregator, state: OuterState, **losses: float) -> None:
    """One more version, judged so, and what follows."""
    for silo in config.full_roster:
        deliver(config, state, silo)
    deliveries = aggregator.collect(state)
    merged = aggregator.merge(state, deliveries)
    aggregator.commit(state, deliveries, merged)
    aggregator.finish()
    tell_all(config, state.version, **losses)
    for silo in config.full_roster:
        as_member(config, silo).mark_resumable(silo, state.version)
    aggregator.judge(state)


def run_of_four(config: RunConfig) -> tuple[Aggregator, OuterState]:
    """Version 2 is the current one; 3 and 4 are worse for beta, the one by itself, the other in the mean, too."""
    aggregator, state = begin(config)
    tell_all(config, 0, alpha=5.0, beta=5.0)
    aggregator.judge(state)
    make_version(config, aggregator, state, alpha=4.5, beta=4.5)
    make_version(config, aggregator, state, alpha=4.0, beta=4.55)
    make_version(config, aggregator, state, alpha=3.0, beta=4.75)
    make_version(config, aggregator, state, alpha=3.9, beta=5.0)
    return aggregator, state


def test_a_candidate_that_breaks_the_rule_does_not_become_current(
    config: RunConfig, said: Callable[[], str], tmp_path: Path
) -> None:
    run_of_four(config)
    found = decisions(config)
    assert [one.current for one in found] == [0, 1, 2, 2, 2]
    silo = "silo beta finds 4.7500, +0.2000 above version 2; allowed: +0.1 (gate.max_silo_rise)"
    assert found[3].reasons == [silo]
    assert len(found[4].reasons) == 2
    line = f"gate: version 3 does not become the current one, which stays version 2: {silo}; judged: alpha 3.0000, beta"
    assert line in said()
    operator = as_member(config, OPERATOR)
    assert current_version(config, operator) == 2
    verified = StoreVerifier(operator, tmp_path / "scratch", tell=lambda line: None).verify()
    assert (verified.num_decisions, verified.current, verified.findings) == (5, 2, [])
    records = [json.loads(line) for line in (Path(config.directory) / "metrics.jsonl").read_text().splitlines()]
    assert [r["is_current"] for r in records if r["kind"] == "gate"] == [True, True, True, False, False]


def test_all_of_the_current_version_is_kept(make: Make, tiny_text: TinyText, tmp_path: Path) -> None:
    """However many have come since, and nothing older; a restart finds what was decided."""
    gate = RULE | {"data": gate_data(tiny_text, "alpha", "beta")}
    config = make(gate=gate, exchange={"snapshot_versions": 1, "keep_versions": 1})
    aggregator, state = run_of_four(config)
    store = Path(config.store_url)
    kept = sorted(int(path.parent.name) for path in store.glob("global/*/parameter-*.safetensors"))
    assert kept == [2, 3, 4]
    exported = export_global_model(config, tmp_path / "model", current_version(config, as_member(config, OPERATOR)))
    assert (exported["version"], exported["gate"]["current"]) == (2, 2)
    assert exported["gate"]["losses"] == {"alpha": 4.0, "beta": 4.55}
    aggregator.stop()
    again = Aggregator(config, aggregator._journal)
    before = sorted((str(p), p.stat().st_mtime_ns) for p in store.rglob("*") if p.is_file())
    found = again.start()
    again.judge(found, is_last=True)
    assert found.version == state.version
    assert sorted((str(p), p.stat().st_mtime_ns) for p in store.rglob("*") if p.is_file()) == before


def test_nothing_is_decided_before_all_have_judged(config: RunConfig) -> None:
    aggregator, state = begin(config)
    tell(config, 0, "alpha", 5.0)
    aggregator.judge(state)
    assert not decisions(config)
    keeper = aggregator._gatekeeper
    assert keeper
    assert keeper.look(0) == "silo beta: held-out loss of version 0"
    tell(config, 0, "beta", 5.0)
    assert not keeper.look(0)
    assert decisions(config)[0].judges == ["alpha", "beta"]
    tell(config, 0, "beta", 9.0)  # what was said first stands
    decisions(config)


def test_at_the_deadline_those_decide_that_are_there(make: Make, tiny_text: TinyText) -> None:
    gate = RULE | {"data": gate_data(tiny_text, "alpha", "beta"), "deadline_seconds": 0.0}
    config = make(gate=gate)
    aggregator, state = begin(config)
    aggregator.judge(state)  # whatever is told of it, version 0 is the first
    make_version(config, aggregator, state, alpha=4.5)
    first, second = decisions(config)
    assert (first.is_current, first.judges) == (True, [])
    assert second.reasons == [
        "1 of 2 silos have judged it in time; allowed: 2 or more (gate.quorum)",
        "no silo has judged both it and version 0",
    ]


def test_a_result_of_others_does_not_count(config: RunConfig, said: Callable[[], str]) -> None:
    """Signed by another, of other parameters, of other splits: beta is still waited for."""
    aggregator, _ = begin(config)
    tell(config, 0, "alpha", 5.0)
    file = Path(config.store_url) / judged_path("beta", 0)
    alpha, beta = as_member(config, "alpha"), as_member(config, "beta")
    good = Evaluation(
        version=0,
        parameters_digest=beta.read_commit(0).parameters_digest,
        losses={"beta": 5.0},
        sequences={"beta": 64.0},
    )
    name = judged_path("beta", 0)
    spoiled = {
        "signature": alpha.signed(name, good),
        "of version 0 as it is here": beta.signed(name, dataclasses.replace(good, parameters_digest="0" * 64)),
        "just the splits": beta.signed(name, dataclasses.replace(good, losses={"x": 1.0}, sequences={"x": 1.0})),
    }
    for why, data in spoiled.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        other = Gated(as_member(config, OPERATOR), config.gate)
        assert other.result("beta", 0, good.parameters_digest) is None
        assert f"{name} is passed over: " in (line := said())
        assert why in line
    assert aggregator._gatekeeper
    assert "silo beta" in aggregator._gatekeeper.look(0)


def test_a_decision_that_does_not_follow_is_found(config: RunConfig, tmp_path: Path) -> None:
    """Even by the operator's own key."""
    run_of_four(config)
    operator, name = as_member(config, OPERATOR), decision_path(4)
    file = Path(config.store_url) / name
    lie = dataclasses.replace(Decision.from_bytes(file.read_bytes()), is_current=True, reasons=[])
    file.write_bytes(operator.signed(name, lie))
    verified = StoreVerifier(operator, tmp_path / "scratch", tell=lambda line: None).verify()
    (finding,) = verified.findings
    assert (finding.version, finding.name) == (4, name)
    assert finding.what.startswith(
        f"{name} says: version 4 is current; compared with 2; from its results comes: version 2"
    )
    assert f"{name} says: version 4 is current" in one_line_error(current_version, config, operator)
    file.unlink()
    Path(config.store_url, judged_path("beta", 2)).unlink()
    with pytest.raises(RefusedError, match="is not the result by which version 2 was decided"):
        decisions(config)


def test_thresholds_cannot_be_changed_after_the_fact(config: RunConfig) -> None:
    begin(config)
    stored = as_member(config, OPERATOR).read_contract()
    assert stored
    other = dataclasses.replace(config, gate=dataclasses.replace(config.gate, max_silo_rise=9.0))
    message = one_line_error(check_same_contract, build_contract(other), stored, config.store_url)
    assert "gate.max_silo_rise is 9.0 here and 0.1 there; change these keys, or name another store" in message
    without = dataclasses.replace(config, gate=GateConfig())
    message = one_line_error(check_same_contract, build_contract(without), stored, config.store_url)
    assert "gate is null here and {" in message


def test_the_run_goes_back_if_the_contract_says_so(make: Make, tiny_text: TinyText, tmp_path: Path) -> None:
    """All ends with one line; started again, the same version is made, judged and decided anew."""
    config = make(gate=RULE | {"data": gate_data(tiny_text, "alpha", "beta"), "otherwise": "go_back"})
    aggregator, state = begin(config)
    tell_all(config, 0, alpha=5.0, beta=5.0)
    aggregator.judge(state)
    make_version(config, aggregator, state, alpha=4.0, beta=4.0)
    with pytest.raises(ConfigError) as caught:
        make_version(config, aggregator, state, alpha=3.0, beta=4.75)
    assert str(caught.value).endswith("; the run was taken back to version 1; start it again")
    aggregator.stop()
    again = Aggregator(config, aggregator._journal)
    state = again.start()
    assert state.version == 1
    make_version(config, again, state, alpha=3.0, beta=3.9)
    assert [(one.version, one.current) for one in decisions(config)] == [(0, 0), (1, 1), (2, 2)]
    operator = as_member(config, OPERATOR)
    assert not StoreVerifier(operator, tmp_path / "scratch", tell=lambda line: None).verify().findings
    (record,) = Path(config.store_url).glob("rolled-back/000001/global/000002/gate.json")
    assert Decision.from_bytes(record.read_bytes()).reasons


LIMITS = GateConfig(
    every_versions=1,
    data={"alpha/a": "", "beta/b": ""},
    public={"p": ""},
    max_mean=4.0,
    max_worst=4.5,
    max_public=3.0,
    max_public_rise=0.25,
)


@pytest.mark.parametrize(
    ("found", "reasons"),
    [
        ({"alpha": 4.0, "beta": 4.0, OPERATOR: 3.0}, []),
        (
            {"alpha": 4.5, "beta": 3.75, OPERATOR: 3.0},
            ["the mean of 2 silos is 4.1250; allowed: up to 4 (gate.max_mean)"],
        ),
        ({"alpha": 4.75, "beta": 3.0, OPERATOR: 3.0}, ["silo alpha finds 4.7500; allowed: up to 4.5 (gate.max_worst)"]),
        (
            {"alpha": 4.0, "beta": 4.0, OPERATOR: 3.5},
            [
                "the public splits have 3.5000; allowed: up to 3 (gate.max_public)",
                "the public splits have 3.5000, +0.5000 above version 7; allowed: +0.25 (gate.max_public_rise)",
            ],
        ),
        ({"alpha": 4.0, "beta": 4.0}, ["the operator has not judged it by the public splits"]),
    ],
)
def test_each_limit_says_what_broke_it(found: dict[str, float], reasons: list[str]) -> None:
    current = {"alpha": 1.0, "beta": 1.0, OPERATOR: 3.0}
    assert faults(LIMITS, found, current, compared_with=7, expected=["alpha", "beta"]) == reasons
