"""A collective whose silos die, hang or differ: all stop with a name and a checkpoint, and go on bit-equal."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.keys import RunConfig
from pretrain.exchange.store import StoreExchange
from pretrain.trust.members import with_keys
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, federate, launched
from tests.distributed.guests import Guest
from tests.distributed.test_collective import collective
from tests.faults.scripted import Faults, check_struck, federate_with, with_faults
from tests.faults.test_kills import STREAMING, check_same, make_config
from tests.support import TinyText, tiny_silo
from tests.waiting import wait_for

DEAD_SECONDS = 3.0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> Outcome:
    """The run that nothing happens to: two silos, top-k up, int8 down, two fragments, overlap, error feedback."""
    return federate(streaming(tiny_config, tmp_path_factory.mktemp("undisturbed")))


def streaming(tiny_config: TinyConfig, directory: Path) -> RunConfig:
    exchange = collective(dead_seconds=DEAD_SECONDS)
    outer = STREAMING | {"codec": "topk", "downlink_codec": "int8"}
    return with_keys(make_config(tiny_config, directory, exchange=exchange, **outer), make=True)


# Whoever dies between its step and its commit is one version behind those that have it.
DEATHS: Faults = {
    "alpha": [("before_publish", 2), ("after_keep", 6)],
    "beta": [("before_publish", 4), ("saving", 9)],
}


@pytest.mark.soak
def test_killed_and_restarted_equals_undisturbed(undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig) -> None:
    run = federate_with(DEATHS, streaming(tiny_config, tmp_path), tmp_path / "fired", max_restarts=20)
    check_same(run, undisturbed)


# At the very end, before the others know that all have the last version, the seventh.
LAST_DEATHS: list[Faults] = [
    {"beta": [("before_publish", 7)]},
    {"alpha": [("after_publish", 7)]},
    {"alpha": [("before_publish", 7)], "beta": [("after_publish", 7)]},
]


@pytest.mark.soak
@pytest.mark.parametrize("deaths", LAST_DEATHS, ids=["behind", "keeper", "both"])
def test_killed_after_the_last_version(
    undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig, deaths: Faults
) -> None:
    run = federate_with(deaths, streaming(tiny_config, tmp_path), tmp_path / "fired", max_restarts=20)
    check_same(run, undisturbed)


@pytest.mark.soak
def test_a_silo_that_has_all_does_not_wait_for_those_that_are_done(
    undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    config = streaming(tiny_config, tmp_path)
    run = federate(config)
    with Guest(config, "beta") as beta:
        beta.start()
        assert "all versions are here, and the other silos have not come in 60 s: done" in beta.wait(100)
    check_same(run, undisturbed)


def wait_for_words(path: Path, words: str) -> None:
    """Until a file is there and has them."""

    def content() -> str:
        return path.read_text() if path.is_file() else ""

    wait_for(lambda: words in content(), seconds=120, poll_seconds=0.02, tells=lambda: f"{path}: {content()[-3000:]}")


HOW = [pytest.param(signal.SIGKILL, id="dead"), pytest.param(signal.SIGSTOP, id="hung", marks=pytest.mark.soak)]


@pytest.mark.parametrize("how", HOW)
def test_the_others_stop_in_time_with_a_name_and_a_checkpoint(
    undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig, how: signal.Signals
) -> None:
    config = streaming(tiny_config, tmp_path)
    metrics = Path(config.directory) / "metrics.jsonl"
    with Guest(config, "alpha") as alpha, Guest(config, "beta") as beta:
        alpha.start()
        beta.start()
        wait_for_words(metrics, '"version": 2')
        for process in beta.workers():
            process.send_signal(how)
        began = time.monotonic()
        log = alpha.wait(60, code=None)
        seconds = time.monotonic() - began
    assert "silo beta is lost: " in log or "silo beta has failed" in log
    assert "all is saved, start again to go on" in log
    # The stated time, and what leaving takes: a checkpoint, and the ends of two processes.
    assert seconds < DEAD_SECONDS + 20
    assert (config.silo_directory("alpha") / "checkpoints").is_dir()

    check_same(federate(config), undisturbed)


WAITS = [pytest.param({}, id="store", marks=pytest.mark.soak), pytest.param(collective(), id="collective")]


@pytest.mark.parametrize("exchange", WAITS)
def test_a_silo_that_waits_for_the_others_stops_when_asked(
    tmp_path: Path, tiny_config: TinyConfig, exchange: dict[str, Any]
) -> None:
    config = tiny_config(tmp_path, exchange=exchange)
    status = config.silo_directory("alpha") / "status.json"
    with Guest(config, "alpha") as alpha:
        alpha.start()
        wait_for_words(status, '"waiting_for": "the contract from ')
        alpha.stop(20)
        assert json.loads(status.read_text())["phase"] == "stopped"


def test_a_silo_with_another_result_is_named(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> None:
    config = tiny_config(
        tmp_path,
        exchange=collective(dead_seconds=DEAD_SECONDS),
        silos={"gamma": tiny_silo(tiny_text, "gamma")},
    )
    faults: Faults = {"gamma": [("corrupt_version", 2)]}
    code, _ = launched(config, build_commands=with_faults(faults, tmp_path / "fired"))
    assert code == 1
    check_struck(faults, tmp_path / "fired")
    for silo in ("alpha", "beta", "gamma"):
        log = (Path(config.directory) / "logs" / "latest" / f"{silo}.log").read_text()
        assert "stopped after step 8: silo gamma: another version 2 than the other silos' came out" in log
    assert Outcome(config=config).exchange.newest_version() == 1

    run = federate(config)  # the memory was at fault, not the run: it goes on from version 1
    ledgers = [StoreExchange(config.ledger_url(silo)) for silo in config.silos]
    assert len({ledger.commit_bytes(3) for ledger in ledgers}) == 1
    assert [contributor.silo for contributor in run.commit(3).contributors] == ["alpha", "beta", "gamma"]
