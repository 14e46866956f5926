"""The error of averaging factors, measured without making a product."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pretrain.outer.factors import aggregation_error, pairs
from pretrain.outer.fragments import cut_factors

NAMES = [f"layers.{i}.q.lora_{factor}.default.weight" for i in (10, 2) for factor in "BA"]


def test_each_factor_is_a_fragment_and_each_a_has_its_b() -> None:
    a, b = cut_factors(NAMES)
    assert a == [f"layers.{i}.q.lora_A.default.weight" for i in (2, 10)]
    assert b == [f"layers.{i}.q.lora_B.default.weight" for i in (2, 10)]
    assert sorted(pairs(NAMES)) == sorted(zip(a, b, strict=True))
    assert pairs([*a, b[0]]) == [(a[0], b[0])]


def test_by_hand() -> None:
    one = torch.ones(1, 1)
    assert aggregation_error([[(one, one), (-one, -one)]], [1, 1]) == 1.0  # 0 times 0, and 1
    assert aggregation_error([[(one, one), (one, 3 * one)]], [1, 1]) == 0.0  # A is the same everywhere
    assert aggregation_error([[(one, one), (3 * one, 3 * one)]], [1, 1]) == pytest.approx(1 / 5)  # 4 for 5
    assert aggregation_error([[(one, 0 * one)]], [1]) == 0.0


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_it_is_what_the_products_say(num_silos: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    factors = [[(draw(rank, 5), draw(7, rank)) for _ in range(num_silos)] for _ in range(2)]
    weights = [i + 1 for i in range(num_silos)]
    off = whole = 0.0
    for of_silos in factors:
        mean = sum(w * b @ a for w, (a, b) in zip(weights, of_silos, strict=True)) / sum(weights)
        mean_a = sum(w * a for w, (a, _) in zip(weights, of_silos, strict=True)) / sum(weights)
        mean_b = sum(w * b for w, (_, b) in zip(weights, of_silos, strict=True)) / sum(weights)
        off += (mean_b @ mean_a - mean).square().sum().item()
        whole += mean.square().sum().item()
    assert aggregation_error(factors, weights) == pytest.approx((off / whole) ** 0.5, rel=1e-9, abs=1e-12)
