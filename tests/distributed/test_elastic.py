"""Silos that join late, die, stay away and come back: real processes, a quorum of two of three."""

import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch import cli
from pretrain.exchange.store import StoreExchange
from pretrain.federation.egress import check_ledgers, ledgers
from pretrain.outer.rounds import participants
from pretrain.silo.optim import learning_rate
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_evaluated_last, federate
from tests.distributed.guests import Guest, final_digest
from tests.faults.scripted import Faults, federate_with
from tests.support import TinyText, tiny_silo
from tests.waiting import PATIENCE_SECONDS, wait_for

ROSTER = ["alpha", "beta", "gamma"]
RULES = {"quorum": 2, "deadline_floor_seconds": 0.5, "deadline_ceiling_seconds": 20.0, "away_after_versions": 2}


STREAMING = {
    "optimizer": "sgd",
    "lr": 1.0,
    "num_fragments": 2,
    "overlap_steps": 1,
    "codec": "int4",
    "downlink_codec": "int4",
    "error_feedback": 1.0,
}


def test_a_sample_of_the_silos_trains_and_one_whose_loss_explodes_goes_back(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    rules = {"quorum": 2, "sample": 2, "sample_seed": 1, "max_loss_rise": 0.5, "rejoin_warmup_steps": 2}
    config = tiny_config(
        tmp_path,
        inner={"num_steps": 20},
        membership=rules,
        silos={"gamma": tiny_silo(tiny_text, "gamma")},
        exchange={"keep_versions": 1, "snapshot_versions": 1},
        trust={"archive": str(tmp_path / "archive")},
    )
    drawn = [participants(ROSTER, round, sample=2, seed=1) for round in range(1, 6)]
    assert drawn == [["beta", "gamma"], ["alpha", "gamma"], ["alpha", "gamma"], ["alpha", "beta"], ["alpha", "gamma"]]
    faults: Faults = {"gamma": [("step", 4, 0, "times", 1e4)]}  # the learning rate of round 2's first step
    run = federate_with(faults, config, tmp_path / "fired")
    commits = [run.commit(version) for version in range(1, 6)]
    assert [[contributor.silo for contributor in commit.contributors] for commit in commits] == drawn
    assert len(run.by_step("gamma", "loss")) == 4 * 4  # and none of the round for which it was not drawn
    (back,) = [record for record in run.records if record["kind"] == "went_back"]
    assert (back["silo"], back["version"]) == ("gamma", 1)
    assert back["step"] in (6, 7)
    warming = learning_rate(back["step"], config.inner) / 2  # its optimizer is a fresh one
    assert run.by_step("gamma", "lr")[back["step"] + 1] == pytest.approx(warming)
    all_tokens, forgotten = 2 * 4 * 4 * 16, (back["step"] - 4) * 4 * 16  # what it trained before it went back
    assert [commit.divisor for commit in commits] == [all_tokens, all_tokens - forgotten, *[all_tokens] * 3]
    losses = run.by_step("gamma", "loss")
    assert losses[back["step"]] > losses[4] + 0.5 > losses[8]
    assert len({run.held_out(silo)[5][silo] for silo in ROSTER}) == 3
    assert_evaluated_last(run)
    said = CliRunner().invoke(cli.app, ["verify", config.directory])
    assert (said.exit_code, "6 in one chain, 5 merged again" in said.stdout) == (0, True), said.output
    assert (tmp_path / "archive/global/000001/parameter-000.safetensors").is_file()
    assert not check_ledgers(*ledgers(Path(config.directory))).findings


@pytest.mark.soak
def test_what_comes_too_late_counts_half_in_the_next_commit(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    rules = {"quorum": 2, "deadline_mads": 0.0, "deadline_floor_seconds": 1.0, "stale_weight": 0.5}
    changes: dict[str, Any] = {
        "inner": {"num_steps": 40},
        "outer": {"optimizer": "sgd", "lr": 1.0},
        "membership": rules | {"rejoin_warmup_steps": 4, "away_after_versions": 100},
        "exchange": {"keep_versions": 100},
        "silos": {"gamma": tiny_silo(tiny_text, "gamma")},
    }
    config = tiny_config(tmp_path, **changes)
    slow: Faults = {
        "alpha": [("step", 0, 0, "slow", 0.3)],
        "beta": [("step", 0, 0, "slow", 0.3)],
        "gamma": [("step", 8, 0, "slow", 0.5)],
    }
    run = federate_with(slow, config, tmp_path / "fired")
    late = []
    for version in range(1, config.schedule.num_versions + 1):
        commit = run.commit(version)
        assert commit.divisor == sum(c.weight for c in commit.contributors)
        late += [(c.silo, c.version, version, c.tokens, c.weight) for c in commit.contributors if c.version < version]
    assert "gamma" in {silo for silo, *_ in late}
    assert all(of == into - 1 and 2 * weight == tokens for _, of, into, tokens, weight in late)
    counted = [(c.silo, c.version) for version in range(1, 11) for c in run.commit(version).contributors]
    assert len(counted) == len(set(counted))  # used once at most
    caught_up = [record["step"] for record in run.records if record["kind"] == "catch_up"]
    rates = run.by_step("gamma", "lr")
    warmed = [step for step in caught_up if step + 1 in rates]
    assert warmed
    for step in warmed:
        assert rates[step + 1] == pytest.approx(learning_rate(step, config.inner) / 4)
    assert_evaluated_last(run)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_one_joins_late_is_killed_and_comes_back(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> None:
    changes: dict[str, Any] = {
        "inner": {"num_steps": 200},
        "outer": STREAMING,
        "membership": RULES,
        "roster": ROSTER,
        "exchange": {"poll_seconds": 0.5, "url": str(tmp_path / "store")},
        "silo": {"eval_interval_rounds": 0},
    }
    config = tiny_config(tmp_path / "hosts", **changes)
    alone = {"alpha": None, "beta": None, "gamma": tiny_silo(tiny_text, "gamma")}
    guest = Guest(tiny_config(tmp_path / "guest", **changes, silos=alone), "gamma")
    store = StoreExchange(config.store_url)
    present: list[int] = []  # the newest version whenever the guest starts, has contributed, and is killed

    def contributed() -> list[int]:
        store.read_contract()
        versions = range(1, store.newest_version() + 1)
        return [v for v in versions if "gamma" in {c.silo for c in store.read_commit(v).contributors}]

    def come_and_go() -> None:
        wait_for(lambda: store.newest_version() >= 3, seconds=120)
        guest.start()
        wait_for(lambda: len(contributed()) >= 2, seconds=120)
        guest.kill()
        present.extend([contributed()[0], contributed()[-1]])
        before = store.newest_version()
        wait_for(lambda: store.newest_version() >= before + 4, seconds=120)
        guest.start()

    visitor = threading.Thread(target=come_and_go)
    visitor.start()
    run = federate(config)
    visitor.join()
    said = guest.wait(PATIENCE_SECONDS)

    last = config.schedule.num_versions
    joined, left = present
    assert joined > 3
    versions = contributed()
    assert versions[-1] > left + 4  # it came back
    assert "caught up from version " in said
    for version in range(1, last + 1):
        commit = run.commit(version)
        assert commit.divisor == sum(c.weight for c in commit.contributors)
        assert {c.silo for c in commit.contributors} >= {"alpha", "beta"}
        assert all(c.weight == c.tokens == c.steps * 4 * 16 for c in commit.contributors)
    digest = run.commit(last).parameters_digest
    assert {final_digest(config, "alpha"), final_digest(config, "beta")} == {digest}
    assert final_digest(guest.config, "gamma") == digest
    assert_evaluated_last(run)
    losses = Outcome(config=guest.config).held_out("gamma")
    assert losses[config.num_rounds]["gamma"] < 5.0
