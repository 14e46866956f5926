"""The format of packed text on disk, in one place; imports no torch.

A packed split is a directory:

    manifest.json                      what is in it, by which tokenizer, with a sha256 for every shard
    shard-00000.bin, shard-00001.bin   little-endian unsigned tokens, nothing else

Documents stand one after another, each followed by the end-of-text token; a document may go on in the next shard.
Only JSON and raw integers are read, so a split from someone else can hold no code.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from pretrain.config import ConfigError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
TOKEN_TYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(kw_only=True, frozen=True)
class Shard:
    """One file of tokens."""

    file: str
    """Name within the split's directory."""
    num_tokens: int
    """Tokens in the file, end-of-text tokens included."""
    sha256: str
    """Of the file's bytes, in hexadecimal."""


@dataclass(kw_only=True, frozen=True)
class Manifest:
    """What a packed split holds."""

    format: int = FORMAT
    """Version of this layout."""
    tokenizer_sha256: str
    """`tokenizer_sha256` of the tokenizer.json that made the tokens."""
    source_sha256: str
    """Of the bytes of the text file that was packed; equal source and tokenizer mean equal tokens."""
    vocab_size: int
    """Every token is below this."""
    token_type: str
    """uint16 or uint32, little-endian."""
    end_of_text_id: int
    """The token after each document."""
    num_tokens: int
    """Tokens of all shards, end-of-text tokens included."""
    num_documents: int
    """Documents, and so end-of-text tokens that the packing has put."""
    num_bytes: int
    """UTF-8 bytes of the documents' text."""
    shards: tuple[Shard, ...]
    """In the order in which they are read."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of a token on disk."""
        return TOKEN_TYPES[self.token_type]


def token_type_for(vocab_size: int) -> str:
    """The smallest token type that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write a file or a directory at; at the end it takes `path`'s place.

    All is on the disk (fsync) before the rename, so whoever sees `path` sees it whole. When the block raises, nothing
    is left. A file replaces an existing file; a directory replaces only an empty one (OSError otherwise).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        temporary = folder / path.name
        yield temporary
        if temporary.is_dir():
            for inner in temporary.iterdir():
                _fsync(inner)
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_sha256(file: Path, *, key: str = "tokenizer") -> str:
    """sha256 of a tokenizer.json's canonical JSON (sorted keys, no white space), so that its layout does not matter.

    Raises ConfigError, naming `key`, when the file is missing or is no JSON object.
    """
    loaded = _read_json(file, missing=f"{key}: {str(file)!r} given; there is no such file: name a tokenizer.json")
    canonical = json.dumps(loaded, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read_json(file: Path, *, missing: str) -> dict[str, Any]:
    try:
        loaded = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ConfigError(missing) from None
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({' '.join(str(error).split())}): make it again") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file}: a {type(loaded).__name__} given; allowed: a JSON object: make it again")
    return loaded


def read_manifest(directory: Path, *, key: str = "silo.data", tokenizer_sha256: str | None = None) -> Manifest:
    """Read a split's manifest and check it, the shards' sizes and, when given, the tokenizer.

    `key` is the configuration key or option that named the directory. Costs one `stat` a shard; `verify_shards` reads
    the tokens too. Raises ConfigError.
    """
    file = directory / MANIFEST_FILE
    missing = f"{key}: {str(directory)!r} given; it has no {MANIFEST_FILE}: name a packed split (atoll data prepare)"
    manifest = _parse_manifest(_read_json(file, missing=missing), file)
    if tokenizer_sha256 is not None and manifest.tokenizer_sha256 != tokenizer_sha256:
        raise ConfigError(
            f"{key}: {directory} was packed with tokenizer {manifest.tokenizer_sha256[:12]}, the run uses "
            f"{tokenizer_sha256[:12]}: prepare it again or change tokenizer"
        )
    for shard in manifest.shards:
        path = directory / shard.file
        expected_bytes = shard.num_tokens * manifest.dtype.itemsize
        if not path.is_file():
            raise ConfigError(f"{key}: {path} is missing, {MANIFEST_FILE} lists it: copy or prepare the split again")
        if path.stat().st_size != expected_bytes:
            raise ConfigError(
                f"{key}: {path} has {path.stat().st_size} bytes, {MANIFEST_FILE} says {expected_bytes}: "
                "copy or prepare the split again"
            )
    return manifest


def verify_shards(directory: Path, *, key: str = "silo.data", tokenizer_sha256: str | None = None) -> Manifest:
    """`read_manifest`, and the sha256 of every shard. Reads all bytes, in constant memory. Raises ConfigError."""
    manifest = read_manifest(directory, key=key, tokenizer_sha256=tokenizer_sha256)
    for shard in manifest.shards:
        found = file_sha256(directory / shard.file)
        if found != shard.sha256:
            raise ConfigError(
                f"{key}: {directory / shard.file} has sha256 {found[:12]}, {MANIFEST_FILE} says {shard.sha256[:12]}: "
                "copy or prepare the split again"
            )
    return manifest


def count_sequences(num_tokens: int, sequence_tokens: int) -> int:
    """Whole sequences in a text: each needs one token more than it predicts, which the next one begins with."""
    return max(0, (num_tokens - 1) // sequence_tokens)


def check_enough(num_tokens: int, sequence_tokens: int, global_batch_sequences: int, *, key: str) -> None:
    """Raise ConfigError when a corpus has fewer sequences than one global batch."""
    num_sequences = count_sequences(num_tokens, sequence_tokens)
    if num_sequences < global_batch_sequences:
        raise ConfigError(
            f"{key}: {num_tokens} tokens given, which are {num_sequences} sequences of sequence_tokens="
            f"{sequence_tokens}; allowed: at least one batch of global_batch_sequences={global_batch_sequences}: "
            "add text, or lower sequence_tokens or global_batch_sequences"
        )


def _parse_manifest(loaded: dict[str, Any], file: Path) -> Manifest:
    if loaded.get("format") != FORMAT:
        raise ConfigError(f"{file}: format {loaded.get('format')!r} given; allowed: {FORMAT}: prepare the split again")
    try:
        shards = tuple(Shard(**shard) for shard in loaded["shards"])
        manifest = Manifest(**{**loaded, "shards": shards})
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{file}: not a manifest of format {FORMAT} ({error}): prepare the split again") from None
    records: tuple[Manifest | Shard, ...] = (manifest, *shards)
    for record in records:
        for field in dataclasses.fields(record):
            value = getattr(record, field.name)
            wrong_type = field.type in (int, str) and type(value) is not field.type
            if wrong_type or (isinstance(value, int) and value < 0):
                raise ConfigError(f"{file}: {field.name}: {value!r} given: prepare the split again")
    consistent = (
        manifest.token_type == token_type_for(manifest.vocab_size)
        and 0 <= manifest.end_of_text_id < manifest.vocab_size
        and all(re.fullmatch(r"shard-\d+\.bin", shard.file) and shard.num_tokens > 0 for shard in shards)
        and len(shards) > 0
        and manifest.num_tokens == sum(shard.num_tokens for shard in shards)
    )
    if not consistent:
        raise ConfigError(f"{file}: its token_type, end_of_text_id, num_tokens or shards disagree: prepare it again")
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, atomically."""
    with atomic_path(directory / MANIFEST_FILE) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")


def open_shard(directory: Path, manifest: Manifest, shard: Shard) -> npt.NDArray[Any]:
    """A shard's tokens, memory-mapped and read-only. # (shard.num_tokens,)"""
    return np.memmap(directory / shard.file, dtype=manifest.dtype, mode="r", shape=(shard.num_tokens,))


class ShardWriter:
    """Writes tokens into `shard-00000.bin`, ... of a directory; constant memory. Used as a context manager."""

    def __init__(self, directory: Path, *, vocab_size: int, shard_tokens: int) -> None:
        """`shard_tokens` is the most that one shard takes."""
        assert shard_tokens > 0
        self.shards: list[Shard] = []
        self._directory = directory
        self._dtype = TOKEN_TYPES[token_type_for(vocab_size)]
        self._shard_tokens = shard_tokens
        self._num_tokens = 0
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close_shard()

    def write(self, tokens: npt.NDArray[Any]) -> None:
        """Append tokens. # (num_tokens,)"""
        while len(tokens):
            if self._file is None:
                self._file = (self._directory / _shard_file(len(self.shards))).open("xb")
            piece = tokens[: self._shard_tokens - self._num_tokens].astype(self._dtype)
            raw = piece.tobytes()
            self._file.write(raw)
            self._hash.update(raw)
            self._num_tokens += len(piece)
            tokens = tokens[len(piece) :]
            if self._num_tokens == self._shard_tokens:
                self._close_shard()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        file, sha256 = _shard_file(len(self.shards)), self._hash.hexdigest()
        self.shards.append(Shard(file=file, num_tokens=self._num_tokens, sha256=sha256))
        self._file, self._num_tokens, self._hash = None, 0, hashlib.sha256()


def _shard_file(index: int) -> str:
    return f"shard-{index:05d}.bin"
