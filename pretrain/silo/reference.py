"""Log-probabilities of preference pairs by the model that they are compared with, beside their shards; no torch.

    reference.bin     of each document of the split, what fills rows included: little-endian 64 bit floats
    reference.json    of which base, in which precision, and of which tokens they are, and the sha256 of the other file

They are computed once (`atoll data reference`), by the checkpoint from which a run goes on, whose files the contract
has the hashes of.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.config.allowed import DPO
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.host.foreign import loads
from pretrain.silo.shards import Manifest, atomic_path, file_sha256, text_sha256
from pretrain.silo.weights import checkpoint_files

FORMAT = 1
VALUES_FILE, RECORD_FILE = "reference.bin", "reference.json"
VALUE = np.dtype("<f8")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What reference.json says."""

    format: int = FORMAT
    base: dict[str, str]
    """sha256 of each file of the checkpoint, by its name, as the contract has it."""
    precision: str
    """fp32 or bf16: in which it computed."""
    text_sha256: str
    """Of the split."""
    values_sha256: str
    """Of reference.bin."""


def base_hashes(checkpoint: Path, *, key: str = "model.checkpoint") -> dict[str, str]:
    """sha256 of each file of a checkpoint, by its name. Raises ConfigError."""
    found = checkpoint_files(checkpoint, key=key)
    return {file.name: _sha256(file, file.stat().st_size, file.stat().st_mtime_ns) for file in found}


@lru_cache(maxsize=1024)
def _sha256(file: Path, num_bytes: int, time_ns: int) -> str:
    return file_sha256(file)


def write_reference(
    directory: Path, manifest: Manifest, values: npt.NDArray[np.float64], base: dict[str, str], precision: str
) -> None:
    """Write what a base says of each document of a split; the record last, so that what is there is whole."""
    assert len(values) == manifest.num_documents
    (directory / RECORD_FILE).unlink(missing_ok=True)
    with atomic_path(directory / VALUES_FILE) as temporary:
        temporary.write_bytes(values.astype(VALUE).tobytes())
    record = Reference(
        base=base,
        precision=precision,
        text_sha256=text_sha256(manifest),
        values_sha256=file_sha256(directory / VALUES_FILE),
    )
    with atomic_path(directory / RECORD_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(record), indent=1) + "\n")


def read_reference(directory: Path, manifest: Manifest, *, key: str) -> Reference | None:
    """What is there, if it is of these tokens. Raises ConfigError for what cannot be read."""
    file = directory / RECORD_FILE
    if not file.is_file():
        return None
    try:
        found = Reference(**loads(file.read_bytes()))
        values = directory / VALUES_FILE
        is_whole = found.format == FORMAT and values.stat().st_size == manifest.num_documents * VALUE.itemsize
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{key}: {file}: no record of log-probabilities ({error}): {_again(directory)}") from None
    return found if is_whole and found.text_sha256 == text_sha256(manifest) else None


def check_reference(
    directory: Path, manifest: Manifest, base: Mapping[str, str], precision: str, *, key: str, whole: bool = False
) -> None:
    """Raise ConfigError unless a base's log-probabilities are there, in the precision in which a silo computes.

    With `whole`, of every byte.
    """
    found = read_reference(directory, manifest, key=key)
    if found is None:
        raise ConfigError(
            f"{key}: {directory} has preference pairs without the log-probabilities of the base: {_again(directory)}"
        )
    if found.base != dict(base):
        names = ", ".join(sorted(name for name in {**found.base, **base} if found.base.get(name) != base.get(name)))
        raise ConfigError(
            f"{key}: {directory} has log-probabilities of another base than model.checkpoint: {names} differ: "
            f"{_again(directory)}"
        )
    if found.precision != precision:
        raise ConfigError(
            f"{key}: {directory} has log-probabilities in {found.precision}, and silo.precision is {precision}: "
            f"{_again(directory)} --precision {precision}"
        )
    if whole and file_sha256(directory / VALUES_FILE) != found.values_sha256:
        raise ConfigError(f"{key}: {directory / VALUES_FILE} is not what {RECORD_FILE} says: {_again(directory)}")


def _again(directory: Path) -> str:
    return f"type atoll data reference {directory} --base CHECKPOINT"


def open_reference(directory: Path, manifest: Manifest) -> npt.NDArray[np.float64]:
    """The log-probability of each document, memory-mapped and read-only. # (num_documents,)"""
    return np.memmap(directory / VALUES_FILE, dtype=VALUE, mode="r", shape=(manifest.num_documents,))


def check_loss(config: RunConfig, name: str, directory: Path, manifest: Manifest, *, key: str) -> None:
    """Raise ConfigError for pairs in a run whose loss is another, and for anything else where it is of pairs."""
    is_pairs = manifest.chat is not None and manifest.chat.num_pairs is not None
    if config.inner.loss != DPO and is_pairs:
        raise ConfigError(
            f"{key}: {directory} has preference pairs, and inner.loss is {config.inner.loss!r}; allowed: "
            f"inner.loss={DPO}, or conversations (atoll data prepare --chat without --pairs)"
        )
    if config.inner.loss == DPO:
        if not is_pairs:
            raise ConfigError(
                f"{key}: {directory} has no preference pairs, and inner.loss is {DPO!r}; allowed: pairs (atoll data "
                "prepare --chat --pairs), or inner.loss=masked"
            )
        assert config.model.checkpoint
        base, precision = base_hashes(Path(config.model.checkpoint)), config.silos[name].precision
        check_reference(directory, manifest, base, precision, key=key)


def verify_reference(directory: Path, manifest: Manifest, *, key: str) -> Any:
    """Compare every byte with the record's sha256, where there is one. Raises ConfigError."""
    if found := read_reference(directory, manifest, key=key):
        check_reference(directory, manifest, found.base, found.precision, key=key, whole=True)
