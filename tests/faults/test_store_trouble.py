"""The store of a running federation goes away, or is full, and comes back: nothing is lost and no bit differs."""

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config
from pretrain.exchange.lease import Lease
from pretrain.exchange.store import StoreExchange
from pretrain.host.stopping import STOPPED
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, federate
from tests.faults.scripted import Faults, federate_with
from tests.faults.test_kills import check_same, make_config
from tests.support import fill, mounted
from tests.unit.test_aggregate import GOOD, plus_noise, start
from tests.waiting import PATIENCE_SECONDS, wait_for

OUTAGE_SECONDS = 8.0
OVER = re.compile(r" was (?:read|written|listed|deleted) after \d+\.\d s$", re.MULTILINE)


@contextmanager
def disturbed(store: Path, action: Callable[[], None]) -> Iterator[threading.Thread]:
    """Does `action` beside the test, once version 1 is committed; it must have been done when the block ends."""

    def wait_and_act() -> None:
        is_there = (store / "global" / "000001" / "commit.json").exists
        wait_for(lambda: is_there() or ended.is_set(), seconds=math.inf, poll_seconds=0.02)
        if not ended.is_set():
            action()

    ended = threading.Event()
    thread = threading.Thread(target=wait_and_act)
    thread.start()
    try:
        yield thread
    finally:
        ended.set()
        thread.join()


def move_away_and_back(store: Path, seconds: float) -> None:
    store.rename(store.with_name("away"))
    time.sleep(seconds)
    store.with_name("away").rename(store)  # fails if somebody has made a new one meanwhile


def logs(run: Outcome) -> str:
    return "".join(file.read_text() for file in sorted((Path(run.config.directory) / "logs" / "latest").iterdir()))


@pytest.mark.soak
def test_an_outage_in_mid_run(undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = make_config(tiny_config, tmp_path)
    store = Path(config.store_url)

    with disturbed(store, lambda: move_away_and_back(store, OUTAGE_SECONDS)):
        run = federate(config)
    for name in ("aggregator", "alpha", "beta"):  # it struck, in every process
        log = (Path(config.directory) / "logs" / "latest" / f"{name}.log").read_text()
        assert "this directory is not there any more; trying again for 600 s" in log
        assert log.count("; trying again for ") == len(OVER.findall(log))
    check_same(run, undisturbed)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_with_overlap_the_silos_train_on_in_an_outage_of_two_minutes(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """What leaves at step 8 is needed at step 10, where nothing but the store is missing."""
    overlap = {"overlap_steps": 2, "codec": "int4", "downlink_codec": "int4", "error_feedback": 0.9}
    undisturbed = federate(make_config(tiny_config, tmp_path / "undisturbed", **overlap))
    config, times = make_config(tiny_config, tmp_path, **overlap), []

    def go_away() -> None:
        metrics = Path(config.directory) / "metrics.jsonl"

        def all_have_version_1() -> bool:
            return metrics.read_text().count('"kind": "sync"') >= len(config.silos)

        wait_for(all_have_version_1, seconds=120, poll_seconds=0.02)
        times.append(time.time())
        move_away_and_back(Path(config.store_url), 120.0)
        times.append(time.time())

    slow: Faults = {silo: [("step", 0, 0, "slow", 0.5)] for silo in config.silos}
    with disturbed(Path(config.store_url), go_away):
        run = federate_with(slow, config, tmp_path / "fired")
    began, ended = times
    for silo in config.silos:
        steps = [r for r in run.records if r["kind"] == "step" and r["silo"] == silo and r["time"] < ended]
        assert steps[-1]["step"] == 10
        assert began < steps[-1]["time"] < began + 20
    assert "this directory is not there any more; trying again for 600 s" in logs(run)
    check_same(run, undisturbed)


@pytest.mark.soak
def test_a_full_disk_in_mid_run(undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig) -> None:
    with mounted(tmp_path / "disk", num_bytes=24 << 20) as disk:
        config = make_config(tiny_config, tmp_path, {"url": str(disk / "store")})

        def fill_and_make_room() -> None:
            filler = fill(disk)
            time.sleep(OUTAGE_SECONDS)
            filler.unlink()

        with disturbed(disk / "store", fill_and_make_room):
            run = federate(config)
        log = logs(run)
        assert "cannot be written: No space left on device; trying again for 600 s" in log  # it struck
        assert log.count("; trying again for ") == len(OVER.findall(log))
        assert [path for path in disk.rglob("*") if path.name.startswith(".")] == []
        check_same(run, undisturbed)


# ---- the aggregator's process


def aggregator(config: RunConfig) -> subprocess.Popen[str]:
    Path(config.directory).mkdir(parents=True, exist_ok=True)
    path = Path(config.directory) / "config.yaml"
    save_config(config, path)
    command = [sys.executable, "-m", "pretrain.aggregate", "--config", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_disk_that_stays_full_ends_in_one_line(tmp_path: Path, tiny_config: TinyConfig) -> None:
    with mounted(tmp_path / "disk", num_bytes=1 << 16) as disk:
        exchange = {"url": str(disk / "store"), "retry_seconds": 0.5}  # version 0 does not fit
        process = aggregator(tiny_config(tmp_path, exchange=exchange))
        out, error = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == STOPPED
        assert error == (
            f"atoll: exchange.url: {disk}/store given; global/000000/parameter-000.safetensors cannot be written: "
            "No space left on device; tried for 0.5 s (exchange.retry_seconds)\n"
        )
        assert out.count("; trying again for 0.5 s\n") == 1
        assert not list(disk.rglob("*.tmp"))


@pytest.mark.soak
def test_two_aggregators(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """The second one stops; when the first does not move it takes over, and the first commits nothing any more."""
    exchange = {"url": str(tmp_path / "store"), "lease_seconds": 6}
    configs = [tiny_config(tmp_path / name, exchange=exchange) for name in "abc"]
    first = aggregator(configs[0])
    try:
        assert first.stdout
        while "waiting for" not in first.stdout.readline():  # version 0 is there
            assert first.poll() is None
        second = aggregator(configs[1])
        _, error = second.communicate(timeout=PATIENCE_SECONDS)
        assert second.returncode == 2
        assert f", process {first.pid} works on this store; stop it first, or name another store\n" in error
        assert error.count("\n") == 1
        assert first.poll() is None

        first.send_signal(signal.SIGSTOP)
        lease = Lease(StoreExchange(configs[2].store_url), seconds=6)
        third, state = start(configs[2])
        for silo in configs[2].full_roster:
            GOOD.deliver(configs[2], silo, state, plus_noise(state))
        first.send_signal(signal.SIGCONT)  # it finds all deliveries there
        _, error = first.communicate(timeout=PATIENCE_SECONDS)
        assert first.returncode == 2
        assert f", process {os.getpid()} has taken over here\n" in error
        assert not (tmp_path / "store" / "global" / "000001" / "commit.json").exists()
        deliveries = third.collect(state)
        third.commit(state, deliveries, third.merge(state, deliveries))
        assert (tmp_path / "store" / "global" / "000001" / "commit.json").exists()
        lease.release()
    finally:
        first.kill()
        first.communicate()
