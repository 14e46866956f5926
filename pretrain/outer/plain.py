"""The stages of an outer step on one block of elements, by operations of torch: the reference, and a slow one.

fused.py has the same functions, to the last bit, compiled. All arrays are flat and of a whole tensor, or piece of one,
but for the scratch of the block, which is as long as the block: elements `start` to `stop`. Codes, indices and scales
are bytes and 16 bits of a bf16, as numpy has no such type.
"""

import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.outer.codec import SUM32, apply_change, decoded, encode
from pretrain.outer.merge import add_to_importance_mean, add_to_mean, importance
from pretrain.outer.optimizer import OuterOptimizer
from pretrain.outer.quantize import CHUNK, QUANTIZERS, Parts, all_finite, sum_of_pairs

Arrays = dict[str, NDArray]  # of numpy: shares its memory with Parts
Importance = tuple[NDArray, NDArray, int]  # fp32: of each row, of each column, and the first element of the piece


def arrays(parts: Parts) -> Arrays:
    """The same memory for numpy."""
    return {part: array(value) for part, value in parts.items()}


def array(value: Tensor) -> NDArray:
    """A contiguous tensor's memory, flat."""
    flat = value.detach().view(-1)
    return flat.view(torch.int16).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()


def cut(codec: str, of_tensor: Arrays, start: int, stop: int) -> Parts:
    """What of a tensor's parts belongs to some elements; `start` is a multiple of CHUNK."""
    before, until = QUANTIZERS[codec].layout(start), QUANTIZERS[codec].layout(stop)
    return {
        part: torch.from_numpy(of_tensor[part][before[part][1] : length]).view(dtype)
        for part, (dtype, length) in until.items()
    }


def code(
    codec: str,
    base: NDArray,
    value: NDArray,
    residual: NDArray | None,
    decay: float,
    start: int,
    stop: int,
    difference: NDArray,
    parts: Arrays,
) -> None:
    """Code a block of what a silo sends; `difference` becomes `base - value`, and the residual what is left out.

    Of fp32 nothing is written, as the parts are the values themselves. Raises ValueError for what does not travel.
    """
    of_base, of_value = (torch.from_numpy(whole[start:stop]) for whole in (base, value))
    torch.sub(of_base, of_value, out=torch.from_numpy(difference))
    left = None if residual is None else torch.from_numpy(residual[start:stop])
    found = encode(codec, of_base, of_value, residual=left, decay=decay)
    if codec != "fp32":
        _keep(codec, found, start, stop, parts)


def _keep(codec: str, found: Parts, start: int, stop: int, parts: Arrays) -> None:
    """Put a block's parts into the tensor's."""
    for part, value in cut(codec, parts, start, stop).items():
        value.copy_(found[part])


def subtract(codec: str, of_tensor: Arrays, value: NDArray, start: int, stop: int) -> None:
    """Take what a block's codes stand for from its `value`, fp32."""
    QUANTIZERS[codec].decode_add(cut(codec, of_tensor, start, stop), torch.from_numpy(value), -1.0)


def is_valid(codec: str, of_tensor: Arrays, num_elements: int) -> bool:
    """Whether all scales, codes and values of a whole tensor's parts, of the right sizes, are allowed."""
    parts = cut(codec, of_tensor, 0, num_elements)
    return all_finite(parts["values"]) if codec == "fp32" else not QUANTIZERS[codec].check(parts, num_elements)


def decode(codec: str, of_tensor: Arrays, base: NDArray | None, start: int, stop: int, out: NDArray) -> None:
    """A block of a coded difference, float64; codec fp32 needs the base, and sum32 is without its scale."""
    if codec == SUM32:
        out[:] = of_tensor["values"][start:stop]
        return
    of_base = torch.empty(stop - start) if base is None else torch.from_numpy(base[start:stop])
    torch.from_numpy(out).copy_(decoded(codec, of_base, cut(codec, of_tensor, start, stop)))


def add_scaled(value: NDArray, factor: float, total: NDArray) -> None:
    """`total` += `value` times `factor`."""
    torch.from_numpy(total).add_(torch.from_numpy(value) * factor)


def add_mean(value: NDArray, share: float, mean: NDArray) -> None:
    """Move the mean towards a value by its share of all weight so far."""
    add_to_mean(torch.from_numpy(mean), torch.from_numpy(value), share)


def add_importance(value: NDArray, of: Importance, start: int, weight: int, mean: NDArray, total: NDArray) -> None:
    """The same where every element has weights of its own; `total` has their sum so far."""
    rows, columns, first = (torch.from_numpy(of[0]), torch.from_numpy(of[1]), of[2])
    places = torch.arange(first + start, first + start + len(value))
    second_moment = rows[places // len(columns)] * columns[places % len(columns)]
    add_to_importance_mean(
        torch.from_numpy(mean), torch.from_numpy(total), torch.from_numpy(value), importance(second_moment), weight
    )


def sums_of_squares(value: NDArray, sums: NDArray) -> None:
    """float64 or fp32 values to the sum of squares of each chunk, float64, in a fixed order of pairs."""
    wide = torch.from_numpy(value).double()
    padded = torch.nn.functional.pad(wide, (0, len(sums) * CHUNK - len(wide)))
    torch.from_numpy(sums).copy_(sum_of_pairs(padded.square().view(-1, CHUNK)).view(-1))


def step(
    optimizer: OuterOptimizer,
    merged: NDArray,
    published: NDArray,
    target: NDArray,
    moments: dict[str, NDArray],
    start: int,
    stop: int,
    new: NDArray,
    update: NDArray,
    *,
    lr: float,
    count: int,
) -> bool:
    """The outer step of a block: `new` parameters, and their `update`, both fp32; moments change in place.

    Returns whether all of it is in the range of fp32.
    """
    before = torch.from_numpy(target[start:stop])
    of_block = {kind: torch.from_numpy(value[start:stop]) for kind, value in moments.items()}
    found, kept = optimizer.step(before, torch.from_numpy(merged), of_block, lr=lr, count=count)
    torch.from_numpy(new).copy_(found)
    torch.from_numpy(update).copy_(found - before)  # not finite where the new one is not
    change = found - torch.from_numpy(published[start:stop])
    for kind, value in kept.items():
        of_block[kind].copy_(value)
    return all(bool(value.isfinite().all()) for value in (found - before, change, *kept.values()))


def publish(codec: str, published: NDArray, new: NDArray, start: int, stop: int, change: Arrays) -> None:
    """Code a block's change of the published parameters, and make it there."""
    of_block = torch.from_numpy(published[start:stop])
    parts = encode(codec, of_block, torch.from_numpy(new))
    apply_change(codec, of_block, parts)
    _keep(codec, parts, start, stop, change)
