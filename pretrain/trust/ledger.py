"""The record of a run: a silo's manifest for each delivery, a hash-chained commit for each outer step. No torch.

None holds a time of day: a run that was killed and resumed has the same ledger, byte by byte, as one that was not.
"""

import dataclasses
import hashlib
import json
import math
import re
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, get_args, get_origin

from pretrain.host.foreign import loads, shown

FORMAT, MANIFEST_FORMAT, COMMIT_FORMAT = 1, 3, 4
RECORD_BYTES = 4 << 20  # of a record: a commit of ten thousand silos
METRIC = re.compile(r"[A-Za-z0-9_./-]{1,128}")
MANIFEST_METRICS = 16  # how many a manifest may have; ours have three


class RefusedError(Exception):
    """Bytes of another party that are not what they should be; the message says how."""


@dataclass(frozen=True, kw_only=True)
class Payload:
    """One object of a delivery or commit."""

    fragment: int
    file: str
    blake3: str
    """Of its bytes, in hexadecimal (https://github.com/BLAKE3-team/BLAKE3-specs)."""
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """What manifests and commits share: canonical JSON bytes, and reading that refuses what does not fit."""

    format: int = FORMAT
    signature: str | None = None
    """By its author, over the bytes without it; None where the contract names no keys (members.py)."""

    def unsigned_bytes(self) -> bytes:
        """What is signed."""
        return dataclasses.replace(self, signature=None).to_bytes()

    def to_bytes(self) -> bytes:
        """Canonical JSON: the bytes that hashes are taken over."""
        return (json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1, allow_nan=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a record of another party; raises RefusedError if anything is missing, unknown or of another type."""
        given = typed_keys(cls, data, limit_bytes=RECORD_BYTES)
        if given["format"] != cls.format:  # the class's own
            raise RefusedError(f"format {shown(given['format'])} given; this version reads {cls.format}")
        check_types(cls, given)
        for name, row_type in (("payloads", Payload), ("contributors", Contributor)):
            if name in given:
                given[name] = [read_row(row_type, row) for row in given[name]]
        for name in given.get("metrics", ()):
            if not METRIC.fullmatch(name):
                raise RefusedError(f"metrics: {shown(repr(name))} given; allowed: {METRIC.pattern}")
        return cls(**given)


def typed_keys(kind: type, data: bytes, *, limit_bytes: int, optional: Collection[str] = ()) -> dict[str, Any]:
    """What JSON of another party says, if it has just a dataclass's fields; raises RefusedError, one short line.

    What is `optional` may be missing, and is None then.
    """
    try:
        given = loads(data, limit_bytes=limit_bytes)
    except ValueError as error:
        raise RefusedError(f"not JSON: {shown(error)}") from None
    names = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(given, dict) or set(given) | {*optional} != names:
        found = sorted(given) if isinstance(given, dict) else given
        raise RefusedError(f"has keys {shown(found)}, not {sorted(names - {*optional})}")
    return dict.fromkeys(optional) | given


def check_types(kind: type, given: Mapping[str, Any]) -> None:
    """Raise RefusedError unless every value is of its field's type."""
    for f in dataclasses.fields(kind):
        if not _fits(given[f.name], f.type):
            raise RefusedError(f"{f.name}: {shown(repr(given[f.name]))} given; allowed: {f.type}")


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))  # 1e999 reads as infinity


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value read from JSON is of a field's type; whole numbers are those that every reader can hold."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin is types.UnionType:
        return any(_fits(value, one) for one in inner)
    if origin is dict:
        return isinstance(value, dict) and all(_is_number(number) for number in value.values())
    if origin is list:
        return type(value) is list and (inner != (str,) or all(type(text) is str for text in value))
    if wanted is float:
        return _is_number(value)
    return type(value) is wanted and (wanted is not int or 0 <= value < 1 << 53)


def read_row(row_type: type, row: Any) -> Any:
    """One of several dataclasses in a record of another party. Raises RefusedError."""
    what = row_type.__name__.lower()
    try:
        made = row_type(**row)
    except TypeError as error:
        raise RefusedError(f"{what}: {shown(error)}") from None
    for f in dataclasses.fields(row_type):
        if not _fits(getattr(made, f.name), f.type):
            raise RefusedError(f"{what}.{f.name}: {shown(repr(getattr(made, f.name)))} given")
    if isinstance(made, Payload) and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", made.file):
        raise RefusedError(f"payload.file: {shown(repr(made.file))} given; allowed: a plain file name")
    return made


@dataclass(frozen=True, kw_only=True)
class Manifest(Record):
    """What one silo delivered for one version; written after the payload that it names."""

    format: int = MANIFEST_FORMAT
    contract_sha256: str
    silo: str
    version: int
    base_version: int
    base_digest: str
    cosigned: str
    """sha256 of the bytes of the newest commit that the silo had adopted, so that what signs this stands under it, too;
    empty in a collective, where each makes the commits itself."""
    codec: str
    payloads: list[Payload]
    tokens: int
    steps: int
    tokens_total: int
    metrics: dict[str, float]

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The same; a manifest stays in the store for ever, and its metrics are few."""
        manifest = super().from_bytes(data)
        if len(manifest.metrics) > MANIFEST_METRICS:
            raise RefusedError(f"metrics: {len(manifest.metrics)} given; allowed: {MANIFEST_METRICS}")
        return manifest


@dataclass(frozen=True, kw_only=True)
class Contributor:
    """One silo's part in a commit. Its weight is in tokens, or a count where a merge counts every silo alike."""

    silo: str
    version: int
    """The version that it delivered for: an older one if it came too late for that."""
    manifest_sha256: str
    tokens: int
    tokens_total: int
    steps: int
    weight: int


@dataclass(frozen=True, kw_only=True)
class Commit(Record):
    """One finished outer step, recorded for ever. Version 0 is the initial state and has no contributors."""

    format: int = COMMIT_FORMAT
    contract_sha256: str
    version: int
    previous: str | None
    codec: str
    payloads: list[Payload]
    contributors: list[Contributor]
    divisor: int
    parameters_digest: str
    outer_digest: str
    """Of the outer state of the fragments that changed, where a snapshot follows; else empty."""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Snapshot(Record):
    """What a restart needs beside a commit's payloads, else it follows from earlier versions and deliveries.

    Written while silos train on from the version, so it may be missing for a while, or for ever.
    """

    contract_sha256: str
    version: int
    commit_sha256: str
    payloads: list[Payload]


@dataclass(frozen=True, kw_only=True)
class Agreement(Record):
    """A member's signature under the contract."""

    contract_sha256: str
    member: str


@dataclass(frozen=True, kw_only=True)
class GroupKey(Record):
    """The key with which the operator seals what it writes to all members, sealed to one of them."""

    contract_sha256: str
    member: str
    sealed: str
    """In hexadecimal; see seal.py."""


def sha256_bytes(data: bytes) -> str:
    """sha256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def check_cosigned(manifest: Manifest, sha256s: Collection[str]) -> None:
    """Raise RefusedError unless a silo has adopted one of the commits that it could have by then, by their sha256."""
    if manifest.cosigned not in sha256s:
        raise RefusedError(
            f"silo {manifest.silo} had adopted commit {shown(manifest.cosigned[:12])} when it delivered for version "
            f"{manifest.version}, which is none of this chain: it was shown another history"
        )


def check_link(commit: Commit, version: int, previous: bytes | None, contract_sha256: str) -> None:
    """Check that `commit` is version `version` of this contract and names the bytes of its predecessor."""
    if commit.version != version:
        raise RefusedError(f"commit {version} says it is version {commit.version}")
    if commit.contract_sha256 != contract_sha256:
        raise RefusedError(
            f"commit {version} belongs to contract {commit.contract_sha256[:12]}, not {contract_sha256[:12]}"
        )
    expected = sha256_bytes(previous) if previous is not None else None
    if commit.previous != expected:
        raise RefusedError(f"commit {version} follows {commit.previous}, but version {version - 1} is {expected}")
