"""Every reader of bytes that another party wrote, given anything: the one intended exception, one line, or a value.

What is given is arbitrary JSON, arbitrary bytes, and what the reader should accept, spoiled in a few places. The suite
takes some hundred inputs a reader, the same ones always; `make soak` a million in all.
"""

import json
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save

from data_tools.counts import read_counts
from launch.show.status import print_status
from pretrain.config.check import ConfigError
from pretrain.config.load import load_config
from pretrain.exchange import words
from pretrain.exchange.board import Words, answer
from pretrain.exchange.channel import BrokenError, Passport
from pretrain.exchange.payload import Tensors, check_header
from pretrain.exchange.rollback import Rollback
from pretrain.host.foreign import loads, shown
from pretrain.outer.codec import CODECS, check, decoded, encode
from pretrain.outer.moments import MeanGradient, SecondMoment, check_moments
from pretrain.silo.shards import read_manifest, tokenizer_sha256
from pretrain.trust.contract import FORMAT, first_contract, read_contract
from pretrain.trust.keys import PublicKey
from pretrain.trust.ledger import Agreement, Commit, Manifest, RefusedError, Snapshot
from tests.unit.trust.test_ledger import COMMIT, MANIFEST

MANY = 1_000_000
SHAPE = torch.Size([6, 5])
ROLLBACK = Rollback(
    previous=None, from_version=2, to_version=1, commit_sha256="a" * 64, discarded=["b" * 64], reason="worse"
)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Something that reads bytes of others."""

    read: Callable[[bytes, Path], object]
    """Takes the bytes, and a folder that is empty but for them."""
    accepted: bytes
    """What it reads without a word."""
    refuses: type[Exception] | tuple[type[Exception], ...]
    """How it says that something is wrong, in one line."""


def from_file(read: Callable[[Path], object], name: str) -> Callable[[bytes, Path], object]:
    """A reader of a file in a folder; gets the file."""

    def read_file(data: bytes, folder: Path) -> object:
        file = folder / name
        file.write_bytes(data)
        return read(file)

    return read_file


def read_payload(file: Path) -> None:
    check_header(file, limit_bytes=1 << 20)
    tensors = Tensors(file)
    for name in tensors.names:
        for codec in CODECS:
            try:
                check(codec, parts := tensors.parts(name), SHAPE)
            except ValueError:
                continue
            assert decoded(codec, torch.zeros(SHAPE), parts).shape == SHAPE
    for kind in (SecondMoment, MeanGradient):
        agreed = {"w": kind(SHAPE)}
        try:
            check_moments(tensors.moments, agreed)
        except ValueError:
            continue
        assert agreed["w"].decode(tensors.moments["w"]).isfinite().all()


def payload() -> bytes:
    value = torch.arange(30.0).view(SHAPE)
    parts = {f"parameter/{part}/w": tensor for part, tensor in encode("int4", value, value * 2).items()}
    moments = {f"moment/{part}/w": tensor for part, tensor in SecondMoment(SHAPE).encode(value).items()}
    return save(parts | moments)


WORDS = {
    "identity": words.Identity(identity="a" * 32),
    "membership": words.Membership(left=False, version=3),
    "refusal": words.Refusal(reason="its norm", final=True, manifest_sha256="a" * 64),
    "lease": words.Holder(holder="aggregator", machine="m", pid=1, lease_seconds=30.0, nonce="n"),
    "waiting": words.Waiting(silos=["alpha"], deadline_seconds=None),
    "damaged": words.Damaged(reason="truncated"),
}
SPLIT = {
    "format": 2,
    "name": "train",
    "tokenizer_sha256": "a" * 64,
    "vocab_size": 300,
    "shards": [{"file": "shard-00000.bin", "num_tokens": 2, "sha256": "b" * 64}],
}
SNAPSHOT = Snapshot(contract_sha256="a" * 64, version=1, commit_sha256="b" * 64, payloads=[])
PASSPORT = Passport(run="run", silo="alpha", lane=0, certificate="a" * 64, key="b" * 64, signature="c" * 86)
AGREEMENT = Agreement(contract_sha256="a" * 64, member="alpha", signature="c" * 86)
# Of the seeds 9d61b19d... (RFC 8032, 7.1, test 1) and 77076d0a... (RFC 7748, 6.1).
KEY = PublicKey(
    signing=bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"),
    agreement=bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"),
).text.encode()
READERS: dict[str, Reader] = {
    "json": Reader(read=lambda data, _: loads(data), accepted=b'{"a": [1, 2.5]}', refuses=ValueError),
    "text": Reader(read=lambda data, _: shown(data.decode(errors="replace")), accepted=b"a\x1b[2J", refuses=()),
    "manifest": Reader(
        read=lambda data, _: Manifest.from_bytes(data), accepted=MANIFEST.to_bytes(), refuses=RefusedError
    ),
    "commit": Reader(read=lambda data, _: Commit.from_bytes(data), accepted=COMMIT.to_bytes(), refuses=RefusedError),
    "snapshot": Reader(
        read=lambda data, _: Snapshot.from_bytes(data), accepted=SNAPSHOT.to_bytes(), refuses=RefusedError
    ),
    "agreement": Reader(
        read=lambda data, _: Agreement.from_bytes(data), accepted=AGREEMENT.to_bytes(), refuses=RefusedError
    ),
    "passport": Reader(
        read=lambda data, _: Passport.from_bytes(data), accepted=PASSPORT.to_bytes(), refuses=RefusedError
    ),
    "request to the board": Reader(
        read=lambda data, _: answer(Words(["alpha"]).of("alpha"), data),
        accepted=b'["set", "said/1/alpha", "words"]',
        refuses=BrokenError,
    ),
    "public key": Reader(
        read=lambda data, _: PublicKey.parse(data.decode(errors="replace")), accepted=KEY, refuses=ConfigError
    ),
    "rollback": Reader(
        read=lambda data, _: Rollback.from_bytes(data),
        accepted=ROLLBACK.to_bytes(),
        refuses=RefusedError,
    ),
    "contract": Reader(
        read=lambda data, _: read_contract(data, "store"),
        accepted=first_contract({"format": FORMAT, "run_id": ""}),
        refuses=ConfigError,
    ),
    "payload": Reader(
        read=from_file(read_payload, "p.safetensors"),
        accepted=payload(),
        refuses=(SafetensorError, ValueError, RefusedError),
    ),
    "packed split": Reader(
        read=from_file(lambda file: read_manifest(file.parent), "manifest.json"),
        accepted=json.dumps(SPLIT).encode(),
        refuses=ConfigError,
    ),
    "tokenizer": Reader(
        read=from_file(tokenizer_sha256, "tokenizer.json"), accepted=b'{"model": {"type": "BPE"}}', refuses=ConfigError
    ),
    "counts": Reader(read=from_file(read_counts, "c.tsv"), accepted=b'# {"format": 1}\n"a"\t3\n', refuses=ConfigError),
    "configuration": Reader(
        read=from_file(lambda file: load_config([file]), "run.yaml"),
        accepted=b"name: run\nmodel: {config: {model_type: llama}}\nsilos: {a: {data: [x]}}\ninner: {num_steps: 500}\n",
        refuses=ConfigError,
    ),
    "status": Reader(
        read=from_file(lambda file: print_status(str(file.parent)), "contract.json"),
        accepted=first_contract({"format": FORMAT, "run_id": "", "roster": ["alpha"], "outer": {"num_fragments": 1}}),
        refuses=ConfigError,
    ),
} | {
    name: Reader(read=lambda data, _, word=word: word.from_bytes(data), accepted=word.to_bytes(), refuses=RefusedError)
    for name, word in WORDS.items()
}

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
SNIPPETS = st.sampled_from(
    [
        *(b"[" * 5000, b'{"a":' * 3000, b"1e999", b"NaN", b"-1", b"9" * 400, b"null", b"\\ud800"),
        *(b"\xff\xfe", b"\x00", b'"', b"}", b"\n", b"\x1b[2J", b"\xe2\x80\xae"),
        *(b"${oc.env:HOME}", b"!!python/object:os.system", b"../.."),
    ]
)


@st.composite
def inputs(draw: st.DrawFn, accepted: bytes) -> bytes:
    """Arbitrary bytes or JSON; or what is accepted with a value of its own replaced, or with places overwritten."""
    kind = draw(st.sampled_from(["bytes", "json", "member", "places", "places", "places"]))
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    if kind == "json":
        return json.dumps(draw(VALUES)).encode()
    if kind == "member":
        try:
            found = json.loads(accepted)
        except ValueError:
            kind = "places"
        else:
            keys = sorted(found) if isinstance(found, dict) else range(len(found))
            found[draw(st.sampled_from(keys))] = draw(VALUES)
            return json.dumps(found).encode()
    data = bytearray(accepted)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 8))] = draw(SNIPPETS | st.binary(max_size=4))
    return bytes(data)


def fuzz(reader: Reader, folder: Path, num_inputs: int) -> None:
    """Give a reader so many inputs; whatever else it raises, or a message of several lines, fails."""
    check = settings(
        max_examples=num_inputs, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )

    @check
    @given(inputs(reader.accepted))
    def run(data: bytes) -> None:
        said = ""
        try:
            reader.read(data, folder)
        except SafetensorError:  # the library's own words; whoever catches it makes a line of them
            pass
        except reader.refuses as error:
            said = str(error)
        assert "\n" not in said

    run()


@pytest.mark.parametrize("name", READERS)
def test_anything_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    fuzz(READERS[name], tmp_path, 150)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", READERS)
def test_a_million_inputs_in_bounded_memory(name: str, tmp_path: Path) -> None:
    fuzz(READERS[name], tmp_path, int(os.environ.get("ATOLL_FUZZ_INPUTS", MANY)) // len(READERS))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # kilobytes
