"""The small objects of a store, other than records: what each says, of which type, and under which names. No torch.

Whoever may write to a store may write anything into it. A word that is none raises RefusedError, one line that names
what is wrong with it, whoever reads it; names that are not exactly these are nobody's.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Self

from pretrain.host.foreign import shown
from pretrain.trust.ledger import RefusedError, check_types, typed_keys

WORD_BYTES = 64 << 10
MOST_CORPORA = 64  # of an evaluation, ...
NAME_CHARACTERS = 64  # ... and of a corpus's name
LABEL = re.compile(r"[a-z][a-z0-9_-]{0,31}")
DIGEST = re.compile(r"[0-9a-f]{64}")
NUMBER = re.compile(r"[0-9]{6}|[1-9][0-9]{6,8}")


@dataclass(frozen=True, kw_only=True)
class Word:
    """What they share: JSON with just their keys, and a signature where the contract names keys."""

    signature: str | None = field(default=None, compare=False)

    def to_bytes(self) -> bytes:
        """One line of JSON."""
        said = dataclasses.asdict(self)
        if self.signature is None:
            del said["signature"]
        return (json.dumps(said) + "\n").encode()

    def to_sign(self, contract_sha256: str, name: str) -> bytes:
        """What is signed of it: it counts in this run, and under this name."""
        return f"{contract_sha256} {name}\n".encode() + dataclasses.replace(self, signature=None).to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a word of another party; raises RefusedError if anything is missing, unknown or of another type."""
        given = typed_keys(cls, data, limit_bytes=WORD_BYTES, optional=("signature",))
        check_types(cls, given)
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class Identity(Word):
    """Which run directory holds a silo's name."""

    identity: str


@dataclass(frozen=True, kw_only=True)
class Membership(Word):
    """A silo's last word on whether it takes part, and the newest version when it said it."""

    left: bool
    version: int


@dataclass(frozen=True, kw_only=True)
class Refusal(Word):
    """Why a delivery was not taken, and whether another one for the same version would not be either."""

    reason: str
    final: bool
    manifest_sha256: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class Holder(Word):
    """Who holds a term of a store's lease."""

    holder: str
    machine: str
    pid: int
    lease_seconds: float
    nonce: str


@dataclass(frozen=True, kw_only=True)
class TermSign(Word):
    """The holder of a term of a store's lease is alive, or has ended."""

    nonce: str
    """The term's."""


@dataclass(frozen=True, kw_only=True)
class Beat(Word):
    """A silo is alive."""

    lease_seconds: float
    """How long it may be silent."""


@dataclass(frozen=True, kw_only=True)
class Resumable(Word):
    """A silo has a checkpoint that holds the version in the object's name."""

    num_rollbacks: int
    """Of the run until then: a later one takes the mark back, whoever may keep a copy of it."""


@dataclass(frozen=True, kw_only=True)
class Done(Word):
    """A rollback is complete."""


@dataclass(frozen=True, kw_only=True)
class Waiting(Word):
    """Whom a version waits for, and how long at most."""

    silos: list[str]
    deadline_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Damaged(Word):
    """A silo cannot use the newest version as it lies in the store, and why."""

    reason: str
    nonce: str
    """What is said twice counts twice, a copy of it does not."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Word):
    """What a silo has found the loss of a model to be on held-out text."""

    version: int | None
    """Of the run's model; None: of one beside the run, ..."""
    label: str = ""
    """... which is called this (central, alone); else empty."""
    parameters_digest: str
    """Of the model that was evaluated, as a commit has it."""
    losses: dict[str, float]
    """Corpus to nats per token, ..."""
    sequences: dict[str, float]
    """... and to how many sequences that is the mean of."""
    tokens: int | None = None
    """That a model beside the run was trained on; None: not known, or not told."""

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The same; it stays in the store for ever, and a page shows its names and numbers."""
        found = super().from_bytes(data)
        label, digest, corpora = found.label, found.parameters_digest, found.losses.keys()
        if bool(label) != (found.version is None) or not (DIGEST.fullmatch(digest) and LABEL.fullmatch(label or "a")):
            raise RefusedError("it does not say of which model it is; allowed: a version or a label, and a digest")
        if not 1 <= len(corpora) <= MOST_CORPORA or corpora != found.sequences.keys():
            raise RefusedError(f"{len(corpora)} corpora given; allowed: 1 to {MOST_CORPORA}, with their sequences")
        for corpus in corpora:
            if not (corpus.isprintable() and 1 <= len(corpus) <= NAME_CHARACTERS):
                raise RefusedError(f"corpus {shown(repr(corpus))} given; allowed: up to {NAME_CHARACTERS} characters")
            if found.losses[corpus] < 0 or found.sequences[corpus] < 1:
                raise RefusedError(f"corpus {shown(corpus)}: allowed: a loss of 0 or more, of sequences")
        return found


@dataclass(frozen=True, kw_only=True)
class Decision(Word):
    """Whether a version has become the run's current model, by the contract's gate (`gated.py`)."""

    version: int
    parameters_digest: str
    is_current: bool
    """Whether it is the current one from then on; else that which it was compared with stays."""
    compared_with: int
    """The current one before; of version 0, which is the first, itself."""
    previous: str | None
    """sha256 of the decision before, as it was written."""
    judges: list[str]
    """Whose results were there, silos and operator, sorted, ..."""
    results: list[str]
    """... and the sha256 of each, as it was written."""
    reasons: list[str]
    """Why it has not become the current one."""

    @property
    def current(self) -> int:
        """The current version after it."""
        return self.version if self.is_current else self.compared_with

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The same."""
        found = super().from_bytes(data)
        if found.compared_with > found.version or len(found.judges) != len(found.results):
            raise RefusedError("it is compared with a later version, or does not name the result of every judge")
        if found.is_current == bool(found.reasons):
            raise RefusedError("it does not say why it has not become the current one, or says why it has not")
        return found


def number(name: str, *, before: str = "", after: str = "") -> int | None:
    """The number in a name such as 000017 or 000017.json, written just so; None if it is another name."""
    if not (name.startswith(before) and name.endswith(after)):
        return None
    digits = name[len(before) : len(name) - len(after)]
    return int(digits) if NUMBER.fullmatch(digits) else None
