"""Pseudo-gradients as whole numbers: golden ones, the range, and that a sum never wraps."""

import math

import numpy as np
import pytest
import torch

from pretrain.outer.fixed_point import OutOfRangeError, code, scale


def test_values_by_hand() -> None:
    base = torch.tensor([[1.0, 0.5], [0.0, 0.0]])
    value = torch.tensor([[0.0, 0.75], [1.5, -0.875]])  # differences 1, -0.25, -1.5, 0.875
    [found] = code([(base, value)], 4.0, 2.0)
    assert found.dtype == np.int32
    assert found.tolist() == [4, -1, -6, 4]  # 3.5 lies between 3 and 4; 4 is even
    [weighted] = code([(base, value)], 4.0 * 100 / 400, 2.0)  # a quarter of the largest weight
    assert weighted.tolist() == [1, 0, -2, 1]  # -1.5 to even


def test_without_a_value_it_is_the_base_and_64_bits_hold_more() -> None:
    [found] = code([(torch.tensor([3.0, -0.5]), None)], 2.0**40, 4.0, dtype=np.int64)
    assert found.dtype == np.int64
    assert found.tolist() == [3 * 2**40, -(2**39)]
    assert scale(4, 1.0, 64) == 2.0**60
    assert scale(4, 1.0) == 2.0**28


@pytest.mark.parametrize("num_silos", [1, 2, 3, 4, 7, 10, 64])
@pytest.mark.parametrize("largest", [1e-6, 0.1, 1.0, 3.7, 1e4])
def test_the_scale_is_a_power_of_two_with_which_no_sum_wraps(num_silos: int, largest: float) -> None:
    found = scale(num_silos, largest)
    assert math.frexp(found)[0] == 0.5
    [highest] = code([(torch.full([3], largest), torch.zeros(3))], found, math.inf)
    [lowest] = code([(torch.zeros(3), torch.full([3], largest))], found, math.inf)
    total = sum([highest.astype(np.int64)] * num_silos)
    assert 2**29 <= total.max() < 2**31
    assert (sum([lowest.astype(np.int64)] * num_silos) >= -(2**31)).all()
    assert np.array_equal(sum([highest.view(np.uint32)] * num_silos).view(np.int32), total)


@pytest.mark.parametrize("bad", [1.001, -1.001, math.inf, -math.inf, math.nan])
def test_what_is_not_in_the_range_is_refused_with_its_tensor(bad: float) -> None:
    good, value = torch.zeros(5), torch.zeros(200_000)
    value[150_000] = bad
    with pytest.raises(OutOfRangeError) as caught:
        code([(good, good), (torch.zeros(200_000), value)], 1024.0, 1.0, num_threads=2)
    number, peak = caught.value.args
    assert number == 1
    assert peak == pytest.approx(abs(bad), nan_ok=True, rel=1e-6)


def test_bits_do_not_depend_on_threads_and_differ_little_from_the_values() -> None:
    generator = torch.Generator().manual_seed(1)
    base, value = (torch.randn(3_000_001, generator=generator) for _ in range(2))
    one, two = (code([(base, value)], scale(4, 16.0), 16.0, num_threads)[0] for num_threads in (1, 3))
    assert np.array_equal(one, two)
    exact = (base.double() - value.double()).numpy()
    assert np.abs(one / scale(4, 16.0) - exact).max() <= 0.5 / scale(4, 16.0)
