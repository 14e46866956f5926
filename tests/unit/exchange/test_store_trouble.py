"""A store in trouble: what passes is tried again, what does not is one line, and nothing is written by half."""

import errno
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.exchange.objects import Objects, StopWaitingError, StoreTroubleError
from tests.unit.exchange.test_store import make_file


def away(root: Path, seconds: float) -> threading.Thread:
    """Move the store away, as when its disk is not mounted, and back after some seconds."""
    root.rename(root.with_name("away"))

    def back() -> None:
        time.sleep(seconds)
        root.with_name("away").rename(root)

    thread = threading.Thread(target=back)
    thread.start()
    return thread


@pytest.mark.parametrize("verb", ["read", "exists", "names", "write", "upload", "download", "delete"])
def test_every_verb_outlasts_an_outage(tmp_path: Path, capfd: pytest.CaptureFixture[str], verb: str) -> None:
    objects = Objects(str(tmp_path / "store"), retry_seconds=30)
    objects.write("a/one", b"1")
    objects.exists("a/one")
    thread = away(tmp_path / "store", 0.6)
    source = make_file(tmp_path, b"2")
    done: dict[str, Callable[[], object]] = {
        "read": lambda: objects.read("a/one") == b"1",
        "exists": lambda: objects.exists("a/one"),
        "names": lambda: objects.names("a") == ["one"],
        "write": lambda: objects.write("a/two", b"2") is None,
        "upload": lambda: objects.upload(source, "a/two") is None,
        "download": lambda: objects.download("a/one", tmp_path / "copy", limit_bytes=9)[1] == 1,
        "delete": lambda: objects.delete("a/one") is None,
    }
    assert done[verb]()
    thread.join()
    said = capfd.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0].endswith("this directory is not there any more; trying again for 30 s")
    assert re.fullmatch(r"a(/one|/two)? was (read|listed|written|deleted) after \d+\.\d s", said[1])
    assert objects.names("a") == {"write": ["one", "two"], "upload": ["one", "two"], "delete": []}.get(verb, ["one"])


def test_an_outage_that_does_not_pass_is_one_line(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path / "store"), retry_seconds=0.3)
    objects.write("one", b"1")
    objects.exists("one")
    (tmp_path / "store").rename(tmp_path / "away")
    with pytest.raises(StoreTroubleError, match="this directory is not there any more"):
        objects.read("one")
    assert not (tmp_path / "store").exists()  # and no new one is begun in its place


def test_whoever_closes_does_not_wait(tmp_path: Path) -> None:
    closing = threading.Event()
    objects = Objects(str(tmp_path / "store"), retry_seconds=600, closing=closing)
    objects.write("one", b"1")
    objects.exists("one")
    (tmp_path / "store").rename(tmp_path / "away")
    threading.Timer(0.3, closing.set).start()
    with pytest.raises(StopWaitingError):
        objects.read("one")


def test_a_write_that_seemed_to_fail_is_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk tells of an error after the object is there; the object of another is still refused."""
    objects, real = Objects(str(tmp_path), retry_seconds=5), os.link

    def link_and_fail(*names: str, **folders: Any) -> None:
        real(*names, **folders)
        monkeypatch.setattr(os, "link", real)
        raise OSError(errno.EIO, "Input/output error")

    source = make_file(tmp_path, b"3")
    for create in (lambda: objects.write("mine", b"1"), lambda: objects.upload(source, "copied")):
        monkeypatch.setattr(os, "link", link_and_fail)
        create()
    assert (objects.read("mine"), objects.read("copied")) == (b"1", b"3")
    with pytest.raises(FileExistsError):
        objects.write("mine", b"1")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_passes_when_room_is_made(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    try:
        objects, filler = Objects(str(disk), retry_seconds=30), disk / "filler"
        filler.write_bytes(bytes(900_000))
        source = make_file(tmp_path, bytes(range(256)) * 2000)
        threading.Timer(0.6, filler.unlink).start()
        objects.upload(source, "folder/whole")
        assert objects.read("folder/whole") == source.read_bytes()
        assert [path.name for path in (disk / "folder").iterdir()] == ["whole"]
        assert re.search(r"No space left on device.*; trying again for 30 s\n", capfd.readouterr().out)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
