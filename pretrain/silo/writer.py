"""Writes packed splits, as shards.py describes them; imports no torch."""

import contextlib
import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.silo.shards import (
    DOCUMENT_END,
    DOCUMENTS_FILE,
    TOKEN_TYPES,
    Chat,
    Manifest,
    Shard,
    open_documents,
    pairs_of_rows,
    token_type_for,
    without_none,
    write_manifest,
)


class SplitWriter:
    """Writes a packed split, in constant memory, and can go on where a killed writer had last synced.

    The bytes depend on the documents, masks and `shard_tokens` only, never on how they were cut into calls of `write`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        vocab_size: int,
        end_of_text_id: int,
        shard_tokens: int,
        chat: Chat | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Start an empty split in `directory`, or go on from what `sync` returned; what was written after is cut off.

        `shard_tokens` is the most that one shard takes, of conversations at least a row. With `chat` (whose trained
        tokens are counted here) it is a split of conversations.
        """
        assert shard_tokens > 0
        if chat:
            shard_tokens = max(1, shard_tokens // chat.sequence_tokens) * chat.sequence_tokens
        self._chat = chat
        self._directory = directory
        self._vocab_size, self._end_of_text_id, self._shard_tokens = vocab_size, end_of_text_id, shard_tokens
        self._dtype = TOKEN_TYPES[token_type_for(vocab_size)]
        state = state or {"num_tokens": 0, "num_documents": 0, "num_bytes": 0, "shards": []}
        self.num_tokens: int = state["num_tokens"]
        self.num_documents: int = state["num_documents"]
        self.num_bytes: int = state["num_bytes"]
        self.num_trained_tokens: int = state.get("num_trained_tokens", 0)
        self._shards = [Shard(**shard) for shard in state["shards"]]
        directory.mkdir(parents=True, exist_ok=True)
        for kind in ("bin", "mask"):
            for left_over in sorted(directory.glob(f"shard-*.{kind}"))[len(self._shards) + 1 :]:
                left_over.unlink()
        self._documents = HashedFile(directory / DOCUMENTS_FILE, self.num_documents * DOCUMENT_END.itemsize)
        self._shard, self._mask = self._open_shard(state.get("mask_bits", []))

    def _open_shard(self, mask_bits: list[int] | None = None) -> "tuple[HashedFile, MaskFile | None]":
        """The shard that is being filled, and its mask; `mask_bits` of that are not in the file yet."""
        num_tokens = self.num_tokens - sum(shard.num_tokens for shard in self._shards)
        path = self._directory / f"shard-{len(self._shards):05d}.bin"
        mask = MaskFile(path.with_suffix(".mask"), num_tokens, mask_bits or []) if self._chat else None
        return HashedFile(path, num_tokens * self._dtype.itemsize), mask

    def write(
        self,
        tokens: npt.NDArray[Any],
        document_tokens: npt.NDArray[Any],
        num_bytes: int,
        mask: npt.NDArray[Any] | None = None,
    ) -> None:
        """Append whole documents.

        tokens (num_tokens,) holds them all, of text each ended by the end-of-text token; document_tokens
        (num_documents,) says how many of the tokens are whose; num_bytes are the UTF-8 bytes of their text. Of
        conversations, mask (num_tokens,) says which tokens are trained; the first one of a document never is, whatever
        it says. What fills a row is a document, too; no document goes on in another row.
        """
        assert document_tokens.sum() == len(tokens)
        ends = self.num_tokens + np.cumsum(document_tokens)
        bits = self._bits(ends, document_tokens, mask)
        self._documents.write(ends.astype(DOCUMENT_END).tobytes())
        self.num_documents += len(document_tokens)
        self.num_bytes += num_bytes
        while len(tokens):
            piece = tokens[: self._shard_tokens - self._shard.num_bytes // self._dtype.itemsize].astype(self._dtype)
            self._shard.write(piece.tobytes())
            if self._mask:
                self._mask.write(bits[: len(piece)])
            self.num_tokens += len(piece)
            tokens, bits = tokens[len(piece) :], bits[len(piece) :]
            if self._shard.num_bytes == self._shard_tokens * self._dtype.itemsize:
                self._end_shard()
                self._shard, self._mask = self._open_shard()

    def _bits(
        self, ends: npt.NDArray[Any], document_tokens: npt.NDArray[Any], mask: npt.NDArray[Any] | None
    ) -> npt.NDArray[np.bool_]:
        """The mask of what is about to be written, counted; empty of text."""
        assert (mask is None) == (self._chat is None)
        if mask is None or self._chat is None or not len(ends):
            return np.empty(0, np.bool_)
        row_tokens, starts = self._chat.sequence_tokens, ends - document_tokens
        assert len(mask) == ends[-1] - self.num_tokens
        assert (document_tokens > 0).all()
        assert (starts // row_tokens == (ends - 1) // row_tokens).all(), "a conversation goes on in another row"
        bits = mask.astype(np.bool_)
        bits[starts - self.num_tokens] = False
        self.num_trained_tokens += int(bits.sum())
        return bits

    def _end_shard(self) -> None:
        path, num_tokens = self._shard.path, self._shard.num_bytes // self._dtype.itemsize
        sha256, mask_sha256 = self._shard.close(), self._mask.close() if self._mask else None
        if num_tokens:
            self._shards.append(Shard(file=path.name, num_tokens=num_tokens, sha256=sha256, mask_sha256=mask_sha256))
        else:
            path.unlink()
            path.with_suffix(".mask").unlink(missing_ok=True)

    def sync(self) -> dict[str, Any]:
        """Bring all to the disk; returns the state, as JSON holds it, from which another writer goes on."""
        self._shard.sync()
        self._documents.sync()
        masked = {}
        if self._mask:
            masked = {"num_trained_tokens": self.num_trained_tokens, "mask_bits": self._mask.sync()}
        return {
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "shards": [without_none(shard) for shard in self._shards],
            **masked,
        }

    def finish(self, *, tokenizer_sha256: str, recipe_sha256: str) -> Manifest:
        """Close the files and write the manifest. All rows must be full."""
        assert not self._chat or self.num_tokens % self._chat.sequence_tokens == 0
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
            chat=replace(self._chat, num_trained_tokens=self.num_trained_tokens) if self._chat else None,
        )
        if manifest.chat and manifest.chat.num_pairs is not None:
            num_pairs = int(
                pairs_of_rows(open_documents(self._directory, manifest), manifest.chat.sequence_tokens).sum()
            )
            manifest = replace(manifest, chat=replace(manifest.chat, num_pairs=num_pairs))
        write_manifest(self._directory, manifest)
        return manifest

    def close(self) -> None:
        """Close the files as they are, for another writer to go on from what `sync` returned."""
        self._shard.abandon()
        self._documents.abandon()
        if self._mask:
            self._mask.abandon()


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


class MaskFile:
    """A mask that is appended to, bit by bit, and its sha256. Of an earlier one the first `num_bits` are kept."""

    def __init__(self, path: Path, num_bits: int, pending: list[int]) -> None:
        """`pending` are those of the bits that had not filled a byte."""
        assert len(pending) == num_bits % 8
        self._file, self._pending = HashedFile(path, num_bits // 8), np.array(pending, np.bool_)

    def write(self, bits: npt.NDArray[np.bool_]) -> None:
        """Append bits."""
        bits = np.concatenate([self._pending, bits])
        num_whole = len(bits) // 8 * 8
        self._file.write(np.packbits(bits[:num_whole], bitorder="little").tobytes())
        self._pending = bits[num_whole:]

    def sync(self) -> list[int]:
        """Bring all whole bytes to the disk; returns the bits that do not fill one yet."""
        self._file.sync()
        return self._pending.astype(int).tolist()

    def close(self) -> str:
        """Fill the last byte with zeros, bring all to the disk and close; returns the sha256, in hexadecimal."""
        self._file.write(np.packbits(self._pending, bitorder="little").tobytes())
        return self._file.close()

    def abandon(self) -> None:
        """Close, if it is still open; what was not synced may be lost."""
        self._file.abandon()
