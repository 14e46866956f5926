"""Terms of the contract on what silos tell of themselves, on privacy and on software; and who is held to them."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.show.report import write_report
from pretrain.config.allowed import METRICS
from pretrain.config.keys import RunConfig, WandbConfig
from pretrain.config.trust import TrustConfig
from pretrain.exchange.store import StoreExchange
from pretrain.federation.contract import Agreed, describe, propose
from pretrain.federation.preflight import check_silo
from pretrain.federation.verify import StoreVerifier
from pretrain.host import software
from pretrain.host.journal import Journal
from pretrain.sync.through_store import ThroughStore
from pretrain.trust.contract import contract_bytes, other_software
from pretrain.trust.egress import tracked
from pretrain.trust.ledger import Manifest
from pretrain.trust.policy import TELLS, Policy, read_policy
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.launch.show.test_report import make_run
from tests.unit.test_aggregate import Hand, one_version, start, times
from tests.unit.test_signed import begin, deliver, manifest_file, sign_delivery
from tests.unit.trust.test_policy import configured

KEPT = {"loss": "member", "pseudo_gradient_norm": "consortium", "tokens": "consortium"}


def test_without_a_word_all_may_be_shown() -> None:
    assert TrustConfig().metrics == dict.fromkeys(METRICS, "public")
    assert {*TELLS} == {*METRICS}
    assert Policy(tiers=TrustConfig().metrics).shows is None


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"trust": {"metrics": {"loss": "secret"}}}, "loss: 'secret' given; allowed: public, consortium, member"),
        ({"trust": {"metrics": {"lost": "public"}}}, "metrics: ['epochs', 'held_out', 'loss', 'lost', "),
        (
            {"trust": {"metrics": {"tokens": "member"}}},
            "tokens: 'member' given; allowed: public, consortium with outer.weight_power and every restart, for which",
        ),
        (
            {"trust": {"metrics": {"seconds_per_step": "member"}}, "membership": {"quorum": 2, "steps": "speed"}},
            "seconds_per_step: 'member' given; allowed: public, consortium with membership.steps=speed, for which",
        ),
        (
            {"trust": {"metrics": {"pseudo_gradient_norm": "member"}}, "membership": {"max_norm_ratio": 9.0}},
            "pseudo_gradient_norm: 'member' given; allowed: public, consortium with membership.max_norm_ratio=9.0, for",
        ),
        ({"trust": {"software": "any"}}, "software: 'any' given; allowed: recorded, exact"),
    ],
)
def test_what_tiers_cannot_be(changes: dict[str, Any], error: str, tiny_config: TinyConfig, tmp_path: Path) -> None:
    line = one_line_error(tiny_config, tmp_path, **changes)
    assert error in line
    assert line.startswith("trust.")


def test_what_is_a_members_own_does_not_leave(tiny_config: TinyConfig, tmp_path: Path) -> None:
    """The contract's tiers, and a policy that is stricter; one that is looser changes nothing."""
    config = tiny_config(tmp_path, trust={"metrics": KEPT})
    manifest = dataclasses.replace(
        MANIFEST, metrics={"loss": 2.0, "pseudo_gradient_norm": 0.5, "seconds_per_step": 0.1}
    )
    assert read_policy(config).leaving(manifest).metrics == {"pseudo_gradient_norm": 0.5, "seconds_per_step": 0.1}
    for said, left in (
        ("metrics: ['*']", {"pseudo_gradient_norm": 0.5, "seconds_per_step": 0.1}),
        ("metrics: [loss, seconds_per_step]", {"seconds_per_step": 0.1}),
        ("max_norm: 1.0\nmetrics: []", {}),
    ):
        config.trust.policy = str(tmp_path / "policy.yaml")
        Path(config.trust.policy).write_text(said)
        assert read_policy(config).leaving(manifest).metrics == left


MANIFEST = Manifest(
    contract_sha256="c" * 64,
    silo="law",
    version=1,
    base_version=0,
    base_digest="d" * 64,
    cosigned="e" * 64,
    codec="fp32",
    payloads=[],
    tokens=1,
    steps=1,
    tokens_total=1,
    metrics={},
)


def test_what_is_the_consortiums_is_not_in_weights_and_biases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a silo or of the aggregator, under whichever name; metrics.jsonl, which stays here, has all of it."""
    logged: list[dict[str, Any]] = []
    run = SimpleNamespace(log=logged.append, finish=lambda: None)
    library = SimpleNamespace(init=lambda **_: run, Settings=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "wandb", library)  # type: ignore[arg-type]  # it would need a server
    config = RunConfig(directory=str(tmp_path), wandb=WandbConfig(mode="offline"))
    policy = Policy(tiers={**TrustConfig().metrics, **KEPT})
    journal = Journal(config, "silos/law", silo="law", allows=policy.shows, says=tracked(config, "law", policy))
    journal.record("step", step=3, loss=1.5, lr=0.1, tokens=7, tokens_per_second=70.0, mfu=0.4)
    journal.record("sync", version=1, pseudo_gradient_norm=0.5, bytes_sent=9)
    told = {"norm/law": 0.5, "loss/law": 1.5, "loss/law/3": 1.6, "seconds_per_step/law": 0.1}
    journal.record("commit", version=1, divisor=100, update_norm=0.4, **told)
    journal.close()
    assert logged == [
        {"step/step": 3, "step/lr": 0.1},
        {"sync/version": 1, "sync/bytes_sent": 9},
        {"commit/version": 1, "commit/update_norm": 0.4, "commit/seconds_per_step/law": 0.1},
    ]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [len(record) for record in records] == [3 + 6, 3 + 3, 3 + 3 + len(told)]


def test_a_report_says_that_it_is_not_for_publication(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run")
    line = "Not for publication: by the contract (trust.metrics) loss, pseudo_gradient_norm, tokens of silos stay"
    assert line not in write_report(config).read_text()
    config.trust.metrics |= KEPT
    assert line in write_report(config).read_text()


def test_what_must_not_travel_is_refused_by_name(tiny_config: TinyConfig, tmp_path: Path) -> None:
    """By the aggregator; and a number that the contract has no tier for."""
    rules = {"quorum": 1, "deadline_floor_seconds": 0.0, "deadline_ceiling_seconds": 0.5}
    config = tiny_config(tmp_path, trust={"metrics": KEPT}, membership=rules)
    aggregator, state = start(config)
    exchange = StoreExchange(config.store_url)
    norm = {"pseudo_gradient_norm": 1.0}
    for version, number in ((1, "loss"), (2, "words")):
        for silo, metrics in (("alpha", norm), ("beta", norm | {number: 3.0})):
            exchange.announce(silo, left=False, version=0)
            hand = Hand(manifest=lambda manifest, metrics=metrics: manifest.update(metrics=metrics))
            hand.deliver(config, silo, state, times(state, 2))
        one_version(aggregator, state)
        (refusal,) = exchange.refusals("beta", version)
        assert refusal.reason == f"its metrics have {number}, which trust.metrics in the contract keeps with its silo"


def test_an_operator_that_takes_what_must_not_travel_is_found(signed_config: RunConfig, tmp_path: Path) -> None:
    """By the silos one version later, and by atoll verify."""
    config = signed_config
    config.trust.metrics = config.trust.metrics | {"loss": "member"}
    aggregator, state = begin(config)
    aggregator._config.trust.metrics = config.trust.metrics | {"loss": "public"}  # the operator's own
    alpha = ThroughStore(config, "alpha")
    alpha._store.read_contract()
    alpha._delivered.begin(3)
    for version in (1, 2):
        deliver(config, state, "beta")
        hand = Hand(manifest=lambda manifest: manifest.update(metrics={}))
        hand.deliver(config, "alpha", state, times(state, 2))
        sign_delivery(config, "alpha", version, "alpha")
        one_version(aggregator, state)
        alpha.receive(version, None, state.parameters)
    assert Manifest.from_bytes(manifest_file(config, "beta", 2).read_bytes()).metrics == {"loss": 1.0}
    line = one_line_error(alpha.receive, 3, None, state.parameters)
    reason = "its metrics have loss, which trust.metrics in the contract keeps with its silo"
    assert line == f"silo alpha: version 2 in the store cannot be used: the delivery of silo beta: {reason}"
    (tmp_path / "scratch").mkdir()
    findings = StoreVerifier(StoreExchange(config.store_url), tmp_path / "scratch").verify().findings
    names = [(finding.version, finding.name) for finding in findings if finding.what == reason]
    assert names == [(version, f"silos/beta/{version:06d}/manifest.json") for version in (1, 2)]


# ---- privacy and software


def test_the_contract_says_who_sees_what_and_what_clips_and_which_software(
    signed_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = signed_config
    config.trust.metrics = config.trust.metrics | KEPT
    propose(config)
    stored = json.loads((Path(config.store_url) / "contract.json").read_bytes())
    assert stored["inner"]["clip_norm"] == 1.0
    assert (stored["trust"]["seal"], stored["trust"]["software"]) == (False, "recorded")
    assert stored["trust"]["metrics"] == TrustConfig().metrics | KEPT
    assert stored["software"] == software.installed()
    assert {"atoll", "torch", "numpy", "numba"} <= stored["software"].keys()
    said = dict(describe(Agreed.at(config.store_url)))
    metrics = "public: held_out, seconds_per_step, epochs; consortium: pseudo_gradient_norm, tokens; member: loss"
    assert said["metrics"] == metrics
    assert said["privacy"] == "gradients of a step clipped to 1, no noise; payloads not sealed"
    assert said["software"].endswith(": others are told what differs")
    assert f"torch {software.installed()['torch']}" in said["software"]


@pytest.fixture
def elsewhere(tiny_config: TinyConfig, tmp_path: Path) -> Callable[[str], tuple[RunConfig, bytes]]:
    """A run whose aggregator had another numba, by what the contract says of software."""

    def elsewhere(rule: str) -> tuple[RunConfig, bytes]:
        config = tiny_config(tmp_path, trust={"software": rule})
        start(config)
        file = Path(config.store_url) / "contract.json"
        terms = json.loads(file.read_bytes())
        terms["software"]["numba"] = "0.1.2"
        file.write_bytes(contract_bytes(terms))
        return config, file.read_bytes()

    return elsewhere


def test_other_software_is_said(
    elsewhere: Callable[[str], tuple[RunConfig, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    config, stored = elsewhere("recorded")
    here = software.installed()["numba"]
    line = f"numba {here} here, 0.1.2 there: the models may differ in their last bits"
    assert other_software(stored, config.store_url) == [line]
    config.silo_directory("alpha").mkdir(parents=True)
    silo = ThroughStore(config, "alpha")
    silo.join()
    silo.close("on request")
    assert f"{line}\n" in capsys.readouterr().out


def test_other_software_is_refused_where_the_contract_says_exact(
    elsewhere: Callable[[str], tuple[RunConfig, bytes]],
) -> None:
    config, _ = elsewhere("exact")
    here = software.installed()["numba"]
    expected = (
        f"trust.software: exact given by the contract in {config.store_url}; here is numba {here}; allowed: numba "
        "0.1.2, or trust.software=recorded in the contract of a new run"
    )
    assert one_line_error(ThroughStore(config, "alpha").join) == expected
    assert one_line_error(start, config) == expected


# ---- a site's own policy


FOUR = {"silos": {"gamma": {}, "delta": {}}, "outer": {"quality_floor": 1.25}}


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (
            "metrics: [tokens]",
            "its metrics is tokens, and the contract's outer.quality_floor is 1.25, which needs loss",
        ),
        (
            "least_silos: 3",
            "its least_silos is 3, and the contract's outer.quality_floor is 1.25, with which 2 of 4 may be all that "
            "count",
        ),
    ],
)
def test_a_policy_wins_over_a_floor(said: str, error: str, tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = configured(tiny_config, tmp_path, said, **FOUR)
    line = f"trust.policy: {config.trust.policy} given; {error}; change either, or take no part"
    assert one_line_error(check_silo, config, "alpha") == line
    assert not Path(config.directory).exists()


def test_who_does_not_count_is_not_one_of_those_with_which_ours_is_merged(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    """As after an amendment; ours is merged with nobody where it does not count itself."""
    config = tiny_config(tmp_path, **FOUR)
    aggregator, state = start(config)
    for silo, loss in zip(config.full_roster, (1.0, 1.1, 9.0, 9.0), strict=True):  # alpha, beta, delta, gamma
        hand = Hand(manifest=lambda manifest, loss=loss: manifest.update(metrics={"loss": loss}))
        hand.deliver(config, silo, state, times(state, 2))
    one_version(aggregator, state)
    config.trust.policy = str(tmp_path / "policy.yaml")
    Path(config.trust.policy).write_text("least_silos: 3")
    for silo in ("alpha", "delta"):
        exchange = ThroughStore(config, silo)
        exchange._store.read_contract()
        exchange._delivered.begin(9)
        counts = {one.silo: one.weight for one in exchange._store.read_commit(1).contributors}
        assert counts == {"alpha": 100, "beta": 100, "delta": 0, "gamma": 0}
        if silo == "delta":
            exchange.receive(1, None, state.parameters)
        else:
            line = one_line_error(exchange.receive, 1, None, state.parameters)
            assert "its least_silos is 3, and commit 1 has merged what we delivered among 2;" in line
