"""Silos that join late, die, stay away and come back: real processes, a quorum of two of three."""

import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks.elastic import Guest, final_digest, wait_until
from pretrain.exchange.store import StoreExchange
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_evaluated_last, federate
from tests.support import TinyText, tiny_silo

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
        wait_until(lambda: store.newest_version() >= 3, 120)
        guest.start()
        wait_until(lambda: len(contributed()) >= 2, 120)
        guest.kill()
        present.extend([contributed()[0], contributed()[-1]])
        before = store.newest_version()
        wait_until(lambda: store.newest_version() >= before + 4, 120)
        guest.start()

    visitor = threading.Thread(target=come_and_go)
    visitor.start()
    run = federate(config)
    visitor.join()
    said = guest.wait(120)

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
