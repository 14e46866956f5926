"""What reads bytes that another party wrote: each with bytes that it accepts, and its way to say no."""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from data_tools.counts import CountsHeader, read_counts
from launch.show.status import print_status
from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR, InnerConfig, MembershipConfig, OuterConfig
from pretrain.config.load import load_config
from pretrain.exchange import words
from pretrain.exchange.board import Words, answer
from pretrain.exchange.channel import BrokenError, Passport
from pretrain.exchange.payload import Tensors, check_header
from pretrain.exchange.revocation import Revocation
from pretrain.exchange.rollback import Rollback
from pretrain.federation.bundle import Exit, Listed
from pretrain.host.foreign import loads, shown
from pretrain.merge.outcome import Outcome, bare, read_outcome, settled
from pretrain.outer.codec import CODECS, check, decoded, encode
from pretrain.outer.moments import MeanGradient, SecondMoment, check_moments
from pretrain.silo import shards
from pretrain.silo.shards import tokenizer_sha256
from pretrain.trust.amendment import Acceptance, Amendment
from pretrain.trust.contract import FORMAT, first_contract, read_contract
from pretrain.trust.keys import PublicKey
from pretrain.trust.ledger import Agreement, Commit, GroupKey, Manifest, RefusedError, Snapshot
from pretrain.trust.members import Members
from pretrain.trust.sums import Answer, Shares, Survivors, laid_open
from tests.unit.trust.test_ledger import COMMIT, MANIFEST
from tests.unit.trust.test_seal import EPOCH, PLACE, sealed, sealer

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


CONTRACT = first_contract(
    {
        "format": FORMAT,
        "run_id": "",
        "roster": ["alpha"],
        "inner": dataclasses.asdict(InnerConfig()),
        "outer": dataclasses.asdict(OuterConfig()),
        "membership": dataclasses.asdict(MembershipConfig()),
    }
)
NAMES = (
    *("aggregator/000001.json", "waiting/000001.json", "rollbacks/000001.json", "global/000000/commit.json"),
    *("silos/alpha/beats/000001", "silos/alpha/membership/000001.json", "silos/alpha/000001/manifest.json"),
    *("silos/alpha/000001/refused-0.json", "silos/alpha/identity.json"),
)


def read_store(data: bytes, folder: Path) -> None:
    """What `atoll status` reads of a store whose contract is as it should be."""
    (folder / "contract.json").write_bytes(CONTRACT)
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    print_status(str(folder))


WORDS = {
    "identity": words.Identity(identity="a" * 32),
    "membership": words.Membership(left=False, version=3),
    "refusal": words.Refusal(reason="its norm", final=True, manifest_sha256="a" * 64),
    "lease": words.Holder(holder="aggregator", machine="m", pid=1, lease_seconds=30.0, nonce="n"),
    "waiting": words.Waiting(silos=["alpha"], deadline_seconds=None),
    "damaged": words.Damaged(reason="truncated", nonce="n"),
    "resumable": words.Resumable(num_rollbacks=0),
    "beat": words.Beat(lease_seconds=30.0),
    "evaluation": words.Evaluation(
        version=None, label="central", parameters_digest="a" * 64, losses={"law": 2.5}, sequences={"law": 64}, tokens=9
    ),
    "decision": words.Decision(
        version=2,
        parameters_digest="a" * 64,
        is_current=False,
        compared_with=1,
        previous="b" * 64,
        judges=["alpha"],
        results=["c" * 64],
        reasons=["its mean"],
    ),
    "sign of a term": words.TermSign(nonce="n"),
}
REVOCATION = Revocation(
    contract_sha256="a" * 64,
    member="beta",
    from_version=2,
    to_version=3,
    commit_sha256="b" * 64,
    parameters_digest="c" * 64,
    reason="",
    signer="alpha",
)
LEFT = Exit(
    contract_sha256="a" * 64,
    member="alpha",
    version=3,
    commit_sha256="b" * 64,
    parameters_digest="c" * 64,
    software=["torch 2.9"],
    asked=["model"],
    missing=[],
    files=[Listed(path="store/contract.json", blake3="d" * 64, num_bytes=1)],
)
SHARD = shards.Shard(file="shard-00000.bin", num_tokens=2, sha256="b" * 64)
SPLIT = shards.Manifest(
    tokenizer_sha256="a" * 64,
    recipe_sha256="b" * 64,
    vocab_size=300,
    token_type="uint16",
    end_of_text_id=0,
    num_tokens=2,
    num_documents=1,
    num_bytes=3,
    documents_sha256="c" * 64,
    shards=(SHARD,),
)
CHAT_SPLIT = dataclasses.replace(
    SPLIT,
    shards=(dataclasses.replace(SHARD, mask_sha256="d" * 64),),
    chat=shards.Chat(template_sha256="e" * 64, sequence_tokens=2, num_trained_tokens=1),
)
COUNTS = CountsHeader(kind="occurrences", min_count=1, min_documents=1, epsilon=None, delta=None, per_document=None)


def read_split(file: Path) -> None:
    (file.parent / SHARD.file).write_bytes(bytes(2 * SHARD.num_tokens))
    (file.parent / SHARD.mask_file).write_bytes(bytes(1))
    (file.parent / shards.DOCUMENTS_FILE).write_bytes(bytes(shards.DOCUMENT_END.itemsize))
    shards.read_manifest(file.parent)


SNAPSHOT = Snapshot(contract_sha256="a" * 64, version=1, commit_sha256="b" * 64, payloads=[])
PASSPORT = Passport(run="run", silo="alpha", lane=0, certificate="a" * 64, key="b" * 64, signature="c" * 86)
AGREEMENT = Agreement(contract_sha256="a" * 64, member="alpha", signature="c" * 86)
OUTCOME = Outcome(
    contract_sha256="a" * 64,
    silo="alpha",
    version=1,
    terms_sha256="b" * 64,
    moments_digest="c" * 64,
    kept_digest="d" * 64,
    update_squared=0.5,
    gram=[[1.0, 0.5], [0.5, 2.0]],
)
AMENDMENT = Amendment(number=1, previous="a" * 64, from_version=3, changes=["outer.lr=0.5"], author="alpha")
ACCEPTANCE = Acceptance(amendment_sha256="a" * 64, version=1)
RUN = "c0" * 32
GROUP_KEY = GroupKey(contract_sha256=RUN, member="law", sealed=sealer(OPERATOR).give(EPOCH, "law"))
# Of the seeds 9d61b19d... (RFC 8032, 7.1, test 1) and 77076d0a... (RFC 7748, 6.1).
KEY = PublicKey(
    signing=bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"),
    agreement=bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"),
).text.encode()


OF_SUM: dict[str, Any] = {"contract_sha256": "a" * 64, "version": 17}
SHARES = Shares(**OF_SUM, silo="alpha", blake3="b" * 64, salt="c" * 64, sealed=["d0" * 148] * 2, seeds=["e" * 64] * 2)
SURVIVORS = Survivors(**OF_SUM, silos=["alpha"], manifests=["f" * 64])
ANSWER = Answer(**OF_SUM, silo="alpha", survivors_sha256="0" * 64, shares=["ab" * 66, "cd" * 66])


def sealed_payload() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        return sealed(Path(directory), payload())[0]


def read_two_outcomes(data: bytes, _: Path) -> None:
    """What two silos say of a version, both the same, and what comes of it."""
    outcome = read_outcome(data, silo="alpha", version=1, contract_sha256="a" * 64, num_silos=2, members=Members())
    settled(bare(COMMIT), [outcome, outcome]).to_bytes()


def read_group_key(data: bytes, _: Path) -> None:
    sealer("law").take(EPOCH, GroupKey.from_bytes(data).sealed)


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
    "shares": Reader(read=lambda data, _: Shares.from_bytes(data), accepted=SHARES.to_bytes(), refuses=RefusedError),
    "survivors": Reader(
        read=lambda data, _: laid_open(Survivors.from_bytes(data), ["alpha", "beta"]),
        accepted=SURVIVORS.to_bytes(),
        refuses=RefusedError,
    ),
    "answer": Reader(read=lambda data, _: Answer.from_bytes(data), accepted=ANSWER.to_bytes(), refuses=RefusedError),
    "revocation": Reader(
        read=lambda data, _: Revocation.from_bytes(data), accepted=REVOCATION.to_bytes(), refuses=RefusedError
    ),
    "exit": Reader(read=lambda data, _: Exit.from_bytes(data), accepted=LEFT.to_bytes(), refuses=RefusedError),
    "agreement": Reader(
        read=lambda data, _: Agreement.from_bytes(data), accepted=AGREEMENT.to_bytes(), refuses=RefusedError
    ),
    "outcome": Reader(read=read_two_outcomes, accepted=OUTCOME.to_bytes(), refuses=RefusedError),
    "amendment": Reader(
        read=lambda data, _: Amendment.from_bytes(data).new_key, accepted=AMENDMENT.to_bytes(), refuses=RefusedError
    ),
    "acceptance": Reader(
        read=lambda data, _: Acceptance.from_bytes(data), accepted=ACCEPTANCE.to_bytes(), refuses=RefusedError
    ),
    "group key": Reader(read=read_group_key, accepted=GROUP_KEY.to_bytes(), refuses=RefusedError),
    "sealed payload": Reader(
        read=from_file(lambda file: sealer(OPERATOR).open(file, PLACE), "000017.safetensors"),
        accepted=sealed_payload(),
        refuses=RefusedError,
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
        read=from_file(read_split, "manifest.json"),
        accepted=json.dumps(shards.without_none(SPLIT)).encode(),
        refuses=ConfigError,
    ),
    "packed conversations": Reader(
        read=from_file(read_split, "manifest.json"),
        accepted=json.dumps(shards.without_none(CHAT_SPLIT)).encode(),
        refuses=ConfigError,
    ),
    "tokenizer": Reader(
        read=from_file(tokenizer_sha256, "tokenizer.json"), accepted=b'{"model": {"type": "BPE"}}', refuses=ConfigError
    ),
    "counts": Reader(
        read=from_file(read_counts, "c.tsv"),
        accepted=b'# Counts.\n# %s\n3\t"a"\n' % json.dumps(dataclasses.asdict(COUNTS)).encode(),
        refuses=ConfigError,
    ),
    "configuration": Reader(
        read=from_file(lambda file: load_config([file]), "run.yaml"),
        accepted=b"name: run\nmodel: {config: {model_type: llama}}\nsilos: {a: {data: [x]}}\ninner: {num_steps: 500}\n",
        refuses=ConfigError,
    ),
    "status": Reader(
        read=from_file(lambda file: print_status(str(file.parent)), "contract.json"),
        accepted=CONTRACT,
        refuses=ConfigError,
    ),
    "store": Reader(
        read=read_store, accepted=words.Waiting(silos=["alpha"], deadline_seconds=1.0).to_bytes(), refuses=()
    ),
} | {
    name: Reader(read=lambda data, _, word=word: word.from_bytes(data), accepted=word.to_bytes(), refuses=RefusedError)
    for name, word in WORDS.items()
}

SPOILS = [
    *(b"[" * 5000, b'{"a":' * 3000, b"1e999", b"NaN", b"-1", b"9" * 400, b"null", b"\\ud800"),
    *(b"\xff\xfe", b"\x00", b'"', b"}", b"\n", b"\x1b[2J", b"\xe2\x80\xae"),
    *(b"${oc.env:HOME}", b"!!python/object:os.system", b"../.."),
]
