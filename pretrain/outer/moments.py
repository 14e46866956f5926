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

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.outer.merge import weighted_mean
from pretrain.outer.quantize import QUANTIZERS, Parts, check_parts, decode
from pretrain.outer.robust import coordinate_median

MOMENT = "moment"  # the kind in a payload
LEAST_IMPORTANCE = 1e-8  # Adam's epsilon: what no silo has met is merged by tokens alone
GRADIENT = QUANTIZERS["int4"]

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

    def decode(self, parts: Parts) -> Tensor:
        """Rows x columns / their common mean."""
        if "values" in parts:
            return parts["values"]
        rows, columns = parts["rows"], parts["columns"]
        mean = rows.mean()
        return torch.outer(rows, columns / mean) if mean > 0 else torch.zeros(self.shape)

    def check(self, parts: Parts) -> None:
        """Values are finite, 0 or more."""
        given = {part: f"{value.dtype} {list(value.shape)}" for part, value in sorted(parts.items())}
        expected = {part: f"{dtype} {list(size)}" for part, (dtype, size) in self.layout.items()}
        if given != expected:
            raise ValueError(f"{given} given; allowed: {expected}")
        if not all(value.isfinite().all() and (value >= 0).all() for value in parts.values()):
            raise ValueError("infinite, NaN or negative given; allowed: finite, 0 or more")

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

    def merge(self, weighted: Sequence[tuple[int, Parts]], *, robust: bool = False) -> Parts:
        """Decoded, merged, and coded again."""
        decoded = [(weight, self.decode(parts)) for weight, parts in weighted]
        return self.encode(_merge(decoded, self.shape, robust=robust))


def _merge(weighted: Sequence[tuple[int, Tensor]], shape: torch.Size, *, robust: bool) -> Tensor:
    values = [(weight, value.double()) for weight, value in weighted]
    if robust:
        return coordinate_median(torch.stack([value for _, value in values])).float()
    return weighted_mean(values, shape)[0].float()


def importance(second_moment: Tensor) -> Tensor:
    """How much a silo's text has to say of each element, float64: the root of its second moment, and never 0."""
    return second_moment.double().sqrt_().add_(LEAST_IMPORTANCE)


def check_moments(found: Mapping[str, Parts], agreed: Mapping[str, Moment]) -> None:
    """Raise ValueError, in one line, unless another party's moments are those of the agreed tensors."""
    if set(found) != set(agreed):
        raise ValueError("it holds moments of other tensors than are agreed")
    for name, moment in agreed.items():
        try:
            moment.check(found[name])
        except ValueError as error:
            raise ValueError(f"moment of {name}: {error}") from None
