"""What silos tell each other of their gradients, beside parameters: one moment of each tensor.

Of what AdamW trains it is the second moment, as means of rows and columns, which an outer product puts together again
(Adafactor, https://arxiv.org/abs/1804.04235). Silos whose text differs scale the same gradient differently: a word that
one of them alone knows moves there by whole steps, and the mean of all silos by a part of one. Where all divide by the
same second moments, the mean of the silos' changes is the change that the mean of their gradients makes. Means of rows
and columns are 4 (rows + columns) bytes of a matrix, where its parameters in 4 bits are half a byte for each of rows x
columns.

Of Muon's matrices it is the mean gradient of the last round, in int4. A silo adds a share of (all silos' mean - its
own) to each of its gradients until the next sync: what its text alone pulls at is taken back, and what the others'
pulls at is added (control variates, SCAFFOLD, https://arxiv.org/abs/1910.06378).
"""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pretrain.outer.blocks import mean_of, squared_norms
from pretrain.outer.merge import weighted_mean
from pretrain.outer.quantize import QUANTIZERS, Parts, check_parts, decode
from pretrain.outer.robust import coordinate_median

MOMENT = "moment"  # the kind in a payload
GRADIENT = QUANTIZERS["int4"]
FURTHEST = 4.0  # a silo's moment of a tensor counts up to this many times the length of the median silo's
LONGEST = 4.0  # of all a silo's moments, in lengths to which gradients are clipped: honest ones have up to 1

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Moment(ABC):
    """What travels of one tensor's gradients."""

    shape: torch.Size
    """Of the tensor."""

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Parts, their dtypes and their shapes."""

    @abstractmethod
    def encode(self, value: Tensor) -> Parts:
        """What travels of an fp32 moment, on its device. Raises ValueError for a mean gradient that is not finite."""

    @abstractmethod
    def decode(self, parts: Parts) -> Tensor:
        """The moment, fp32, that the parts stand for."""

    @abstractmethod
    def check(self, parts: Parts) -> None:
        """Raise ValueError, in one line, unless another party's parts are of this layout and their values possible."""

    @abstractmethod
    def length(self, parts: Parts) -> float:
        """How long the gradients behind it are: the root of a second moment's sum, the norm of a mean gradient."""

    @abstractmethod
    def scaled(self, parts: Parts, factor: float) -> Parts:
        """The moment of gradients `factor` times as long."""

    @abstractmethod
    def merge(self, weighted: Sequence[tuple[int, Parts]], *, robust: bool = False) -> Parts:
        """The silos' parts, each with its weight, to those of their weighted mean, or median."""

    @property
    def num_bytes(self) -> int:
        """What all parts weigh."""
        return sum(dtype.itemsize * torch.Size(size).numel() for dtype, size in self.layout.values())


class SecondMoment(Moment):
    """Adam's second moment: of a matrix means of its rows and columns, else every value."""

    @property
    def layout(self) -> Layout:
        """fp32 all of them."""
        if len(self.shape) == 2:
            return {"columns": (torch.float32, (self.shape[1],)), "rows": (torch.float32, (self.shape[0],))}
        return {"values": (torch.float32, tuple(self.shape))}

    def encode(self, value: Tensor) -> Parts:
        """Means over each row and each column of a matrix, else itself."""
        if value.ndim != 2:
            return {"values": value.contiguous()}
        return {"columns": value.mean(0), "rows": value.mean(1)}

    def factors(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """What of each row and of each column multiplies to an element, row by row; of no matrix, one column."""
        if "values" in parts:
            return parts["values"].view(-1), torch.ones(1)
        rows, columns = parts["rows"], parts["columns"]
        mean = rows.mean()
        return rows, columns / mean if mean > 0 else torch.zeros_like(columns)

    def decode(self, parts: Parts) -> Tensor:
        """Rows x columns / their common mean."""
        return torch.outer(*self.factors(parts)).view(self.shape)

    def check(self, parts: Parts) -> None:
        """Values are finite, 0 or more."""
        given = {part: f"{value.dtype} {list(value.shape)}" for part, value in sorted(parts.items())}
        expected = {part: f"{dtype} {list(size)}" for part, (dtype, size) in self.layout.items()}
        if given != expected:
            raise ValueError(f"{given} given; allowed: {expected}")
        if not all(value.isfinite().all() and (value >= 0).all() for value in parts.values()):
            raise ValueError("infinite, NaN or negative given; allowed: finite, 0 or more")
        rows, columns = self.factors(parts)
        if not (rows.amax() * columns.amax()).isfinite():
            raise ValueError("rows and columns whose product is infinite given; allowed: a finite one")

    def length(self, parts: Parts) -> float:
        """By the rows, or the columns if these say more: their means should be the same."""
        mean = max(value.double().mean().item() for value in parts.values())
        return math.sqrt(mean * self.shape.numel())

    def scaled(self, parts: Parts, factor: float) -> Parts:
        """Second moments go with the square."""
        return {part: value * factor**2 for part, value in parts.items()}

    def merge(self, weighted: Sequence[tuple[int, Parts]], *, robust: bool = False) -> Parts:
        """Part by part: the mean of means is the mean."""
        return {
            part: _merge([(weight, parts[part]) for weight, parts in weighted], torch.Size(size), robust=robust)
            for part, (_, size) in self.layout.items()
        }


class MeanGradient(Moment):
    """The mean of a tensor's gradients, in int4."""

    @property
    def layout(self) -> Layout:
        """Codes and scales (quantize.py)."""
        parts = GRADIENT.layout(self.shape.numel())
        return {part: (dtype, (length,)) for part, (dtype, length) in sorted(parts.items())}

    def encode(self, value: Tensor) -> Parts:
        """To the nearest of 15 levels in each block."""
        return GRADIENT.encode(value)

    def decode(self, parts: Parts) -> Tensor:
        """Levels times scales."""
        return decode(GRADIENT, parts, self.shape)

    def check(self, parts: Parts) -> None:
        """Sizes come first, then scales."""
        check_parts(GRADIENT, parts, self.shape)

    def length(self, parts: Parts) -> float:
        """Its norm."""
        nothing_read = torch.empty(self.shape)  # int4 stands for differences, whatever they are to
        return math.sqrt(squared_norms(GRADIENT.name, [(parts, nothing_read)])[0])

    def scaled(self, parts: Parts, factor: float) -> Parts:
        """Coded again."""
        return self.encode(self.decode(parts) * factor)

    def merge(self, weighted: Sequence[tuple[int, Parts]], *, robust: bool = False) -> Parts:
        """Decoded, merged, and coded again, block by block."""
        if robust:
            decoded = [(weight, self.decode(parts)) for weight, parts in weighted]
            return self.encode(_merge(decoded, self.shape, robust=True))
        return mean_of(GRADIENT.name, weighted, self.shape)


def _merge(weighted: Sequence[tuple[int, Tensor]], shape: torch.Size, *, robust: bool) -> Tensor:
    values = [(weight, value.double()) for weight, value in weighted]
    if robust:
        return coordinate_median(torch.stack([value for _, value in values])).float()
    return weighted_mean(values, shape)[0].float()


class Checked(Protocol):
    """What another party's parts can be compared with."""

    def check(self, parts: Parts) -> None:
        """Raise ValueError, in one line, unless they are as agreed."""


def check_moments(found: Mapping[str, Parts], agreed: Mapping[str, Checked]) -> None:
    """Raise ValueError, in one line, unless another party's moments are those of the agreed tensors."""
    if set(found) != set(agreed):
        raise ValueError("it holds moments of other tensors than are agreed")
    for name, moment in agreed.items():
        try:
            moment.check(found[name])
        except ValueError as error:
            raise ValueError(f"moment of {name}: {error}") from None


def check_lengths(found: Mapping[str, Parts], agreed: Mapping[str, Moment], *, clip_norm: float) -> None:
    """Raise ValueError, in one line, if a silo's moments tell of longer gradients than clipping to `clip_norm` leaves.

    Of second moments and of mean gradients each: whatever a silo trains on, its gradients are not longer than what all
    have agreed to clip them to. 0 clips, and bounds, nothing.
    """
    for kind in (SecondMoment, MeanGradient) if clip_norm else ():
        lengths = [moment.length(found[name]) for name, moment in agreed.items() if isinstance(moment, kind)]
        if (length := math.hypot(*lengths)) > LONGEST * clip_norm:
            what = "second moments of gradients" if kind is SecondMoment else "mean gradients"
            raise ValueError(f"{what} of norm {length:.4g} given; allowed: {LONGEST:g} x inner.clip_norm={clip_norm:g}")


def bounded(told: Sequence[Mapping[str, Parts]], agreed: Mapping[str, Moment]) -> list[dict[str, Parts]]:
    """The silos' moments, each no longer than `FURTHEST` times that of the median silo (the lower of two).

    So none can drown the others in any merge; what is within the bound stays as it is, to the last bit.
    """
    found: list[dict[str, Parts]] = [{} for _ in told]
    for name, moment in agreed.items():
        of_silos = [one[name] for one in told]
        lengths = [moment.length(parts) for parts in of_silos]
        most = FURTHEST * statistics.median_low(lengths)
        for of_silo, parts, length in zip(found, of_silos, lengths, strict=True):
            of_silo[name] = parts if length <= most or not most else moment.scaled(parts, most / length)
    return found
