"""Sealed payloads: what is sealed comes back in its place, and nothing else is ever opened."""

import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pretrain.config.keys import OPERATOR
from pretrain.exchange.store import file_payload
from pretrain.trust.keys import PrivateKey
from pretrain.trust.ledger import Payload, RefusedError
from pretrain.trust.seal import (
    CHUNK_BYTES,
    HEADER_BYTES,
    MAGIC,
    TAG_BYTES,
    Epoch,
    Place,
    Sealer,
    opened_bytes,
    sealed_bytes,
)
from tests.support import ROOT

# RFC 7748, section 6.1: Alice's and Bob's private keys; and another member's.
AGREEMENT = {
    "law": "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
    OPERATOR: "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
    "medicine": "a0" * 32,
}
PLACE = Place(contract_sha256="c0" * 32, author="law", version=17, fragment=1, file="000017.safetensors")
SIZES = (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 7)
STEP = CHUNK_BYTES + TAG_BYTES


def private(name: str) -> PrivateKey:
    return PrivateKey(
        name=name,
        signing=Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32)),
        agreement=X25519PrivateKey.from_private_bytes(bytes.fromhex(AGREEMENT[name])),
    )


KEYS = {name: private(name).public for name in AGREEMENT}


EPOCH = Epoch(from_version=0, number=0, sha256=PLACE.contract_sha256, keys=KEYS)


def sealer(name: str, epoch: Epoch = EPOCH) -> Sealer:
    return Sealer(name, lambda key: private(name), lambda: [epoch])


def sealed(directory: Path, data: bytes, place: Place = PLACE) -> tuple[bytes, Payload]:
    """What a silo makes of a payload, and tells of it."""
    file, target = directory / "000017.safetensors", directory / "000017.sealed"
    file.write_bytes(data)
    payload = sealer(place.author).seal(file_payload(file, place.fragment), file, target, place)
    assert file.read_bytes() == data
    return target.read_bytes(), payload


def opened(directory: Path, data: bytes, place: Place = PLACE, *, name: str = OPERATOR) -> bytes:
    file = directory / "opened"
    file.write_bytes(data)
    sealer(name).open(file, place)
    return file.read_bytes()


def noise(num_bytes: int) -> bytes:
    return random.Random(num_bytes).randbytes(num_bytes)


@pytest.mark.parametrize("num_bytes", SIZES)
def test_what_is_sealed_comes_back(num_bytes: int, tmp_path: Path) -> None:
    data = noise(num_bytes)
    found, payload = sealed(tmp_path, data)
    assert len(found) == payload.num_bytes == sealed_bytes(num_bytes)
    assert opened_bytes(len(found)) == num_bytes
    assert payload.blake3 == blake3(found).hexdigest()
    assert (payload.fragment, payload.file) == (1, "000017.safetensors")
    assert opened(tmp_path, found) == data
    assert opened(tmp_path, found, name="law") == data  # who has sealed it can read it


def test_the_same_payload_in_the_same_place_has_the_same_bytes(tmp_path: Path) -> None:
    data = noise(1000)
    first, _ = sealed(tmp_path, data)
    assert sealed(tmp_path, data)[0] == first
    others = [sealed(tmp_path, data[:-1] + b"!")[0]]
    for change in ({"version": 18}, {"fragment": 0}, {"author": "medicine"}, {"contract_sha256": "c1" * 32}):
        others.append(sealed(tmp_path, data, replace(PLACE, **change))[0])  # type: ignore[arg-type]
    headers = {other[:HEADER_BYTES] for other in others}
    assert len(headers) == len(others)  # another salt, and with it another key, for each
    assert all(other[HEADER_BYTES : HEADER_BYTES + 16] != first[HEADER_BYTES : HEADER_BYTES + 16] for other in others)


def test_a_reader_of_the_store_finds_nothing_of_the_payload(tmp_path: Path) -> None:
    """Neither its bytes nor its hash, with which a guess could be confirmed."""
    data = b'{"parameter/values/lm_head.weight": 7}' * 100
    found, payload = sealed(tmp_path, data)
    digest = blake3(data)
    for secret in (data[:16], digest.digest(), digest.hexdigest().encode()):
        assert secret not in found
    assert digest.hexdigest() not in str(payload)
    assert found.startswith(MAGIC)


def refused(directory: Path, data: bytes, place: Place = PLACE, *, name: str = OPERATOR) -> str:
    """The one line with which something is not opened."""
    with pytest.raises(RefusedError) as caught:
        opened(directory, data, place, name=name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    found, _ = sealed(tmp_path, noise(100))
    for at in range(len(found)):
        spoiled = bytearray(found)
        spoiled[at] ^= 1 << at % 8
        line = refused(tmp_path, bytes(spoiled))
        assert ("is not sealed" if at < len(MAGIC) else "chunk 1 of 1 is not as law sealed it for version 17") in line


def edges(found: bytes) -> list[int]:
    return [0, HEADER_BYTES, *range(HEADER_BYTES + STEP, len(found), STEP)]


@pytest.mark.parametrize("num_bytes", [3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 7])
def test_a_truncated_payload_is_refused(num_bytes: int, tmp_path: Path) -> None:
    """At, just before and just after every edge of a chunk: the last one says that it is the last."""
    found, _ = sealed(tmp_path, noise(num_bytes))
    cuts = {max(0, edge + by) for edge in edges(found) for by in (-TAG_BYTES, -1, 0, 1, TAG_BYTES, TAG_BYTES + 1)}
    for cut in sorted(cuts | {len(found) - 1, len(found) - TAG_BYTES}):
        assert re.search("cut off|cannot be opened", refused(tmp_path, found[:cut])), cut
    for more in (b"\0", found[-TAG_BYTES:], found[-STEP:]):
        assert re.search("cut off|cannot be opened", refused(tmp_path, found + more))


def chunks(found: bytes) -> list[bytes]:
    return [found[at : at + STEP] for at in range(HEADER_BYTES, len(found), STEP)]


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: [parts[1], parts[0], *parts[2:]],
        lambda parts: [parts[0], parts[0], *parts[2:]],
        lambda parts: [parts[0], *parts],
        lambda parts: parts[1:],
        lambda parts: [*parts[:-2], parts[-1]],
        lambda parts: [*parts, parts[-1]],
        lambda parts: [*parts[:-2], parts[-1], parts[-2]],
    ],
)
def test_chunks_in_other_places_are_refused(change: Callable[[list[bytes]], list[bytes]], tmp_path: Path) -> None:
    found, _ = sealed(tmp_path, noise(4 * CHUNK_BYTES))
    spoiled = found[:HEADER_BYTES] + b"".join(change(chunks(found)))
    assert spoiled != found
    assert "cannot be opened: chunk " in refused(tmp_path, spoiled)


def test_what_belongs_elsewhere_is_refused(tmp_path: Path) -> None:
    found, _ = sealed(tmp_path, noise(100))
    for change in ({"version": 18}, {"fragment": 0}, {"author": "medicine"}, {"contract_sha256": "c1" * 32}):
        assert "cannot be opened" in refused(tmp_path, found, replace(PLACE, **change))  # type: ignore[arg-type]
    assert "cannot be opened" in refused(tmp_path, found, name="medicine")  # another member
    other, _ = sealed(tmp_path, noise(101)[:100])
    assert "cannot be opened" in refused(tmp_path, other[:HEADER_BYTES] + found[HEADER_BYTES:])
    for none in (b"", b"x" * 20, noise(100), noise(HEADER_BYTES + STEP + 3)):
        assert re.search("cut off|is not sealed", refused(tmp_path, none))


def test_a_file_that_changes_while_it_is_sealed_does_not_leave(tmp_path: Path) -> None:
    """Its salt is of other bytes, and a salt must not come twice."""
    file, target = tmp_path / "file", tmp_path / "target"
    file.write_bytes(b"before")
    payload = file_payload(file, 1)
    file.write_bytes(b"behind")
    with pytest.raises(OSError, match="changed while it was sealed"):
        sealer("law").seal(payload, file, target, PLACE)
    assert not target.exists()


# ---- the group's key


def test_what_the_operator_seals_for_all_opens_for_who_was_given_the_key(tmp_path: Path) -> None:
    file, target = tmp_path / "change-001.safetensors", tmp_path / "sealed"
    file.write_bytes(data := noise(CHUNK_BYTES + 1))
    place = replace(PLACE, author=OPERATOR, file=file.name)
    found = []
    for _ in range(2):  # and after a restart the same
        sealer(OPERATOR).seal(file_payload(file, 1), file, target, place)
        found.append(target.read_bytes())
    assert found[0] == found[1]
    member = sealer("law")
    with pytest.raises(RefusedError, match="the group's key cannot be opened"):
        member.take(EPOCH, sealer(OPERATOR).give(EPOCH, "medicine"))
    with pytest.raises(RefusedError, match="the group's key cannot be opened"):
        member.take(EPOCH, sealer(OPERATOR, other := replace(EPOCH, sha256="c1" * 32)).give(other, "law"))
    member.take(EPOCH, sealer(OPERATOR).give(EPOCH, "law"))
    member.open(target, place)
    assert target.read_bytes() == data
    target.write_bytes(found[0])
    with pytest.raises(RefusedError, match="is not as aggregator sealed it for version 17"):
        member.open(target, replace(place, file="velocity-001.safetensors"))


# ---- other tools


def test_what_the_documentation_says_opens_it(tmp_path: Path) -> None:
    """The lines of docs/formats.md, run as they stand there, by a process that has nothing of ours."""
    page = (ROOT / "docs" / "formats.md").read_text().partition("## Sealed payloads")[2].partition("\n## ")[0]
    found, _ = sealed(tmp_path, b"atoll")
    words = re.findall(r"^    ([0-9a-f]{20,})$", page, re.MULTILINE)
    assert "".join(words) == found.hex()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    data = noise(2 * CHUNK_BYTES + 5)
    for given, expected in ((found, b"atoll"), (sealed(tmp_path, data)[0], data)):
        (tmp_path / "given").write_bytes(given)
        operator, law = AGREEMENT[OPERATOR], KEYS["law"].agreement.hex()
        arguments = [str(tmp_path / "given"), operator, law, PLACE.to_bytes().decode().rstrip()]
        command = [sys.executable, "-I", "-c", code, *arguments]
        assert subprocess.run(command, check=True, capture_output=True).stdout == expected
