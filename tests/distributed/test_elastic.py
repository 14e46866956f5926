"""Silos that join late, die, stay away and come back: real processes, a quorum of two of three."""

import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from launch.local import local_commands
from pretrain.config import RunConfig, save_config
from pretrain.exchange.store import StoreExchange
from pretrain.outer.digest import digest_tensors
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_evaluated_last, federate
from tests.support import TinyText, tiny_silo

ROSTER = ["alpha", "beta", "gamma"]
RULES = {"quorum": 2, "deadline_floor_seconds": 0.5, "deadline_ceiling_seconds": 20.0, "away_after_versions": 2}


class Guest:
    """A silo with a run directory of its own, started and killed by the test."""

    def __init__(self, config: RunConfig, name: str) -> None:
        self.config, self.name = config, name
        path = Path(config.directory) / "config.yaml"
        save_config(config, path)
        self._command = next(command for command in local_commands(config, path) if command.name == name)
        self._log = Path(config.directory) / "guest.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command.argv,
                env=os.environ | self._command.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        assert self._process
        agent = psutil.Process(self._process.pid)
        for process in [agent, *agent.children(recursive=True)]:  # the workers have process groups of their own
            process.kill()
        self._process.wait()

    def wait(self) -> str:
        assert self._process
        code = self._process.wait(timeout=120)
        text = self._log.read_text()
        assert code == 0, text[-5000:]
        return text


def wait_until(what: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def final_digest(config: RunConfig, silo: str) -> str:
    """Of the global parameters that a silo's last checkpoint holds."""
    newest = max((config.silo_directory(silo) / "checkpoints").glob("step-*"))
    return digest_tensors(load_file(newest / "global.safetensors").items())


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
        wait_until(lambda: store.newest_version() >= 3)
        guest.start()
        wait_until(lambda: len(contributed()) >= 2)
        guest.kill()
        present.extend([contributed()[0], contributed()[-1]])
        before = store.newest_version()
        wait_until(lambda: store.newest_version() >= before + 4)
        guest.start()

    visitor = threading.Thread(target=come_and_go)
    visitor.start()
    run = federate(config)
    visitor.join()
    said = guest.wait()

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
