"""A bundle: all that a member leaves a federation with, listed and signed; and checking one alone, without a network.

exit.json      who left, with which version, what is missing and why; every other file with its BLAKE3; signed
store/         the whole signed chain, laid out as a store, and that of which the newest versions are merged again
model/         the newest parameters as a transformers directory
data/          manifests of the member's own packed text
own/           what the member's run directory still has of its deliveries
keys.txt       public keys of all members
software/      the source of what made this, and what it needs
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pretrain.config.errors import ConfigError
from pretrain.config.load import CONFIG_FILE
from pretrain.exchange.store import StoreExchange, file_payload
from pretrain.federation.export import exported_digest
from pretrain.federation.verify import Finding, StoreVerifier, Verified
from pretrain.host.foreign import shown
from pretrain.silo.shards import tokenizer_sha256
from pretrain.trust.contract import read_contract
from pretrain.trust.ledger import Record, RefusedError, check_types, read_row, sha256_bytes, typed_keys
from pretrain.trust.members import Members

EXIT, STORE, MODEL, DATA, OWN, KEYS, SOFTWARE = "exit.json", "store", "model", "data", "own", "keys.txt", "software"
EXIT_BYTES = 1 << 28  # a row a file: a million of them


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One file of a bundle."""

    path: str
    """From the bundle's own directory, with / between folders."""
    blake3: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Exit(Record):
    """What a member left with."""

    contract_sha256: str
    member: str
    version: int
    """The newest then, ..."""
    commit_sha256: str
    """... sha256 of its commit's bytes, ..."""
    parameters_digest: str
    """... and the digest of its parameters, which the model has."""
    software: list[str]
    """Versions of what made it."""
    asked: list[str]
    """What a bundle is to hold."""
    missing: list[str]
    """What of it was not there any more, and why; empty: it is complete."""
    files: list[Listed]
    """All but this one, sorted."""

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The same, with as many files as there may be. Raises RefusedError."""
        given = typed_keys(cls, data, limit_bytes=EXIT_BYTES)
        if given["format"] != cls.format:
            raise RefusedError(f"format {shown(given['format'])} given; this version reads {cls.format}")
        check_types(cls, given)
        return cls(**given | {"files": [read_row(Listed, row) for row in given["files"]]})


@dataclass(kw_only=True)
class VerifiedBundle:
    """What was looked at, and found."""

    directory: str
    member: str = ""
    contract_sha256: str = ""
    """Of the contract in it: whoever knows the federation's own compares, as another contract has other keys."""
    missing: list[str] = field(default_factory=list)
    """What the member says was not there any more."""
    num_files: int = 0
    store: Verified | None = None
    """None: it is not even the store of a run, which is among the findings."""
    findings: list[Finding] = field(default_factory=list)
    """Those of the store among them."""


def is_bundle(directory: Path) -> bool:
    """Whether a directory is a bundle, or was one: who takes its list away does not make it a mere store."""
    names = (EXIT, KEYS, SOFTWARE) if (directory / CONFIG_FILE).is_file() else (EXIT, KEYS, SOFTWARE, MODEL, DATA, OWN)
    return (directory / STORE).is_dir() and any(os.path.lexists(directory / name) for name in names)


def walk(directory: Path) -> Iterator[tuple[str, bool]]:
    """Every file below a directory, and whether it is a regular one; links are not followed."""
    folders = [directory]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                else:
                    name = Path(entry.path).relative_to(directory).as_posix()
                    yield name, entry.is_file(follow_symlinks=False)


def listed(directory: Path) -> list[Listed]:
    """All regular files of a bundle but its list."""
    names = sorted(name for name, is_file in walk(directory) if is_file and name != EXIT)
    return [_listed(directory, name) for name in names]


def _listed(directory: Path, name: str) -> Listed:
    found = file_payload(directory / name, 0)
    return Listed(path=name, blake3=found.blake3, num_bytes=found.num_bytes)


class BundleVerifier:
    """Goes through one bundle; writes nothing into it."""

    def __init__(
        self, directory: Path, scratch: Path, *, tell: Callable[[str], object] = print, key: Path | None = None
    ) -> None:
        """`scratch` is an empty folder for what is read; `tell` gets a line of progress now and then; `key` is the
        operator's private key, which opens sealed deliveries."""
        self._directory, self._scratch, self._tell, self._key = directory, scratch, tell, key
        self._found = VerifiedBundle(directory=str(directory))

    def verify(self) -> VerifiedBundle:
        """All of it: the list, every file, the chain, the model."""
        found, record = self._found, None
        file = self._directory / EXIT
        try:
            if file.is_symlink() or not file.is_file():
                raise RefusedError("it is missing")
            data = file.read_bytes()
            record = Exit.from_bytes(data)
            if data != record.to_bytes():
                self._note(EXIT, "it is not in the one form that it has")
            found.member, found.missing = record.member, record.missing
        except (OSError, RefusedError) as error:
            self._note(EXIT, error.strerror if isinstance(error, OSError) else error)
        self._check_files(record.files if record else [])
        exchange = StoreExchange(str(self._directory / STORE))
        try:
            verifier = StoreVerifier(exchange, self._scratch, tell=self._tell, key=self._key)
            found.store = verifier.verify()
            found.findings += found.store.findings
            found.contract_sha256 = exchange.contract_sha256
            self._check_record(record, exchange, verifier.members)
        except ConfigError as error:
            self._note(f"{STORE}/contract.json", error)
        return found

    def _note(self, name: str, what: object) -> None:
        self._found.findings.append(Finding(version=None, name=shown(name), what=shown(what, limit=1000)))

    def _check_files(self, files: Sequence[Listed]) -> None:
        """None missing, none added, none changed."""
        wanted = {one.path: one for one in files}
        if len(wanted) != len(files):
            self._note(EXIT, "it lists a file twice")
        for name, is_file in sorted(walk(self._directory)):
            one = wanted.pop(name, None)
            if not is_file:
                self._note(name, "it is no regular file")
            elif name == EXIT:
                continue
            elif one is None:
                self._note(name, f"it was added: {EXIT} does not list it")
            else:
                self._found.num_files += 1
                self._check_file(one)
        for name in wanted:
            self._note(name, "it is missing")

    def _check_file(self, one: Listed) -> None:
        try:
            if _listed(self._directory, one.path) != one:
                self._note(one.path, f"it was changed: {EXIT} lists it with {one.num_bytes} bytes, {one.blake3[:12]}")
        except OSError as error:
            self._note(one.path, error.strerror)

    def _check_record(self, record: Exit | None, exchange: StoreExchange, members: Members) -> None:
        """Who has signed what, that it is of this chain, and that the model is that of its end."""
        newest = exchange.newest_version()
        try:
            commit_sha256, commit = sha256_bytes(exchange.commit_bytes(newest)), exchange.read_commit(newest)
        except (FileNotFoundError, RefusedError):
            return  # which the chain's own findings say
        terms, _ = read_contract(exchange.read_contract() or b"", exchange.objects.url)
        try:
            if exported_digest(self._directory / MODEL) != commit.parameters_digest:
                self._note(MODEL, f"its parameters are not those of version {newest}")
            if tokenizer_sha256(self._directory / MODEL / "tokenizer.json") != terms["tokenizer_sha256"]:
                self._note(f"{MODEL}/tokenizer.json", "it is not the contract's")
        except ConfigError as error:
            self._note(MODEL, error)
        if not record:
            return
        expected = {
            "contract_sha256": exchange.contract_sha256,
            "version": newest,
            "commit_sha256": commit_sha256,
            "parameters_digest": commit.parameters_digest,
        }
        for term, value in expected.items():
            if getattr(record, term) != value:
                self._note(EXIT, f"its {term} is {getattr(record, term)!r}; of the store here it is {value!r}")
        try:
            if record.member not in members.all_silos(terms["roster"]):
                raise RefusedError(f"{record.member} is not on the contract's roster, nor was it added")
            members.check(record.member, record)
        except RefusedError as error:
            self._note(EXIT, error)
