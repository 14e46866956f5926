"""Robust merges by hand, and what each stands."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.outer.robust import clip_factors, coordinate_median, krum, trimmed_mean


def double(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_clipping_by_hand() -> None:
    assert clip_factors([1.0, 2.0, 8.0]) == [1.0, 1.0, 0.25]
    assert clip_factors([0.0, 0.0, 5.0]) == [1.0, 1.0, 0.0]


def test_trimmed_mean_and_median_by_hand() -> None:
    stacked = double([1, -100], [2, 5], [3, 6], [4, 7], [1000, 8])
    assert trimmed_mean(stacked, 1).tolist() == [3, 6]
    assert coordinate_median(stacked).tolist() == [3, 6]
    assert coordinate_median(stacked[:4]).tolist() == [2.5, 5.5]
    assert coordinate_median(stacked[:1]).tolist() == [1, -100]


def test_krum_by_hand() -> None:
    # At 0, 1, 2, 3 and 100, one malicious: each counts its two nearest. 1 has 1 + 1, as has 2; the first wins.
    points = double([0], [1], [2], [3], [100])
    assert krum(points @ points.T, 1) == 1


@given(st.integers(5, 9), st.integers(0, 2**31), st.floats(-1e6, 1e6))
def test_one_malicious_silo_moves_the_merge_no_further_than_the_honest_ones_are(
    num_silos: int, seed: int, attack: float
) -> None:
    honest = torch.randn(num_silos - 1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    stacked = torch.cat([honest, torch.full((1, 12), attack, dtype=torch.float64)])
    for merged in (trimmed_mean(stacked, 1), coordinate_median(stacked)):
        assert (merged >= honest.min(dim=0).values - 1e-12).all()
        assert (merged <= honest.max(dim=0).values + 1e-12).all()
    if abs(attack) > 100:
        assert krum(stacked @ stacked.T, 1) < num_silos - 1


def test_too_few_silos() -> None:
    with pytest.raises(ValueError, match="2 silos given; allowed: more than twice 1 malicious ones"):
        trimmed_mean(double([1], [2]), 1)
    with pytest.raises(ValueError, match=r"4 silos given; allowed: 5 or more \(twice the malicious, plus 3\)"):
        krum(torch.eye(4, dtype=torch.float64), 1)
