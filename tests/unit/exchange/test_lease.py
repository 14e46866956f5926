"""One aggregator for each store, shown with processes that hold a lease, end, are killed, or are paused."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.exchange.lease import Lease
from pretrain.exchange.objects import Objects
from pretrain.exchange.store import StoreExchange
from tests.support import one_line_error
from tests.waiting import wait_for

HOLDER = """
import sys
from pathlib import Path
from pretrain.config.errors import ConfigError
from pretrain.exchange.lease import Lease
from pretrain.exchange.store import StoreExchange

url, scratch, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
exchange, leases = StoreExchange(url), []

def commit():
    from tests.unit.exchange.test_store import file_payload, make_commit, make_file

    file = make_file(scratch, b"values", "parameter-000.safetensors")
    payload = file_payload(file, 0)
    exchange.publish(make_commit(0, None, [payload]), [(payload, file)], check=leases[0].check)

actions = {
    "acquire": lambda: leases.append(Lease(exchange, seconds=seconds)),
    "commit": commit,
    "release": lambda: leases[0].release(),
}
for line in sys.stdin:
    try:
        actions[line.strip()]()
        print("done", flush=True)
    except ConfigError as error:
        print(f"error: {error}", flush=True)
"""


class Holder:
    """An aggregator in a process of its own, as far as its lease goes."""

    def __init__(self, url: str, scratch: Path, *, lease_seconds: float) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", HOLDER, url, str(scratch), str(lease_seconds)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = f"the aggregator at {socket.gethostname()}, process {self.process.pid}"
        self.said: list[str] = []

    def begin(self, action: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{action}\n")
        self.process.stdin.flush()

    def end(self) -> str:
        """How what was begun has ended: `done`, or the error."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line == "done\n" or line.startswith("error: "):
                return line.removeprefix("error: ").strip()
            self.said.append(line.strip())
        raise AssertionError("the process has ended")

    def do(self, action: str) -> str:
        self.begin(action)
        return self.end()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()


NewHolder = Callable[..., Holder]


@pytest.fixture
def new_holder(tmp_path: Path) -> Iterator[NewHolder]:
    """Starts holders; ends them with the test."""
    holders: list[Holder] = []

    def start(*, lease_seconds: float = 5.0, url: str | None = None) -> Holder:
        scratch = tmp_path / f"scratch-{len(holders)}"
        holders.append(Holder(url or str(tmp_path / "store"), scratch, lease_seconds=lease_seconds))
        return holders[-1]

    yield start
    for holder in holders:
        holder.process.kill()
        holder.process.wait()
        for pipe in (holder.process.stdin, holder.process.stdout):
            assert pipe
            pipe.close()


def ours(tmp_path: Path, seconds: float = 1.0) -> Lease:
    return Lease(StoreExchange(str(tmp_path / "store")), seconds=seconds)


def names(tmp_path: Path, term: int) -> list[str]:
    """What there is of a term, beats without their numbers."""
    found = sorted(path.name for path in (tmp_path / "store" / "aggregator").glob(f"{term:06d}.*"))
    return [name[7:].split("-")[0] for name in found]


def test_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nonces = set()
    for term in range(1, 5):
        lease = ours(tmp_path, seconds=3600)
        record = json.loads((tmp_path / "store" / "aggregator" / f"{term:06d}.json").read_text())
        assert record["holder"] == f"{socket.gethostname()}, process {os.getpid()}"
        nonces.add(record["nonce"])
        lease.check()
        lease.release()
    assert len(nonces) == 4  # no two write the same bytes, which would count as written for both
    assert capsys.readouterr().out == ""
    assert [names(tmp_path, term) for term in (1, 2)] == [["json"], ["json"]]
    assert [names(tmp_path, term) for term in (3, 4)] == [["beat", "ended", "json"]] * 2


def test_the_second_one_says_who_holds_the_lease(tmp_path: Path, new_holder: NewHolder) -> None:
    first, second = new_holder(lease_seconds=5), new_holder(lease_seconds=5)
    assert first.do("acquire") == "done"
    expected = (
        f"exchange.url: {tmp_path}/store given; {first.name} works on this store; stop it first, or name another store"
    )
    assert second.do("acquire") == expected
    assert second.said == [f"{first.name} holds this store: waiting 5 s for a sign of life"]
    assert one_line_error(ours, tmp_path, 0.5) == expected  # the holder's own beat counts
    assert first.do("commit") == "done"
    assert first.do("release") == "done"
    assert second.do("acquire") == "done"  # at once
    assert len(second.said) == 1


def test_of_many_at_once_one_works(tmp_path: Path, new_holder: NewHolder) -> None:
    holders = [new_holder() for _ in range(3)]
    for holder in holders:
        holder.begin("acquire")
    ends = [holder.end() for holder in holders]
    assert ends.count("done") == 1
    winner = holders[ends.index("done")]
    assert [f"{winner.name} works on this store" in end for end in ends if end != "done"] == [True, True]


def test_one_that_was_killed_on_this_machine_is_followed_at_once(
    tmp_path: Path, new_holder: NewHolder, capsys: pytest.CaptureFixture[str]
) -> None:
    first = new_holder(lease_seconds=3600)
    assert first.do("acquire") == "done"
    first.signal(signal.SIGKILL)
    ours(tmp_path, seconds=3600).release()
    assert capsys.readouterr().out == ""


def test_one_that_was_killed_elsewhere_is_watched(
    tmp_path: Path, new_holder: NewHolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its number means nothing here, even if a process has it."""
    first = new_holder(lease_seconds=0.5)
    assert first.do("acquire") == "done"
    first.signal(signal.SIGKILL)
    file = tmp_path / "store" / "aggregator" / "000001.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"machine": "another", "pid": os.getpid()}))
    ours(tmp_path, seconds=0.2).release()
    assert capsys.readouterr().out.splitlines() == [
        f"{first.name} holds this store: waiting 0.5 s for a sign of life",
        f"{first.name} has been silent for 0.5 s: taking over",
    ]


def test_one_that_was_paused_and_taken_over_commits_nothing(tmp_path: Path, new_holder: NewHolder) -> None:
    first, second = new_holder(lease_seconds=0.5), new_holder(lease_seconds=0.5)
    assert first.do("acquire") == "done"
    first.signal(signal.SIGSTOP)
    assert second.do("acquire") == "done"
    assert second.said[-1] == f"{first.name} has been silent for 0.5 s: taking over"
    first.signal(signal.SIGCONT)
    assert first.do("commit") == (f"exchange.url: {tmp_path}/store given; {second.name} has taken over here")
    assert not (tmp_path / "store" / "global").exists()
    assert second.do("commit") == "done"
    before = sorted((tmp_path / "store" / "aggregator").glob("000001.beat-*"))
    time.sleep(0.5)
    assert sorted((tmp_path / "store" / "aggregator").glob("000001.beat-*")) == before  # no more signs of life
    assert first.do("release") == "done"
    assert second.do("release") == "done"


def test_one_that_ends_while_it_is_watched(tmp_path: Path, new_holder: NewHolder) -> None:
    first, second = new_holder(lease_seconds=60), new_holder(lease_seconds=4)  # a beat every twelve seconds
    assert first.do("acquire") == "done"
    second.begin("acquire")
    time.sleep(0.5)
    assert first.do("release") == "done"
    assert second.end() == "done"
    assert names(tmp_path, 2)[-1] == "json"
    assert not any("silent" in line for line in second.said)


class Lagging(Objects):
    """Objects of a store whose listings are behind: what they show has been there at the first one."""

    def names(self, prefix: str) -> list[str]:
        if not hasattr(self, "_first"):
            self._first = super().names(prefix)
        return self._first


def test_a_listing_that_lags_gives_nobody_a_lease(tmp_path: Path, new_holder: NewHolder) -> None:
    exchange = StoreExchange(str(tmp_path / "store"))
    exchange.objects = objects = Lagging(str(tmp_path / "store"))
    assert objects.names("aggregator") == []
    for _ in range(3):
        ours(tmp_path).release()
    first = new_holder(lease_seconds=3600)
    assert first.do("acquire") == "done"
    file = tmp_path / "store" / "aggregator" / "000004.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lease_seconds": 0.4}))
    lease = Lease(
        exchange, seconds=0.4
    )  # it sees no beat: the worst that can come of it is that the holder is taken for dead ...
    assert names(tmp_path, 5)[-1] == "json"  # ... but the term is the next one, ...
    assert f"process {os.getpid()} has taken over here" in first.do("commit")  # ... and one of the two commits
    lease.check()
    lease.release()


def test_beats_go_on_after_trouble(tmp_path: Path) -> None:
    lease, store = ours(tmp_path, seconds=0.5), tmp_path / "store"

    def beat() -> str:
        return max((path.name for path in (store / "aggregator").glob("*.beat-*")), default="")

    seen = wait_for(beat, poll_seconds=0.01)
    store.rename(tmp_path / "away")
    store.write_text("a file, so that nothing can be written here")
    time.sleep(0.4)
    store.unlink()
    (tmp_path / "away").rename(store)
    wait_for(lambda: beat() != seen, poll_seconds=0.01)
    lease.release()
    assert names(tmp_path, 1)[-2:] == ["ended", "json"]


def test_in_a_bucket(s3_url: str, tmp_path: Path, new_holder: NewHolder) -> None:
    url = f"{s3_url}/lease"
    first, second = new_holder(url=url), new_holder(url=url)
    assert first.do("acquire") == "done"
    assert f"{first.name} works on this store" in second.do("acquire")
    assert first.do("release") == "done"
    assert second.do("acquire") == "done"
    assert f"{second.name} has taken over here" in first.do("commit")
    assert second.do("commit") == "done"


def test_ending_in_an_outage_does_not_wait_for_it(tmp_path: Path) -> None:
    """The signs of life are not tried again either; who comes next watches for them."""
    store = tmp_path / "store"
    exchange = StoreExchange(str(store), retry_seconds=3600)
    exchange.write_contract(b"{}")
    lease = Lease(exchange, seconds=0.3)
    store.rename(tmp_path / "away")
    time.sleep(0.2)
    lease.release()
    assert not store.exists()
    (tmp_path / "away").rename(store)
    assert set(names(tmp_path, 1)) - {"beat"} == {"json"}
