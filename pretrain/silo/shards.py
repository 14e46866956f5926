"""The format of packed text on disk, in one place; imports no torch.

A packed split is a directory:

    manifest.json                      what is in it, by which tokenizer, with a sha256 for every file
    shard-00000.bin, shard-00001.bin   little-endian unsigned tokens, nothing else
    documents.bin                      for each document, the tokens up to its end: little-endian 64 bit unsigned

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
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.config.errors import ConfigError
from pretrain.host.disk import to_disk
from pretrain.host.foreign import loads, shown

FORMAT = 2
# What published tokenizers call the token that ends a document; the first that is there is taken.
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
MANIFEST_FILE = "manifest.json"
DOCUMENTS_FILE = "documents.bin"
DOCUMENT_END = np.dtype("<u8")
# Large vocabularies have some tens of MB.
LIMIT_BYTES = 1 << 29
# Tokens that `verify_tokens` looks at together.
VERIFY_TOKENS = 1 << 22
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
    recipe_sha256: str
    """Of what was packed and how: the text's files, the tokenizer, every step of cleaning, the held-out share."""
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
    documents_sha256: str
    """Of documents.bin, in hexadecimal."""
    shards: tuple[Shard, ...]
    """In the order in which they are read."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of a token on disk."""
        return TOKEN_TYPES[self.token_type]


def text_sha256(manifest: Manifest) -> str:
    """What tells whether a split holds the same tokens, wherever it lies and whenever it was prepared."""
    terms = [manifest.documents_sha256, *((shard.num_tokens, shard.sha256) for shard in manifest.shards)]
    return hashlib.sha256(json.dumps(terms).encode()).hexdigest()


def token_type_for(vocab_size: int) -> str:
    """The smallest token type that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


UNFINISHED = ".*.*.tmp"  # the names of what somebody who was killed within `atomic_path` leaves


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
                to_disk(inner)
        to_disk(temporary)
        temporary.replace(path)
        to_disk(path.parent)
    finally:
        shutil.rmtree(folder)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_sha256(file: Path, *, key: str = "tokenizer") -> str:
    """sha256 of a tokenizer.json's canonical JSON (sorted keys, no white space), so that its layout does not matter.

    Raises ConfigError, naming `key`, when the file is missing or is no JSON object.
    """
    missing = f"{str(file)!r} given; there is no such file" if file != Path() else "none given"
    loaded = _read_json(file, missing=f"{key}: {missing}; allowed: a tokenizer.json, or a directory that has one")
    canonical = json.dumps(loaded, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read_json(file: Path, *, missing: str) -> dict[str, Any]:
    try:
        loaded = loads(file.read_bytes(), limit_bytes=LIMIT_BYTES)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ConfigError(missing) from None
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({shown(error)}): make it again") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file}: a {type(loaded).__name__} given; allowed: a JSON object: make it again")
    return loaded


def read_manifest(directory: Path, *, key: str = "silo.data", tokenizer_sha256: str | None = None) -> Manifest:
    """Read a split's manifest and check it, the shards' sizes and, when given, the tokenizer.

    `key` is the configuration key or option that named the directory. Costs one `stat` a shard; `verify_shards` reads
    the tokens too. Raises ConfigError.
    """
    file = directory / MANIFEST_FILE
    split = directory / ("valid" if ".valid" in key else "train")
    advice = f"name {split}" if (split / MANIFEST_FILE).exists() else "name a packed split (atoll data prepare)"
    missing = f"{key}: {str(directory)!r} given; it has no {MANIFEST_FILE}: {advice}"
    manifest = _parse_manifest(_read_json(file, missing=missing), file)
    if tokenizer_sha256 is not None and manifest.tokenizer_sha256 != tokenizer_sha256:
        raise ConfigError(
            f"{key}: {directory} was packed with tokenizer {manifest.tokenizer_sha256[:12]}, the run uses "
            f"{tokenizer_sha256[:12]}: prepare it again or change tokenizer"
        )
    sizes = {shard.file: shard.num_tokens * manifest.dtype.itemsize for shard in manifest.shards}
    sizes[DOCUMENTS_FILE] = manifest.num_documents * DOCUMENT_END.itemsize
    for file_name, expected_bytes in sizes.items():
        path = directory / file_name
        if not path.is_file():
            raise ConfigError(f"{key}: {path} is missing, {MANIFEST_FILE} lists it: copy or prepare the split again")
        if path.stat().st_size != expected_bytes:
            raise ConfigError(
                f"{key}: {path} has {path.stat().st_size} bytes, {MANIFEST_FILE} says {expected_bytes}: "
                "copy or prepare the split again"
            )
    return manifest


def verify_shards(directory: Path, *, key: str = "silo.data", tokenizer_sha256: str | None = None) -> Manifest:
    """`read_manifest`, and the sha256 of every file. Reads all bytes, in constant memory. Raises ConfigError."""
    manifest = read_manifest(directory, key=key, tokenizer_sha256=tokenizer_sha256)
    expected = {shard.file: shard.sha256 for shard in manifest.shards} | {DOCUMENTS_FILE: manifest.documents_sha256}
    for file_name, sha256 in expected.items():
        found = file_sha256(directory / file_name)
        if found != sha256:
            raise ConfigError(
                f"{key}: {directory / file_name} has sha256 {found[:12]}, {MANIFEST_FILE} says {sha256[:12]}: "
                "copy or prepare the split again"
            )
    return manifest


def verify_tokens(directory: Path, manifest: Manifest, *, key: str = "silo.data") -> None:
    """Check what the tokens say: each below vocab_size, and an end-of-text token where a document ends, nowhere else.

    Reads all tokens, in constant memory. Raises ConfigError.
    """
    ends = open_documents(directory, manifest)
    begin, num_documents = 0, 0
    for shard in manifest.shards:
        tokens = open_shard(directory, manifest, shard)
        for first in range(0, shard.num_tokens, VERIFY_TOKENS):
            piece = tokens[first : first + VERIFY_TOKENS]
            if piece.max() >= manifest.vocab_size:
                raise ConfigError(token_outside_vocabulary(key, directory / shard.file, piece.max(), manifest))
            found = np.flatnonzero(piece == manifest.end_of_text_id) + (begin + first + 1)
            listed = ends[num_documents : num_documents + len(found)]
            if not np.array_equal(found.astype(DOCUMENT_END), listed):
                raise ConfigError(
                    f"{key}: {directory / shard.file} and {DOCUMENTS_FILE} disagree about where documents end: "
                    "prepare the split again"
                )
            num_documents += len(found)
        begin += shard.num_tokens
    if num_documents != manifest.num_documents or (num_documents and ends[-1] != manifest.num_tokens):
        raise ConfigError(
            f"{key}: {directory} has {num_documents} ends of documents, {MANIFEST_FILE} says {manifest.num_documents}: "
            "prepare the split again"
        )


def token_outside_vocabulary(key: str, file: Path, token: int, manifest: Manifest) -> str:
    """What a user is told of a token that no vocabulary entry has."""
    return (
        f"{key}: {file} holds token {token}, its vocab_size is {manifest.vocab_size}: copy or prepare the split again"
    )


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


def check_a_sequence(num_tokens: int, sequence_tokens: int, *, key: str) -> None:
    """Raise ConfigError when a text is shorter than one sequence."""
    if not count_sequences(num_tokens, sequence_tokens):
        raise ConfigError(
            f"{key}: {num_tokens} tokens given; allowed: more than sequence_tokens={sequence_tokens}: "
            "add text or lower sequence_tokens"
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
    if manifest.token_type != token_type_for(manifest.vocab_size):
        raise ConfigError(
            f"{file}: token_type: {manifest.token_type!r} given; allowed for a vocab_size of {manifest.vocab_size}: "
            f"{token_type_for(manifest.vocab_size)}: prepare the split again"
        )
    consistent = (
        0 <= manifest.end_of_text_id < manifest.vocab_size
        and all(re.fullmatch(r"shard-[0-9]{5,9}\.bin", shard.file) and shard.num_tokens > 0 for shard in shards)
        and len(shards) > 0
        and manifest.num_tokens == sum(shard.num_tokens for shard in shards)
    )
    if not consistent:
        raise ConfigError(f"{file}: its end_of_text_id, num_tokens or shards disagree: prepare it again")
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, atomically."""
    with atomic_path(directory / MANIFEST_FILE) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")


def open_shard(directory: Path, manifest: Manifest, shard: Shard) -> npt.NDArray[Any]:
    """A shard's tokens, memory-mapped and read-only. # (shard.num_tokens,)"""
    return np.memmap(directory / shard.file, dtype=manifest.dtype, mode="r", shape=(shard.num_tokens,))


def open_documents(directory: Path, manifest: Manifest) -> npt.NDArray[np.uint64]:
    """For each document the number of tokens up to its end, memory-mapped and read-only. # (num_documents,)"""
    if not manifest.num_documents:
        return np.empty(0, DOCUMENT_END)
    return np.memmap(directory / DOCUMENTS_FILE, dtype=DOCUMENT_END, mode="r", shape=(manifest.num_documents,))


class SplitWriter:
    """Writes a packed split, in constant memory, and can go on where a killed writer had last synced.

    The bytes depend on the documents and `shard_tokens` only, never on how they were cut into calls of `write`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        vocab_size: int,
        end_of_text_id: int,
        shard_tokens: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Start an empty split in `directory`, or go on from what `sync` returned; what was written after is cut off.

        `shard_tokens` is the most that one shard takes.
        """
        assert shard_tokens > 0
        self._directory = directory
        self._vocab_size, self._end_of_text_id, self._shard_tokens = vocab_size, end_of_text_id, shard_tokens
        self._dtype = TOKEN_TYPES[token_type_for(vocab_size)]
        state = state or {"num_tokens": 0, "num_documents": 0, "num_bytes": 0, "shards": []}
        self.num_tokens: int = state["num_tokens"]
        self.num_documents: int = state["num_documents"]
        self.num_bytes: int = state["num_bytes"]
        self._shards = [Shard(**shard) for shard in state["shards"]]
        directory.mkdir(parents=True, exist_ok=True)
        for left_over in sorted(directory.glob("shard-*.bin"))[len(self._shards) + 1 :]:
            left_over.unlink()
        self._documents = HashedFile(directory / DOCUMENTS_FILE, self.num_documents * DOCUMENT_END.itemsize)
        self._shard = self._open_shard()

    def _open_shard(self) -> "HashedFile":
        tokens_before = sum(shard.num_tokens for shard in self._shards)
        path = self._directory / f"shard-{len(self._shards):05d}.bin"
        return HashedFile(path, (self.num_tokens - tokens_before) * self._dtype.itemsize)

    def write(self, tokens: npt.NDArray[Any], document_tokens: npt.NDArray[Any], num_bytes: int) -> None:
        """Append whole documents.

        tokens (num_tokens,) holds them all, each ended by the end-of-text token; document_tokens (num_documents,) says
        how many of the tokens are whose; num_bytes are the UTF-8 bytes of their text.
        """
        assert document_tokens.sum() == len(tokens)
        self._documents.write((self.num_tokens + np.cumsum(document_tokens)).astype(DOCUMENT_END).tobytes())
        self.num_documents += len(document_tokens)
        self.num_bytes += num_bytes
        while len(tokens):
            piece = tokens[: self._shard_tokens - self._shard.num_bytes // self._dtype.itemsize].astype(self._dtype)
            self._shard.write(piece.tobytes())
            self.num_tokens += len(piece)
            tokens = tokens[len(piece) :]
            if self._shard.num_bytes == self._shard_tokens * self._dtype.itemsize:
                self._end_shard()
                self._shard = self._open_shard()

    def _end_shard(self) -> None:
        path, num_tokens = self._shard.path, self._shard.num_bytes // self._dtype.itemsize
        sha256 = self._shard.close()
        if num_tokens:
            self._shards.append(Shard(file=path.name, num_tokens=num_tokens, sha256=sha256))
        else:
            path.unlink()

    def sync(self) -> dict[str, Any]:
        """Bring all to the disk; returns the state, as JSON holds it, from which another writer goes on."""
        self._shard.sync()
        self._documents.sync()
        return {
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "shards": [dataclasses.asdict(shard) for shard in self._shards],
        }

    def finish(self, *, tokenizer_sha256: str, recipe_sha256: str) -> Manifest:
        """Close the files and write the manifest."""
        self._end_shard()
        manifest = Manifest(
            tokenizer_sha256=tokenizer_sha256,
            recipe_sha256=recipe_sha256,
            vocab_size=self._vocab_size,
            token_type=token_type_for(self._vocab_size),
            end_of_text_id=self._end_of_text_id,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            num_bytes=self.num_bytes,
            documents_sha256=self._documents.close(),
            shards=tuple(self._shards),
        )
        write_manifest(self._directory, manifest)
        return manifest

    def close(self) -> None:
        """Close the files as they are, for another writer to go on from what `sync` returned."""
        self._shard.abandon()
        self._documents.abandon()


class HashedFile:
    """A file that is appended to, and its sha256. Of an earlier one the first `num_bytes` are kept."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path, self.num_bytes = path, num_bytes
        self._hash = hashlib.sha256()
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(num_bytes)
        while piece := self._file.read(1 << 20):
            self._hash.update(piece)
        assert self._file.tell() == num_bytes, f"{path} is shorter than it was"

    def write(self, raw: bytes) -> None:
        """Append bytes."""
        self._file.write(raw)
        self._hash.update(raw)
        self.num_bytes += len(raw)

    def sync(self) -> None:
        """Bring all to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> str:
        """Bring all to the disk and close; returns the sha256, in hexadecimal."""
        self.sync()
        self._file.close()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Close, if it is still open; what was not synced may be lost."""
        with contextlib.suppress(OSError):  # a full disk, which is known already
            self._file.close()
