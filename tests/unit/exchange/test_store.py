"""The store on a directory, in memory, and on a real S3 API: atomic, never overwritten, prunable."""

import dataclasses
import gc
import json
import os
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest
from blake3 import blake3

from pretrain.exchange.objects import BLOCK_BYTES, Objects
from pretrain.exchange.store import Refusal, StoreExchange, delivery_path, file_payload, version_path
from pretrain.trust.ledger import Commit, Manifest, Payload, RefusedError, sha256_bytes
from tests.support import one_line_error


@pytest.fixture
def objects(url: str) -> Objects:
    return Objects(url)


def make_file(directory: Path, data: bytes, name: str = "000001.safetensors") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(data)
    return directory / name


# ---- objects


def test_write_read_list_delete(objects: Objects, tmp_path: Path) -> None:
    assert not objects.exists("a/one")
    assert objects.names("a") == []
    with pytest.raises(FileNotFoundError):
        objects.read("a/one")
    objects.write("a/two", b"2")
    objects.write("a/one", b"1")
    objects.write("a/deep/three", b"3")
    big = os.urandom(2 * BLOCK_BYTES + 1)
    objects.upload(make_file(tmp_path, big), "a/big")
    assert objects.names("a") == ["big", "deep", "one", "two"]
    assert objects.names("") == ["a"]
    assert objects.exists("a/one")
    assert objects.read("a/one") == b"1"
    copy = tmp_path / "new" / "copy"
    assert objects.download("a/big", copy, limit_bytes=len(big)) == (blake3(big).hexdigest(), len(big))
    assert copy.read_bytes() == big
    with pytest.raises(FileNotFoundError):
        objects.download("a/none", copy, limit_bytes=1)
    objects.delete("a/one")
    objects.delete("a/one")  # a second time is no error
    assert objects.names("a") == ["big", "deep", "two"]


def test_a_no_keeps_nothing_in_memory(objects: Objects) -> None:
    """Nothing that a caller has in hand while it asks, until the garbage collector comes by."""

    class Held:
        pass

    def ask() -> weakref.ref[Held]:
        held = Held()
        assert not objects.exists("a/nothing")
        assert objects.names("nothing") == []
        return weakref.ref(held)

    gc.disable()
    try:
        assert ask()() is None
    finally:
        gc.enable()


def test_another_process_sees_it_at_once(url: str) -> None:
    reader = Objects(url)
    assert reader.names("silos") == []
    Objects(url).write("silos/law", b"x")
    assert reader.names("silos") == ["law"]
    assert reader.exists("silos/law")


def test_nothing_is_ever_overwritten(objects: Objects, tmp_path: Path) -> None:
    objects.write("one", b"first")
    file = make_file(tmp_path, b"second")
    for attempt in (lambda: objects.write("one", b"second"), lambda: objects.upload(file, "one")):
        with pytest.raises(FileExistsError, match=r"one exists already; nothing is ever overwritten$"):
            attempt()
    assert objects.read("one") == b"first"
    assert objects.names("") == ["one"]


@pytest.mark.parametrize("retry_seconds", [0, 60])
@pytest.mark.parametrize("url", ["directory", "s3"], indirect=True)
def test_a_name_that_is_given_up_meanwhile_was_taken(url: str, retry_seconds: float) -> None:
    """Who reads a word deletes it: whoever writes it again at that moment hears that it was there, or writes it."""
    objects = Objects(url, retry_seconds=retry_seconds)
    writers, tries = 2, 10 if url.startswith("s3:") else 500
    over = threading.Event()

    def write(writer: int) -> int:
        taken = 0
        for number in range(tries):
            try:
                objects.write("words/one", b"%d of %d" % (number, writer))
            except FileExistsError:
                taken += 1
        return taken

    def delete() -> None:
        while not over.is_set():
            objects.delete("words/one")

    with ThreadPoolExecutor(writers + 1) as pool:
        deleting = pool.submit(delete)
        taken = [pool.submit(write, writer) for writer in range(writers)]
        try:
            assert 0 < sum(future.result() for future in taken) < writers * tries
        finally:
            over.set()
        deleting.result()


@pytest.mark.parametrize("url", ["directory", "s3"], indirect=True)
def test_of_many_writers_one_succeeds(url: str) -> None:
    for place in range(1 if url.startswith("s3:") else 50):  # where the directory itself is not there yet
        of_many_writers_one_succeeds(Objects(f"{url}/{place}"))


def of_many_writers_one_succeeds(objects: Objects) -> None:
    def write(number: int) -> bool:
        try:
            objects.write("name", str(number).encode())
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(write, range(8)))
    assert written.count(True) == 1
    assert objects.read("name") == str(written.index(True)).encode()


def test_a_crash_within_an_upload_leaves_nothing_to_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects, file = Objects(str(tmp_path / "store")), make_file(tmp_path, b"whole")
    seen: list[tuple[bool, list[str]]] = []

    def copy_half(source: IO[bytes], target: IO[bytes], length: int) -> None:
        target.write(source.read(2))
        seen.append((objects.exists("a/b"), objects.names("a")))  # what others see meanwhile
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", copy_half)
        with pytest.raises(KeyboardInterrupt):
            objects.upload(file, "a/b")
    assert seen == [(False, [])]
    assert list((tmp_path / "store" / "a").iterdir()) == []
    objects.upload(file, "a/b")
    assert objects.read("a/b") == b"whole"


def test_leftovers_of_a_kill_are_no_objects(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".b.0123.tmp").write_bytes(b"ha")
    objects = Objects(str(tmp_path))
    assert objects.names("a") == []
    objects.write("a/b", b"whole")
    assert objects.names("a") == ["b"]


def test_a_store_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """Below a regular file, where not even root can write."""
    file = make_file(tmp_path, b"x", "file")
    objects = Objects(str(file / "store"))
    assert not objects.exists("contract.json")
    assert objects.names("global") == []
    for name in ("contract.json", "global/000000/commit.json"):
        for attempt in (lambda name=name: objects.write(name, b"x"), lambda name=name: objects.upload(file, name)):
            message = one_line_error(attempt)
            assert message.startswith(f"exchange.url: {file}/store given; {name} cannot be written: ")


def test_a_bucket_that_is_not_there_is_one_line(s3_url: str) -> None:
    message = one_line_error(Objects("s3://atoll-nowhere/run").write, "contract.json", b"x")
    assert message.startswith("exchange.url: s3://atoll-nowhere/run given; contract.json cannot be written: ")


@pytest.mark.parametrize("given", ["nosuch://bucket/run", "abc://x"])
def test_an_unknown_kind_of_url_is_one_line(given: str) -> None:
    assert one_line_error(Objects, given).startswith(f"exchange.url: {given!r} given; ")


# ---- exchange

MANIFEST = Manifest(
    contract_sha256="",
    silo="law",
    version=1,
    base_version=0,
    base_digest="d0",
    cosigned="e0" * 32,
    codec="fp32",
    payloads=[],
    tokens=512,
    steps=4,
    tokens_total=512,
    metrics={},
)


def make_commit(version: int, previous: bytes | None, payloads: list[Payload], contract_sha256: str = "") -> Commit:
    return Commit(
        contract_sha256=contract_sha256,
        version=version,
        previous=sha256_bytes(previous) if previous else None,
        codec="fp32",
        payloads=payloads,
        contributors=[],
        divisor=version,
        parameters_digest=f"p{version}",
        outer_digest="o",
    )


def publish(exchange: StoreExchange, version: int, scratch: Path) -> Commit:
    file = make_file(scratch, f"version {version}".encode(), "parameter-000.safetensors")
    payload = file_payload(file, 0)
    previous = exchange.commit_bytes(version - 1) if version else None
    commit = make_commit(version, previous, [payload], exchange.contract_sha256)
    exchange.publish(commit, [(payload, file)])
    return commit


def deliver(exchange: StoreExchange, silo: str, version: int, data: bytes, scratch: Path) -> Manifest:
    file = make_file(scratch, data, f"{version:06d}.safetensors")
    payload = file_payload(file, 0)
    manifest = dataclasses.replace(MANIFEST, silo=silo, version=version, payloads=[payload])
    exchange.deliver(manifest, [(payload, file)])
    return manifest


def test_contract_is_written_once(exchange: StoreExchange, url: str) -> None:
    assert exchange.read_contract() is None
    exchange.write_contract(b"{}\n")
    reader = StoreExchange(url)
    assert reader.read_contract() == b"{}\n"
    assert reader.contract_sha256 == exchange.contract_sha256 == sha256_bytes(b"{}\n")
    assert "contract.json was not there, and cannot be written" in one_line_error(reader.write_contract, b"{ }\n")


def test_a_name_belongs_to_one_run_directory(exchange: StoreExchange, url: str) -> None:
    exchange.claim_name("law", "first")
    exchange.claim_name("law", "first")  # the same silo, restarted
    exchange.claim_name("medicine", "second")
    message = one_line_error(StoreExchange(url).claim_name, "law", "second")
    assert message.startswith("silos: 'law' given; another run directory takes part under this name in ")
    assert "silos/law/identity.json" in message


def test_publish_and_read_back(exchange: StoreExchange, tmp_path: Path) -> None:
    exchange.write_contract(b"{}\n")
    assert exchange.newest_version() == -1
    commits = [publish(exchange, version, tmp_path) for version in range(3)]
    assert exchange.newest_version() == exchange.newest_version(0) == exchange.newest_version(2) == 2
    assert [exchange.read_commit(version) for version in range(3)] == commits
    copy = tmp_path / "copy"
    assert exchange.fetch(version_path(2), commits[2].payloads[0], copy) == 9
    assert copy.read_bytes() == b"version 2"
    with pytest.raises(RefusedError, match="commit 3 is missing"):
        exchange.read_commit(3)


def test_a_version_is_there_when_its_commit_is(exchange: StoreExchange, tmp_path: Path) -> None:
    publish(exchange, 0, tmp_path)
    exchange.objects.write("global/000001/parameter-000.safetensors", b"left by one that died")
    assert exchange.newest_version() == exchange.newest_version(0) == 0
    commit = publish(exchange, 1, tmp_path)
    assert exchange.newest_version() == 1
    assert exchange.fetch(version_path(1), commit.payloads[0], tmp_path / "copy") == 9  # the leftover is replaced


def test_a_version_is_published_once(exchange: StoreExchange, tmp_path: Path) -> None:
    publish(exchange, 0, tmp_path)
    before = exchange.commit_bytes(0)
    file = make_file(tmp_path, b"another", "parameter-000.safetensors")
    other = make_commit(0, None, [file_payload(file, 0)])
    with pytest.raises(FileExistsError, match="another aggregator works on this store"):
        exchange.publish(other, [(other.payloads[0], file)])
    assert exchange.commit_bytes(0) == before
    assert exchange.objects.read("global/000000/parameter-000.safetensors") == b"version 0"


def test_broken_chain_is_refused(exchange: StoreExchange, tmp_path: Path) -> None:
    exchange.write_contract(b"{}\n")
    publish(exchange, 0, tmp_path)
    publish(exchange, 1, tmp_path)
    rewritten = dataclasses.replace(exchange.read_commit(0), divisor=7)
    exchange.objects.delete("global/000000/commit.json")
    exchange.objects.write("global/000000/commit.json", rewritten.to_bytes())
    with pytest.raises(RefusedError, match="commit 1 follows"):
        exchange.read_commit(1)


def test_fetch_refuses_what_is_not_as_announced(exchange: StoreExchange, tmp_path: Path) -> None:
    exchange.objects.write("f/data", b"abcdef")
    payload = Payload(fragment=0, file="data", blake3=blake3(b"abcdef").hexdigest(), num_bytes=6)
    assert exchange.fetch("f", payload, tmp_path / "copy") == 6
    for wrong, expected in [
        (dataclasses.replace(payload, num_bytes=7), "is truncated: it has not the 7 bytes announced"),
        (dataclasses.replace(payload, num_bytes=5), "is too long: it has not the 5 bytes announced"),
        (dataclasses.replace(payload, blake3=blake3(b"abcdeF").hexdigest()), "corrupted"),
        (dataclasses.replace(payload, file="none"), "f/none is missing"),
    ]:
        with pytest.raises(RefusedError, match=expected):
            exchange.fetch("f", wrong, tmp_path / "copy")


def test_deliver_refuse_deliver_again(exchange: StoreExchange, tmp_path: Path) -> None:
    assert exchange.delivery("law", 1) is None
    assert exchange.refusals("law", 1) == []
    first = deliver(exchange, "law", 1, b"bad", tmp_path)
    assert exchange.delivery("law", 1) == first.to_bytes()
    exchange.refuse("law", 1, first.to_bytes(), "its codec is odd")
    assert exchange.delivery("law", 1) is None
    assert exchange.refusals("law", 1) == [Refusal(reason="its codec is odd", final=False)]
    second = deliver(exchange, "law", 1, b"good", tmp_path)  # replaces the refused payload
    assert exchange.delivery("law", 1) == second.to_bytes()
    exchange.fetch(delivery_path("law", 1), second.payloads[0], tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"good"


def test_a_delivery_that_stands_is_not_replaced(exchange: StoreExchange, tmp_path: Path) -> None:
    first = deliver(exchange, "law", 1, b"first", tmp_path)
    file = make_file(tmp_path, b"second")
    payload = file_payload(file, 0)
    other = dataclasses.replace(first, payloads=[payload])
    assert exchange.deliver(other, [(payload, file)]) == first.to_bytes()
    assert exchange.delivery("law", 1) == first.to_bytes()
    assert exchange.objects.read("silos/law/000001/000001.safetensors") == b"first"


def test_every_refusal_counts_also_of_the_same_bytes(exchange: StoreExchange, tmp_path: Path) -> None:
    """A silo gives up after so many refusals; one that delivers the same bytes each time must get there."""
    for count in range(1, 4):
        manifest = deliver(exchange, "law", 1, b"bad", tmp_path)
        exchange.refuse("law", 1, manifest.to_bytes(), "not finite")
        assert exchange.refusals("law", 1) == [Refusal(reason="not finite", final=False)] * count
    record = json.loads(exchange.objects.read("silos/law/000001/refused-2.json"))
    assert record == {"reason": "not finite", "final": False, "manifest_sha256": sha256_bytes(manifest.to_bytes())}


def test_a_commit_that_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    exchange = StoreExchange(str(tmp_path / "store"))
    payload = file_payload(file := make_file(tmp_path, b"version 0", "parameter-000.safetensors"), 0)
    commit = dataclasses.replace(make_commit(0, None, [payload]), divisor=1 << 53)
    with pytest.raises(RefusedError, match=f"divisor: {1 << 53} given"):
        exchange.publish(commit, [(payload, file)])
    assert not (tmp_path / "store" / "global").exists()


def test_an_empty_object_is_there_and_one_that_is_not_is_none(exchange: StoreExchange) -> None:
    """A bucket has no first byte of it to give."""
    objects = exchange.objects
    objects.write("empty", b"")
    objects.write("one", b"1")
    assert [objects.exists(name) for name in ("empty", "one", "none", "a/none")] == [True, True, False, False]
    found = [objects.read_if_there(name) for name in ("empty", "one", "none", "a/none")]
    assert found == [b"", b"1", None, None]
