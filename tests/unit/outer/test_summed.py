"""Moments as whole numbers: golden ones, bounds, sums that never wrap, and how little is lost."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.outer.fixed_point import OutOfRangeError, scale
from pretrain.outer.moments import LONGEST, MeanGradient, Moment, SecondMoment
from pretrain.outer.quantize import Parts
from pretrain.outer.summed import ROUNDING, SummedMoment, in_stream

MATRIX = torch.Size([3, 2])


def summed(moment: Moment, clip_norm: float = 1.0, num_silos: int = 4) -> SummedMoment:
    return SummedMoment(moment=moment, clip_norm=clip_norm, num_silos=num_silos)


def added(of_silos: list[Parts]) -> Parts:
    """The plain sum."""
    return {
        part: torch.stack([parts[part] for parts in of_silos]).sum(0, dtype=t.dtype) for part, t in of_silos[0].items()
    }


def test_second_moments_by_hand() -> None:
    moment = summed(SecondMoment(MATRIX), num_silos=4)
    assert moment.layout == {"columns": (torch.int64, (2,)), "rows": (torch.int64, (3,))}
    assert moment.num_bytes == 8 * (2 + 3)
    # All of a matrix's squares in one row make a mean of 16 / 2 there, in one column of 16 / 3.
    assert (moment.largest("rows"), moment.largest("columns")) == (8.0, 16 / 3)
    value = torch.tensor([[1.0, 3.0], [2.0, 6.0], [0.0, 0.0]])  # rows 2, 4, 0; columns 1, 3
    parts = moment.whole(moment.moment.encode(value), 0.5)
    # 4 silos x 8 x 2^57 is 2^62, twice that would be 2^63.
    assert parts["rows"].tolist() == [2 * 2**56, 4 * 2**56, 0]
    assert parts["columns"].tolist() == [1 * 2**57, 3 * 2**57]
    assert moment.values(parts, 0.5)["rows"].tolist() == [2.0, 4.0, 0.0]


def test_mean_gradients_by_hand() -> None:
    moment = summed(MeanGradient(MATRIX), num_silos=4)
    assert moment.layout == {"values": (torch.int32, (3, 2))}
    assert moment.largest("values") == 1.25
    levels = torch.tensor([[7.0, -7.0], [1.0, -1.0], [3.0, 0.0]])  # int4 has -7 to 7
    whole = moment.whole(moment.moment.encode(levels * 2.0**-28), 1.0)  # 4 x 1.25 x 2^28 < 2^31
    assert whole["values"].tolist() == levels.tolist()
    assert torch.equal(moment.decode(moment.values(whole, 1.0)), levels * 2.0**-28)
    halves = moment.whole(moment.moment.encode(levels * 2.0**-28), 0.5)
    assert halves["values"].tolist() == [[4, -4], [0, 0], [2, 0]]  # 3.5, 0.5 and 1.5, to even


@pytest.mark.parametrize("num_silos", [3, 4, 7, 100])
@pytest.mark.parametrize("clip_norm", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("of", [SecondMoment(torch.Size([5])), SecondMoment(MATRIX), MeanGradient(MATRIX)], ids=str)
def test_no_sum_of_the_largest_wraps(of: Moment, clip_norm: float, num_silos: int) -> None:
    moment = summed(of, clip_norm, num_silos)
    for part, (dtype, size) in moment.layout.items():
        most = torch.full(size, 0.99 * moment.largest(part))  # int4 rounds its scale, too
        [whole] = moment.whole({part: most} if isinstance(of, SecondMoment) else of.encode(most), 1.0).values()
        exact = num_silos * int(whole.flatten()[0])
        assert 2 ** (8 * dtype.itemsize - 3) <= exact < 2 ** (8 * dtype.itemsize - 1)
        total = added([{part: whole}] * num_silos)
        assert int(total[part].flatten()[0]) == exact
        moment.merged(total, num_silos)


def random_moments(of: Moment, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(of.shape, generator=generator) / math.sqrt(of.shape.numel())
    return value.square() if isinstance(of, SecondMoment) else value / 10


@pytest.mark.parametrize(
    "of",
    [SecondMoment(torch.Size([300])), SecondMoment(torch.Size([300, 70])), MeanGradient(torch.Size([300, 70]))],
    ids=str,
)
def test_what_is_made_of_a_sum_is_the_weighted_mean(of: Moment) -> None:
    moment, shares = summed(of), [1.0, 0.25, 0.01]
    told = [of.encode(random_moments(of, seed)) for seed in range(3)]
    total = added([moment.whole(parts, share) for parts, share in zip(told, shares, strict=True)])
    found = moment.merged(total, sum(shares))
    of.check(found)
    if isinstance(of, SecondMoment):
        for part, value in of.merge(
            [(int(100 * share), parts) for share, parts in zip(shares, told, strict=True)]
        ).items():
            torch.testing.assert_close(found[part], value, rtol=1e-6, atol=0.0)
        return
    mean = sum(of.decode(parts).double() * share for share, parts in zip(shares, told, strict=True)) / sum(shares)
    most = len(told) * 0.5 / (scale(4, 1.25) * sum(shares))
    assert (moment.decode(moment.values(total, sum(shares))) - mean).abs().max() <= 1.01 * most
    assert all(
        torch.equal(found[part], value)
        for part, value in of.encode(moment.values(total, sum(shares))["values"]).items()
    )


def test_a_rare_words_row_survives_beside_frequent_ones() -> None:
    """A billionth of a frequent word's, and that a thousandth of the bound; 32 bits would leave nothing of it."""
    moment = summed(SecondMoment(torch.Size([50_000, 64])), num_silos=10)
    rows = torch.full([50_000], 1e-3 * moment.largest("rows"))
    rows[7] *= 1e-9
    found = moment.values(moment.whole({"rows": rows}, 1 / 16), 1 / 16)["rows"]
    torch.testing.assert_close(found, rows, rtol=1e-5, atol=0.0)
    assert round(float(rows[7]) * scale(10, moment.largest("rows")) / 16) == 0


@pytest.mark.parametrize("bad", [1.001, math.inf, -math.inf, math.nan])
def test_what_is_beyond_its_bound_is_refused_with_its_part(bad: float) -> None:
    moment = summed(SecondMoment(MATRIX))
    parts = {part: torch.zeros(size) for part, (_, size) in moment.layout.items()}
    parts["rows"][1] = bad * moment.largest("rows")
    with pytest.raises(OutOfRangeError) as caught:
        moment.whole(parts, 1.0)
    assert caught.value.args[0] == "rows"
    assert caught.value.args[1] == pytest.approx(abs(bad) * moment.largest("rows"), nan_ok=True, rel=1e-6)


def test_a_mean_gradient_beyond_its_bound_is_refused() -> None:
    moment = summed(MeanGradient(MATRIX))
    with pytest.raises(OutOfRangeError) as caught:
        moment.whole(moment.moment.encode(torch.full(MATRIX, -1.3)), 1.0)
    assert caught.value.args[0] == "values"
    assert caught.value.args[1] == pytest.approx(1.3, rel=0.01)


def test_bounds_follow_what_gradients_are_clipped_to() -> None:
    assert summed(MeanGradient(MATRIX), 0.5).largest("values") == 0.5 * ROUNDING
    assert summed(SecondMoment(torch.Size([7])), 0.5).largest("values") == (0.5 * LONGEST) ** 2


def test_a_sum_that_none_can_be_is_refused() -> None:
    second, mean = summed(SecondMoment(MATRIX)), summed(MeanGradient(MATRIX))
    parts = second.whole(second.moment.encode(torch.rand(MATRIX)), 1.0)
    with pytest.raises(ValueError, match=r"its rows add up to -1 to .*, where .* is the most there can be"):
        second.merged(parts | {"rows": torch.tensor([5, -1, 5])}, 1.0)
    share = 0.1  # of one silo, where the sum has room for more
    whole = mean.whole(mean.moment.encode(torch.full(MATRIX, 1.24)), share)
    mean.merged(whole, share)
    with pytest.raises(ValueError, match="its values add up to"):
        mean.merged({"values": -2 * whole["values"]}, share)


def test_another_layout_is_refused() -> None:
    moment = summed(MeanGradient(MATRIX))
    moment.check({"values": torch.zeros(MATRIX, dtype=torch.int32)})
    for parts in ({}, {"values": torch.zeros(MATRIX)}, {"values": torch.zeros(6, dtype=torch.int32)}):
        with pytest.raises(ValueError, match="given; allowed: "):
            moment.check(parts)


def test_in_a_stream_moments_come_first_by_name_and_part() -> None:
    second = {"rows": torch.tensor([1, 2]), "columns": torch.tensor([-1])}
    values = {
        "b": {"values": torch.tensor([[3]], dtype=torch.int32)},
        "a": {"values": torch.tensor([4], dtype=torch.int32)},
    }
    found = in_stream({"z": second}, values)
    assert [(one.dtype.name, one.tolist()) for one in found] == [
        ("uint64", [2**64 - 1]),
        ("uint64", [1, 2]),
        ("uint32", [4]),
        ("uint32", [3]),
    ]
    found[1] += np.uint64(5)
    assert second["rows"].tolist() == [6, 7]  # the same memory
