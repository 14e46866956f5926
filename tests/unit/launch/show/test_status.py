"""`atoll status`: who is alive, who takes part, what is waited for, of stores that the real parties have written."""

import dataclasses
import json
import os
import re
import shutil
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from rich.console import Console

from launch.show.status import print_status, show_status
from launch.show.status_reader import StoreStatus, store_status
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config
from pretrain.exchange.beats import Beats
from pretrain.exchange.lease import Lease
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.words import Beat
from pretrain.outer.rounds import participants
from pretrain.sync.through_store import ThroughStore
from pretrain.trust.contract import build_contract, contract_bytes
from tests.conftest import TinyConfig
from tests.support import TinyText, one_line_error, tiny_silo, write_settings
from tests.unit.merge.test_membership import join
from tests.unit.test_aggregate import GOOD, one_version, plus_noise, start
from tests.waiting import wait_for

BEGAN = 1_600_000_000.0
"""When all that matters not was written."""


@pytest.fixture
def make(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> Any:
    """A run of five silos."""

    def make(url: str = "", **membership: Any) -> RunConfig:
        config: RunConfig = tiny_config(
            tmp_path,
            outer={"optimizer": "sgd", "lr": 1.0},
            silos={name: tiny_silo(tiny_text, "gamma") for name in ("gamma", "delta", "epsilon")},
            membership=membership,
            exchange={"lease_seconds": 600},
        )
        config.exchange.url = url  # also memory://, which a configuration of several processes must not name
        return config

    return make


@pytest.fixture(scope="module")
def written_once(tmp_path_factory: pytest.TempPathFactory, tiny_text: TinyText) -> Path:
    """The store of a run of two silos with a quorum, where version 1 is committed."""
    directory = tmp_path_factory.mktemp("written-once")
    config = load_config([write_settings(directory, tiny_text, membership={"quorum": 1})])
    aggregator, state = start(config)
    join(config, ["alpha", "beta"])
    for silo in ("alpha", "beta"):
        GOOD.deliver(config, silo, state, plus_noise(state))
    one_version(aggregator, state)
    return Path(config.store_url)


@pytest.fixture
def store_of_one(written_once: Path, tmp_path: Path) -> Path:
    """A copy of it, into which others have put what they like."""
    return Path(shutil.copytree(written_once, tmp_path / "store"))


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
    print_status(url, console=console)
    return [line.rstrip() for line in console.export_text().splitlines()]


def holder(store: Path) -> str:
    record = json.loads((store / "aggregator/000001.json").read_text())
    return str(record["holder"])


def test_who_is_alive_and_who_takes_part(make: Any) -> None:
    config = make(quorum=2, deadline_floor_seconds=0.1, deadline_ceiling_seconds=0.1, away_after_versions=2)
    store, url = Path(config.store_url), config.store_url
    lease = Lease(StoreExchange(url), seconds=600)
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
    lines = shown(config.store_url, width=80)
    assert lines[5] == "beta    never seen yes              -       0           0 refused"
    assert lines[9] == "silo beta was refused for version 1: its norm is absurd"
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
        one = next(silo for silo in status.silos.values() if silo.is_awaited)
        many = replace(status, silos={f"silo-{index}": one for index in range(1000)})
        assert re.fullmatch(r"delivery for version \d from silo-0, .*, \.\.\. \(1,000 in all\)", many.waiting_for or "")
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
    lease = Lease(StoreExchange(url), seconds=600)
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
    assert one_line_error(store_status, str(tmp_path)).startswith(f"{words}inner.speed: 1 given")


def test_signs_of_life_go_on_where_a_killed_process_ended(tmp_path: Path) -> None:
    exchange = StoreExchange(str(tmp_path / "store"))
    objects = exchange.objects
    for name in ("contract.json", "beats/000040", "beats/000041"):
        objects.write(name, b"{}\n")
    assert objects.exists("contract.json")
    beats = Beats(exchange, "beats/", Beat(lease_seconds=7), "law", lease_seconds=0.5)
    wait_for(lambda: objects.names("beats")[-1] >= "000044", poll_seconds=0.01)
    (tmp_path / "store").rename(tmp_path / "away")
    beats.stop(take_back=True)
    assert not (tmp_path / "store").exists()
    newest = max(path for path in (tmp_path / "away" / "beats").iterdir() if path.name.isdigit())
    assert newest.name >= "000044"
    assert newest.read_bytes() == b'{"lease_seconds": 7}\n'
    (tmp_path / "away").rename(tmp_path / "store")
    Beats(exchange, "beats/", Beat(lease_seconds=7), "law", lease_seconds=600).stop(take_back=True)
    assert objects.names("beats") == []


PASSED_OVER = "passed over, as they are not what their names say:"
ESCAPES = "\x1b[2J\x1b]0;title\x07\u202e[red]bold"


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("content", ["", "{", "[]", "7", nested(100_000), '{"a": 1e999}', "\x00", "9" * 5000])
@pytest.mark.parametrize(
    "name",
    [
        "global/000001/commit.json",
        "silos/alpha/000001/manifest.json",
        "silos/alpha/000002/refused-0.json",
        "silos/alpha/membership/000007.json",
        "silos/alpha/beats/999999",
        "rollbacks/000001.json",
        "aggregator/000009.json",
        "waiting/000002.json",
    ],
)
def test_an_object_that_is_none_is_passed_over_and_named(name: str, content: str, store_of_one: Path) -> None:
    (store_of_one / name).parent.mkdir(parents=True, exist_ok=True)
    (store_of_one / name).write_text(content)
    lines = shown(str(store_of_one), width=80)
    assert f"{PASSED_OVER} {name}" in " ".join(lines)
    assert all(len(line) <= 80 for line in lines[3:-4])


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("aggregator/000009.json", {"holder": ESCAPES, "lease_seconds": 1e30}),
        ("aggregator/000009.json", {"holder": {"a": ["b"] * 1000}, "lease_seconds": "long"}),
        ("rollbacks/000001.json", {"reason": ESCAPES, "from_version": ESCAPES, "to_version": [1]}),
        ("silos/alpha/000002/refused-0.json", {"reason": ESCAPES, "final": "yes"}),
        ("silos/alpha/000002/refused-0.json", {"reason": {"a": 1}, "final": 1}),
        ("silos/alpha/membership/000007.json", {"left": ESCAPES, "version": "2"}),
        ("silos/alpha/beats/999999", {"lease_seconds": -5}),
        ("waiting/000002.json", {"silos": [ESCAPES, 1, [], {}], "deadline_seconds": 1e300}),
        ("waiting/000002.json", {"silos": {}, "deadline_seconds": "soon"}),
        ("waiting/000002.json", {"silos": ["alpha"], "deadline_seconds": True}),
    ],
)
def test_what_others_say_reaches_no_terminal_raw(name: str, record: Any, store_of_one: Path) -> None:
    (store_of_one / name).parent.mkdir(parents=True, exist_ok=True)
    (store_of_one / name).write_text(json.dumps(record))
    lines = shown(str(store_of_one), width=80)
    assert all(line.isprintable() for line in lines)
    assert not any("passed over" in line for line in lines)
    if ESCAPES in record.values() and name.split("/", maxsplit=1)[0] in ("rollbacks", "aggregator"):
        assert r"\x1b[2J\x1b]0;title\x07\u202e[red]bold" in "".join(lines)


def untimed(store: Path) -> StoreStatus:
    """All but the clock, which goes on."""
    return dataclasses.replace(store_status(str(store)), now_unix_seconds=None, waited_seconds=None)


def test_what_is_no_object_and_what_is_no_number_is_not_looked_at(store_of_one: Path) -> None:
    before = untimed(store_of_one)
    names = ["global/\u00b2/commit.json", "global/999999/commit.json", "silos/alpha/resumable/\u00b2"]
    for name in names:
        (store_of_one / name).parent.mkdir(parents=True, exist_ok=True)
        (store_of_one / name).write_text("{}")
    (store_of_one / "waiting").mkdir(exist_ok=True)
    os.mkfifo(store_of_one / "waiting/000002.json")  # read, it would never end
    (store_of_one / "loop").symlink_to(store_of_one)
    (store_of_one / "rollbacks").mkdir()
    (store_of_one / "rollbacks/000001.json").symlink_to("/proc/kmsg")
    assert untimed(store_of_one) == before
    manifest = store_of_one / "silos/beta/000001/manifest.json"
    os.truncate(manifest, 300 << 20)  # larger than any of ours
    assert f"{PASSED_OVER} silos/beta/000001/manifest.json" in " ".join(shown(str(store_of_one)))


def test_a_time_that_no_calendar_has(store_of_one: Path) -> None:
    console = Console(record=True, width=80, file=open(os.devnull, "w"))  # noqa: SIM115
    status = dataclasses.replace(store_status(str(store_of_one)), now_unix_seconds=1e18, deadline_unix_seconds=1e19)
    show_status(status, console)
    assert "the store last changed at a time beyond all calendars" in console.export_text()


def test_one_file_of_another_century_ages_nobody(store_of_one: Path) -> None:
    def last_words() -> str:
        return " ".join(shown(str(store_of_one)))

    before = untimed(store_of_one)
    stray = store_of_one / "silos/alpha/000001/manifest.json"
    os.utime(stray, (4.9e9, 4.9e9))
    status = store_status(str(store_of_one))
    assert status.ahead == ["silos/alpha/000001/manifest.json"]
    assert dataclasses.replace(untimed(store_of_one), ahead=[]) == before
    assert status.now_unix_seconds == pytest.approx(time.time(), abs=600)
    assert "and so not counted from: silos/alpha/000001/manifest.json" in last_words()
    for file in store_of_one.rglob("*.*"):  # or is it this machine's clock that is behind?
        os.utime(file, (4.9e9, 4.9e9))
    assert store_status(str(store_of_one)).ahead == []
    assert "the store last changed at 2125-04-10 23:06:40 UTC, and by this machine's clock it is " in last_words()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"outer": {"sync_interval_steps": 0}}, "outer.sync_interval_steps: 0 given; allowed: 1 or more"),
        ({"inner": {"num_steps": "many"}}, "inner.num_steps: many given"),
        ({"inner": {"num_steps": True}}, "inner.num_steps: True given"),
        ({"inner": {ESCAPES: 1}}, r"inner.\x1b[2J"),
        ({"membership": {"quorum": "two"}}, "membership.quorum: two given"),
        ({"membership": {"quorum": 9}}, "membership.quorum: 9 given; allowed: null, or 1 to the 2 silos of the roster"),
        ({"membership": {"sample": -1}}, "membership.sample: -1 given"),
        ({"membership": {"away_after_versions": 0}}, "membership.away_after_versions: 0 given"),
        ({"membership": None}, "it has no membership"),
        ({"roster": "alpha"}, "roster: alpha given; allowed: up to 4096 names"),
        ({"roster": [ESCAPES]}, r"roster: '\x1b[2J"),
        ({"roster": [["alpha"]]}, "roster: [['alpha']] given"),
        ({"roster": []}, "silos: {} given"),
        ({"roster": [f"silo-{number}" for number in range(100_000)]}, "roster: ['silo-0', "),
        ({"roster": [f"silo-{number}" for number in range(1_000_000)]}, "it has more than 4,194,304 bytes"),
        ({"inner": {"lr": [[1]]}}, "inner.lr: [[1]] given"),
    ],
)
def test_a_contract_that_cannot_be_one_is_one_line(change: Any, said: str, store_of_one: Path) -> None:
    file = store_of_one / "contract.json"
    contract = json.loads(file.read_text())
    for key, value in change.items():
        contract[key] = contract[key] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(contract))
    line = one_line_error(store_status, str(store_of_one))
    assert line.startswith(f"store: {str(store_of_one)!r} given; its contract.json is not of this version of atoll: ")
    assert said in line
    assert line.isprintable()
    assert len(line) < 800


@pytest.mark.parametrize("content", ["", "[]", "null", nested(100_000), '{"inner": 1e999}'])
def test_a_contract_that_is_no_json_object_is_one_line(content: str, store_of_one: Path) -> None:
    (store_of_one / "contract.json").write_text(content)
    assert "its contract.json is not of this version of atoll: " in one_line_error(store_status, str(store_of_one))


def test_long_names_stay_whole_in_a_narrow_terminal(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    names = ["university-hospital-of-the-northern-region", "b"]
    config = tiny_config(
        tmp_path, silos={"alpha": None, "beta": None} | {n: tiny_silo(tiny_text, "alpha") for n in names}
    )
    StoreExchange(config.store_url).write_contract(contract_bytes(build_contract(config)))
    lines = shown(config.store_url, width=80)
    end = next(number for number, line in enumerate(lines) if line.startswith("alive "))
    start = next(number for number, line in enumerate(lines) if line.startswith("silo "))
    width = lines[start].index("life")
    assert names[0] in "".join(line[:width].strip() for line in lines[start + 1 : end])
    assert not any("…" in line for line in lines)
