"""A delivery that comes byte by byte: the others are merged without it, or it is waited for until it comes as usual."""

import dataclasses
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pretrain.aggregate import Aggregator, OuterState
from pretrain.config.keys import RunConfig
from pretrain.exchange.store import StoreExchange
from pretrain.merge.looks import Looks
from pretrain.trust.ledger import Commit
from tests.conftest import TinyConfig
from tests.support import TinyText, tiny_silo
from tests.unit.conftest import in_front_of_s3
from tests.unit.dripping import DrippingLine
from tests.unit.test_aggregate import GOOD, one_version, plus_noise, start
from tests.waiting import wait_for

ROSTER = ("alpha", "beta", "gamma")
SOON = {"quorum": 2, "deadline_floor_seconds": 0.4, "deadline_ceiling_seconds": 0.4}


@pytest.fixture
def run(s3_url: str, tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> Any:
    """A run of three silos in a bucket that is reached through a line."""
    with in_front_of_s3(DrippingLine) as line:

        def make(**membership: Any) -> tuple[RunConfig, DrippingLine, Aggregator, OuterState]:
            config = tiny_config(
                tmp_path,
                inner={"num_steps": 24},
                outer={"optimizer": "sgd", "lr": 1.0},
                silos={"gamma": tiny_silo(tiny_text, "gamma")},
                membership=membership,
                exchange={
                    "url": f"{s3_url}/{uuid.uuid4().hex}",
                    "stall_seconds": 2.0,
                    "retry_seconds": 10.0,
                    "poll_seconds": 0.1,
                },
            )
            aggregator, state = start(config)
            if membership:
                for silo in ROSTER:
                    store(config).announce(silo, left=False, version=0)
            return config, line, aggregator, state

        yield make


def store(config: RunConfig) -> StoreExchange:
    exchange = StoreExchange(config.store_url)
    exchange.read_contract()
    return exchange


def deliver(config: RunConfig, silo: str, state: OuterState, scratch: Path) -> None:
    """A good delivery, as it would be in a directory, in the bucket."""
    objects = StoreExchange(config.store_url).objects
    there = dataclasses.replace(config, exchange=dataclasses.replace(config.exchange, url=str(scratch)))
    scratch.mkdir(exist_ok=True)
    for name in ("contract.json", f"global/{state.version:06d}/commit.json"):
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_bytes(objects.read(name))
    GOOD.deliver(there, silo, state, plus_noise(state, seed=ROSTER.index(silo)))
    folder = Path("silos") / silo / f"{state.version + 1:06d}"
    for file in sorted((scratch / folder).iterdir(), key=lambda file: file.name == "manifest.json"):
        objects.upload(file, str(folder / file.name))


def silos_of(config: RunConfig, version: int) -> list[str]:
    return [c.silo for c in Commit.from_bytes(store(config).commit_bytes(version)).contributors]


def test_the_others_are_merged_without_it(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, line, aggregator, state = run(**SOON)
    for silo in ROSTER:
        deliver(config, silo, state, tmp_path / "there")
    line.drip(r"GET .*/gamma/0.*safetensors")
    before = set(threading.enumerate())
    began = time.monotonic()
    one_version(aggregator, state)
    assert time.monotonic() - began < 60
    assert silos_of(config, 1) == ["alpha", "beta"]
    said = capsys.readouterr().out
    assert "version 1: waiting for silo gamma: delivery for version 1, which is on its way; the others are en" in said
    assert "version 1: the delivery of silo gamma was not there in time\n" in said
    assert "refused" not in said
    wait_for(lambda: not [t for t in set(threading.enumerate()) - before if "ThreadPool" in t.name], seconds=30)
    assert list((tmp_path / "tiny" / "aggregator" / "inbox").glob("gamma*")) == []
    line.heal()
    for silo in ("beta", "gamma"):
        deliver(config, silo, state, tmp_path / "there")
    one_version(aggregator, state)
    assert silos_of(config, 2) == ["beta", "gamma"]


def test_who_is_needed_is_waited_for_and_others_are_looked_at_meanwhile(
    run: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, line, aggregator, state = run()
    deliver(config, "gamma", state, tmp_path / "there")
    line.drip(r"GET .*/gamma/0.*safetensors")
    said = ""

    def has_said(words: str) -> bool:
        nonlocal said
        said += capfd.readouterr().out
        return words in said

    with ThreadPoolExecutor(1) as pool:
        committed = pool.submit(one_version, aggregator, state)
        wait_for(lambda: any("GET" in asked and "gamma/0" in asked for asked in line.asked), seconds=30)
        for silo in ("alpha", "beta"):
            deliver(config, silo, state, tmp_path / "there")
        wait_for(lambda: has_said("waiting for silo gamma: delivery for version 1\n"), seconds=60)
        wait_for(lambda: has_said("the delivery of silo gamma counts as not there: exchange.url: "), seconds=60)
        assert not committed.done()
        line.heal()
        committed.result(60)
    assert "less than 256 KiB came in 2 s (exchange.stall_seconds); tried for 10 s (exchange.retry_seconds)\n" in said
    assert silos_of(config, 1) == [*ROSTER]


def test_slow_ones_do_not_keep_the_others_from_being_looked_at() -> None:
    """Two at once, of which two are slow: the others come, and nobody is looked at twice at a time."""
    asked: list[str] = []

    def look(silo: str, over: threading.Event) -> str | None:
        asked.append(silo)
        return None if silo.startswith("slow") and over.wait(60) else silo

    silos = ["slow-1", "slow-2", "alpha", "beta", "gamma"]
    began = time.monotonic()
    with Looks(look, at_once=2, most=5, patience_seconds=0.3) as looks:
        assert list(looks.at(silos, 2.0)) == ["alpha", "beta", "gamma"]
        assert looks.at(silos[:2], 0.1) == {}
        assert looks.under_way == ["slow-1", "slow-2"]
    assert time.monotonic() - began < 30
    assert sorted(asked) == sorted(silos)


def test_what_a_look_raises_ends_the_others() -> None:
    def look(silo: str, over: threading.Event) -> str | None:
        if silo == "alpha":
            raise OSError("nothing goes")
        return None if over.wait(60) else silo

    began = time.monotonic()
    with pytest.raises(OSError, match="nothing goes"), Looks(look, at_once=4, most=4, patience_seconds=60) as looks:
        looks.at(["beta", "alpha"], 60.0)
    assert time.monotonic() - began < 30
