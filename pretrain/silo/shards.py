"""The format of packed text on disk, in one place; imports no torch.

A packed split is a directory:

    manifest.json                      what is in it, by which tokenizer, with a sha256 for every file
    shard-00000.bin, shard-00001.bin   little-endian unsigned tokens, nothing else
    documents.bin                      for each document, the tokens up to its end: little-endian 64 bit unsigned

Of text, documents stand one after another, each followed by the end-of-text token; a document may go on in the next
shard. Of conversations, the tokens are rows of `chat.sequence_tokens`, whole ones in each shard. A row holds whole
conversations, each a document as the chat template renders it, and then end-of-text tokens up to its end, if any, which
are one document. With `chat.prompt_tokens` each begins with so many end-of-text tokens, which no template has rendered.
With `chat.num_pairs` they are preference pairs: the first document of a row is a chosen one, the next what was rejected
for it, and so on; a last one without a partner is what fills the row.
Beside each shard lies

    shard-00000.mask                   one bit a token, the first in the lowest: 1 for one that is trained as a target

The first token of a document is not trained, as nothing is there to predict it from, nor is what fills a row.
Only JSON and raw integers are read, so a split from someone else can hold no code.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
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
TEMPLATE_FILE = "chat_template.jinja"  # the name that transformers gives it
DOCUMENT_END = np.dtype("<u8")
# Large vocabularies have some tens of MB.
LIMIT_BYTES = 1 << 29
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
    mask_sha256: str | None = None
    """Of the bytes of its mask; None where all tokens are trained."""

    @property
    def mask_file(self) -> str:
        """Name of the mask, where there is one."""
        return self.file.removesuffix(".bin") + ".mask"


@dataclass(kw_only=True, frozen=True)
class Chat:
    """What a split of conversations has beyond one of text."""

    template_sha256: str
    """`template_sha256` of the chat template that made text of them."""
    sequence_tokens: int
    """Tokens of a row; a run can have no other sequences of it."""
    num_trained_tokens: int = 0
    """Tokens that are trained as targets, of all shards."""
    prompt_tokens: int | None = None
    """End-of-text tokens that each conversation begins with, whose places a prompt takes; None: there are none."""
    num_pairs: int | None = None
    """Preference pairs, whose sides are documents one after another in a row, the chosen one first; None: no pairs."""


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
    """Documents: of text so many end-of-text tokens has the packing put; of conversations what fills rows counts."""
    num_bytes: int
    """UTF-8 bytes of the documents' text."""
    documents_sha256: str
    """Of documents.bin, in hexadecimal."""
    shards: tuple[Shard, ...]
    """In the order in which they are read."""
    chat: Chat | None = None
    """Of a split of conversations; None: one of text."""

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that are trained as targets."""
        return self.chat.num_trained_tokens if self.chat else self.num_tokens

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of a token on disk."""
        return TOKEN_TYPES[self.token_type]


def text_sha256(manifest: Manifest) -> str:
    """What tells whether a split holds the same tokens, wherever it lies and whenever it was prepared."""
    masks = [(shard.mask_sha256,) if manifest.chat else () for shard in manifest.shards]
    shards = ((shard.num_tokens, shard.sha256, *mask) for shard, mask in zip(manifest.shards, masks, strict=True))
    terms = [manifest.documents_sha256, *shards]
    return hashlib.sha256(json.dumps(terms).encode()).hexdigest()


def mask_bytes(num_tokens: int) -> int:
    """Bytes of the mask of so many tokens."""
    return -(-num_tokens // 8)


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


def template_text(file: Path) -> str:
    """A chat template's text, to its last byte, without a byte order mark, which would begin every conversation."""
    return file.read_bytes().decode("utf-8-sig")


def template_sha256(file: Path | None, *, key: str = "chat_template") -> str:
    """sha256 of `template_text` in UTF-8; empty of None. Raises ConfigError, naming `key`."""
    if file is None:
        return ""
    try:
        if not (text := template_text(file)).strip():
            raise ConfigError(f"{key}: {str(file)!r} given, which is empty; allowed: a chat template (Jinja)")
    except (OSError, UnicodeDecodeError) as error:
        why = "it is no text in UTF-8" if isinstance(error, UnicodeDecodeError) else "there is no such file"
        raise ConfigError(
            f"{key}: {str(file)!r} given; {why}; allowed: a chat template (Jinja), or a folder with a {TEMPLATE_FILE}"
        ) from None
    return hashlib.sha256(text.encode()).hexdigest()


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


def read_manifest(
    directory: Path,
    *,
    key: str = "silo.data",
    tokenizer_sha256: str | None = None,
    template_sha256: str | None = None,
) -> Manifest:
    """Read a split's manifest and check it, the files' sizes and, when given, the tokenizer and the chat template.

    `key` is the configuration key or option that named the directory; `template_sha256` is empty where there is to be
    text alone. Costs one or two `stat` a shard; `verify_shards` reads the tokens too. Raises ConfigError.
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
    if manifest.chat:
        _check_template(manifest.chat, directory, key, template_sha256)
    sizes = {shard.file: shard.num_tokens * manifest.dtype.itemsize for shard in manifest.shards}
    if manifest.chat:
        sizes |= {shard.mask_file: mask_bytes(shard.num_tokens) for shard in manifest.shards}
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


def _check_template(chat: Chat, directory: Path, key: str, expected: str | None) -> None:
    if not chat.num_trained_tokens:
        raise ConfigError(
            f"{key}: {directory} has conversations of which not one token is trained: prepare it again from ones that "
            "have answers"
        )
    if expected == "":
        raise ConfigError(
            f"{key}: {directory} has conversations, and the run has no chat_template; allowed: the template that they "
            "were prepared with, as chat_template, or text"
        )
    if expected not in (None, chat.template_sha256):
        whose, theirs = ("model's", "the model's") if key.startswith("--") else ("contract's", "chat_template")
        raise ConfigError(
            f"{key}: {directory} was prepared with another template than the {whose}: "
            f"{chat.template_sha256[:12]}, and {theirs} is {expected[:12]}: prepare it again with that one"  # type: ignore[index]
        )


def check_rows(
    manifest: Manifest,
    directory: Path,
    sequence_tokens: int,
    *,
    key: str,
    prompt_tokens: int = 0,
    keeps_apart: bool = False,
) -> None:
    """Raise ConfigError where conversations lie in rows of another length than the run's sequences have.

    Or where they have not the room that a prompt takes; or where text has documents that do not see each other
    (`keeps_apart`), and so no one place for a prompt.
    """
    if not manifest.chat:
        if prompt_tokens and keeps_apart:
            raise ConfigError(
                f"{key}: {directory} has text, and the run keeps documents apart and trains a prompt (model.adapter): "
                "what is left of a document from the sequence before would have none; allowed: conversations, or text "
                "with document_masking=false"
            )
        return
    room = manifest.chat.prompt_tokens or 0
    if room != prompt_tokens:
        again = f"with --prompt-tokens {prompt_tokens}" if prompt_tokens else "without --prompt-tokens"
        raise ConfigError(
            f"{key}: {directory} has room for prompts of {room} tokens, and the run trains "
            f"{f'one of {prompt_tokens} (model.adapter.tokens)' if prompt_tokens else 'none'}; allowed: the "
            f"conversations prepared again {again}{f', or model.adapter.tokens={room}' * bool(room)}"
        )
    if manifest.chat.sequence_tokens != sequence_tokens:
        raise ConfigError(
            f"{key}: {directory} has rows of {manifest.chat.sequence_tokens} tokens, and sequence_tokens is "
            f"{sequence_tokens}; allowed: sequence_tokens={manifest.chat.sequence_tokens}, or the conversations "
            "prepared again in rows of that length"
        )


def verify_shards(directory: Path, *, key: str = "silo.data", tokenizer_sha256: str | None = None) -> Manifest:
    """`read_manifest`, and the sha256 of every file. Reads all bytes, in constant memory. Raises ConfigError."""
    manifest = read_manifest(directory, key=key, tokenizer_sha256=tokenizer_sha256)
    expected = {shard.file: shard.sha256 for shard in manifest.shards} | {DOCUMENTS_FILE: manifest.documents_sha256}
    expected |= {shard.mask_file: shard.mask_sha256 for shard in manifest.shards if shard.mask_sha256}
    for file_name, sha256 in expected.items():
        found = file_sha256(directory / file_name)
        if found != sha256:
            raise ConfigError(
                f"{key}: {directory / file_name} has sha256 {found[:12]}, {MANIFEST_FILE} says {sha256[:12]}: "
                "copy or prepare the split again"
            )
    return manifest


def token_outside_vocabulary(key: str, file: Path, token: int, manifest: Manifest) -> str:
    """What a user is told of a token that no vocabulary entry has."""
    return (
        f"{key}: {file} holds token {token}, its vocab_size is {manifest.vocab_size}: copy or prepare the split again"
    )


def own_tokens(sequence_tokens: int, prompt_tokens: int, *, in_rows: bool) -> int:
    """Tokens of the corpus in a sequence: before text a prompt takes room, in rows of conversations it has its own."""
    return sequence_tokens if in_rows else sequence_tokens - prompt_tokens


def count_sequences(num_tokens: int, sequence_tokens: int, *, in_rows: bool = False) -> int:
    """Whole sequences in a text: each needs one token more than it predicts, which the next one begins with.

    `in_rows`: of conversations, where a sequence is a row.
    """
    return max(0, num_tokens - (not in_rows)) // sequence_tokens


def check_enough(
    num_tokens: int, sequence_tokens: int, global_batch_sequences: int, *, key: str, in_rows: bool = False
) -> None:
    """Raise ConfigError when a corpus has fewer sequences than one global batch."""
    num_sequences = count_sequences(num_tokens, sequence_tokens, in_rows=in_rows)
    if num_sequences < global_batch_sequences:
        raise ConfigError(
            f"{key}: {num_tokens} tokens given, which are {num_sequences} sequences of sequence_tokens="
            f"{sequence_tokens}; allowed: at least one batch of global_batch_sequences={global_batch_sequences}: "
            "add text, or lower sequence_tokens or global_batch_sequences"
        )


def check_a_sequence(num_tokens: int, sequence_tokens: int, *, key: str, in_rows: bool = False) -> None:
    """Raise ConfigError when a text is shorter than one sequence."""
    if not count_sequences(num_tokens, sequence_tokens, in_rows=in_rows):
        raise ConfigError(
            f"{key}: {num_tokens} tokens given; allowed: more than sequence_tokens={sequence_tokens}: "
            "add text or lower sequence_tokens"
        )


def check_alike(manifests: Sequence[Manifest], *, key: str) -> None:
    """Raise ConfigError where splits that are read one after another are not all text, or all conversations."""
    if len({manifest.chat is None for manifest in manifests}) > 1:
        raise ConfigError(
            f"{key}: text and conversations given as one corpus; allowed: with data_weights, which take them in turns"
        )


def _parse_manifest(loaded: dict[str, Any], file: Path) -> Manifest:
    if loaded.get("format") != FORMAT:
        raise ConfigError(f"{file}: format {loaded.get('format')!r} given; allowed: {FORMAT}: prepare the split again")
    try:
        shards = tuple(Shard(**shard) for shard in loaded["shards"])
        chat = {"chat": Chat(**loaded["chat"])} if "chat" in loaded else {}
        manifest = Manifest(**{**loaded, "shards": shards, **chat})
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{file}: not a manifest of format {FORMAT} ({error}): prepare the split again") from None
    records: tuple[Manifest | Shard | Chat, ...] = (manifest, *shards, *chat.values())
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
    if not _has_its_masks(manifest):
        raise ConfigError(f"{file}: its chat, num_documents or shards disagree: prepare it again")
    return manifest


def _has_its_masks(manifest: Manifest) -> bool:
    """Whether all shards have masks and whole rows, or, of text, none has a mask."""
    if not (chat := manifest.chat):
        return all(shard.mask_sha256 is None for shard in manifest.shards)
    prompt_tokens = 0 if chat.prompt_tokens is None else chat.prompt_tokens
    num_pairs = 0 if chat.num_pairs is None else chat.num_pairs
    return (
        type(num_pairs) is int
        and 0 <= num_pairs <= manifest.num_documents // 2
        and chat.sequence_tokens > 1
        and type(prompt_tokens) is int
        and 0 <= prompt_tokens < chat.sequence_tokens
        and all(isinstance(shard.mask_sha256, str) for shard in manifest.shards)
        and all(shard.num_tokens % chat.sequence_tokens == 0 for shard in manifest.shards)
        and manifest.num_tokens // chat.sequence_tokens <= manifest.num_documents
        and chat.num_trained_tokens <= manifest.num_tokens - manifest.num_documents
    )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, atomically."""
    with atomic_path(directory / MANIFEST_FILE) as temporary:
        temporary.write_text(json.dumps(without_none(manifest), indent=2) + "\n")


def without_none(record: Manifest | Shard) -> dict[str, Any]:
    """A record as JSON holds it: what a split of text does not have is left out."""

    def given(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in items if value is not None}

    return dataclasses.asdict(record, dict_factory=given)


def open_shard(directory: Path, manifest: Manifest, shard: Shard) -> npt.NDArray[Any]:
    """A shard's tokens, memory-mapped and read-only. # (shard.num_tokens,)"""
    return np.memmap(directory / shard.file, dtype=manifest.dtype, mode="r", shape=(shard.num_tokens,))


def open_mask(directory: Path, shard: Shard) -> npt.NDArray[np.uint8]:
    """The mask of a shard, eight tokens a byte, memory-mapped and read-only. # (mask_bytes(shard.num_tokens),)"""
    return np.memmap(directory / shard.mask_file, dtype=np.uint8, mode="r", shape=(mask_bytes(shard.num_tokens),))


def trained(mask: npt.NDArray[np.uint8], begin: int, end: int) -> npt.NDArray[np.bool_]:
    """Which of the tokens from `begin` to `end` are trained, of the mask of their shard. # (end - begin,)"""
    first = begin // 8
    bits = np.unpackbits(mask[first : mask_bytes(end)], bitorder="little")
    return bits[begin - 8 * first : end - 8 * first].astype(np.bool_)


def open_documents(directory: Path, manifest: Manifest) -> npt.NDArray[np.uint64]:
    """For each document the number of tokens up to its end, memory-mapped and read-only. # (num_documents,)"""
    if not manifest.num_documents:
        return np.empty(0, DOCUMENT_END)
    return np.memmap(directory / DOCUMENTS_FILE, dtype=DOCUMENT_END, mode="r", shape=(manifest.num_documents,))


def pairs_of_rows(document_ends: npt.NDArray[Any], row_tokens: int) -> npt.NDArray[np.int64]:
    """How many preference pairs each of some rows has, by the ends of their documents. # (num_rows,)"""
    return np.bincount((document_ends.astype(np.int64) - 1) // row_tokens) // 2
