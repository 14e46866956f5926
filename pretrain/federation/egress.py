"""Checking egress ledgers: their chain, their signatures, and what lies in the store in our name. No torch."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.config.load import CONFIG_FILE, load_run
from pretrain.exchange.archive import KIND as ARCHIVE
from pretrain.exchange.objects import Objects
from pretrain.exchange.options import store_options
from pretrain.exchange.store import REQUESTS_AT_ONCE
from pretrain.outer.threads import in_threads
from pretrain.trust.egress import FOLDER, RELAY, REQUESTS, SIGNED, Line, read_lines
from pretrain.trust.keys import PublicKey, read_key, verify
from pretrain.trust.ledger import RefusedError, sha256_bytes
from pretrain.trust.members import with_keys

REFUSAL = re.compile(r"silos/[^/]+/\d+/refused-\d+\.json")  # of the aggregator, among what a silo wrote
KEPT = ("manifest", "commit")  # for ever
TAKEN_BACK = "rolled-back"
NOT_IN_STORE = (REQUESTS, ARCHIVE, "wandb", "collective")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is not as it should be."""

    file: str
    what: str


@dataclass(kw_only=True)
class Checked:
    """What was looked at, and what is wrong with it."""

    num_lines: int = 0
    num_signed: int = 0
    num_unsigned_at_end: int = 0
    """Lines after the last signature, of members that sign."""
    num_objects: int = 0
    """Of the store, compared with their lines."""
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def ledgers(where: Path) -> tuple[list[Path], RunConfig | None]:
    """The ledgers of a run directory, or the one that is named, and the run's configuration if it is there.

    Raises ConfigError if there is none.
    """
    directory = where.parent.parent if where.is_file() else where
    files = [where] if where.is_file() else sorted((where / FOLDER).glob("*.jsonl"))
    if not files:
        raise ConfigError(
            f"ledger: {str(where)!r} given; allowed: a run directory with {FOLDER}/NAME.jsonl, or such a file"
        )
    config = with_keys(load_run(directory), make=False) if (directory / CONFIG_FILE).is_file() else None
    return files, config


def check_ledgers(files: list[Path], config: RunConfig | None) -> Checked:
    """Chain and signatures of ledgers, and objects of the store, where it can be reached."""
    checked = Checked()
    for file in files:
        lines = _check_chain(file, _keys(config, file.stem) if config else [], checked)
        if not config or config.exchange.kind != "store":
            continue
        sent = [line for line in lines if line.kind not in NOT_IN_STORE]
        url = sent[-1].where if file.stem == RELAY and sent else config.store_url
        try:
            objects = Objects(url, options=store_options(config.exchange, url))
            _check_store(objects, file, sent, config, checked)
        except ConfigError as error:
            checked.notes.append(f"{file.name}: the store was not compared: {error}")
    return checked


def _keys(config: RunConfig, member: str) -> list[PublicKey]:
    """Those of a member that signs, and for a relay those of its silos: of the contract, and of this machine, where it
    was changed since.
    """
    found, known = [], config.trust.keys | config.trust.added
    for name in sorted(config.silos) if member == RELAY else [member]:
        if name in known:
            found.append(PublicKey.parse(known[name]))
            with suppress(ConfigError):
                own = read_key(config.key_file(name))
                found.append(own if isinstance(own, PublicKey) else own.public)
    return found


def _check_signature(line: Line, keys: list[PublicKey]) -> None:
    """Raise RefusedError unless one of them has signed it."""
    for key in keys[1:]:
        with suppress(RefusedError):
            return verify(key, "egress", line.unsigned_bytes(), line.signature)
    return verify(keys[0], "egress", line.unsigned_bytes(), line.signature)


def _check_chain(file: Path, keys: list[PublicKey], checked: Checked) -> list[Line]:
    """All lines that are some."""
    previous, found, unsigned = None, [], 0
    if file.stem == RELAY and not any(line and line.signature for line, _ in read_lines(file)):
        keys = []  # it had none of its silos' keys

    def wrong(number: int, what: str) -> None:
        checked.findings.append(Finding(file=str(file), what=f"line {number}: {what}"))

    for number, (line, data) in enumerate(read_lines(file), 1):
        checked.num_lines += 1
        unsigned += 1
        if line is None:
            wrong(number, "no line of a ledger")
        else:
            found.append(line)
            if line.previous != previous:
                wrong(number, "it does not follow the line before")
            if line.signature is None and keys and line.kind in SIGNED:
                wrong(number, f"a {line.kind}, and not signed")
            if line.signature is not None and keys:
                unsigned = 0
                checked.num_signed += 1
                try:
                    _check_signature(line, keys)
                except RefusedError as error:
                    wrong(number, str(error))
        previous = sha256_bytes(data)
    if keys:
        checked.num_unsigned_at_end += unsigned
    return found


def _check_store(objects: Objects, file: Path, lines: list[Line], config: RunConfig, checked: Checked) -> None:
    """That every object in our name has a line, each object that has lines the bytes of one of them, and what stays for
    ever is there.
    """
    sent: dict[str, dict[str, int]] = defaultdict(dict)
    for line in lines:
        sent[line.name][line.blake3] = line.num_bytes
    there = set(_ours(objects, file.stem, config))

    def differs(name: str) -> bool | None:
        """None if it is gone by now, as beats are."""
        try:
            found = objects.download(name, Path(os.devnull), limit_bytes=max(sent[name].values()))
        except FileNotFoundError:
            return None
        return found not in sent[name].items()

    known = sorted(name for name in there if name in sent)
    for name, wrong in zip(known, in_threads(differs, known, REQUESTS_AT_ONCE), strict=True):
        checked.num_objects += wrong is not None
        if wrong:
            what = f"{name} in the store has other bytes than those that left"
            checked.findings.append(Finding(file=str(file), what=what))
    for name in sorted(name for name in there if name not in sent and objects.exists(name)):
        checked.findings.append(Finding(file=str(file), what=f"{name} is in the store, and no line says that it left"))

    newest = max((line.of.get("version", -1) for line in lines if line.kind in KEPT), default=-1)
    for name in sorted({line.name for line in lines if line.kind in KEPT} - there):
        if _version(lines, name) != newest and not _was_taken_back(objects, name):  # the newest may not have got there
            checked.findings.append(Finding(file=str(file), what=f"{name} left, and is not in the store any more"))


def _version(lines: list[Line], name: str) -> float:
    return next(line.of.get("version", -1) for line in reversed(lines) if line.name == name)


def _was_taken_back(objects: Objects, name: str) -> bool:
    """Whether what is gone was refused, or is where a rollback has put it."""
    folder = name.rpartition("/")[0]
    if any(REFUSAL.fullmatch(f"{folder}/{other}") for other in objects.names(folder)):
        return True
    return any(objects.exists(f"{TAKEN_BACK}/{number}/{name}") for number in objects.names(TAKEN_BACK))


def _ours(objects: Objects, member: str, config: RunConfig) -> Iterator[str]:
    """Names of all objects in a store that a process of ours should have written."""
    if member == OPERATOR:
        yield from ("contract.json",) if objects.exists("contract.json") else ()
        for folder in ("global", "snapshots"):
            yield from _walk(objects, folder)
        for silo in config.full_roster:
            yield from (name for name in _walk(objects, f"silos/{silo}") if REFUSAL.fullmatch(name))
        return
    for silo in config.silos if member == RELAY else [member]:
        yield from (name for name in _walk(objects, f"silos/{silo}") if not REFUSAL.fullmatch(name))
    if objects.exists(name := f"signatures/{member}.json"):
        yield name


def _walk(objects: Objects, folder: str) -> Iterator[str]:
    for name in objects.names(folder):
        path = f"{folder}/{name}"
        inner = [] if "." in name else list(_walk(objects, path))
        yield from inner or [path]
