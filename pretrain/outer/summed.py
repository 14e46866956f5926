"""Moments in a secure sum: whole numbers in a scale that follows from what gradients are clipped to, `inner.clip_norm`.

A sum takes one scale for all silos, which all know before, and moments of tensors, rows and silos differ by many powers
of ten. What bounds them all is in the contract: no gradient is longer than `inner.clip_norm` = c, so that no mean of
some has an element above c, and the mean over a row of a second moment is at most c^2 / its length; there is room for
as much as a plain merge takes (`LONGEST`). Then no scale has to be carried from one version to the next: the first has
what all others have, whoever comes, goes on or checks a version needs nothing else, nothing is saturated, and a value
beyond its bound is a mistake and is refused.

Second moments take 64 bits for it. In 32, one range for a tensor's rows leaves a rare word's row, 10^-6 of a frequent
one's, a few steps of rounding or none; a range for each row from the version before would be left whenever a word
comes back. They are rows and columns, and small. With 64 bits and four silos a step is 10^-17 of c^2, where Adam's
epsilon of 1e-8 stands for 1e-16.

Mean gradients are as large as their matrices and have 32 bits: with four silos a step is c / 2^28. Of a billion
parameters whose gradients have norm c the usual one is 3e-5 c, and their mean over a round a tenth of that, of which
the step is a thousandth. They are in int4 before, as they travel elsewhere, which leaves a tenth: so they are copied
from the device in eight times fewer bytes while training stands still, and what is merged is the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.outer.fixed_point import OutOfRangeError, code, scale
from pretrain.outer.moments import LONGEST, Layout, Moment, SecondMoment
from pretrain.outer.plain import array
from pretrain.outer.quantize import Parts

Unsigned = NDArray[np.unsignedinteger[Any]]

ROUNDING = 1.25  # times inner.clip_norm: room for an element of a mean gradient, some of it for rounding


@dataclass(frozen=True, kw_only=True)
class SummedMoment:
    """What travels of one tensor's gradients to a secure sum of so many silos, and what is made of the sum."""

    moment: Moment
    clip_norm: float
    num_silos: int
    """Of the roster, whoever has a part in the sum."""

    @property
    def _is_second(self) -> bool:
        return isinstance(self.moment, SecondMoment)

    @property
    def layout(self) -> Layout:
        """Parts, their dtypes and their shapes."""
        if self._is_second:
            return {part: (torch.int64, size) for part, (_, size) in self.moment.layout.items()}
        return {"values": (torch.int32, tuple(self.moment.shape))}

    @property
    def num_bytes(self) -> int:
        """What all parts weigh."""
        return sum(dtype.itemsize * torch.Size(size).numel() for dtype, size in self.layout.values())

    def largest(self, part: str) -> float:
        """The largest magnitude of a value for which the sum has room."""
        if not self._is_second:
            return ROUNDING * self.clip_norm
        num_values = torch.Size(self.layout[part][1]).numel()
        return (LONGEST * self.clip_norm) ** 2 * num_values / self.moment.shape.numel()

    def _scale(self, part: str) -> float:
        return scale(self.num_silos, self.largest(part), 8 * self.layout[part][0].itemsize)

    def whole(self, parts: Parts, share: float, num_threads: int = 1) -> Parts:
        """A moment, as it is told elsewhere, in whole numbers; a silo's weight is `share` of the largest there can be.

        Raises OutOfRangeError with a part and its largest magnitude.
        """
        told = parts if self._is_second else {"values": self.moment.decode(parts)}
        return {part: self._whole(part, value, share, num_threads) for part, value in sorted(told.items())}

    def _whole(self, part: str, value: Tensor, share: float, num_threads: int) -> Tensor:
        (dtype, size), largest = self.layout[part], self.largest(part)
        kind = np.int64 if dtype == torch.int64 else np.int32
        try:
            [found] = code([(value, None)], self._scale(part) * share, largest, num_threads, dtype=kind)
        except OutOfRangeError as error:
            raise OutOfRangeError(part, error.args[1]) from None
        return torch.from_numpy(found).view(size)

    def values(self, parts: Parts, share: float) -> Parts:
        """What whole numbers stand for, fp32: of one silo by its share, or the mean of all by the sum of theirs."""
        return {part: (value.double() * (1 / (self._scale(part) * share))).float() for part, value in parts.items()}

    def decode(self, parts: Parts) -> Tensor:
        """The moment, fp32, whose `values` these are."""
        return self.moment.decode(parts) if self._is_second else parts["values"]

    def merged(self, total: Parts, share: float) -> Parts:
        """What all silos are told of a sum. Raises ValueError, in one line, for what no sum of such values is."""
        for part, value in total.items():
            most = self.largest(part) * self._scale(part) * share * (1 + 2**-40) + self.num_silos / 2
            low, high = (extreme.item() for extreme in value.aminmax())
            if high > most or low < (0 if self._is_second else -most):
                raise ValueError(f"its {part} add up to {low} to {high}, where {most:.0f} is the most there can be")
        mean = self.values(total, share)
        return mean if self._is_second else self.moment.encode(mean["values"])

    def check(self, parts: Parts) -> None:
        """Raise ValueError, in one line, unless another party's parts are of this layout: no more of them is known."""
        given = {part: f"{value.dtype} {list(value.shape)}" for part, value in sorted(parts.items())}
        expected = {part: f"{dtype} {list(size)}" for part, (dtype, size) in sorted(self.layout.items())}
        if given != expected:
            raise ValueError(f"{given} given; allowed: {expected}")


def in_stream(moments: Mapping[str, Parts], values: Mapping[str, Parts]) -> list[Unsigned]:
    """A delivery's whole numbers in the order in which masks are added, flat, without signs, in the same memory.

    Moments come first, by name and part, so that a silo can take the masks off its own without making all the others.
    """
    ordered = [parts[part] for of in (moments, values) for _, parts in sorted(of.items()) for part in sorted(parts)]
    return [array(value).view(np.uint64 if value.dtype == torch.int64 else np.uint32) for value in ordered]
