"""What silos tell each other of second moments, and the merge that they weigh."""

import re
from pathlib import Path

import pytest
import torch

from pretrain.outer.merge import importance_mean
from pretrain.outer.moments import (
    LEAST_IMPORTANCE,
    check_factors,
    factor,
    factor_bytes,
    importance,
    merge_factors,
    unfactor,
)
from pretrain.outer.quantize import Parts
from pretrain.payload import Tensors, save_tensors

MATRIX = torch.tensor([[1.0, 3.0], [2.0, 6.0], [0.0, 0.0]])  # rows 2, 4, 0; columns 1, 3


def test_a_matrix_is_its_rows_and_columns() -> None:
    parts = factor(MATRIX)
    assert parts["rows"].tolist() == [2.0, 4.0, 0.0]
    assert parts["columns"].tolist() == [1.0, 3.0]
    assert torch.equal(unfactor(parts), MATRIX)  # of rank one, so nothing is lost
    assert unfactor(factor(torch.zeros(3, 2))).tolist() == [[0.0, 0.0]] * 3


def test_the_means_of_rows_and_columns_survive() -> None:
    matrix = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    back = unfactor(factor(matrix))
    assert torch.allclose(back.mean(0), matrix.mean(0))
    assert torch.allclose(back.mean(1), matrix.mean(1))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_all_else_is_told_whole(shape: tuple[int, ...]) -> None:
    value = torch.rand(shape)
    assert torch.equal(unfactor(factor(value)), value)


def test_bytes() -> None:
    assert factor_bytes({"a": torch.Size([3, 2]), "b": torch.Size([7])}) == 4 * (3 + 2 + 7)


def test_merged_by_tokens() -> None:
    found = [(1, factor(MATRIX)), (3, factor(torch.zeros(3, 2)))]
    assert merge_factors(found, torch.Size([3, 2]))["rows"].tolist() == [0.5, 1.0, 0.0]
    one = merge_factors([(5, factor(MATRIX)), (2, factor(MATRIX))], torch.Size([3, 2]))
    assert torch.equal(unfactor(one), MATRIX)


def test_a_liar_does_not_move_the_robust_merge() -> None:
    honest = factor(torch.ones(2, 2))
    found = [(1, honest), (1, honest), (10**9, factor(torch.full((2, 2), 1e30)))]
    assert merge_factors(found, torch.Size([2, 2]), robust=True)["rows"].tolist() == [1.0, 1.0]
    assert merge_factors(found, torch.Size([2, 2]))["rows"][0] > 1e29


def test_a_silo_that_alone_has_a_say_is_not_divided_by_all() -> None:
    says, silent = importance(factor(torch.tensor([4.0, 1.0]))), importance(factor(torch.tensor([0.0, 1.0])))
    assert says.tolist() == pytest.approx([2.0, 1.0])
    assert silent.tolist() == pytest.approx([LEAST_IMPORTANCE, 1.0])
    ones, zeros = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    merged = importance_mean([(1, ones, says), (1, zeros, silent), (2, zeros, silent)], torch.Size([2]))
    assert merged.tolist() == pytest.approx([1.0, 0.25], rel=1e-6)  # the second by tokens: 1 of 4


def test_equal_pseudo_gradients_stay_what_they_are() -> None:
    value = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(3, 100, dtype=torch.float64) + 0.1
    merged = importance_mean([(n + 1, value, one) for n, one in enumerate(weights)], value.shape)
    assert torch.equal(merged, value)


def test_travels_beside_parameters(tmp_path: Path) -> None:
    file = tmp_path / "payload"
    save_tensors({"a": {"values": torch.ones(2)}}, file, factors={"w": factor(MATRIX.T)})
    found = Tensors(file)
    assert found.names == ["a"]
    assert torch.equal(unfactor(found.factors["w"]), MATRIX.T)


SHAPES = {"w": torch.Size([3, 2])}
REFUSED: dict[str, tuple[dict[str, Parts], str]] = {
    "missing": ({}, "it holds the second moments of other tensors than are agreed"),
    "unknown": ({"w": factor(MATRIX), "x": factor(MATRIX)}, "it holds the second moments of other tensors"),
    "another shape": ({"w": factor(MATRIX.T)}, "second moment of w: {'columns': 'torch.float32 [3]'"),
    "another type": ({"w": factor(MATRIX.double())}, "second moment of w: {'columns': 'torch.float64 [2]'"),
    "NaN": ({"w": factor(MATRIX * torch.nan)}, "second moment of w: infinite, NaN or negative given"),
    "negative": ({"w": factor(-MATRIX)}, "second moment of w: infinite, NaN or negative given; allowed: finite, 0 or"),
}


@pytest.mark.parametrize(("found", "message"), REFUSED.values(), ids=REFUSED)
def test_what_another_party_must_not_send(found: dict[str, Parts], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_factors(found, SHAPES)
    check_factors({"w": factor(MATRIX)}, SHAPES)
