"""What all silos agree on before round 0, written once to the store as contract.json. No torch."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError, RunConfig
from pretrain.silo.shards import tokenizer_sha256

FORMAT = 1


def build_contract(config: RunConfig) -> dict[str, Any]:
    """The contract of a configuration: model, tokenizer, sequences, inner and outer settings, roster and its rules."""
    return {
        "format": FORMAT,
        "name": config.name,
        "model": _model_terms(config),
        "tokenizer_sha256": tokenizer_sha256(config.tokenizer_file),
        "sequence_tokens": config.sequence_tokens,
        "document_masking": config.document_masking,
        "inner": dataclasses.asdict(config.inner),
        "outer": dataclasses.asdict(config.outer),
        "membership": dataclasses.asdict(config.membership),
        "num_versions": config.schedule.num_versions,
        "roster": config.full_roster,
        "signature": None,
    }


def _model_terms(config: RunConfig) -> dict[str, Any]:
    if not config.model.checkpoint:
        return {"config": config.model.config, "seed": config.model.seed}
    directory = Path(config.model.checkpoint)
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    if len(files) < 2 or not files[0].is_file():
        raise ConfigError(
            f"model.checkpoint: {str(directory)!r} given; allowed: a directory with config.json and *.safetensors"
        )
    return {"checkpoint": {path.name: _file_sha256(path) for path in files}}


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contract_bytes(contract: dict[str, Any]) -> bytes:
    """Canonical JSON of a contract; its sha256 is in every manifest and commit."""
    return (json.dumps(contract, sort_keys=True, indent=1) + "\n").encode()


def check_same_contract(ours: dict[str, Any], stored: bytes, where: str) -> None:
    """Raise ConfigError that names every term in which our configuration differs from the contract in the store."""
    try:
        theirs = json.loads(stored)
    except ValueError:
        raise ConfigError(f"exchange.url: {where} given; its contract.json is not JSON; name another store") from None
    differences = [
        f"{key} is {_short(ours_value)} here and {_short(theirs_value)} there"
        for key, ours_value, theirs_value in _differences(ours, theirs, "")
    ]
    if differences:
        raise ConfigError(
            f"exchange.url: {where} given; it holds a run with another contract: {'; '.join(differences)}; "
            "change these keys, or name another store"
        )


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
