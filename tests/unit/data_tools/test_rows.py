"""Conversations go into rows, each once, whole and in a row with room for it, and little is left."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools import rows
from data_tools.rows import Kept, Rows, best_fit


@given(lengths=st.lists(st.integers(1, 32), max_size=200))
def test_every_conversation_is_in_one_row_that_has_room(lengths: list[int]) -> None:
    found = best_fit(lengths, 32)
    assert sorted(index for row in found for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in found]
    assert all(0 < tokens <= 32 for tokens in filled)
    # No two rows could be one, and so no more than one of them is half empty.
    assert sum(1 for tokens in filled if 2 * tokens <= 32) <= 1
    assert best_fit(lengths, 32) == found


def test_the_fullest_row_with_room_is_taken() -> None:
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([], 10) == []
    assert best_fit([10, 10], 10) == [[0], [1]]


def test_real_lengths_leave_little() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 0.8, 20_000).astype(int).clip(8, 2048).tolist()
    found = best_fit(lengths, 2048)
    assert sum(lengths) / (2048 * len(found)) > 0.998


def test_rows_are_written_when_enough_are_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "WINDOW_TOKENS", 20)
    monkeypatch.setattr(rows, "WINDOW_ROWS", 1)
    written: list[tuple[list[int], list[int], int, list[bool]]] = []

    def write(tokens: np.ndarray, lengths: np.ndarray, num_bytes: int, mask: np.ndarray) -> None:
        written.append((tokens.tolist(), lengths.tolist(), num_bytes, mask.tolist()))

    collected = Rows(8, 99, write)
    for number, length in enumerate((7, 5, 3, 6), start=1):
        tokens = np.full(length, number, np.uint16)
        is_written = collected.add(Kept(tokens, np.arange(length) == length - 1, 10 * number))
        assert is_written == (number == 4)
    assert collected.num_tokens == 0
    [(tokens, lengths, num_bytes, mask)] = written
    assert tokens == [*[1] * 7, 99, *[4] * 6, 99, 99, *[2] * 5, *[3] * 3]
    assert lengths == [7, 1, 6, 2, 5, 3]
    assert num_bytes == 100
    assert np.flatnonzero(mask).tolist() == [6, 13, 20, 23]
    collected.flush()
    assert len(written) == 1
