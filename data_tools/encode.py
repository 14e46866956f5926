"""What a worker process does with a block of text: parse, clean, tokenize."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools import quality
from data_tools.clean import Cleaner, Cleaning, document_hash, is_held_out, language_of, text_grams
from data_tools.sources import Bad, Block, parse_block
from data_tools.tokenizer import PlainText
from pretrain.silo.shards import TOKEN_TYPES, token_type_for

# Documents that are tokenized at once: the library's objects take some 300 bytes a token.
BATCH_BYTES = 1 << 16


@dataclass(kw_only=True, frozen=True)
class Job:
    """What every worker is told at its start."""

    tokenizer: Path
    """The tokenizer.json."""
    cleaning: Cleaning
    """What is done to documents."""
    held_out: float
    """Share of documents that are held out, 0 to below 1."""
    held_out_grams: Path | None = None
    """The 13-grams of the held-out documents, where training documents must not share one."""


@dataclass(kw_only=True)
class Encoded:
    """What became of a block. Documents are those that passed all that can be decided without the rest of the text."""

    tokens: npt.NDArray[Any]
    """Of all documents, each ended by the end-of-text token. # (num_tokens,)"""
    document_tokens: npt.NDArray[np.int64]
    """Tokens of each document, its end included. # (num_documents,)"""
    document_bytes: npt.NDArray[np.int64]
    """UTF-8 bytes of each document's text. # (num_documents,)"""
    held_out: npt.NDArray[np.bool_]
    """Whether it belongs to the held-out split. # (num_documents,)"""
    hashes: list[bytes]
    """`document_hash` of each document."""
    signatures: list[bytes]
    """Its MinHash, where near duplicates are looked for; empty otherwise."""
    languages: list[str]
    """Its language, where it is asked for; empty otherwise."""
    quality: npt.NDArray[np.float64]
    """Each of quality.MEASURES, where they are asked for, rounded. # (num_documents or 0, num_measures)"""
    would_drop: npt.NDArray[np.bool_]
    """Whether each of quality.RULES would drop it. # (num_documents or 0, num_rules)"""
    dropped: list[tuple[str, int]]
    """Reason and bytes of each document that was dropped."""
    trained: npt.NDArray[np.bool_] | None = None
    """Of conversations, which tokens are learned; None: of text. # (num_tokens,)"""
    chosen_tokens: npt.NDArray[np.int64] | None = None
    """Of preference pairs, how many tokens of each are the chosen side's, the first; else None. # (num_documents,)"""
    bad: list[Bad] = field(default_factory=list)
    """Records that could not be used."""
    personal: Counter[tuple[str, str]] = field(default_factory=Counter)
    """What there was of personal data, as `Cleaner` counts it."""
    split: Counter[str] = field(default_factory=Counter)
    """Of conversations too long for a row that were split: `conversations`, their `tokens` and `trained_tokens`; the
    `pieces`, their `piece_tokens` and `piece_trained_tokens`; and `turns_cut`, those that are in none."""


class Encoder:
    """Turns blocks into tokens; one a worker process."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._cleaner = Cleaner(job.cleaning, job.held_out_grams)
        self._plain = PlainText(job.tokenizer)
        self._dtype = TOKEN_TYPES[token_type_for(self._plain.vocab_size)]

    def encode(self, block: Block) -> Encoded:
        """Parse, clean and tokenize a block."""
        texts, hashes, held_out, signatures, languages = [], [], [], [], []
        dropped: list[tuple[str, int]] = []
        bad: list[Bad] = []
        self._cleaner.personal.clear()
        for text, reason in self._cleaned(block, bad):
            digest = document_hash(text)
            is_valid = self._is_held_out(block, digest)
            if reason:
                dropped.append((reason, len(text.encode())))
            elif self._job.held_out_grams and not is_valid and self._cleaner.overlaps(text):
                dropped.append(("overlap", len(text.encode())))
            else:
                texts.append(text)
                hashes.append(digest)
                held_out.append(is_valid)
                if self._job.cleaning.asks_languages:
                    languages.append(language_of(text))
                if self._job.cleaning.near_duplicates:
                    signatures.append(self._cleaner.signature(text))
        pieces = list(self._tokens(texts))
        measured = [quality.measured(text) for text in texts] if self._job.cleaning.quality_report else []
        return Encoded(
            tokens=np.concatenate(pieces) if pieces else np.empty(0, self._dtype),
            document_tokens=np.array([len(piece) for piece in pieces], dtype=np.int64),
            document_bytes=np.array([len(text.encode()) for text in texts], dtype=np.int64),
            held_out=np.array(held_out, dtype=np.bool_),
            hashes=hashes,
            signatures=signatures,
            languages=languages,
            quality=np.array(
                [[quality.rounded(found[name]) for name in quality.MEASURES] for found in measured], dtype=np.float64
            ).reshape(-1, len(quality.MEASURES)),
            would_drop=np.array(
                [[rule(found) for rule in quality.RULES.values()] for found in measured], dtype=np.bool_
            ).reshape(-1, len(quality.RULES)),
            dropped=dropped,
            bad=bad,
            personal=self._cleaner.personal.copy(),
        )

    def held_out_grams(self, block: Block) -> npt.NDArray[np.uint64]:
        """The 13-grams of the block's held-out documents."""
        grams = [
            text_grams(text)
            for text, reason in self._cleaned(block, [])
            if reason is None and self._is_held_out(block, document_hash(text))
        ]
        return np.unique(np.concatenate(grams)) if grams else np.empty(0, np.uint64)

    def _cleaned(self, block: Block, bad: list[Bad]) -> Iterator[tuple[str, str | None]]:
        """Each document's text after cleaning, and the reason why it is dropped; what is no document goes to `bad`."""
        for number, text in parse_block(block):
            if isinstance(text, Bad):
                bad.append(text)
            else:
                yield self._cleaner.clean(text, f"{block.part.path}, {block.part.unit} {number}")

    def _is_held_out(self, block: Block, digest: bytes) -> bool:
        return block.part.split == "valid" if block.part.split else is_held_out(digest, self._job.held_out)

    def _tokens(self, texts: list[str]) -> Iterator[npt.NDArray[Any]]:
        """Tokens of each text, and the end-of-text token. # (num_tokens,)"""
        first, num_characters = 0, 0
        for last, text in enumerate(texts, start=1):
            num_characters += len(text)
            if num_characters >= BATCH_BYTES or last == len(texts):
                for ids in self._plain.encode(texts[first:last]):
                    ids.append(self._plain.end_id)
                    yield np.array(ids, dtype=self._dtype)
                first, num_characters = last, 0


_encoder: Encoder


def start(job: Job) -> None:
    """Make this process's encoder."""
    global _encoder
    _encoder = Encoder(job)


def encode(item: tuple[int, Block]) -> Encoded:
    """`Encoder.encode` of a numbered block."""
    return _encoder.encode(item[1])


def held_out_grams(item: tuple[int, Block]) -> npt.NDArray[np.uint64]:
    """`Encoder.held_out_grams` of a numbered block."""
    return _encoder.held_out_grams(item[1])
