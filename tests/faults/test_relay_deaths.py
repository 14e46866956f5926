"""Kill the relay at any write, or whenever, and start it again: a silo behind it trains as one without it."""

import dataclasses
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.start.local import CommandBuilder, local_commands
from launch.start.processes import ChildCommand
from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config
from pretrain.trust.members import with_keys
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, federate
from tests.faults.scripted import check_struck, scripted
from tests.faults.test_kills import STREAMING, check_same, make_config

POINTS = [
    *(("before_contract", 0), ("after_contract", 0), ("before_upload", 0), ("mid_publish", 0), ("committing", 0)),
    *(("after_commit", 1), ("before_payload", 2), ("before_manifest", 3), ("after_manifest", 4), ("version_read", 4)),
    *(("corrupt_payload", 5), ("before_refusal", 5), ("before_commit", 6), ("before_pruning", 5), ("pruning", 1)),
]
LIVES_SECONDS = (0.7, 2.5)


def relay_command(config: RunConfig, silo: str, here: Path, module: Sequence[str] = ("launch.cli",)) -> list[str]:
    """`atoll relay` for one silo of a configuration that names the federation's store."""
    exchange = dataclasses.replace(config.exchange, url=str(here))
    roster = {"roster": config.full_roster, "silos": {silo: config.silos[silo]}}
    path = here.parent / "relay.yaml"
    save_config(dataclasses.replace(config, directory=str(here.parent / "run"), exchange=exchange, **roster), path)
    return [sys.executable, "-m", *module, "relay", "--config", str(path), "--remote", config.store_url]


def behind_relay(build: CommandBuilder, silo: str, here: Path) -> CommandBuilder:
    """The silo trains with the directory `here` as its store."""

    def changed(config: RunConfig, path: Path) -> list[ChildCommand]:
        commands = {command.name: command for command in build(config, path)}
        argv = [*commands[silo].argv, f"exchange.url={here}"]
        return list((commands | {silo: dataclasses.replace(commands[silo], argv=argv)}).values())

    return changed


def configured(tiny_config: TinyConfig, directory: Path, num_steps: int, exchange: dict[str, Any]) -> RunConfig:
    config = make_config(tiny_config, directory, exchange | {"snapshot_versions": 2}, **STREAMING)
    return dataclasses.replace(config, inner=dataclasses.replace(config.inner, num_steps=num_steps))


class Restarted:
    """A relay that is started again whenever it was killed; with `lives` it is killed after a random time, so often."""

    def __init__(self, command: list[str], log: Path, *, num_lives: int = 0) -> None:
        self.num_kills, self.codes = 0, [0][:0]
        self._command, self._log, self._num_lives = command, log, num_lives
        self._random, self._closing = random.Random(7), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self, seconds: float) -> None:
        """Wait for the end of the last one, so long."""
        self._thread.join(seconds)
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self.codes or self.codes[-1] == -9:
            with self._log.open("ab") as log:
                process = subprocess.Popen(self._command, stdout=log, stderr=log)
            life_seconds = self._random.uniform(*LIVES_SECONDS) if self.num_kills < self._num_lives else 1e9
            waited = 0.0
            while process.poll() is None and waited < life_seconds and not self._closing.wait(0.05):
                waited += 0.05
            if process.poll() is None:
                process.kill()
                self.num_kills += 1
            self.codes.append(process.wait())
            if self._closing.is_set():
                return


def relayed(
    tiny_config: TinyConfig, directory: Path, faults: list[tuple[str, int]], *, num_lives: int, num_steps: int
) -> Restarted:
    """Train alpha behind a relay that dies, beta without one; all must be as if there were no relay."""
    there, here, fired = directory / "there", directory / "site" / "store", directory / "fired"
    fired.mkdir(parents=True)
    config = with_keys(configured(tiny_config, directory, num_steps, {"url": str(there)}), make=True)
    module = scripted("launch.cli", faults, fired)
    relay = Restarted(relay_command(config, "alpha", here, module), directory / "relay.log", num_lives=num_lives)
    try:
        run = federate(config, build_commands=behind_relay(local_commands, "alpha", here))
    finally:
        relay.end(60)
    assert relay.codes[-1] == 0, (directory / "relay.log").read_text()[-4000:]
    check_struck({"relay": [*faults]}, fired)
    undisturbed: Outcome = federate(configured(tiny_config, directory / "undisturbed", num_steps, {}))
    check_same(run, undisturbed)
    return relay


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_killed_at_every_kind_of_write(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """One payload is spoilt on its way, too: it is refused, and the silo delivers again."""
    relay = relayed(tiny_config, tmp_path, POINTS, num_lives=0, num_steps=12)
    num_deaths = len([point for point, _ in POINTS if not point.startswith("corrupt")])
    assert relay.codes.count(-9) == num_deaths
    assert "version 5: the delivery of silo alpha was refused" in (tmp_path / "relay.log").read_text()


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_killed_at_random(tmp_path: Path, tiny_config: TinyConfig) -> None:
    relay = relayed(tiny_config, tmp_path, [], num_lives=20, num_steps=72)
    assert relay.num_kills >= 10  # as many as the run's time allows
