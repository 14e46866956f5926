"""Whole conversations into rows of one length, so that little is left of them.

So many are collected that rows can be filled well, then all of them are packed: the longest first, each into the
fullest row that has room for it (best-fit decreasing). What is written depends on them and their order alone.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# Collected before they are packed, in tokens, and rows at least: some 8 MB, and a few rows in a thousand are not full.
WINDOW_TOKENS = 1 << 21
WINDOW_ROWS = 64


@dataclass(frozen=True)
class Kept:
    """One conversation that is to be packed."""

    tokens: npt.NDArray[Any]
    trained: npt.NDArray[np.bool_]
    num_bytes: int
    parts: tuple[int, ...] = ()
    """Tokens of each of its documents, which stay together in a row, as those of a pair; empty: it is one."""


def best_fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Which of so long conversations go into which row, none of them longer than a row."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # of each row that has any, what is left of it; rising
    shortest = min(lengths, default=0)
    for index in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        place = bisect.bisect_left(rooms, (lengths[index], -1))
        if place == len(rooms):
            room, row = row_tokens, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(place)
        rows[row].append(index)
        if room - lengths[index] >= shortest:
            bisect.insort(rooms, (room - lengths[index], row))
    return rows


class Rows:
    """Collects a split's conversations and writes rows of them."""

    def __init__(self, row_tokens: int, padding_id: int, write: Callable[..., None]) -> None:
        """`write` is that of the split's writer; what fills a row is `padding_id`."""
        self.pending: list[Kept] = []
        self.num_tokens = 0
        """Of those that are pending."""
        self._row_tokens, self._padding_id, self._write = row_tokens, padding_id, write
        self._window_tokens = max(WINDOW_TOKENS, WINDOW_ROWS * row_tokens)

    def add(self, kept: Kept) -> bool:
        """Take one more; whether all that were pending have been written now."""
        self.pending.append(kept)
        self.num_tokens += len(kept.tokens)
        if self.num_tokens < self._window_tokens:
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Pack and write what is pending."""
        rows = best_fit([len(one.tokens) for one in self.pending], self._row_tokens)
        if not rows:
            return
        pieces, lengths = [], []
        for row in rows:
            chosen = [self.pending[index] for index in row]
            rest = self._row_tokens - sum(len(one.tokens) for one in chosen)
            if rest:
                padding = np.full(rest, self._padding_id, chosen[0].tokens.dtype)
                chosen.append(Kept(padding, np.zeros(rest, np.bool_), 0))
            pieces += chosen
            lengths += [length for one in chosen for length in one.parts or (len(one.tokens),)]
        self._write(
            np.concatenate([one.tokens for one in pieces]),
            np.array(lengths, np.int64),
            sum(one.num_bytes for one in pieces),
            np.concatenate([one.trained for one in pieces]),
        )
        self.pending, self.num_tokens = [], 0
