"""Packed splits of made-up preference pairs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.rows import Kept, Rows
from pretrain.silo.shards import Chat, Manifest
from pretrain.silo.writer import SplitWriter
from tests.chats import END, TEMPLATE

Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen and rejected answer, in tokens


def made_pairs(number: int, *, vocab_size: int, seed: int = 0, longest: int = 7) -> list[Pair]:
    """Tokens at random, answers of very unlike lengths."""
    random = np.random.default_rng(seed)
    parts = [
        [random.integers(1, vocab_size, random.integers(1, longest)).tolist() for _ in range(3)] for _ in range(number)
    ]
    return [(prompt, chosen, rejected) for prompt, chosen, rejected in parts]


def kept(pair: Pair) -> Kept:
    """A pair as it is packed."""
    prompt, *sides = pair
    tokens = [token for side in sides for token in [*prompt, *side]]
    bits = [bit for side in sides for bit in [False] * len(prompt) + [True] * len(side)]
    lengths = [len(prompt) + len(side) for side in sides]
    return Kept(np.array(tokens), np.array(bits), len(tokens), (lengths[0], lengths[1]))


def write_pairs(
    directory: Path,
    given: Sequence[Pair],
    *,
    row_tokens: int,
    vocab_size: int,
    tokenizer: str,
    template: str = TEMPLATE,
    shard_tokens: int = 1_000,
) -> Manifest:
    """Pack pairs."""
    writer = SplitWriter(
        directory,
        vocab_size=vocab_size,
        end_of_text_id=END,
        shard_tokens=shard_tokens,
        chat=Chat(template_sha256=template, sequence_tokens=row_tokens, num_pairs=0),
    )
    rows = Rows(row_tokens, END, writer.write)
    for pair in given:
        rows.add(kept(pair))
    rows.flush()
    return writer.finish(tokenizer_sha256=tokenizer, recipe_sha256="c3" * 32)
