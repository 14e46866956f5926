"""Bytes that come one by one: whoever reads them is not held for ever, and whoever is only slow is not cut off."""

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pretrain.exchange.client import LEAST_BYTES, PART_BYTES, PARTS_AT_ONCE, Client, StopWaitingError, part_bytes_of
from pretrain.exchange.objects import Objects, StoreSlowError
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.dripping import DrippingLine, dripping_line

BIG = os.urandom(700_000)


@pytest.fixture
def line(s3_url: str) -> Iterator[DrippingLine]:
    with dripping_line() as line:
        yield line


def stored(url: str, tmp_path: Path, **settings: Any) -> Objects:
    """A store with a small object and a large one."""
    objects = Objects(f"{url}/{tmp_path.name}", **settings)
    objects.write("small", b"small")
    (tmp_path / "big").write_bytes(BIG)
    objects.upload(tmp_path / "big", "big")
    return objects


def timed(call: Callable[[], object]) -> tuple[str, float]:
    """The one line that a call ends with, and after how long."""
    began = time.monotonic()
    return one_line_error(call), time.monotonic() - began


def test_no_request_is_waited_for_for_ever(line: DrippingLine, s3_url: str, tmp_path: Path) -> None:
    objects = stored(s3_url, tmp_path, stall_seconds=1.0)
    line.drip(".")
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: objects.read("small"),
        "exists": lambda: objects.exists("small"),
        "names": lambda: objects.names(""),
        "write": lambda: objects.write("new", b"2"),
        "upload": lambda: objects.upload(tmp_path / "big", "new"),
        "delete": lambda: objects.delete("small"),
    }
    with ThreadPoolExecutor(len(calls)) as pool:
        for verb, found in {verb: pool.submit(timed, call) for verb, call in calls.items()}.items():
            message, seconds = found.result(100)
            assert re.search(r": no answer in [\d.]+ s \(exchange.stall_seconds\)$", message), verb
            assert seconds < 40, verb


def test_a_payload_that_drips_is_trouble_of_the_store(line: DrippingLine, s3_url: str, tmp_path: Path) -> None:
    objects, copy = stored(s3_url, tmp_path, stall_seconds=1.0), tmp_path / "copy"
    line.drip(r"GET .*/big")  # and not what is asked about it before
    with pytest.raises(StoreSlowError, match=r"big cannot be read: less than 256 KiB came in 1 s \(exchange.stall_sec"):
        objects.download("big", copy, limit_bytes=len(BIG))
    assert not copy.exists()
    assert objects.read("small") == b"small"  # as its other objects are not


def test_it_is_tried_again(line: DrippingLine, s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects, copy = stored(s3_url, tmp_path, stall_seconds=1.0, retry_seconds=60), tmp_path / "copy"
    line.drip(r"GET .*/big")
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(objects.download, "big", copy, limit_bytes=len(BIG))
        while "trying again" not in (said := capsys.readouterr().out):
            time.sleep(0.05)
        line.heal()
        assert coming.result(60) == (hashlib.sha256(BIG).hexdigest(), len(BIG))
    assert said.endswith("less than 256 KiB came in 1 s (exchange.stall_seconds); trying again for 60 s\n")
    assert copy.read_bytes() == BIG


def test_a_part_that_sticks_is_asked_for_again(
    line: DrippingLine, s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line that is suddenly thin, or a server that has lost one answer: nothing that has come is lost."""
    objects, copy = stored(s3_url, tmp_path, stall_seconds=1.0, retry_seconds=60), tmp_path / "copy"
    line.drip(r"GET .*/big")
    line.asked.clear()
    threading.Timer(1.2, line.heal).start()
    assert objects.download("big", copy, limit_bytes=len(BIG)) == (hashlib.sha256(BIG).hexdigest(), len(BIG))
    assert copy.read_bytes() == BIG
    assert sum(asked.startswith("GET") for asked in line.asked) > 2
    assert capsys.readouterr().out == ""


def test_who_is_told_that_it_is_over_does_not_wait(line: DrippingLine, s3_url: str, tmp_path: Path) -> None:
    over = threading.Event()
    objects, copy = stored(s3_url, tmp_path, retry_seconds=600).until(over), tmp_path / "copy"
    line.drip(r"GET .*/big")
    began = time.monotonic()
    threading.Timer(0.5, over.set).start()
    with pytest.raises(StopWaitingError):
        objects.download("big", copy, limit_bytes=len(BIG))
    assert time.monotonic() - began < 30
    assert not copy.exists()


# ---- in parts


def test_a_large_object_comes_in_parts_and_whole(s3_url: str, tmp_path: Path) -> None:
    """Also an object of exactly some parts, one byte more and less, and one that is longer than it may be."""
    objects, copy = Objects(f"{s3_url}/{tmp_path.name}"), tmp_path / "copy"
    data = os.urandom(40 * 2**20 + 1)
    for size in (0, 1, LEAST_BYTES, 2**20 - 1, 2**20, 2**20 + 1, 5 * 2**20, 16 * 2**20, len(data)):
        (tmp_path / "file").write_bytes(data[:size])
        objects.upload(tmp_path / "file", f"{size}")
        assert objects.download(f"{size}", copy, limit_bytes=size) == (hashlib.sha256(data[:size]).hexdigest(), size)
        assert copy.read_bytes() == data[:size]
        if size > 2:
            too_long = hashlib.sha256(data[: size - 1]).hexdigest(), size - 1
            assert objects.download(f"{size}", copy, limit_bytes=size - 2) == too_long
    with pytest.raises(FileExistsError):
        objects.upload(tmp_path / "file", "1")
    (tmp_path / "file").write_bytes(data[::-1])
    with pytest.raises(FileExistsError):  # of several parts, too
        objects.upload(tmp_path / "file", f"{len(data)}")


def test_several_parts_at_once_but_no_more(line: DrippingLine, s3_url: str, tmp_path: Path) -> None:
    objects = Objects(f"{s3_url}/{tmp_path.name}")
    (tmp_path / "file").write_bytes(bytes(8 * PART_BYTES))
    objects.upload(tmp_path / "file", "big")
    line.asked.clear()
    blocks = Client(objects._fs, 600.0).blocks(f"atoll/{tmp_path.name}/big", 8 * PART_BYTES)
    taken = [len(next(blocks)) for _ in range(5)]
    assert taken == [2**20, 2 * 2**20, 2 * 2**20, 4 * 2**20, 4 * 2**20]
    time.sleep(0.5)  # whatever is asked for is so by now
    assert sum(asked.startswith("GET") for asked in line.asked) <= 5 + PARTS_AT_ONCE
    blocks.close()  # type: ignore[attr-defined]  # a generator


def test_parts_of_what_is_sent_are_few_enough() -> None:
    assert part_bytes_of(1) == part_bytes_of(10_000 * PART_BYTES) == PART_BYTES
    for num_bytes in (10_000 * PART_BYTES + 1, 10**12, 5 * 2**40):
        assert 0 <= part_bytes_of(num_bytes) * 10_000 - num_bytes < 10_000


@pytest.mark.parametrize("given", [0.0, -1.0, float("inf")])
def test_settings_that_cannot_be(given: float, tmp_path: Path, tiny_config: TinyConfig) -> None:
    message = one_line_error(tiny_config, tmp_path, exchange={"stall_seconds": given})
    assert message == f"exchange.stall_seconds: {given!r} given; allowed: above 0"
