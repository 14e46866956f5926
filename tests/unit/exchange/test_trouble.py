"""A store in trouble: what may pass is tried again, what cannot is said at once, and no write is lost or doubled."""

import math
import os
import re
import socket
import socketserver
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from pretrain.config.errors import ConfigError
from pretrain.exchange.directory import Directory
from pretrain.exchange.objects import Objects, StopWaitingError, StoreTroubleError
from pretrain.host.disk import full_disk
from tests.conftest import TinyConfig
from tests.support import fill, mounted, one_line_error
from tests.unit.conftest import fresh_clients, in_front_of_s3
from tests.waiting import PATIENCE_SECONDS

OUTAGE_SECONDS = 0.7
BIG = os.urandom(300_000)


def digest(data: bytes) -> str:
    return blake3(data).hexdigest()


def after(seconds: float, action: Callable[[], object]) -> threading.Timer:
    """Run `action` beside the test."""
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


def lines_of(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """What was printed when trouble began, and when it was over."""
    lines = capsys.readouterr().out.splitlines()
    began = [line for line in lines if "; trying again for " in line]
    over = [line for line in lines if re.search(r" was (read|written|listed|deleted) after \d+\.\d s$", line)]
    assert len(lines) == len(began) + len(over)
    return began, over


def leftovers(directory: Path) -> list[Path]:
    return list(directory.rglob(".*"))


def store_of(root: Path, **settings: Any) -> Objects:
    """A directory with a few objects, as one who has used it before sees it."""
    objects = Objects(str(root), anchor="contract.json", **settings)
    objects.write("contract.json", b"{}")
    objects.write("a/one", b"1")
    objects.write("a/old", b"0")
    (root.parent / "big").write_bytes(BIG)
    objects.upload(root.parent / "big", "a/big")
    return objects


@contextmanager
def moved(root: Path) -> Iterator[None]:
    root.rename(root.with_name("away"))
    yield
    root.with_name("away").rename(root)


@contextmanager
def a_file(root: Path) -> Iterator[None]:
    with moved(root):
        root.write_bytes(b"")
        yield
        root.unlink()


@contextmanager
def empty(root: Path) -> Iterator[None]:
    """As where its file system is not mounted any more."""
    with moved(root):
        root.mkdir()
        yield
        root.rmdir()


GONE = {"moved": moved, "a file": a_file, "empty": empty}


@pytest.mark.parametrize("way", GONE)
def test_every_verb_outlasts_an_outage(way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "store"
    objects = store_of(root, retry_seconds=60)
    verbs: dict[str, tuple[Callable[[], object], object]] = {
        "read": (lambda: objects.read("a/one"), b"1"),
        "exists": (lambda: objects.exists("a/one"), True),
        "names": (lambda: objects.names("a"), ["big", "old", "one"]),
        "write": (lambda: objects.write("b/c/two", b"2"), None),
        "upload": (lambda: objects.upload(tmp_path / "big", "c"), None),
        "download": (
            lambda: objects.download("a/big", tmp_path / "copy", limit_bytes=len(BIG)),
            (digest(BIG), len(BIG)),
        ),
        "delete": (lambda: objects.delete("d"), None),
    }
    with ThreadPoolExecutor(len(verbs)) as pool:
        with GONE[way](root):
            results = {verb: pool.submit(call) for verb, (call, _) in verbs.items()}
            time.sleep(OUTAGE_SECONDS)
            assert not any(result.done() for result in results.values())
        for verb, (_, expected) in verbs.items():
            assert results[verb].result(PATIENCE_SECONDS) == expected, verb
    began, over = lines_of(capsys)
    assert len(began) == len(over) == len(verbs)
    for line in began:
        assert line.startswith(f"exchange.url: {root} given; ")
        assert line.endswith("; trying again for 60 s")
    for name, verb in (("a/one", "read"), ("a", "listed"), ("b/c/two", "written"), ("d", "deleted")):
        assert any(f"; {name} cannot be {verb}: " in line for line in began)
    assert objects.read("b/c/two") == b"2"
    assert objects.read("c") == (tmp_path / "copy").read_bytes() == BIG
    assert leftovers(root) == []


def test_an_answer_is_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is not there, or is there already, is not tried again: while nothing is wrong, and after an outage."""
    root = tmp_path / "store"
    objects = store_of(root, retry_seconds=60)

    def ask() -> None:
        assert not objects.exists("a/none")
        assert objects.names("none") == objects.names("a/one/none") == []
        for missing in ("a/none", "a/one/none"):
            with pytest.raises((FileNotFoundError, NotADirectoryError)):
                objects.read(missing)
        with pytest.raises(FileExistsError, match="a/one exists already; nothing is ever overwritten"):
            objects.write("a/one", b"another")
        with pytest.raises(ConfigError, match="a/one/two cannot be written"):
            objects.write("a/one/two", b"below an object")

    ask()
    assert lines_of(capsys) == ([], [])
    with ThreadPoolExecutor(1) as pool:
        with moved(root):
            asked = pool.submit(ask)
            time.sleep(OUTAGE_SECONDS)
            assert not asked.done()
        asked.result(PATIENCE_SECONDS)
    assert [len(lines) for lines in lines_of(capsys)] == [1, 1]


def test_the_time_runs_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "store"
    objects = store_of(root, retry_seconds=0.4)
    with moved(root):
        for verb, call in (("read", lambda: objects.exists("x")), ("written", lambda: objects.write("x", b""))):
            message = one_line_error(call)
            assert message == (
                f"exchange.url: {root} given; x cannot be {verb}: this directory is not there any more; "
                "tried for 0.4 s (exchange.retry_seconds)"
            )
        with pytest.raises(StoreTroubleError, match=r"this directory is not there any more$"):
            objects.at_once().read("x")
        with pytest.raises(FileNotFoundError):  # gone only after it was seen to be there
            Directory(str(root)).create("b/x", ".x.tmp", lambda file: file.write(b"x"), make_root=False)
        assert not root.exists()  # nobody makes it anew
    began, over = lines_of(capsys)
    assert len(began) == 2  # at once says nothing
    assert over == []


def test_a_copy_knows_what_was_seen_since_it_was_made(tmp_path: Path) -> None:
    """Who takes a lease, and leaves signs of life seldom, has looked for the last time before there was a contract."""
    root = tmp_path / "store"
    objects = Objects(str(root), anchor="contract.json")
    seldom = objects.at_once()
    seldom.write("aggregator/000001.beat-000000", b"")
    objects.write("contract.json", b"{}")
    assert objects.exists("contract.json")
    with moved(root):
        with pytest.raises(StoreTroubleError, match=r"this directory is not there any more$"):
            seldom.write("aggregator/000001.beat-000001", b"")
        assert not root.exists()


def test_a_process_that_is_asked_to_end_does_not_wait(tmp_path: Path) -> None:
    closing = threading.Event()
    objects = store_of(tmp_path / "store", retry_seconds=3600, closing=closing)
    with moved(tmp_path / "store"), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(objects.read, "a/one")
        time.sleep(OUTAGE_SECONDS)
        assert not waiting.done()
        closing.set()
        with pytest.raises(StopWaitingError):
            waiting.result(PATIENCE_SECONDS)
        with pytest.raises(StopWaitingError):
            objects.names("a")
    assert objects.read("a/one") == b"1"  # where nothing is wrong, what has to be said can be said


# ---- a full disk


def test_a_full_disk_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "big").write_bytes(BIG)
    with mounted(tmp_path / "disk", num_bytes=2 << 20) as disk:
        objects = Objects(str(disk / "store"), retry_seconds=60)
        objects.write("first", b"1")
        for call in (
            lambda: objects.write("a/small", BIG[:100_000]),
            lambda: objects.upload(tmp_path / "big", "a/big"),
        ):
            timer = after(OUTAGE_SECONDS, fill(disk).unlink)
            call()
            timer.join()
        assert objects.read("a/small") == BIG[:100_000]
        assert objects.read("a/big") == BIG
        assert leftovers(disk) == []
        began, over = lines_of(capsys)
        assert len(began) == len(over) == 2
        assert all("cannot be written: No space left on device" in line for line in began)


def test_a_full_disk_of_our_own_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A download's target is no part of the store: nothing is tried again, and the user learns which disk it is."""
    objects = store_of(tmp_path / "store", retry_seconds=60)
    with mounted(tmp_path / "disk", num_bytes=2 << 20) as disk:
        copy = disk / "inbox" / "copy"
        copy.parent.mkdir()
        filler = fill(disk)
        with pytest.raises(OSError, match=rf"No space left on device: '{copy}'$") as raised:
            objects.download("a/big", copy, limit_bytes=len(BIG))
        assert full_disk(raised.value, str(disk)).startswith(f"directory: '{disk}' given; there is no space left")
        assert not copy.exists()
        filler.unlink()
        assert objects.download("a/big", copy, limit_bytes=len(BIG)) == (digest(BIG), len(BIG))
        assert copy.read_bytes() == BIG
    assert [len(lines) for lines in lines_of(capsys)] == [0, 0]


# ---- what is certain


@contextmanager
def nobody() -> Iterator[None]:
    """Without root's rights."""
    if os.geteuid() != 0:
        pytest.skip("only root can give up its rights and take them back")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_is_forbidden_is_not_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are forbidden from the top
        Path(folder).chmod(0o755)
        objects = store_of(Path(folder) / "store", retry_seconds=3600)
        (Path(folder) / "store" / "a").chmod(0o700)
        with nobody():
            for call, verb in (
                (lambda: objects.read("a/one"), "read"),
                (lambda: objects.exists("a/one"), "read"),
                (lambda: objects.names("a"), "listed"),
                (lambda: objects.write("a/two", b"2"), "written"),
                (lambda: objects.delete("a/one"), "deleted"),
            ):
                message = one_line_error(call)
                assert f" cannot be {verb}: " in message
                assert "Permission denied" in message
            assert objects.exists("contract.json")
    assert lines_of(capsys) == ([], [])


def test_a_bucket_that_is_not_there_is_not_tried_again(s3_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    objects = Objects("s3://atoll-nowhere/run", retry_seconds=3600)
    message = one_line_error(objects.write, "contract.json", b"x")
    assert message.startswith("exchange.url: s3://atoll-nowhere/run given; contract.json cannot be written: ")
    assert not objects.exists("contract.json")
    assert lines_of(capsys) == ([], [])


def test_missing_credentials_are_not_tried_again(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with fresh_clients():
        message = one_line_error(Objects(s3_url, retry_seconds=3600).read, "x")
    assert message == f"exchange.url: {s3_url} given; x cannot be read: Unable to locate credentials"
    assert lines_of(capsys) == ([], [])


# ---- a write that got through unnoticed


class Link(socketserver.StreamRequestHandler):
    """One connection to the S3 server. Where answers get lost, requests still get through."""

    def handle(self) -> None:
        assert isinstance(self.server, Line)
        with socket.create_connection(self.server.far_end) as far:
            threading.Thread(target=self._forward, args=(far,), daemon=True).start()
            while answer := far.recv(65536):
                if b" 100 Continue" in answer[:30]:  # no answer yet, though one may come with it
                    head, end, answer = answer.partition(b"\r\n\r\n")
                    self.connection.sendall(head + end)
                if answer and self.server.num_to_lose > 0:
                    self.server.num_to_lose -= 1
                    return
                self.connection.sendall(answer)

    def _forward(self, far: socket.socket) -> None:
        with suppress(OSError):
            while request := self.connection.recv(65536):
                far.sendall(request)


class Line(socketserver.ThreadingTCPServer):
    """The line to the S3 server, on which the next `num_to_lose` answers get lost."""

    daemon_threads = True

    def __init__(self, far_end: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), Link)
        self.far_end, self.num_to_lose = far_end, 0.0
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def line(s3_url: str) -> Iterator[Line]:
    with in_front_of_s3(Line) as line:
        yield line


def test_a_line_that_is_cut(
    line: Line, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written meanwhile gets through, though nobody hears of it: it is found, and neither lost nor doubled."""
    import s3fs

    file = tmp_path / "big"
    file.write_bytes(BIG)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the libraries' own retries would hide what is tested
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    objects = Objects(f"{s3_url}/cut", retry_seconds=60)
    objects.write("first", b"1")
    line.num_to_lose = math.inf
    with ThreadPoolExecutor(4) as pool:
        calls: list[Future[Any]] = [
            pool.submit(objects.write, "one", b"1"),
            pool.submit(objects.upload, file, "big"),
            pool.submit(objects.exists, "first"),
            pool.submit(objects.names, ""),
        ]
        time.sleep(OUTAGE_SECONDS)
        assert not any(call.done() for call in calls)
        line.num_to_lose = 0
        results = [call.result(PATIENCE_SECONDS) for call in calls]
    assert results[:3] == [None, None, True]
    assert "first" in results[3]  # it may get through before the others do
    assert objects.names("") == ["big", "first", "one"]
    assert objects.read("one") == b"1"
    assert objects.read("big") == BIG
    with pytest.raises(FileExistsError):
        objects.write("one", b"2")
    began, over = lines_of(capsys)
    assert len(began) == len(over) == len(calls)


def test_a_library_that_tries_again_by_itself(
    line: Line, s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own second try meets what its first has written, and we only see the clash."""
    file = tmp_path / "big"
    file.write_bytes(BIG)
    objects = Objects(f"{s3_url}/own", retry_seconds=60)
    for call in (lambda: objects.write("one", b"1"), lambda: objects.upload(file, "big")):
        line.num_to_lose = 1
        call()
        assert line.num_to_lose == 0
    assert objects.read("one") == b"1"
    assert objects.read("big") == BIG
    for changed in (BIG[:-1], BIG + b"x", BIG[:-1] + bytes([BIG[-1] ^ 1])):
        file.write_bytes(changed)
        with pytest.raises(FileExistsError):
            objects.upload(file, "big")
    assert lines_of(capsys) == ([], [])


# ---- settings


@pytest.mark.parametrize(
    ("key", "given", "allowed"),
    [
        ("retry_seconds", -1.0, "0 or more"),
        ("retry_seconds", float("inf"), "0 or more"),
        ("lease_seconds", 0.0, "above 0"),
        ("lease_seconds", float("inf"), "above 0"),
    ],
)
def test_settings_that_cannot_be(key: str, given: float, allowed: str, tmp_path: Path, tiny_config: TinyConfig) -> None:
    message = one_line_error(tiny_config, tmp_path, exchange={key: given})
    assert message == f"exchange.{key}: {given!r} given; allowed: {allowed}"
