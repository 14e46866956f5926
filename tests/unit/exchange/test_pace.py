"""Bytes that come one by one: whoever reads them is not held for ever, and whoever is only slow is not cut off."""

import dataclasses
import os
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from launch.show.status_reader import store_status
from pretrain.config.keys import ExchangeConfig
from pretrain.exchange.client import (
    CONNECTIONS,
    LEAST_BYTES,
    PART_BYTES,
    PARTS_AT_ONCE,
    Client,
    StopWaitingError,
    part_bytes_of,
    with_connections,
)
from pretrain.exchange.objects import Objects, StoreSlowError
from pretrain.exchange.store import StoreExchange
from pretrain.trust.ledger import Payload, RefusedError
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.conftest import in_front_of_s3
from tests.unit.dripping import DrippingLine
from tests.waiting import wait_for

BIG = os.urandom(700_000)


@pytest.fixture
def line(s3_url: str) -> Iterator[DrippingLine]:
    with in_front_of_s3(DrippingLine) as line:
        yield line


def stored(url: str, tmp_path: Path, **settings: Any) -> Objects:
    """A store with a small object and a large one, written without the settings: a busy machine is slow, too."""
    objects = Objects(f"{url}/{tmp_path.name}")
    objects.write("small", b"small")
    (tmp_path / "big").write_bytes(BIG)
    objects.upload(tmp_path / "big", "big")
    return Objects(objects.url, **settings)


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
    line.heal()
    assert Objects(objects.url).read("small") == b"small"


def test_status_is_not_held_either(
    line: DrippingLine, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects, url = stored(s3_url, tmp_path), f"{s3_url}/{tmp_path.name}"
    objects.write("contract.json", b"{}")
    monkeypatch.setattr(ExchangeConfig, "stall_seconds", 0.5)
    for what, limit in (("contract.json", "0.5"), (".", "5")):
        line.drip(what)
        message = one_line_error(store_status, url)
        assert message == f"store: {url!r} given; it cannot be read: no answer in {limit} s (exchange.stall_seconds)"


def test_it_is_tried_again(line: DrippingLine, s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects, copy = stored(s3_url, tmp_path, stall_seconds=1.0, retry_seconds=60), tmp_path / "copy"
    line.drip(r"GET .*/big")
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(objects.download, "big", copy, limit_bytes=len(BIG))
        while "trying again" not in (said := capsys.readouterr().out):
            time.sleep(0.05)
        line.heal()
        assert coming.result(60) == (blake3(BIG).hexdigest(), len(BIG))
    assert said.endswith("less than 256 KiB came in 1 s (exchange.stall_seconds); trying again for 60 s\n")
    assert copy.read_bytes() == BIG


def test_a_part_that_sticks_is_asked_for_again(
    line: DrippingLine, s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line that is suddenly thin, or a server that has lost one answer: nothing that has come is lost."""
    objects, copy = stored(s3_url, tmp_path, stall_seconds=4.0, retry_seconds=60), tmp_path / "copy"
    line.drip(r"GET .*/big")
    line.asked.clear()
    threading.Timer(4.2, line.heal).start()
    assert objects.download("big", copy, limit_bytes=len(BIG)) == (blake3(BIG).hexdigest(), len(BIG))
    assert copy.read_bytes() == BIG
    assert sum(asked.startswith("GET") for asked in line.asked) > 2
    assert capsys.readouterr().out == ""


def test_a_thin_line_that_is_honest_is_never_cut(
    line: DrippingLine, s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first part does not come in time, and the smallest does."""
    objects, copy = stored(s3_url, tmp_path, stall_seconds=4.0), tmp_path / "copy"
    line.drip("GET .*/big", num_bytes=LEAST_BYTES // 40)  # in two seconds, and the whole in more than five
    assert objects.download("big", copy, limit_bytes=len(BIG)) == (blake3(BIG).hexdigest(), len(BIG))
    assert capsys.readouterr().out == ""


def test_those_that_drip_leave_connections_to_others(line: DrippingLine, s3_url: str, tmp_path: Path) -> None:
    over = threading.Event()
    objects = stored(s3_url, tmp_path, stall_seconds=120.0)
    line.drip(r"GET .*/big")
    line.asked.clear()
    with ThreadPoolExecutor(12) as pool:
        for index in range(12):
            pool.submit(objects.until(over).download, "big", tmp_path / f"copy-{index}", limit_bytes=len(BIG))
        try:
            wait_for(lambda: sum(asked.startswith("GET") for asked in line.asked) >= 12, seconds=60)
            assert pool._work_queue.empty()
            began = time.monotonic()
            assert objects.read("small") == b"small"
            assert time.monotonic() - began < 60
        finally:
            over.set()


def test_options_keep_what_they_say_of_connections() -> None:
    kept = {"proxies": {"https": "http://proxy.example:3128"}, "max_pool_connections": 3}
    assert with_connections({"anon": True, "config_kwargs": kept}) == {"anon": True, "config_kwargs": kept}
    assert with_connections({}) == {"config_kwargs": {"max_pool_connections": CONNECTIONS}}


def test_who_is_told_that_it_is_over_does_not_wait(line: DrippingLine, s3_url: str, tmp_path: Path) -> None:
    over = threading.Event()
    objects, copy = stored(s3_url, tmp_path, retry_seconds=600).until(over), tmp_path / "copy"
    for what, call in (
        (r"GET .*/big", lambda: objects.download("big", copy, limit_bytes=len(BIG))),
        (".", lambda: objects.exists("big")),
    ):
        line.drip(what)
        over.clear()
        began = time.monotonic()
        threading.Timer(0.5, over.set).start()
        with pytest.raises(StopWaitingError):
            call()
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
        assert objects.download(f"{size}", copy, limit_bytes=size) == (blake3(data[:size]).hexdigest(), size)
        assert copy.read_bytes() == data[:size]
        if size > 2:
            too_long = blake3(data[: size - 1]).hexdigest(), size - 1
            assert objects.download(f"{size}", copy, limit_bytes=size - 2) == too_long
    with pytest.raises(FileExistsError):
        objects.upload(tmp_path / "file", "1")
    (tmp_path / "file").write_bytes(data[::-1])
    with pytest.raises(FileExistsError):  # of several parts, too
        objects.upload(tmp_path / "file", f"{len(data)}")


def test_several_parts_at_once_but_no_more(line: DrippingLine, s3_url: str, tmp_path: Path) -> None:
    objects = Objects(f"{s3_url}/{tmp_path.name}")
    (tmp_path / "file").write_bytes(bytes(16 * PART_BYTES))
    objects.upload(tmp_path / "file", "big")
    line.asked.clear()
    blocks = Client(objects._fs, 600.0).blocks(f"atoll/{tmp_path.name}/big", 16 * PART_BYTES)
    taken = [len(next(blocks)) for _ in range(5)]
    assert taken == [2**20, 2 * 2**20, 2 * 2**20, 4 * 2**20, 4 * 2**20]  # then eight of eight MiB
    time.sleep(0.5)  # whatever is asked for is so by now
    assert sum(asked.startswith("GET") for asked in line.asked) <= 5 + PARTS_AT_ONCE
    blocks.close()  # type: ignore[attr-defined]  # a generator


def test_parts_of_what_is_sent_are_few_enough() -> None:
    assert part_bytes_of(1) == part_bytes_of(10_000 * PART_BYTES) == PART_BYTES
    for num_bytes in (10_000 * PART_BYTES + 1, 10**12, 5 * 2**40):
        assert 0 <= part_bytes_of(num_bytes) * 10_000 - num_bytes < 10_000


def test_more_than_an_object_may_have_is_said_at_once(
    s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By us for S3, by the system for a directory: with the key to change, and nothing is tried again."""
    file = tmp_path / "file"
    file.touch()
    os.truncate(file, 5 * 2**40 + 1)
    message = one_line_error(Objects(f"{s3_url}/{tmp_path.name}", retry_seconds=600).upload, file, "big")
    assert message == (
        f"exchange.url: {s3_url}/{tmp_path.name} given; big cannot be written: 5497558138881 bytes are more than the "
        "5497558138880 of one object in S3; with more outer.num_fragments objects are smaller"
    )
    os.truncate(file, 2_000_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        message = one_line_error(Objects(str(tmp_path / "store"), retry_seconds=600).upload, file, "big")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message.endswith(
        "; big cannot be written: File too large; with more outer.num_fragments objects are smaller"
    )
    assert list((tmp_path / "store").iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.soak
def test_a_payload_of_six_gigabytes(tmp_path: Path) -> None:
    file, num_bytes = tmp_path / "000001.safetensors", 6 * 10**9
    file.touch()
    os.truncate(file, num_bytes)
    exchange = StoreExchange(str(tmp_path / "store"))
    exchange.objects.give(file, "f/000001.safetensors")
    digest = blake3()
    for _ in range(num_bytes // 10**7):
        digest.update(bytes(10**7))
    payload = Payload(fragment=0, file=file.name, blake3=digest.hexdigest(), num_bytes=num_bytes)
    assert exchange.fetch("f", payload, Path(os.devnull)) == num_bytes
    with pytest.raises(RefusedError, match="is too long"):
        exchange.fetch("f", dataclasses.replace(payload, num_bytes=num_bytes - 2**32), Path(os.devnull))


@pytest.mark.parametrize("given", [0.0, -1.0, float("inf")])
def test_settings_that_cannot_be(given: float, tmp_path: Path, tiny_config: TinyConfig) -> None:
    message = one_line_error(tiny_config, tmp_path, exchange={"stall_seconds": given})
    assert message == f"exchange.stall_seconds: {given!r} given; allowed: above 0"
