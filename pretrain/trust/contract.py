"""What all silos agree on before round 0, written once to the store as contract.json. No torch."""

import dataclasses
import hashlib
import json
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pretrain.config.allowed import DPO
from pretrain.config.check import RUN_ID
from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.host.foreign import loads, shown
from pretrain.host.software import VERSION, differences, installed, minor
from pretrain.silo.shards import template_sha256, tokenizer_sha256
from pretrain.silo.weights import checkpoint_files
from pretrain.trust.keys import PublicKey
from pretrain.trust.ledger import RECORD_BYTES
from pretrain.trust.members import public_keys

FORMAT = 3
SOFTWARE = "software"
MOST_PACKAGES = 100
LOCAL_OUTER = ("state",)  # what of `outer` is each machine's own affair
OF_PAIRS = ("loss", "dpo_beta")  # what of `inner` is said only where the loss is of preference pairs
LOCAL_TRUST = ("added", "archive", "directory", "key_command", "policy")
RUN = "run_id"
GATE = "gate"  # where there is one
TEMPLATE = "chat_template_sha256"  # where silos train on conversations
PRACTICE = "practice"  # where silos practise


def agreed_settings(config: RunConfig) -> dict[str, Any]:
    """Terms that are keys of the configuration, under their own names."""
    outer, trust = dataclasses.asdict(config.outer), dataclasses.asdict(config.trust)
    inner = dataclasses.asdict(config.inner)
    if config.inner.loss != DPO:  # the contract of a run without preference pairs is what it was
        inner = {key: value for key, value in inner.items() if key not in OF_PAIRS}
    return {
        "name": config.name,
        "sequence_tokens": config.sequence_tokens,
        "document_masking": config.document_masking,
        "inner": inner,
        "outer": {key: value for key, value in outer.items() if key not in LOCAL_OUTER},
        "membership": dataclasses.asdict(config.membership),
        "roster": config.agreed_roster,
        **({GATE: config.gate.terms} if config.gate.is_on else {}),
        "trust": {key: value for key, value in trust.items() if key not in LOCAL_TRUST},
    }


def build_contract(config: RunConfig) -> dict[str, Any]:
    """The contract of a configuration: model, tokenizer, sequences, inner and outer settings, roster, rules, keys."""
    public_keys(config)
    return {
        "format": FORMAT,
        "model": model_terms(config),
        "tokenizer_sha256": tokenizer_sha256(config.tokenizer_file),
        **({TEMPLATE: template_sha256(config.template_file)} if config.template_file else {}),
        **({PRACTICE: dataclasses.asdict(config.practice)} if config.practice.every_rounds else {}),
        "num_versions": config.schedule.num_versions,
        RUN: config.run_id,
        **agreed_settings(config),
    }


def model_terms(config: RunConfig) -> dict[str, Any]:
    """What a contract says of the model; of a checkpoint, the sha256 of each of its files."""
    if not config.model.checkpoint:
        return {"config": config.model.config, "seed": config.model.seed}
    files = checkpoint_files(Path(config.model.checkpoint))
    base = {"checkpoint": {path.name: _file_sha256(path) for path in files}}
    adapter = config.model.adapter
    return base | ({"adapter": adapter.terms, "seed": config.model.seed} if adapter.is_on else {})


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contract_bytes(contract: dict[str, Any]) -> bytes:
    """Canonical JSON of a contract; its sha256 is in every manifest and commit."""
    return (json.dumps(contract, sort_keys=True, indent=1) + "\n").encode()


def first_contract(ours: dict[str, Any]) -> bytes:
    """What is written at the beginning of a run: the terms, an id that no other run has, and the writer's software.

    The software is a record and no term, as a site may upgrade in the middle of a run.
    """
    return contract_bytes(ours | {RUN: ours[RUN] or uuid.uuid4().hex, SOFTWARE: installed()})


def read_contract(stored: bytes, where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The terms in the store's contract.json, and the versions of software that its writer had.

    Raises ConfigError if it is no contract, or one of another atoll than this.
    """
    try:
        terms = loads(stored, limit_bytes=RECORD_BYTES)
    except ValueError:
        raise ConfigError(f"exchange.url: {where} given; its contract.json is not JSON; name another store") from None
    if not isinstance(terms, dict):
        raise ConfigError(f"exchange.url: {where} given; its contract.json is no contract; name another store")
    record = terms.pop(SOFTWARE, None)
    rows = list(record.items())[:MOST_PACKAGES] if isinstance(record, dict) else []
    software = {shown(name): shown(version) for name, version in rows}
    theirs, format_version = software.get("atoll", VERSION), terms.get("format")
    if minor(theirs) != minor(VERSION):
        raise ConfigError(
            f"exchange.url: {where} given; its run is of atoll {theirs}, and this is atoll {VERSION}; install "
            f"{minor(theirs)} here"
        )
    if format_version != FORMAT:
        raise ConfigError(
            f"exchange.url: {where} given; its contract.json has format {_short(format_version)}, and this atoll "
            f"({VERSION}) reads {FORMAT}; install the atoll that wrote it"
        )
    if not isinstance(run := terms.get(RUN), str) or not RUN_ID.fullmatch(run):
        raise ConfigError(
            f"exchange.url: {where} given; its contract.json has {RUN} {_short(run)}; allowed: {RUN_ID.pattern}"
        )
    return terms, software


def other_software(stored: bytes, where: str) -> list[str]:
    """How the software here differs by more than patches from that of a contract, a line each. Raises ConfigError."""
    return differences(read_contract(stored, where)[1])


def contract_keys(stored: bytes) -> dict[str, PublicKey]:
    """The keys by which a store is signed, by member. Raises ConfigError for what are no keys.

    None without the operator's: in a collective each silo has a ledger of its own, and the keys are for connections.
    """
    try:
        terms = loads(stored, limit_bytes=RECORD_BYTES)
        keys = terms["trust"]["keys"]
    except (ValueError, KeyError, TypeError):
        return {}  # whoever reads the terms says what is wrong with them
    if not isinstance(keys, dict):
        raise ConfigError(f"contract.json: trust.keys is {shown(repr(keys))}; allowed: a key of each member")
    found = {name: PublicKey.parse(text, f"contract.json: trust.keys.{shown(name)}") for name, text in keys.items()}
    return {} if without_operator(found) else found


def without_operator(keys: Collection[str]) -> bool:
    """Whether keys, by member, are those of a collective, in which nobody commits for the others."""
    return bool(keys) and OPERATOR not in keys


def amend_rule(stored: bytes) -> str:
    """How many silos have to sign an amendment of a contract: `all`, or a number; `all` for what is no contract."""
    try:
        terms = loads(stored, limit_bytes=RECORD_BYTES)
        rule, most = terms["trust"]["amend"], len(terms["roster"])
    except (ValueError, KeyError, TypeError):
        return "all"  # whoever reads the terms says what is wrong with them
    if rule not in ("all", *map(str, range(1, most + 1))):
        raise ConfigError(f"contract.json: trust.amend is {shown(repr(rule))}; allowed: all, or 1 to {most}")
    return str(rule)


def contract_seals(stored: bytes) -> bool:
    """Whether a contract says that payloads are sealed."""
    try:
        return loads(stored, limit_bytes=RECORD_BYTES)["trust"]["seal"] is True
    except (ValueError, KeyError, TypeError):
        return False  # whoever reads the terms says what is wrong with them


def check_same_contract(ours: dict[str, Any], stored: bytes, where: str) -> None:
    """Raise ConfigError that names every term in which our configuration differs from the contract in the store.

    Without a `run_id` of its own, a configuration goes with any run of its terms. With `trust.software: exact` the
    software here has to be the contract's, too.
    """
    theirs, software = read_contract(stored, where)
    if not ours[RUN]:  # drawn when the contract was written
        ours = ours | {RUN: theirs[RUN]}
    check_same_terms(ours, theirs, where)
    here = installed()
    if ours["trust"]["software"] == "exact" and (others := [p for p in software if software[p] != here.get(p)]):
        found = ", ".join(f"{package} {here.get(package, 'none')}" for package in others)
        wanted = ", ".join(f"{package} {software[package]}" for package in others)
        raise ConfigError(
            f"trust.software: exact given by the contract in {where}; here is {found}; allowed: {wanted}, or "
            "trust.software=recorded in the contract of a new run"
        )


def check_same_terms(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> None:
    """The same of terms that were read."""
    if differences := different_terms(ours, theirs):
        raise ConfigError(
            f"exchange.url: {where} given; it holds a run with another contract: {'; '.join(differences)}; "
            "change these keys, or name another store"
        )


def different_terms(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """A line for each term that is not the same."""
    return [
        f"{shown(key)} is {_short(ours_value)} here and {_short(theirs_value)} there"
        for key, ours_value, theirs_value in _differences(ours, theirs, "")
    ]


def _differences(ours: Any, theirs: Any, prefix: str) -> list[tuple[str, Any, Any]]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            row
            for key in sorted(set(ours) | set(theirs))
            for row in _differences(ours.get(key), theirs.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if ours == theirs else [(prefix, ours, theirs)]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
