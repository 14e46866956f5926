"""What silos tell each other of Adam's second moments: the means of rows and columns, which an outer product puts
together again (Adafactor, https://arxiv.org/abs/1804.04235).

Silos whose text differs scale the same gradient differently: a word that one of them alone knows moves there by whole
steps, and the mean of all silos by a part of one. Where all divide by the same second moments, the mean of the silos'
changes is the change that the mean of their gradients makes. Means of rows and columns are 4 (rows + columns) bytes of
a matrix, where its parameters in 4 bits are half a byte for each of rows x columns.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pretrain.outer.merge import weighted_mean
from pretrain.outer.quantize import Parts
from pretrain.outer.robust import coordinate_median

SECOND_MOMENT = "second_moment"  # the kind in a payload
LEAST_IMPORTANCE = 1e-8  # Adam's epsilon: what no silo has met is merged by tokens alone


def layout(shape: torch.Size) -> dict[str, tuple[int, ...]]:
    """Parts of a tensor's factors, fp32, and their shapes: of a matrix its rows and columns, else every value."""
    return {"columns": (shape[1],), "rows": (shape[0],)} if len(shape) == 2 else {"values": tuple(shape)}


def factor_bytes(shapes: Mapping[str, torch.Size]) -> int:
    """What the factors of these tensors weigh."""
    return sum(4 * math.prod(size) for shape in shapes.values() for size in layout(shape).values())


def factor(second_moment: Tensor) -> Parts:
    """The factors of one tensor's second moment: means over each row and each column of a matrix, else itself."""
    if second_moment.ndim != 2:
        return {"values": second_moment.contiguous()}
    return {"columns": second_moment.mean(0), "rows": second_moment.mean(1)}


def unfactor(parts: Parts) -> Tensor:
    """The second moment, fp32, that the factors stand for: rows x columns / their common mean."""
    if "values" in parts:
        return parts["values"]
    rows, columns = parts["rows"], parts["columns"]
    mean = rows.mean()
    return torch.outer(rows, columns / mean) if mean > 0 else torch.zeros(len(rows), len(columns))


def importance(parts: Parts) -> Tensor:
    """How much a silo's text has to say of each element, float64: the root of its second moment, and never 0."""
    return unfactor(parts).double().sqrt_().add_(LEAST_IMPORTANCE)


def merge_factors(weighted: Sequence[tuple[int, Parts]], shape: torch.Size, *, robust: bool = False) -> Parts:
    """The silos' factors of one tensor of `shape`, each with its weight, to their weighted means, or medians."""
    merged = {}
    for part, size in layout(shape).items():
        values = [(weight, parts[part].double()) for weight, parts in weighted]
        if robust:
            merged[part] = coordinate_median(torch.stack([value for _, value in values])).float()
        else:
            merged[part] = weighted_mean(values, torch.Size(size))[0].float()
    return merged


def check_factors(found: Mapping[str, Parts], shapes: Mapping[str, torch.Size]) -> None:
    """Raise ValueError, in one line, unless another party's factors are those of these tensors, finite, 0 or more."""
    if set(found) != set(shapes):
        raise ValueError("it holds the second moments of other tensors than are agreed")
    for name, shape in shapes.items():
        given = {part: f"{value.dtype} {list(value.shape)}" for part, value in sorted(found[name].items())}
        expected = {part: f"{torch.float32} {list(size)}" for part, size in layout(shape).items()}
        if given != expected:
            raise ValueError(f"second moment of {name}: {given} given; allowed: {expected}")
        if not all(value.isfinite().all() and (value >= 0).all() for value in found[name].values()):
            raise ValueError(f"second moment of {name}: infinite, NaN or negative given; allowed: finite, 0 or more")
