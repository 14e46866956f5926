"""A collective whose silos die, hang or differ: all stop with a name and a checkpoint, and go on bit-equal."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from launch.start.local import launch_local, local_commands
from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config
from pretrain.exchange.store import StoreExchange
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, federate
from tests.distributed.test_collective import collective
from tests.faults.scripted import Faults, with_faults
from tests.faults.test_kills import STREAMING, check_same, make_config
from tests.support import TinyText, tiny_silo

DEAD_SECONDS = 3.0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> Outcome:
    """The run that nothing happens to: two silos, top-k up, int8 down, two fragments, overlap, error feedback."""
    return federate(streaming(tiny_config, tmp_path_factory.mktemp("undisturbed")))


def streaming(tiny_config: TinyConfig, directory: Path) -> RunConfig:
    exchange = collective(dead_seconds=DEAD_SECONDS)
    outer = STREAMING | {"codec": "topk", "downlink_codec": "int8"}
    return make_config(tiny_config, directory, exchange=exchange, **outer)


# Whoever dies between its step and its commit is one version behind those that have it.
DEATHS: Faults = {
    "alpha": [("before_publish", 2), ("after_keep", 6)],
    "beta": [("before_publish", 4), ("saving", 9)],
}


@pytest.mark.soak
def test_killed_and_restarted_equals_undisturbed(undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig) -> None:
    fired = tmp_path / "fired"
    fired.mkdir()
    build = with_faults(DEATHS, fired)
    run = federate(streaming(tiny_config, tmp_path), max_restarts=20, build_commands=build)
    expected = {f"{point}-{when}" for deaths in DEATHS.values() for point, when, *_ in deaths}
    assert {path.name for path in fired.iterdir()} == expected
    check_same(run, undisturbed)


@contextmanager
def started(config: RunConfig, silos: Sequence[str]) -> Iterator[dict[str, subprocess.Popen]]:
    """The silos' processes without a launcher that watches them, as in several institutions."""
    path = Path(config.directory) / "config.yaml"
    save_config(config, path)
    children = {}
    try:
        for command in [command for command in local_commands(config, path) if command.name in silos]:
            with (Path(config.directory) / f"{command.name}.log").open("a") as log:
                children[command.name] = subprocess.Popen(
                    command.argv, env=os.environ | command.environment, stdout=log, stderr=log
                )
        yield children
    finally:
        for child in children.values():
            if child.poll() is None:
                for process in [*psutil.Process(child.pid).children(recursive=True), child]:
                    process.kill()
                child.wait()


def wait_for(path: Path, words: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not (path.is_file() and words in path.read_text()):
        assert time.monotonic() < deadline, path.read_text()[-3000:] if path.is_file() else f"no {path}"
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "hung"])
def test_the_others_stop_in_time_with_a_name_and_a_checkpoint(
    undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig, how: signal.Signals
) -> None:
    config = streaming(tiny_config, tmp_path)
    metrics = Path(config.directory) / "metrics.jsonl"
    with started(config, ["alpha", "beta"]) as children:
        wait_for(metrics, '"version": 2')
        for process in psutil.Process(children["beta"].pid).children(recursive=True):
            process.send_signal(how)
        began = time.monotonic()
        children["alpha"].wait(60)
        seconds = time.monotonic() - began
    log = (Path(config.directory) / "alpha.log").read_text()
    assert "silo beta is lost: " in log or "silo beta has failed" in log
    assert "all is saved, start again to go on" in log
    # The stated time, and what leaving takes: a checkpoint, and the ends of two processes.
    assert seconds < DEAD_SECONDS + 20
    assert (config.silo_directory("alpha") / "checkpoints").is_dir()

    check_same(federate(config), undisturbed)


@pytest.mark.parametrize("exchange", [{}, collective()], ids=["store", "collective"])
def test_a_silo_that_waits_for_the_others_stops_when_asked(
    tmp_path: Path, tiny_config: TinyConfig, exchange: dict[str, Any]
) -> None:
    config = tiny_config(tmp_path, exchange=exchange)
    status = config.silo_directory("alpha") / "status.json"
    with started(config, ["alpha"]) as children:
        wait_for(status, '"waiting_for": "the contract from ')
        children["alpha"].send_signal(signal.SIGTERM)
        children["alpha"].wait(20)
        assert json.loads(status.read_text())["phase"] == "stopped"


def test_a_silo_with_another_result_is_named(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> None:
    config = tiny_config(
        tmp_path,
        exchange=collective(dead_seconds=DEAD_SECONDS),
        silos={"gamma": tiny_silo(tiny_text, "gamma")},
    )
    console = tmp_path / "console"
    build = with_faults({"gamma": [("corrupt_version", 2)]}, tmp_path)
    with console.open("w") as file:
        code = launch_local(config, build_commands=build, console=Console(file=file, width=200))
    assert code == 1
    assert (tmp_path / "corrupt_version-2").exists()
    for silo in ("alpha", "beta", "gamma"):
        log = (Path(config.directory) / "logs" / "latest" / f"{silo}.log").read_text()
        assert "stopped after step 8: silo gamma: another version 2 than the other silos' came out" in log
    assert Outcome(config=config).exchange.newest_version() == 1

    run = federate(config)  # the memory was at fault, not the run: it goes on from version 1
    ledgers = [StoreExchange(config.ledger_url(silo)) for silo in config.silos]
    assert len({ledger.commit_bytes(3) for ledger in ledgers}) == 1
    assert [contributor.silo for contributor in run.commit(3).contributors] == ["alpha", "beta", "gamma"]
