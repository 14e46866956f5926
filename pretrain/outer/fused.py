"""The stages of an outer step on one block of elements, compiled: those of plain.py, to the last bit.

A block's scratch stays in the processor's cache. Every operation is one of IEEE 754, rounded by itself (numba joins no
multiplication and addition unless it is told to), and sums have plain.py's order of pairs, so that bits depend neither
on the processor nor on the number of threads. The functions give up Python's lock. What is not compiled here (top-k) is
plain.py's.
"""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from pretrain.outer import plain
from pretrain.outer.merge import LEAST_IMPORTANCE
from pretrain.outer.optimizer import OuterOptimizer
from pretrain.outer.plain import Arrays, Importance
from pretrain.outer.quantize import BLOCK, CHUNK, E3M0, INT4, INT8, LARGEST_BF16, SMALLEST_SCALE


def _can_cache() -> bool:
    try:
        numba.njit(cache=True)(_can_cache)
    except RuntimeError:  # neither beside this file nor in the home directory
        return False
    return True


CACHES = _can_cache()
compiled = numba.njit(nogil=True, cache=CACHES, error_model="numpy")
INFINITE = np.uint32(0x7F800000)
MAGNITUDE = np.uint32(0x7FFFFFFF)
LARGEST_HALF = np.uint32(0x7F7F0000)  # the largest bf16, as an fp32
NIBBLES = {
    "int4": np.array([*range(8), *range(-8, 0)], dtype=np.float32),
    "e3m0": np.array([0, *(2**e for e in range(7)), 0, *(-(2**e) for e in range(7))], dtype=np.float32),
}
LEVELS = {"int4": INT4, "e3m0": E3M0, "int8": INT8}


def _num_compiled(codec: str, num_elements: int) -> int:
    """How many of a block's elements are done here: those of whole blocks of a scale, and of top-k none."""
    if codec in ("fp32", "bf16"):
        return num_elements
    return num_elements // BLOCK * BLOCK if codec in LEVELS else 0


# ---- what a silo's codes stand for


def is_valid(codec: str, of_tensor: Arrays, num_elements: int) -> bool:
    """Whether all scales, codes and values of a whole tensor's parts, of the right sizes, are allowed."""
    if codec == "fp32":
        return bool(_is_finite(of_tensor["values"]))
    if codec == "bf16":
        return bool(_are_between(of_tensor["values"], -LARGEST_BF16, LARGEST_BF16))
    if codec not in LEVELS:
        return plain.is_valid(codec, of_tensor, num_elements)
    if not _are_between(of_tensor["scales"], 0.0, LEVELS[codec].largest_scale):
        return False
    if codec == "int4":
        return bool(_lack_nibble(of_tensor["codes"], 8))  # -8
    return codec == "e3m0" or bool(_lack_byte(of_tensor["codes"], 128))  # -128


@compiled
def _are_between(halves: NDArray, least: float, most: float) -> bool:
    """Whether all bf16 are between two numbers; NaN is not."""
    values, found = _widened(halves, 0, len(halves)), True
    for i in range(len(values)):
        found &= (values[i] >= least) & (values[i] <= most)
    return found


@compiled
def _lack_nibble(codes: NDArray, nibble: int) -> bool:
    found = False
    for i in range(len(codes)):
        found |= (codes[i] & 15 == nibble) | (codes[i] >> 4 == nibble)
    return not found


@compiled
def _lack_byte(codes: NDArray, byte: int) -> bool:
    found = False
    for i in range(len(codes)):
        found |= codes[i] == byte
    return not found


def decode(codec: str, of_tensor: Arrays, base: NDArray | None, start: int, stop: int, out: NDArray) -> None:
    """A block of a coded difference, float64; codec fp32 needs the base."""
    if codec == "fp32":
        assert base is not None
        _difference(base, of_tensor["values"], start, out)
    elif codec == "bf16":
        _from_halves(of_tensor["values"], start, out)
    elif codec in NIBBLES:
        _from_nibbles(of_tensor["codes"], of_tensor["scales"], NIBBLES[codec], start, out)
    elif codec == "int8":
        _from_bytes(of_tensor["codes"].view(np.int8), of_tensor["scales"], start, out)
    else:
        plain.decode(codec, of_tensor, base, start, stop, out)


@compiled
def _difference(base: NDArray, values: NDArray, start: int, out: NDArray) -> None:
    for i in range(len(out)):
        out[i] = np.float64(base[start + i]) - np.float64(values[start + i])


@compiled
def _widened(halves: NDArray, first: int, num: int) -> Any:
    scales = np.empty(num, np.float32)
    bits = scales.view(np.uint32)
    for b in range(num):
        bits[b] = np.uint32(halves[first + b]) << np.uint32(16)  # what a bf16 leaves out of an fp32
    return scales


@compiled
def _from_halves(halves: NDArray, start: int, out: NDArray) -> None:
    values = _widened(halves, start, len(out))
    for i in range(len(out)):
        out[i] = np.float32(0) + values[i]


@compiled
def _from_nibbles(codes: NDArray, halves: NDArray, levels: NDArray, start: int, out: NDArray) -> None:
    scales = _widened(halves, start // BLOCK, -(-len(out) // BLOCK))
    whole = len(out) // BLOCK * BLOCK
    for b in range(len(out) // BLOCK):
        scale, first, byte = scales[b], b * BLOCK, (start + b * BLOCK) // 2
        for j in range(BLOCK // 2):
            code = codes[byte + j]
            out[first + 2 * j] = np.float32(0) + levels[code & 15] * scale
            out[first + 2 * j + 1] = np.float32(0) + levels[code >> 4] * scale
    for i in range(whole, len(out)):
        code = codes[(start + i) // 2] >> (4 * (i % 2)) & 15
        out[i] = np.float32(0) + levels[code] * scales[-1]


@compiled
def _from_bytes(codes: NDArray, halves: NDArray, start: int, out: NDArray) -> None:
    scales = _widened(halves, start // BLOCK, -(-len(out) // BLOCK))
    for b in range(len(scales)):
        for j in range(b * BLOCK, min((b + 1) * BLOCK, len(out))):
            out[j] = np.float32(0) + np.float32(codes[start + j]) * scales[b]


# ---- merging


@compiled
def add_scaled(value: NDArray, factor: float, total: NDArray) -> None:
    """`total` += `value` times `factor`."""
    for i in range(len(value)):
        total[i] += value[i] * factor


@compiled
def add_mean(value: NDArray, share: float, mean: NDArray) -> None:
    """Move the mean towards a value by its share of all weight so far."""
    for i in range(len(value)):
        mean[i] += (value[i] - mean[i]) * share


def add_importance(value: NDArray, of: Importance, start: int, weight: int, mean: NDArray, total: NDArray) -> None:
    """The same where every element has weights of its own; `total` has their sum so far."""
    rows, columns, first = of
    _add_importance(value, rows, columns, first + start, float(weight), mean, total)


@compiled
def _add_importance(
    value: NDArray, rows: NDArray, columns: NDArray, first: int, weight: float, mean: NDArray, total: NDArray
) -> None:
    done, width = 0, len(columns)
    while done < len(value):
        row, column = (first + done) // width, (first + done) % width
        length = min(width - column, len(value) - done)
        for i in range(length):
            j = done + i
            share = (np.sqrt(np.float64(rows[row] * columns[column + i])) + LEAST_IMPORTANCE) * weight
            total[j] += share
            mean[j] += (value[j] - mean[j]) * (share / total[j])
        done += length


@compiled
def sums_of_squares(value: NDArray, sums: NDArray) -> None:
    """float64 or fp32 values to the sum of squares of each chunk, float64, in a fixed order of pairs."""
    work = np.empty(CHUNK)
    for chunk in range(len(sums)):
        first = chunk * CHUNK
        length = min(CHUNK, len(value) - first)
        for i in range(length):
            work[i] = np.float64(value[first + i]) * np.float64(value[first + i])
        work[length:] = 0
        half = CHUNK // 2
        while half > 0:
            for i in range(half):
                work[i] += work[half + i]
            half //= 2
        sums[chunk] = work[0]


# ---- the outer step


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
    before, of_block = target[start:stop], {kind: value[start:stop] for kind, value in moments.items()}
    if optimizer.name == "sgd":
        _sgd(merged, before, lr, new)
    elif optimizer.name == "nesterov":
        _nesterov(merged, before, of_block["velocity"], optimizer.momentum, lr, new)
    else:
        first, second = optimizer.betas
        corrections = (1 - first**count, 1 - second**count)
        of_adam = (first, 1 - first, second, 1 - second, *corrections, optimizer.eps)
        _adam(merged, before, of_block["mean"], of_block["variance"], of_adam, lr, new)
    in_range = _is_difference(new, published[start:stop], update) and all(map(_is_finite, of_block.values()))
    return _is_difference(new, before, update) and in_range


@compiled
def _sgd(merged: NDArray, before: NDArray, lr: float, new: NDArray) -> None:
    for i in range(len(merged)):
        new[i] = np.float64(before[i]) - lr * merged[i]


@compiled
def _nesterov(merged: NDArray, before: NDArray, velocity: NDArray, momentum: float, lr: float, new: NDArray) -> None:
    for i in range(len(merged)):
        wide = momentum * np.float64(velocity[i]) + merged[i]
        new[i] = np.float64(before[i]) - lr * (merged[i] + momentum * wide)
        velocity[i] = wide


@compiled
def _adam(
    merged: NDArray, before: NDArray, mean: NDArray, variance: NDArray, of_adam: Any, lr: float, new: NDArray
) -> None:
    first, rest_first, second, rest_second, correct_first, correct_second, eps = of_adam
    for i in range(len(merged)):
        wide = first * np.float64(mean[i]) + rest_first * merged[i]
        square = second * np.float64(variance[i]) + rest_second * (merged[i] * merged[i])
        new[i] = np.float64(before[i]) - lr * ((wide / correct_first) / (np.sqrt(square / correct_second) + eps))
        mean[i], variance[i] = wide, square


@compiled
def _is_difference(value: NDArray, other: NDArray, difference: NDArray) -> bool:
    """Subtracts, and says whether all differences are finite."""
    for i in range(len(value)):
        difference[i] = value[i] - other[i]
    return _is_finite(difference)


@compiled
def _is_finite(value: NDArray) -> bool:
    bits, largest = value.view(np.uint32), np.uint32(0)
    for i in range(len(value)):
        largest = max(largest, bits[i] & MAGNITUDE)
    return bool(largest < INFINITE)


# ---- what leaves


def publish(codec: str, published: NDArray, new: NDArray, start: int, stop: int, change: Arrays) -> None:
    """Code a block's change of the published parameters, and make it there."""
    if codec == "fp32":
        change["values"][start:stop] = published[start:stop] = new
        return
    whole = _num_compiled(codec, stop - start)
    if whole:
        of_block = published[start : start + whole]
        _encode(codec, of_block - new[:whole], of_block, start, change)
    if whole < stop - start:
        plain.publish(codec, published, new[whole:], start + whole, stop, change)


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
    whole = _num_compiled(codec, stop - start)
    middle = start + whole
    travels = _is_difference(base[start:middle], value[start:middle], difference[:whole])
    if codec == "fp32":
        travels = _is_finite(value[start:middle])
    elif whole:
        wanted = difference[:whole].copy()
        if residual is not None:
            travels = _add_feedback(residual[start:middle], np.float32(decay), wanted)
        if travels:
            left = np.empty_like(wanted) if residual is None else residual[start:middle]
            left[:] = wanted
            _encode(codec, wanted, left, start, parts)
    if not travels or middle < stop:  # of what does not travel, it says why
        first = middle if travels else start
        plain.code(codec, base, value, residual, decay, first, stop, difference[first - start :], parts)


@compiled
def _add_feedback(residual: NDArray, decay: float, wanted: NDArray) -> bool:
    """Adds what was left out before, and says whether all is finite."""
    for i in range(len(wanted)):
        wanted[i] += residual[i] * decay
    return _is_finite(wanted)


def _encode(codec: str, difference: NDArray, left: NDArray, start: int, parts: Arrays) -> None:
    """Code a block's `difference`, whose memory is used up, and take from `left` what the codes stand for."""
    if codec == "bf16":
        _to_halves(left, difference, parts["values"][start : start + len(left)])
        return
    levels, stop = LEVELS[codec], start + len(left)
    scales, codes = parts["scales"][start // BLOCK : stop // BLOCK], parts["codes"]
    codes = codes[levels.num_bytes(start) : levels.num_bytes(stop)]
    wide = _scales(difference, levels.top, levels.largest_scale, scales)
    if codec == "e3m0":
        _to_powers(left, difference, wide, codes, NIBBLES[codec])
    else:
        _to_integers(left, difference, wide, codes, levels.bits)


@compiled
def _half(bits: Any) -> Any:
    """The nearest bf16 of an fp32, the even one if two are equally near; both as bits."""
    return (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)


@compiled
def _to_halves(published: NDArray, difference: NDArray, halves: NDArray) -> None:
    bits = difference.view(np.uint32)
    for i in range(len(halves)):
        half = _half(min(bits[i] & MAGNITUDE, LARGEST_HALF)) | bits[i] >> np.uint32(16) & np.uint32(0x8000)
        halves[i] = half
        bits[i] = half << np.uint32(16)
    for i in range(len(published)):
        published[i] -= difference[i]


def subtract(codec: str, of_tensor: Arrays, value: NDArray, start: int, stop: int) -> None:
    """Take what a block's codes stand for from its `value`, fp32."""
    whole = _num_compiled(codec, stop - start)
    if codec == "bf16":
        _subtract_halves(of_tensor["values"], start, value)
    elif codec in NIBBLES:
        _subtract_nibbles(of_tensor["codes"], of_tensor["scales"], NIBBLES[codec], start, value[:whole])
    elif codec == "int8":
        _subtract_bytes(of_tensor["codes"].view(np.int8), of_tensor["scales"], start, value[:whole])
    if whole < stop - start:
        plain.subtract(codec, of_tensor, value[whole:], start + whole, stop)


@compiled
def _subtract_halves(halves: NDArray, start: int, value: NDArray) -> None:
    values = _widened(halves, start, len(value))
    for i in range(len(value)):
        value[i] -= values[i]


@compiled
def _subtract_nibbles(codes: NDArray, halves: NDArray, levels: NDArray, start: int, value: NDArray) -> None:
    scales = _widened(halves, start // BLOCK, len(value) // BLOCK)
    for b in range(len(scales)):
        scale, first, byte = -scales[b], b * BLOCK, (start + b * BLOCK) // 2
        for j in range(BLOCK // 2):
            coded = codes[byte + j]
            value[first + 2 * j] += levels[coded & 15] * scale
            value[first + 2 * j + 1] += levels[coded >> 4] * scale


@compiled
def _subtract_bytes(codes: NDArray, halves: NDArray, start: int, value: NDArray) -> None:
    scales = _widened(halves, start // BLOCK, len(value) // BLOCK)
    for b in range(len(scales)):
        for j in range(b * BLOCK, (b + 1) * BLOCK):
            value[j] += np.float32(codes[start + j]) * -scales[b]


@compiled
def _scales(difference: NDArray, top: int, largest: float, halves: NDArray) -> Any:
    bits, scales = difference.view(np.uint32), np.empty(len(halves), np.float32)
    of_scales = scales.view(np.uint32)
    for b in range(len(scales)):
        peak = np.uint32(0)
        for j in range(b * BLOCK, (b + 1) * BLOCK):
            peak = max(peak, bits[j] & MAGNITUDE)
        of_scales[b] = peak
    for b in range(len(scales)):
        scales[b] = min(max(scales[b] / np.float32(top), np.float32(SMALLEST_SCALE)), np.float32(largest))
        half = _half(of_scales[b])
        halves[b] = half
        of_scales[b] = half << np.uint32(16)
    return scales


@compiled
def _to_integers(published: NDArray, difference: NDArray, scales: NDArray, codes: NDArray, bits: int) -> None:
    levels = np.empty(len(published), np.int8)
    for b in range(len(scales)):
        scale = scales[b]
        for j in range(b * BLOCK, (b + 1) * BLOCK):
            levels[j] = np.int8(np.rint(difference[j] / scale))
        for j in range(b * BLOCK, (b + 1) * BLOCK):
            published[j] += np.float32(levels[j]) * -scale
    if bits == 8:
        codes[:] = levels.view(np.uint8)
    else:
        _pack(levels, codes)


@compiled
def _pack(levels: NDArray, codes: NDArray) -> None:
    pairs = levels.view(np.uint16)
    for j in range(len(codes)):
        codes[j] = np.uint8(pairs[j] & np.uint16(15)) | np.uint8(pairs[j] >> np.uint16(4) & np.uint16(0xF0))


@compiled
def _to_powers(published: NDArray, difference: NDArray, scales: NDArray, codes: NDArray, powers: NDArray) -> None:
    levels = np.empty(len(published), np.int8)
    for b in range(len(scales)):
        for j in range(b * BLOCK, (b + 1) * BLOCK):
            difference[j] /= scales[b]
    bits = difference.view(np.int32)
    for j in range(len(published)):
        rounded = (bits[j] + np.int32(1 << 22)) >> np.int32(23)  # see _e3m0_to_bytes
        exponent = min(max((rounded & 0xFF) - 126, 0), 7)
        levels[j] = exponent | (rounded >> 5 & 8)
    for b in range(len(scales)):
        for j in range(b * BLOCK, (b + 1) * BLOCK):
            published[j] += powers[levels[j]] * -scales[b]
    _pack(levels, codes)
