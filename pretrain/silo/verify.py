"""Reads packed splits whole: their hashes beside other work, and what their tokens say; imports no torch."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.config.errors import ConfigError
from pretrain.config.keys import SiloConfig
from pretrain.silo.reference import verify_reference
from pretrain.silo.shards import (
    DOCUMENT_END,
    DOCUMENTS_FILE,
    MANIFEST_FILE,
    Manifest,
    Shard,
    open_documents,
    open_mask,
    open_shard,
    pairs_of_rows,
    token_outside_vocabulary,
    trained,
    verify_shards,
)

# Tokens that are looked at together.
VERIFY_TOKENS = 1 << 22


def verify_in_background(name: str, silo: SiloConfig) -> Future[str]:
    """Compare every byte of a silo's shards with their sha256, beside other work.

    The result is what is wrong, or "".
    """
    splits = [(f"silos.{name}.data", directory) for directory in silo.data]
    splits += [(f"silos.{name}.valid.{corpus}", directory) for corpus, directory in silo.valid.items()]
    found = Future[str]()

    def read() -> None:
        try:
            for key, directory in splits:
                verify_reference(Path(directory), verify_shards(Path(directory), key=key), key=key)
            found.set_result("")
        except (ConfigError, OSError) as error:
            found.set_result(str(error))
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=read, daemon=True).start()  # a run that ends for another reason does not wait for it
    return found


def verify_tokens(directory: Path, manifest: Manifest, *, key: str = "silo.data") -> None:
    """Check what the tokens say: each below vocab_size, documents where the index has them; of conversations the masks.

    Reads all tokens, in constant memory. Raises ConfigError.
    """
    if chat := manifest.chat:
        _verify_rows(directory, manifest, chat.sequence_tokens, key, room=chat.prompt_tokens or 0)
    else:
        _verify_ends(directory, manifest, key)


def _pieces(
    directory: Path, manifest: Manifest, num_tokens: int, key: str
) -> Iterator[tuple[Shard, int, npt.NDArray[Any]]]:
    """Up to so many tokens of a shard at a time, all below vocab_size, and how many came before them in the shard."""
    for shard in manifest.shards:
        tokens = open_shard(directory, manifest, shard)
        for first in range(0, shard.num_tokens, num_tokens):
            piece = tokens[first : first + num_tokens]
            if piece.max() >= manifest.vocab_size:
                raise ConfigError(token_outside_vocabulary(key, directory / shard.file, piece.max(), manifest))
            yield shard, first, piece


def _verify_ends(directory: Path, manifest: Manifest, key: str) -> None:
    """Of text: an end-of-text token where a document ends, nowhere else."""
    ends = open_documents(directory, manifest)
    before, num_documents = 0, 0
    for shard, _, piece in _pieces(directory, manifest, VERIFY_TOKENS, key):
        found = np.flatnonzero(piece == manifest.end_of_text_id) + (before + 1)
        listed = ends[num_documents : num_documents + len(found)]
        if not np.array_equal(found.astype(DOCUMENT_END), listed):
            raise ConfigError(
                f"{key}: {directory / shard.file} and {DOCUMENTS_FILE} disagree about where documents end: "
                "prepare the split again"
            )
        num_documents += len(found)
        before += len(piece)
    if num_documents != manifest.num_documents or (num_documents and ends[-1] != manifest.num_tokens):
        raise ConfigError(
            f"{key}: {directory} has {num_documents} ends of documents, {MANIFEST_FILE} says {manifest.num_documents}: "
            "prepare the split again"
        )


def _first_tokens(starts: npt.NDArray[np.int64], num_tokens: int, number: int) -> npt.NDArray[np.bool_]:
    """Which of some tokens are among so many first ones of their documents, which begin there. # (num_tokens,)"""
    return np.arange(num_tokens) - np.repeat(starts, np.diff(starts, append=num_tokens)) < number


def _verify_rows(directory: Path, manifest: Manifest, row_tokens: int, key: str, *, room: int) -> None:
    """Of conversations: each ends in its row, and has room for a prompt; of a document not the first token is trained,
    of a filling none."""
    ends = open_documents(directory, manifest)
    before, num_documents, num_trained, num_pairs = 0, 0, 0, 0
    whole_rows = max(1, VERIFY_TOKENS // row_tokens) * row_tokens
    for shard, first, piece in _pieces(directory, manifest, whole_rows, key):
        last = np.searchsorted(ends, np.uint64(before + len(piece)), side="right")  # of another type it would copy them
        listed = ends[num_documents:last].astype(np.int64)
        row_ends = np.arange(row_tokens, len(piece) + 1, row_tokens)
        starts = np.concatenate([[0], listed - before])[:-1]
        if not (len(listed) and (np.diff(starts) > 0).all() and np.isin(row_ends, listed - before).all()):
            raise ConfigError(
                f"{key}: {directory / shard.file} and {DOCUMENTS_FILE} disagree about where conversations end, as one "
                f"does at the end of each row of {row_tokens} tokens: prepare the split again"
            )
        bits = trained(open_mask(directory, shard), first, first + len(piece))
        # What fills a row is the last document in it, and has nothing but end-of-text tokens.
        last_starts = np.repeat(starts[np.searchsorted(starts, row_ends) - 1], row_tokens)
        in_last = np.arange(len(piece)) >= last_starts
        text = np.add.reduceat(in_last & (piece != manifest.end_of_text_id), row_ends - row_tokens)
        fills = in_last & np.repeat(text == 0, row_tokens)
        if bits[starts].any() or bits[fills].any():
            raise ConfigError(
                f"{key}: {directory / shard.mask_file} trains the first token of a document, or what fills a row: "
                "prepare the split again"
            )
        if room and (bits | (piece != manifest.end_of_text_id))[_first_tokens(starts, len(piece), room)].any():
            raise ConfigError(
                f"{key}: {directory / shard.file} has a conversation without room for a prompt of {room} tokens before "
                "it: prepare the split again"
            )
        num_documents += len(listed)
        num_trained += int(bits.sum())
        num_pairs += int(pairs_of_rows(listed - before, row_tokens).sum())
        before += len(piece)
    if (num_documents, num_trained) != (manifest.num_documents, manifest.num_trained_tokens):
        raise ConfigError(
            f"{key}: {directory} has {num_documents} ends of documents and {num_trained} trained tokens, "
            f"{MANIFEST_FILE} says {manifest.num_documents} and {manifest.num_trained_tokens}: prepare the split again"
        )
    if manifest.chat and manifest.chat.num_pairs not in (None, num_pairs):
        raise ConfigError(
            f"{key}: {directory} has {num_pairs} preference pairs, {MANIFEST_FILE} says {manifest.chat.num_pairs}: "
            "prepare the split again"
        )
