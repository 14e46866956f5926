"""Packed splits of made-up conversations."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.silo.shards import TEMPLATE_FILE, Chat, template_sha256
from pretrain.silo.writer import SplitWriter

TEMPLATE = "ce" * 32
END = 0
Conversation = tuple[list[int], list[int]]  # its tokens, and of each whether it is trained


def conversations(
    number: int, *, vocab_size: int, seed: int = 0, shortest: int = 3, longest: int = 9
) -> list[Conversation]:
    """Tokens at random, among them end-of-text ones, of which about a half are trained, in runs."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        length = int(random.integers(shortest, longest + 1))
        tokens = random.integers(0, vocab_size, length)
        bits = np.cumsum(random.random(length) < 0.4) % 2
        bits[0], bits[-1] = 0, 1
        found.append((tokens.tolist(), bits.tolist()))
    return found


def packed_rows(given: Sequence[Conversation], row_tokens: int) -> list[list[Conversation]]:
    """One conversation after another, in rows that hold whole ones; what fills a row comes last in it."""
    rows: list[list[Conversation]] = [[]]
    for one in given:
        if sum(len(tokens) for tokens, _ in rows[-1]) + len(one[0]) > row_tokens:
            rows.append([])
        rows[-1].append(one)
    for row in rows:
        if rest := row_tokens - sum(len(tokens) for tokens, _ in row):
            row.append(([END] * rest, [0] * rest))
    return rows


def packer(
    directory: Path, *, vocab_size: int, tokenizer: str, prompt_tokens: int = 0
) -> Callable[[str, int, int, int, int], str]:
    """What packs conversations below a directory with a template, by name, number, seed, least and most tokens."""
    template = directory / TEMPLATE_FILE
    template.write_text("{{ messages }}")
    options: dict[str, Any] = {
        "row_tokens": 16,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "template": template_sha256(template),
        "prompt_tokens": prompt_tokens,
    }

    def packed(name: str, number: int, seed: int, shortest: int, longest: int) -> str:
        made = conversations(number, vocab_size=vocab_size, seed=seed, shortest=shortest, longest=longest)
        return str(write_chat(directory / name, made, **options))

    return packed


def write_chat(
    directory: Path,
    given: Sequence[Conversation],
    *,
    row_tokens: int,
    vocab_size: int,
    tokenizer: str,
    template: str = TEMPLATE,
    shard_tokens: int = 1_000,
    documents_at_once: int = 1_000,
    prompt_tokens: int = 0,
) -> Path:
    """Pack conversations, so many documents at once, each with room for a prompt before it."""
    given = [([END] * prompt_tokens + tokens, [0] * prompt_tokens + bits) for tokens, bits in given]
    writer = SplitWriter(
        directory,
        vocab_size=vocab_size,
        end_of_text_id=END,
        shard_tokens=shard_tokens,
        chat=Chat(template_sha256=template, sequence_tokens=row_tokens, prompt_tokens=prompt_tokens or None),
    )
    documents = [one for row in packed_rows(given, row_tokens) for one in row]
    for first in range(0, len(documents), documents_at_once):
        append(writer, documents[first : first + documents_at_once])
    writer.finish(tokenizer_sha256=tokenizer, recipe_sha256="c3" * 32)
    return directory


def append(writer: SplitWriter, documents: Sequence[Conversation]) -> None:
    """Hand a writer some documents in one call."""
    tokens = np.array([token for tokens, _ in documents for token in tokens])
    mask = np.array([bit for _, bits in documents for bit in bits])
    writer.write(tokens, np.array([len(tokens) for tokens, _ in documents]), len(tokens), mask)
