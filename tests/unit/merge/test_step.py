"""Whose delivery counts how much, by hand and by law."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.merge.step import capped


@pytest.mark.parametrize(
    ("weights", "max_share", "expected"),
    [
        ([100, 300], 1.0, [100, 300]),
        ([100, 300], 0.75, [100, 300]),
        ([256, 10**6, 256], 0.6, [256, 768, 256]),  # 768 is 0.6 of 1,280
        ([1, 10, 1000, 1000], 0.4, [1, 10, 22, 22]),  # 22 is 0.4 of 55
        ([5, 7], 0.4, [5, 5]),  # two silos cannot have less than half each
        ([9], 0.5, [9]),
    ],
)
def test_no_silo_has_more_than_its_share(weights: list[int], max_share: float, expected: list[int]) -> None:
    assert capped(weights, max_share) == expected


@given(st.lists(st.integers(1, 1 << 46), min_size=1, max_size=20), st.floats(0.05, 1.0))
def test_shares_for_any_weights(weights: list[int], max_share: float) -> None:
    found = capped(weights, max_share)
    fewer = len(weights) * max_share < 1
    assert all(1 <= new <= old for new, old in zip(found, weights, strict=True))
    assert len(set(found)) == 1 or max(found) <= math.ceil(max_share * sum(found)) + len(found)
    if max(weights) <= max_share * sum(weights):
        assert found == weights
    if fewer:
        assert len(set(found)) == 1
