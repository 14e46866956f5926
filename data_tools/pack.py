"""Text to packed shards, in constant memory: documents -> tokens -> a packed split (see pretrain/silo/shards.py)."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from data_tools.corpora import SPLITS, read_documents, split_file
from data_tools.tokenizer import end_of_text_id, load_tokenizer, tokenizer_file, vocab_size_of
from pretrain.config import ConfigError
from pretrain.silo.shards import (
    MANIFEST_FILE,
    Manifest,
    ShardWriter,
    atomic_path,
    file_sha256,
    read_manifest,
    token_type_for,
    tokenizer_sha256,
    write_manifest,
)

SHARD_TOKENS = 100_000_000
# Text that is tokenized at once: enough for all cores, little enough for a laptop.
BATCH_CHARACTERS = 1_000_000


def prepare_corpus(
    corpus: Path, *, tokenizer: Path, output: Path, shard_tokens: int = SHARD_TOKENS
) -> dict[Path, Manifest]:
    """Pack a corpus folder's train and valid text into `output`/train and `output`/valid, or one file into `output`.

    `tokenizer` is a tokenizer.json or a folder that holds one. Returns the manifest of each split directory.
    Raises ConfigError as `prepare` does, and for a folder that has no train or no valid text.
    """
    pairs = {output / split: split_file(corpus, split) for split in SPLITS} if corpus.is_dir() else {output: corpus}
    return {
        directory: prepare(source, tokenizer=tokenizer, output=directory, shard_tokens=shard_tokens)
        for directory, source in pairs.items()
    }


def prepare(source: Path, *, tokenizer: Path, output: Path, shard_tokens: int = SHARD_TOKENS) -> Manifest:
    """Pack the documents of the file `source` into the directory `output`, in shards of at most `shard_tokens`.

    `output` appears whole or not at all. A split of the same file and tokenizer that is already there is left as it
    is. Raises ConfigError for unreadable text, a bad tokenizer, or when `output` holds anything else.
    """
    if shard_tokens < 1:
        raise ConfigError(f"--shard-tokens: {shard_tokens} given; allowed: 1 or more")
    if not source.is_file():
        raise ConfigError(f"corpus: {str(source)!r} given; there is no such file or folder")
    tokenizer = tokenizer_file(tokenizer)
    tokenizer_hash, source_hash = tokenizer_sha256(tokenizer, key="--tokenizer"), file_sha256(source)
    there = _manifest_there(output)
    if there is not None:
        if (there.tokenizer_sha256, there.source_sha256) == (tokenizer_hash, source_hash):
            return there
        raise ConfigError(
            f"--output: {output} holds other text or another tokenizer's tokens: delete it or choose another --output"
        )
    encoder = load_tokenizer(tokenizer)
    vocab_size, end_id = vocab_size_of(encoder), end_of_text_id(encoder)
    with atomic_path(output) as temporary:
        temporary.mkdir()
        num_documents = num_bytes = 0
        with ShardWriter(temporary, vocab_size=vocab_size, shard_tokens=shard_tokens) as writer:
            for texts in _batches(_documents_with_progress(source)):
                writer.write(_encode(encoder, texts, end_id))
                num_documents += len(texts)
                num_bytes += sum(len(text.encode()) for text in texts)
        if num_documents == 0:
            raise ConfigError(f"corpus: {source} given; it holds no documents")
        manifest = Manifest(
            tokenizer_sha256=tokenizer_hash,
            source_sha256=source_hash,
            vocab_size=vocab_size,
            token_type=token_type_for(vocab_size),
            end_of_text_id=end_id,
            num_tokens=sum(shard.num_tokens for shard in writer.shards),
            num_documents=num_documents,
            num_bytes=num_bytes,
            shards=tuple(writer.shards),
        )
        write_manifest(temporary, manifest)
    return manifest


def _manifest_there(output: Path) -> Manifest | None:
    """The manifest of a split that `output` already is; None when there is nothing, or an empty directory."""
    if output.is_dir() and (output / MANIFEST_FILE).exists():
        return read_manifest(output, key="--output")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"--output: {output} exists and is no packed split: delete it or choose another --output")
    return None


def _documents_with_progress(source: Path) -> Iterator[str]:
    """The documents of a file, with a bar over its bytes when someone looks at a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        progress.open(source, "rb", description=f"packing {source.name}") as stream,
    ):
        yield from read_documents(source, stream=stream)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_characters = 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _encode(encoder: Tokenizer, texts: list[str], end_id: int) -> np.ndarray:
    """Tokens of all texts, each followed by `end_id`. # (num_tokens,)"""
    documents = encoder.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.array([*document.ids, end_id], dtype=np.uint32) for document in documents])
