"""`atoll status`: who is alive, who takes part, what is waited for, of stores that the real parties have written."""

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from rich.console import Console

from launch.show.status import print_status
from launch.show.status_reader import store_status
from pretrain.config.keys import RunConfig
from pretrain.exchange.beats import Beats
from pretrain.exchange.lease import Lease
from pretrain.exchange.objects import Objects
from pretrain.exchange.store import StoreExchange
from pretrain.outer.rounds import participants
from pretrain.sync.through_store import ThroughStore
from pretrain.trust.contract import build_contract, contract_bytes
from tests.conftest import TinyConfig
from tests.support import TinyText, one_line_error, tiny_silo
from tests.unit.merge.test_membership import join
from tests.unit.test_aggregate import GOOD, one_version, plus_noise, start
from tests.waiting import wait_for

BEGAN = 1_600_000_000.0
"""When all that matters not was written."""


@pytest.fixture
def make(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> Any:
    """A run of five silos."""

    def make(url: str = "", **membership: Any) -> RunConfig:
        return tiny_config(
            tmp_path,
            outer={"optimizer": "sgd", "lr": 1.0},
            silos={name: tiny_silo(tiny_text, "gamma") for name in ("gamma", "delta", "epsilon")},
            membership=membership,
            exchange={"url": url, "lease_seconds": 600},
        )

    return make


def joined(config: RunConfig, silo: str) -> ThroughStore:
    """A silo's end of the exchange, as its process has it, with a first sign of life."""
    config.silo_directory(silo).mkdir(parents=True, exist_ok=True)
    exchange = ThroughStore(config, silo)
    exchange.join()
    wait_for(lambda: store_status(config.store_url).silos[silo].life.is_alive, poll_seconds=0.02)
    return exchange


def written_at(store: Path, seconds: dict[str, int]) -> None:
    """Give objects their times, in seconds after `BEGAN`; names may hold *. All others were written then."""
    for path in store.rglob("*"):
        os.utime(path, (BEGAN, BEGAN))
    for pattern, after in seconds.items():
        paths = list(store.glob(pattern))
        assert paths, pattern
        for path in paths:
            os.utime(path, (BEGAN + after, BEGAN + after))


def clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(BEGAN + seconds))


def shown(url: str, width: int = 100) -> list[str]:
    console = Console(record=True, width=width, file=open(os.devnull, "w"))  # noqa: SIM115
    print_status(url, console)
    return [line.rstrip() for line in console.export_text().splitlines()]


def holder(store: Path) -> str:
    record = json.loads((store / "aggregator/000001.json").read_text())
    return str(record["holder"])


def test_who_is_alive_and_who_takes_part(make: Any) -> None:
    config = make(quorum=2, deadline_floor_seconds=0.1, deadline_ceiling_seconds=0.1, away_after_versions=2)
    store, url = Path(config.store_url), config.store_url
    lease = Lease(Objects(url), seconds=600)
    aggregator, state = start(config)
    exchange = join(config, ["alpha", "beta", "gamma", "delta"])
    exchange.announce("delta", left=True, version=0)
    for _ in range(2):
        for silo, tokens in (("alpha", 1_000_000), ("beta", 500)):
            GOOD.deliver(config, silo, state, plus_noise(state), tokens=tokens)
        one_version(aggregator, state)
    GOOD.deliver(config, "alpha", state, plus_noise(state), tokens=1_000_000)
    ends = [joined(config, silo) for silo in ("alpha", "beta", "gamma")]
    exchange.say_waiting(3, ["beta"], deadline_seconds=60.0)
    signs = {"silos/alpha/beats/*": 700, "silos/beta/beats/*": 100, "silos/gamma/beats/*": 99}
    written_at(store, signs | {"aggregator/*.beat-*": 640, "global/000002/commit.json": 655})
    lines = shown(url)
    assert lines[:2] == [f"{url}: version 2 of 3", f"aggregator: alive ({holder(store)})"]
    assert lines[2:-1] == [
        "                                        tokens                        tokens",
        "silo     life              takes part  trained  commits  newest  contributed  version 3",
        "alpha    alive             yes          3.00 M        2       2       2.00 M  delivered",
        "beta     alive             yes           1,000        2       2        1,000  awaited",
        "delta    never seen        left              -        0       -            0",
        "epsilon  never seen        not joined        -        0       -            0",
        "gamma    silent 10:01 min  away              -        0       -            0",
        "alive 2, participating 2, tokens contributed 2.00 M",
        f"waiting for delivery for version 3 from beta: 45 s since commit 2; 2 deliveries are enough in 15 s (at "
        f"{clock(715)} by the store's clock), so far: 1",
    ]
    assert lines[-1].endswith(
        f" h since the store last changed ({clock(700)}): if this machine's clock is right, nobody is alive any more"
    )
    # The deadline counts from the aggregator's own start, if that came after the commit.
    written_at(store, {"aggregator/000001.json": 2, "global/000002/commit.json": 1, "waiting/*": 61})
    assert f"; 2 deliveries are enough in 1 s (at {clock(62)} by" in shown(url)[-2]
    written_at(store, {"silos/alpha/beats/*": 61})
    assert shown(url)[-2].endswith(": 1:01 min since commit 2; 2 deliveries are enough by now, so far: 1")
    for end in ends:
        end.close("")
    lease.release()
    status = store_status(url)
    assert [silo.life.words for silo in status.silos.values()] == [
        "ended",
        "ended",
        "never seen",
        "never seen",
        "ended",
    ]
    assert status.aggregator.words == f"ended ({holder(store)})"
    assert not list(store.glob("silos/*/beats/*"))


def test_a_quorum_that_has_not_come_together(make: Any) -> None:
    config = make(quorum=2, away_after_versions=2)
    _, state = start(config)
    exchange = join(config, ["alpha", "beta"])
    waiting = "waiting for delivery for version 1 from alpha, beta: 0 s since commit 0; 2 deliveries are enough"
    assert shown(config.store_url)[-2] == f"{waiting} after the deadline, so far: 0"
    for silo in ("alpha", "beta"):
        GOOD.deliver(config, silo, state, plus_noise(state))
    assert shown(config.store_url)[-2] == "waiting for commit 1 from the aggregator: 0 s since commit 0"
    manifest = exchange.delivery("beta", 1)
    assert manifest
    exchange.refuse("beta", 1, manifest, "its norm is absurd", final=True)
    lines = shown(config.store_url, width=120)
    assert lines[5].endswith("refused: its norm is absurd")
    assert lines[-2] == (
        "waiting for more silos to join, for version 1: 0 s since commit 0; "
        "2 deliveries are enough after the deadline, so far: 1"
    )


def test_without_a_quorum_from_the_contract_to_the_end(make: Any) -> None:
    config = make(sample=2)
    exchange = StoreExchange(config.store_url)
    exchange.write_contract(contract_bytes(build_contract(config)))
    lines = shown(config.store_url)
    assert lines[:2] == [f"{config.store_url}: no version yet", "aggregator: never seen"]
    assert lines[-3:-1] == [
        "alive 0, participating 2, tokens contributed 0",
        "waiting for version 0 from the aggregator: 0 s since the contract was written",
    ]
    aggregator, state = start(config)
    for version in (1, 2, 3):
        status = store_status(config.store_url)
        drawn = [name for name, silo in status.silos.items() if silo.part == "yes"]
        assert drawn == participants(config.full_roster, version, sample=2, seed=0)
        assert {silo.part for name, silo in status.silos.items() if name not in drawn} == {"not drawn"}
        assert status.waiting_for == f"delivery for version {version} from {', '.join(drawn)}"
        assert shown(config.store_url)[-2].endswith(
            f" since commit {version - 1}; without a quorum there is no deadline"
        )
        for silo in drawn:
            GOOD.deliver(config, silo, state, plus_noise(state))
        one_version(aggregator, state)
    status = store_status(config.store_url)
    assert (status.version, status.is_finished, status.waiting_for) == (3, True, None)
    assert sum(silo.num_commits for silo in status.silos.values()) == 6
    assert shown(config.store_url)[-3:-1] == ["alive 0, participating 2, tokens contributed 600", "finished"]


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_object_stores(kind: str, make: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{request.getfixturevalue('s3_url') if kind == 's3' else 'memory:/'}/{uuid.uuid4().hex}"
    config = make(url)
    lease = Lease(Objects(url), seconds=600)
    start(config)
    end = joined(config, "alpha")
    status = store_status(url)
    assert (status.version, status.aggregator.is_alive) == (0, True)
    assert status.now_unix_seconds == pytest.approx(time.time(), abs=60)
    assert " s since the store last changed (" in shown(url)[-1]
    if kind == "memory":
        find = MemoryFileSystem.find  # some kinds of stores tell no times
        monkeypatch.setattr(MemoryFileSystem, "find", lambda self, path, detail: {key: {} for key in find(self, path)})
        lines = shown(url)
        assert lines[4].startswith("alpha    unknown")
        assert lines[-2:] == [
            "waiting for delivery for version 1 from alpha, beta, delta, epsilon, gamma; without a quorum there is no "
            "deadline",
            "this store does not tell when it changed",
        ]
        monkeypatch.undo()
    end.close("")
    lease.release()
    status = store_status(url)
    assert status.silos["alpha"].life.words == "ended"
    assert status.aggregator.words.startswith("ended (")


def test_what_is_no_store(tmp_path: Path) -> None:
    where = str(tmp_path / "missing")
    assert one_line_error(store_status, where) == f"store: {where!r} given; there is no run in it (no contract.json)"
    assert one_line_error(store_status, "nosuchprotocol://bucket").startswith(
        "store: 'nosuchprotocol://bucket' given; it cannot be read: "
    )
    (tmp_path / "contract.json").write_text("{}")
    words = f"store: {str(tmp_path)!r} given; its contract.json is not of this version of atoll: "
    assert one_line_error(store_status, str(tmp_path)) == f"{words}it has no inner"
    (tmp_path / "contract.json").write_text('{"inner": {"speed": 1}}')
    assert one_line_error(store_status, str(tmp_path)).startswith(f"{words}InnerConfig.__init__() got an unexpected")


def test_signs_of_life_go_on_where_a_killed_process_ended(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path / "store"), anchor="contract.json")
    for name in ("contract.json", "beats/000040", "beats/000041"):
        objects.write(name, b"{}\n")
    assert objects.exists("contract.json")
    beats = Beats(objects, "beats/", lease_seconds=0.5, content=b"ours")
    wait_for(lambda: objects.names("beats")[-1] >= "000044", poll_seconds=0.01)
    (tmp_path / "store").rename(tmp_path / "away")
    beats.stop(take_back=True)
    assert not (tmp_path / "store").exists()
    newest = max(path for path in (tmp_path / "away" / "beats").iterdir() if path.name.isdigit())
    assert newest.name >= "000044"
    assert newest.read_bytes() == b"ours"
    (tmp_path / "away").rename(tmp_path / "store")
    Beats(objects, "beats/", lease_seconds=600).stop(take_back=True)
    assert objects.names("beats") == []
