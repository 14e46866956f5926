"""What silos tell each other of their gradients, and the merge that second moments weigh."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.exchange.payload import Tensors, save_tensors
from pretrain.outer.merge import LEAST_IMPORTANCE, add_to_importance_mean, importance, weighted_mean
from pretrain.outer.moments import MeanGradient, SecondMoment, bounded, check_lengths, check_moments
from pretrain.outer.quantize import Parts

MATRIX_MOMENT, ROW_MOMENT = SecondMoment(torch.Size([3, 2])), SecondMoment(torch.Size([2, 3]))
MATRIX = torch.tensor([[1.0, 3.0], [2.0, 6.0], [0.0, 0.0]])  # rows 2, 4, 0; columns 1, 3


def test_a_matrix_is_its_rows_and_columns() -> None:
    parts = MATRIX_MOMENT.encode(MATRIX)
    assert parts["rows"].tolist() == [2.0, 4.0, 0.0]
    assert parts["columns"].tolist() == [1.0, 3.0]
    assert torch.equal(MATRIX_MOMENT.decode(parts), MATRIX)  # of rank one, so nothing is lost
    zero = MATRIX_MOMENT.encode(torch.zeros(3, 2))
    assert MATRIX_MOMENT.decode(zero).tolist() == [[0.0, 0.0]] * 3


def test_mean_gradients_merge_to_the_code_of_their_mean() -> None:
    shape = torch.Size([301, 257])
    moment, of_silos = MeanGradient(shape), []
    for seed in (1, 2, 3):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / seed
        of_silos.append((seed, moment.encode(value)))
    mean, _ = weighted_mean(((weight, moment.decode(parts).double()) for weight, parts in of_silos), shape)
    for part, value in moment.encode(mean.float()).items():
        assert torch.equal(moment.merge(of_silos)[part], value)


def test_the_means_of_rows_and_columns_survive() -> None:
    matrix = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    moment = SecondMoment(matrix.shape)
    back = moment.decode(moment.encode(matrix))
    assert torch.allclose(back.mean(0), matrix.mean(0))
    assert torch.allclose(back.mean(1), matrix.mean(1))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_all_else_is_told_whole(shape: tuple[int, ...]) -> None:
    value, moment = torch.rand(shape), SecondMoment(torch.Size(shape))
    assert torch.equal(moment.decode(moment.encode(value)), value)


def test_bytes() -> None:
    assert MATRIX_MOMENT.num_bytes == 4 * (3 + 2)
    assert SecondMoment(torch.Size([7])).num_bytes == 4 * 7
    assert MeanGradient(torch.Size([128, 3])).num_bytes == 128 * 3 // 2 + 3 * 2  # and a bf16 scale for 128 of them


def test_merged_by_tokens() -> None:
    encode = MATRIX_MOMENT.encode
    fourth = MATRIX_MOMENT.merge([(1, encode(MATRIX)), (3, encode(torch.zeros(3, 2)))])
    assert fourth["rows"].tolist() == [0.5, 1.0, 0.0]
    one = MATRIX_MOMENT.merge([(5, encode(MATRIX)), (2, encode(MATRIX))])
    assert torch.equal(MATRIX_MOMENT.decode(one), MATRIX)


def test_mean_gradients_travel_in_four_bits() -> None:
    moment, gradient = MeanGradient(torch.Size([2, 4])), torch.arange(-7.0, 1.0).view(2, 4)  # 15 levels, -7 to 7
    assert torch.equal(moment.decode(moment.encode(gradient)), gradient)
    merged = moment.merge([(1, moment.encode(gradient)), (3, moment.encode(gradient * 5))])
    assert torch.equal(moment.decode(merged), gradient * 4)
    robust = moment.merge([(1, moment.encode(gradient * size)) for size in (1.0, 2.0, 1e30)], robust=True)
    assert torch.equal(moment.decode(robust), gradient * 2)


def test_a_liar_does_not_move_the_robust_merge() -> None:
    moment = SecondMoment(torch.Size([2, 2]))
    honest = moment.encode(torch.ones(2, 2))
    found = [(1, honest), (1, honest), (10**9, moment.encode(torch.full((2, 2), 1e30)))]
    assert moment.merge(found, robust=True)["rows"].tolist() == [1.0, 1.0]
    assert moment.merge(found)["rows"][0] > 1e29


def importance_mean(weighted: Iterable[tuple[int, Tensor, Tensor]], shape: torch.Size) -> Tensor:
    mean, total = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for weight, value, says in weighted:
        add_to_importance_mean(mean, total, value, says, weight)
    return mean


def test_a_silo_that_alone_has_a_say_is_not_divided_by_all() -> None:
    says, silent = importance(torch.tensor([4.0, 1.0])), importance(torch.tensor([0.0, 1.0]))
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
    save_tensors({"a": {"values": torch.ones(2)}}, file, moments={"w": ROW_MOMENT.encode(MATRIX.T)})
    found = Tensors(file)
    assert found.names == ["a"]
    assert torch.equal(ROW_MOMENT.decode(found.moments["w"]), MATRIX.T)
    assert list(found.moments) == ["w"]


AGREED = {"w": MATRIX_MOMENT}
ENCODED, GRADIENT = MATRIX_MOMENT.encode(MATRIX), MeanGradient(torch.Size([3, 2])).encode(MATRIX)
REFUSED: dict[str, tuple[dict[str, Parts], str]] = {
    "missing": ({}, "it holds moments of other tensors than are agreed"),
    "unknown": ({"w": ENCODED, "x": ENCODED}, "it holds moments of other tensors"),
    "another shape": ({"w": ROW_MOMENT.encode(MATRIX.T)}, "moment of w: {'columns': 'torch.float32 [3]'"),
    "another type": ({"w": MATRIX_MOMENT.encode(MATRIX.double())}, "moment of w: {'columns': 'torch.float64 [2]'"),
    "NaN": ({"w": MATRIX_MOMENT.encode(MATRIX * torch.nan)}, "moment of w: infinite, NaN or negative given"),
    "negative": (
        {"w": MATRIX_MOMENT.encode(-MATRIX)},
        "moment of w: infinite, NaN or negative given; allowed: finite, 0 or",
    ),
    "a mean gradient": ({"w": GRADIENT}, "moment of w: {'codes'"),
}


@pytest.mark.parametrize(("found", "message"), REFUSED.values(), ids=REFUSED)
def test_what_another_party_must_not_send(found: dict[str, Parts], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_moments(found, AGREED)
    check_moments({"w": ENCODED}, AGREED)


def test_lengths_are_those_of_the_gradients() -> None:
    assert MATRIX_MOMENT.length(MATRIX_MOMENT.encode(MATRIX)) == pytest.approx(12**0.5)  # the sum of all values
    lying = {"rows": torch.zeros(3), "columns": torch.tensor([0.0, 12.0])}
    assert MATRIX_MOMENT.length(lying) == pytest.approx(36**0.5)  # by what says more
    gradient = MeanGradient(torch.Size([2]))
    assert gradient.length(gradient.encode(torch.tensor([3.0, -7.0]))) == pytest.approx(58**0.5)


def test_no_silo_says_much_more_than_the_median_one() -> None:
    second, mean = SecondMoment(torch.Size([2])), MeanGradient(torch.Size([2]))
    usual, far = second.encode(torch.tensor([1.0, 2.0])), second.encode(torch.tensor([1e30, 0.0]))
    pull, push = mean.encode(torch.tensor([7.0, -7.0])), mean.encode(torch.tensor([7e6, 7e6]))
    told = [{"v": usual, "g": pull}, {"v": far, "g": push}, {"v": usual, "g": pull}]
    found = bounded(told, {"v": second, "g": mean})
    for honest in (0, 2):
        assert found[honest]["v"] is usual  # to the last bit
        assert found[honest]["g"] is pull
    assert second.decode(found[1]["v"]).tolist() == pytest.approx([16 * 3.0, 0.0])  # 4 x as long, 16 x the sum
    assert mean.decode(found[1]["g"]).tolist() == pytest.approx([4 * 7.0, 4 * 7.0])
    merged = second.merge([(1, one["v"]) for one in found])
    assert merged["values"].tolist() == pytest.approx([(1 + 48 + 1) / 3, 4 / 3])


def test_where_most_say_nothing_the_one_that_does_is_heard() -> None:
    moment = SecondMoment(torch.Size([2]))
    silent, heard = moment.encode(torch.zeros(2)), moment.encode(torch.ones(2))
    assert bounded([{"v": silent}, {"v": heard}], {"v": moment})[1]["v"] is heard


def test_longer_gradients_than_all_clip_to_are_refused() -> None:
    agreed = {
        "a": SecondMoment(torch.Size([4])),
        "b": SecondMoment(torch.Size([4, 3])),
        "g": MeanGradient(torch.Size([4])),
    }

    def told(second: float, mean: float) -> dict[str, Parts]:
        sizes = {"a": second, "b": second, "g": mean}
        return {name: moment.encode(torch.full(moment.shape, sizes[name])) for name, moment in agreed.items()}

    check_lengths(told(0.99, 0.0), agreed, clip_norm=1.0)  # 16 values of 0.99: a length of 3.98
    for second, mean, line in (
        (1.01, 0.0, "second moments of gradients of norm 4.02 given; allowed: 4 x inner.clip_norm=1"),
        (1e30, 0.0, "second moments of gradients of norm 4e+15 given; allowed: 4 x inner.clip_norm=1"),
        (0.0, 1e6, "mean gradients of norm 2.007e+06 given; allowed: 4 x inner.clip_norm=1"),
    ):
        with pytest.raises(ValueError, match=re.escape(line)):
            check_lengths(told(second, mean), agreed, clip_norm=1.0)
        check_lengths(told(second, mean), agreed, clip_norm=0.0)  # nothing is clipped, so nothing is too long


def test_rows_and_columns_that_multiply_to_infinity_are_refused() -> None:
    lying = {"rows": torch.tensor([3e38, 0.0, 0.0]), "columns": torch.tensor([3e38, 3e38])}
    with pytest.raises(ValueError, match="product is infinite"):
        check_moments({"w": lying}, {"w": MATRIX_MOMENT})
