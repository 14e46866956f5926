"""Values as whole numbers that can be added modulo 2^32, or 2^64: the scale that all know, coding, and the range."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pretrain.outer.plain import array
from pretrain.outer.threads import in_threads

Whole = NDArray[np.signedinteger[Any]]
BLOCK_ELEMENTS, RANGE_ELEMENTS = 1 << 16, 1 << 20  # what lies in the cache; what a thread takes at a time


class OutOfRangeError(ValueError):
    """A tensor, whose number is given, has a value that is not in the range; then comes the largest magnitude."""


def scale(num_silos: int, largest: float, bits: int = 32) -> float:
    """Of one silo's values: the largest power of two with which the sum of so many silos' stays below 2^(bits - 1).

    `largest` is the largest magnitude that a value may have. Each silo's are rounded, by a half at most.
    """
    found = math.ldexp(1.0, bits - math.frexp(largest)[1])
    while num_silos * (largest * found + 0.5) >= 2 ** (bits - 1):
        found /= 2
    return found


def code(
    pairs: Sequence[tuple[Tensor, Tensor | None]],
    factor: float,
    largest: float,
    num_threads: int = 1,
    *,
    dtype: type[np.int32] | type[np.int64] = np.int32,
) -> list[Whole]:
    """Of each base and value, fp32 of one shape, `(base - value) * factor` rounded to the nearest whole number, flat;
    where there is no value, of the base itself.

    The difference and the product are float64, each rounded by itself: the same bits on every machine. Raises
    OutOfRangeError for a difference above `largest`, infinite or NaN.
    """
    works = [(array(base.contiguous()), None if value is None else array(value.contiguous())) for base, value in pairs]
    found: list[Whole] = [np.empty(len(base), dtype) for base, _ in works]

    def of_range(task: tuple[int, int]) -> None:
        number, start = task
        (base, value), stop = works[number], min(start + RANGE_ELEMENTS, len(found[number]))
        scratch = np.empty(BLOCK_ELEMENTS)
        for first in range(start, stop, BLOCK_ELEMENTS):
            last = min(first + BLOCK_ELEMENTS, stop)
            difference = scratch[: last - first]
            with np.errstate(invalid="ignore"):  # infinite minus infinite, which is refused
                subtracted = 0.0 if value is None else value[first:last]
                np.subtract(base[first:last], subtracted, out=difference, dtype=np.float64)
            peak = max(abs(difference.min()), abs(difference.max()))  # NaN if there is one
            if not peak <= largest:
                raise OutOfRangeError(number, float(peak))
            difference *= factor
            found[number][first:last] = np.rint(difference, out=difference)

    tasks = [(number, start) for number, one in enumerate(found) for start in range(0, len(one), RANGE_ELEMENTS)]
    in_threads(of_range, tasks, num_threads)
    return found
