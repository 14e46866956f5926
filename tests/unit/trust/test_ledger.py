"""Manifests and commits: canonical bytes, and everything that does not fit is refused before anybody decodes a byte."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.trust.ledger import (
    Commit,
    Contributor,
    Manifest,
    Payload,
    Record,
    RefusedError,
    check_link,
    sha256_bytes,
)

Change = Callable[[dict[str, Any]], object]
PAYLOAD = Payload(fragment=0, file="000.safetensors", blake3="ab" * 32, num_bytes=9)
MANIFEST = Manifest(
    contract_sha256="c0" * 32,
    silo="law",
    version=3,
    base_version=2,
    base_digest="d0" * 32,
    cosigned="e0" * 32,
    codec="fp32",
    payloads=[PAYLOAD, dataclasses.replace(PAYLOAD, fragment=1, file="001.safetensors")],
    tokens=512,
    steps=4,
    tokens_total=1536,
    metrics={"loss": 2.5},
)
COMMIT = Commit(
    contract_sha256="c0" * 32,
    version=1,
    previous="e0" * 32,
    codec="fp32",
    payloads=[PAYLOAD],
    contributors=[
        Contributor(silo="law", version=1, manifest_sha256="f0" * 32, tokens=512, tokens_total=512, steps=4, weight=512)
    ],
    divisor=512,
    parameters_digest="d1" * 32,
    outer_digest="d2" * 32,
    metrics={"update_norm": 0.5},
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def changed(record: Record, change: Change) -> bytes:
    loaded = json.loads(record.to_bytes())
    change(loaded)
    return json.dumps(loaded).encode()


def put(*path: Any) -> Change:
    """A change that puts the last argument where the ones before it lead."""
    *steps, last, value = path

    def change(loaded: Any) -> None:
        for step in steps:
            loaded = loaded[step]
        loaded[last] = value

    return change


def without(name: str) -> Change:
    return lambda loaded: loaded.pop(name)


def refusal(kind: type[Record], data: bytes) -> str:
    with pytest.raises(RefusedError) as caught:
        kind.from_bytes(data)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("record", [MANIFEST, COMMIT], ids=["manifest", "commit"])
def test_bytes_are_canonical(record: Record) -> None:
    data = record.to_bytes()
    assert type(record).from_bytes(data) == record
    assert type(record).from_bytes(data).to_bytes() == data
    loaded = json.loads(data)
    shuffled = json.dumps(dict(reversed(loaded.items()))).encode()  # another order and layout: the same record
    assert shuffled != data
    assert type(record).from_bytes(shuffled).to_bytes() == data
    assert list(loaded) == sorted(loaded)
    assert data.endswith(b"}\n")


def test_bytes_of_a_payload_are_known() -> None:
    """Whoever writes another reader can compare with this."""
    expected = """ {
   "blake3": "%s",
   "file": "000.safetensors",
   "fragment": 0,
   "num_bytes": 9
""" % ("ab" * 32)
    assert expected in MANIFEST.to_bytes().decode()


def test_no_record_holds_what_is_not_a_number() -> None:
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(MANIFEST, metrics={"loss": float("nan")}).to_bytes()


MALFORMED_MANIFESTS: dict[str, tuple[Change, str]] = {
    "extra key": (put("time", 3), "has keys"),
    "other format": (put("format", 1), "format 1 given; this version reads 3"),
    "format is a text": (put("format", "2"), "format 2 given"),
    "format is true": (put("format", True), "format True given"),
    "format is 1.0": (put("format", 3.0), "format: 3.0 given"),
    "version is a text": (put("version", "3"), "version: '3' given"),
    "version is a fraction": (put("version", 3.0), "version: 3.0 given"),
    "version is true": (put("version", True), "version: True given"),
    "version is null": (put("version", None), "version: None given"),
    "tokens below zero": (put("tokens", -1), "tokens: -1 given"),
    "tokens beyond any reader": (put("tokens", 10**16), "tokens: 10000000000000000 given"),
    "tokens of 400 digits": (put("tokens", 10**400), "not JSON: 10000000000000000000... given"),
    "a key that a log could not hold": (put("x" * 100_000, 1), "has keys ["),
    "a key that rings the bell": (put("\a", 1), "has keys ["),
    "more metrics than anybody needs": (
        lambda m: m["metrics"].update((f"m{i}", 1) for i in range(20)),
        "metrics: 21 given; allowed: 16",
    ),
    "a metric with a strange name": (put("metrics", "lo\nss", 1), r"metrics: 'lo\nss' given"),
    "silo is a number": (put("silo", 3), "silo: 3 given"),
    "silo is a list": (put("silo", ["law"]), "silo: ['law'] given"),
    "signature is a number": (put("signature", 3), "signature: 3 given"),
    "metrics is a list": (put("metrics", []), "metrics: [] given"),
    "a metric is a text": (put("metrics", "loss", "low"), "metrics: {'loss': 'low'} given"),
    "a metric is null": (put("metrics", "loss", None), "metrics: "),
    "payloads is null": (put("payloads", None), "payloads: None given"),
    "payloads is a number": (put("payloads", 5), "payloads: 5 given"),
    "payloads is a mapping": (put("payloads", {"a": 1}), "payloads: {'a': 1} given"),
    "payload is a text": (put("payloads", 0, "x"), "payload: "),
    "payload is a list": (put("payloads", 0, [1]), "payload: "),
    "payload with a missing key": (lambda m: m["payloads"][0].pop("blake3"), "payload: "),
    "payload with an extra key": (put("payloads", 0, "url", "x"), "payload: "),
    "payload size is a text": (put("payloads", 0, "num_bytes", "9"), "payload.num_bytes: '9' given"),
    "payload size is true": (put("payloads", 0, "num_bytes", True), "payload.num_bytes: True given"),
    "payload size below zero": (put("payloads", 0, "num_bytes", -9), "payload.num_bytes: -9 given"),
    "payload hash is null": (put("payloads", 0, "blake3", None), "payload.blake3: None given"),
}
BAD_FILE_NAMES = ["../x", "a/b", "/etc/passwd", "..", ".", "", ".hidden", "a\\b", "a\0b", "a\nb", "x" * 150, "a b", "é"]


@pytest.mark.parametrize("case", MALFORMED_MANIFESTS)
def test_malformed_manifests_are_refused(case: str) -> None:
    change, expected = MALFORMED_MANIFESTS[case]
    assert expected in refusal(Manifest, changed(MANIFEST, change))


def test_a_commit_from_before_there_were_snapshots_is_refused() -> None:
    assert refusal(Commit, changed(COMMIT, put("format", 2))) == "format 2 given; this version reads 4"


@pytest.mark.parametrize("record", [MANIFEST, COMMIT], ids=["manifest", "commit"])
def test_no_key_may_be_missing(record: Record) -> None:
    for field in dataclasses.fields(record):
        assert "has keys" in refusal(type(record), changed(record, without(field.name)))


@pytest.mark.parametrize("file", BAD_FILE_NAMES)
def test_a_payload_is_a_plain_file(file: str) -> None:
    message = refusal(Manifest, changed(MANIFEST, put("payloads", 1, "file", file)))
    assert message == f"payload.file: {file!r} given; allowed: a plain file name"
    assert "payload.file" in refusal(Commit, changed(COMMIT, put("payloads", 0, "file", file)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (put("contributors", 0, "weight", "512"), "contributor.weight: '512' given"),
        (put("contributors", 0, "extra", 1), "contributor: "),
        (put("contributors", None), "contributors: None given"),
        (put("payloads", 0), "payloads: 0 given"),
        (put("previous", 7), "previous: 7 given"),
        (put("divisor", 1.5), "divisor: 1.5 given"),
    ],
)
def test_malformed_commits_are_refused(change: Change, expected: str) -> None:
    assert expected in refusal(Commit, changed(COMMIT, change))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"3",
        b'"manifest"',
        b"[" * 200_000,
        MANIFEST.to_bytes() + b" " * (4 << 20),
        b"\x80\x04\x95.",  # a pickle
        MANIFEST.to_bytes()[:-5],
        MANIFEST.to_bytes().replace(b"2.5", b"NaN"),
        MANIFEST.to_bytes().replace(b"2.5", b"-Infinity"),
        MANIFEST.to_bytes().replace(b"2.5", b"1e999"),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    refusal(Manifest, data)


def test_a_manifest_is_no_commit() -> None:
    assert "has keys" in refusal(Commit, MANIFEST.to_bytes())
    assert "has keys" in refusal(Manifest, COMMIT.to_bytes())


@given(st.sampled_from(sorted(json.loads(MANIFEST.to_bytes()))), JSON_VALUES)
def test_whatever_stands_in_a_field_is_taken_or_refused(name: str, value: Any) -> None:
    """Nothing that another party writes raises anything else."""
    data = changed(MANIFEST, put(name, value))
    try:
        record = Manifest.from_bytes(data)
    except RefusedError:
        return
    assert Manifest.from_bytes(record.to_bytes()) == record


@given(st.sampled_from(sorted(dataclasses.asdict(PAYLOAD))), JSON_VALUES)
def test_whatever_stands_in_a_payload_is_taken_or_refused(name: str, value: Any) -> None:
    try:
        record = Manifest.from_bytes(changed(MANIFEST, put("payloads", 0, name, value)))
    except RefusedError:
        return
    assert type(getattr(record.payloads[0], name)) is type(getattr(PAYLOAD, name))


# ---- the chain


def chain() -> tuple[Commit, Commit]:
    first = dataclasses.replace(COMMIT, version=0, previous=None, contributors=[], divisor=0)
    return first, dataclasses.replace(COMMIT, version=1, previous=sha256_bytes(first.to_bytes()))


def test_a_chain_that_holds() -> None:
    first, second = chain()
    check_link(first, 0, None, "c0" * 32)
    check_link(second, 1, first.to_bytes(), "c0" * 32)


def test_broken_links_are_refused() -> None:
    first, second = chain()
    other = dataclasses.replace(first, divisor=1)
    broken = [
        (second, 1, other.to_bytes(), "c0" * 32, "commit 1 follows "),  # its predecessor was changed by one digit
        (second, 1, None, "c0" * 32, "commit 1 follows "),
        (dataclasses.replace(second, previous=None), 1, first.to_bytes(), "c0" * 32, "commit 1 follows None"),
        (dataclasses.replace(first, previous="ab"), 0, None, "c0" * 32, "commit 0 follows ab"),
        (second, 2, first.to_bytes(), "c0" * 32, "commit 2 says it is version 1"),
        (second, 1, first.to_bytes(), "c1" * 32, "commit 1 belongs to contract c0c0c0c0c0c0, not c1c1c1c1c1c1"),
    ]
    for commit, version, previous, contract, expected in broken:
        with pytest.raises(RefusedError, match=rf"^{expected}[^\n]*$"):
            check_link(commit, version, previous, contract)


def test_sha256_is_the_one_everybody_knows() -> None:
    assert sha256_bytes(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
