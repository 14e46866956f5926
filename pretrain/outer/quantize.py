"""Formats in which a tensor travels: fp32 values of any shape to a few flat tensors of bytes and scales, and back.

`QUANTIZERS` has them all; docs/formats.md shows every byte. What leaves is the same to the last bit on every machine
and device: only single IEEE operations (no fused multiply-add, no division by a Python number, which a GPU turns into a
multiplication), integers, and sums in a fixed order of pairs. It needs a processor that keeps subnormal numbers, as
torch does by default.

s is the scale of a block: absmax / (the largest level), rounded to bf16, at least 2^-126.

| format | what is sent                              | error of an element, at most                                |
|--------|-------------------------------------------|-------------------------------------------------------------|
| fp32   | the value                                 | 0                                                           |
| bf16   | the nearest bf16                          | 2^-8 abs(x), or 2^-134                                      |
| int8   | s times -127 to 127                       | s / 2: absmax / 253, or 2^-127                              |
| int4   | s times -7 to 7                           | s / 2: absmax / 13.9, or 2^-127                             |
| e3m0   | s times 0, +-1, +-2, +-4, ..., +-64       | abs(x) / 3 or 0.75 s, the larger: 0.75 s is absmax / 85     |
| topk   | 64 of 4,096: sign, and one of two means   | abs(x) if not sent, and then no more than anything sent;    |
|        |                                           | squared errors sum up to no more than squared values        |
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

Parts = dict[str, Tensor]  # what travels of one tensor, all flat and contiguous

BLOCK = 128  # elements that share a scale: 1.5 % more bytes in int4 than 256, and 7 % less error on normal data
CHUNK, NUM_KEPT = 4096, 64  # top-k: SparseLoCo, https://arxiv.org/abs/2508.15706
SMALLEST_SCALE = 2.0**-126  # the smallest normal number: no scale is subnormal, and none is zero to divide by
LARGEST_BF16 = torch.finfo(torch.bfloat16).max
LARGEST_FP32 = torch.finfo(torch.float32).max

# Elements worked on at a time: on a CPU what lies between two steps stays in its caches.
PIECE_CPU, PIECE_ACCELERATOR = 1 << 18, 1 << 24

assert sys.byteorder == "little", "bytes are packed by viewing integers of one width as another"


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """One format. The functions leave their inputs as they are, except `out`."""

    name: str
    bits: float
    """Bits an element, scales included, of a tensor with many elements."""
    encode: Callable[[Tensor], Parts]
    """fp32 of any shape with at least one element; raises ValueError if a value is infinite or NaN."""
    decode_add: Callable[[Parts, Tensor, float], None]
    """(parts, out, weight): out += weight * decoded; `out` is fp32, contiguous, of the shape that was encoded."""
    layout: Callable[[int], dict[str, tuple[torch.dtype, int]]]
    """Number of elements of the tensor to dtype and number of elements of each part."""
    check: Callable[[Parts, int], str | None]
    """(parts of the right layout, number of elements of the tensor): what is wrong with their values, if anything."""


def decode(quantizer: Quantizer, parts: Parts, shape: torch.Size) -> Tensor:
    """What `parts` say: fp32 of `shape`, on their device."""
    out = torch.zeros(shape, dtype=torch.float32, device=next(iter(parts.values())).device)
    quantizer.decode_add(parts, out, 1.0)
    return out


def check_parts(quantizer: Quantizer, parts: Parts, shape: torch.Size) -> None:
    """Raise ValueError, in one line, unless `parts` of another party decode to finite values of `shape`.

    Names, dtypes and sizes come first, so that nothing is read out of bounds; then scales and indices.
    """
    check_sizes(quantizer, parts, shape)
    if reason := quantizer.check(parts, math.prod(shape)):
        raise ValueError(f"not {quantizer.name} of shape {list(shape)}: {reason}")


def check_sizes(quantizer: Quantizer, parts: Parts, shape: torch.Size) -> None:
    """Raise ValueError, in one line, unless `parts` of another party have names, dtypes and sizes of `shape`."""
    num_elements = math.prod(shape)
    assert num_elements > 0
    layout = quantizer.layout(num_elements)
    wrong = f"not {quantizer.name} of shape {list(shape)}"
    if parts.keys() != layout.keys():
        raise ValueError(f"{wrong}: parts {sorted(parts)} given; allowed: {sorted(layout)}")
    for name, (dtype, length) in layout.items():
        part = parts[name]
        if part.dtype != dtype or list(part.shape) != [length]:
            raise ValueError(
                f"{wrong}: part {name} of {part.dtype} {list(part.shape)} given; allowed: {dtype} [{length}]"
            )


def _flat(values: Tensor) -> Tensor:
    """All elements in row-major order."""
    assert values.dtype == torch.float32
    assert values.numel() > 0
    return values.detach().reshape(-1)


def _pieces(num_elements: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover the elements in order; all but the last are whole chunks and blocks."""
    piece = PIECE_CPU if device.type == "cpu" else PIECE_ACCELERATOR
    return (slice(start, min(start + piece, num_elements)) for start in range(0, num_elements, piece))


def all_finite(values: Tensor) -> bool:
    """Whether no value is infinite or NaN, which both extremes would be: one pass, and no tensor of answers."""
    return all(extreme.isfinite().item() for extreme in values.aminmax())


def _refuse_non_finite(peaks: Tensor) -> None:
    """`peaks`: the largest magnitudes of all parts of a tensor; NaN where there is a NaN."""
    if not torch.isfinite(peaks).all():
        raise ValueError("a value to send is infinite or NaN; allowed: finite values")


# ---- fp32 and bf16: the values themselves


def _encode_values(values: Tensor, *, dtype: torch.dtype) -> Parts:
    flat = _flat(values)
    sent = torch.empty(flat.shape, dtype=dtype, device=flat.device)
    largest = torch.finfo(dtype).max  # what is above the largest bf16 would round to infinity
    scratch = torch.empty(0, device=flat.device)
    peaks = []
    for piece in _pieces(flat.numel(), flat.device):
        work = torch.abs(flat[piece], out=scratch.resize_(piece.stop - piece.start))
        peaks.append(work.amax())
        sent[piece] = torch.clamp(flat[piece], -largest, largest, out=work)
    _refuse_non_finite(torch.stack(peaks))
    return {"values": sent}


def _decode_add_values(parts: Parts, out: Tensor, weight: float) -> None:
    flat = out.view(-1)
    scratch = torch.empty(0, device=flat.device)
    for piece in _pieces(flat.numel(), flat.device):
        work = scratch.resize_(piece.stop - piece.start)
        # Multiplied and then added: one call for both may round once or twice, as the processor likes.
        flat[piece].add_(work.copy_(parts["values"][piece]).mul_(weight))


def _check_values(parts: Parts, num_elements: int) -> str | None:
    return None if all_finite(parts["values"]) else "an infinite value or NaN given; allowed: finite values"


def _values(name: str, dtype: torch.dtype) -> Quantizer:
    return Quantizer(
        name=name,
        bits=8.0 * dtype.itemsize,
        encode=partial(_encode_values, dtype=dtype),
        decode_add=_decode_add_values,
        layout=lambda num_elements: {"values": (dtype, num_elements)},
        check=_check_values,
    )


# ---- blocks: small integers times a scale


@dataclass(frozen=True, kw_only=True)
class _Levels:
    """How an element over its block's scale becomes bits."""

    top: int  # the largest level
    bits: int
    to_bytes: Callable[[Tensor], Tensor]  # (blocks, BLOCK) fp32 in -top ... top, overwritten -> flat uint8
    to_levels: Callable[[Tensor], Tensor]  # flat uint8 -> flat int8

    @cached_property
    def largest_scale(self) -> float:
        """The largest bf16 with which the top level is finite."""
        return (torch.tensor(LARGEST_FP32 / self.top).view(torch.int32) & -65536).view(torch.float32).item()

    def num_bytes(self, num_elements: int) -> int:
        """Bytes that hold this many codes."""
        return -(-num_elements * self.bits // 8)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """int8, an even number of bytes, overwritten -> uint8: the low halves of two bytes in one, the first one low."""
    codes.view(torch.int64).bitwise_and_(0x0F0F0F0F0F0F0F0F)
    pairs = codes.view(torch.int16)
    return (pairs | pairs >> 4).to(torch.uint8)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 -> uint8, twice as many, each 0 to 15."""
    pairs = packed.to(torch.int16)
    pairs |= pairs << 4
    pairs.view(torch.int64).bitwise_and_(0x0F0F0F0F0F0F0F0F)
    return pairs.view(torch.uint8)


def _nearest_integers(scaled: Tensor) -> Tensor:
    """The nearest integers, the even one if two are equally near: flat int8."""
    return scaled.round_().to(torch.int8).view(-1)


def _int4_to_levels(packed: Tensor) -> Tensor:
    nibbles = _unpack_nibbles(packed)
    nibbles.view(torch.int64).bitwise_xor_(0x0808080808080808)  # two's complement to an offset of 8
    return nibbles.view(torch.int8).sub_(8)


def _e3m0_to_bytes(scaled: Tensor) -> Tensor:
    """Code = sign * 8 + e: 0 below 0.75, else the nearest 2^(e - 1), the larger one if two are equally near."""
    # Half a mantissa more carries into the exponent from 1.5 * 2^k on; what is left is sign (bit 8) and exponent.
    rounded = scaled.view(torch.int32).add_(1 << 22).bitwise_right_shift_(23).to(torch.int16)
    exponents = (rounded & 0xFF).sub_(126).clamp_(0, 7)
    signs = rounded.bitwise_right_shift_(5).bitwise_and_(8)
    return _pack_nibbles(exponents.bitwise_or_(signs).to(torch.int8).view(-1))


def _e3m0_to_levels(packed: Tensor) -> Tensor:
    nibbles = _unpack_nibbles(packed).view(torch.int64)  # eight at a time where bytes do not touch each other
    signs = ((nibbles >> 3) & 0x0101010101010101).view(torch.int8)
    exponents = nibbles.bitwise_and_(0x0707070707070707).view(torch.uint8)
    powers = torch.ones_like(exponents).bitwise_left_shift_(exponents).view(torch.int64)
    levels = powers.bitwise_right_shift_(1).bitwise_and_(0x7F7F7F7F7F7F7F7F).view(torch.int8)  # 0, 1, 2, 4, ..., 64
    return levels.bitwise_xor_(signs.neg()).add_(signs)  # negated where the sign is 1


INT8 = _Levels(
    top=127,
    bits=8,
    to_bytes=lambda scaled: _nearest_integers(scaled).view(torch.uint8),
    to_levels=lambda codes: codes.view(torch.int8),
)
INT4 = _Levels(
    top=7, bits=4, to_bytes=lambda scaled: _pack_nibbles(_nearest_integers(scaled)), to_levels=_int4_to_levels
)
E3M0 = _Levels(top=64, bits=4, to_bytes=_e3m0_to_bytes, to_levels=_e3m0_to_levels)


def _padded(flat: Tensor, num_elements: int) -> Tensor:
    """Zeros behind it up to `num_elements`."""
    missing = num_elements - flat.numel()
    return torch.nn.functional.pad(flat, (0, missing)) if missing else flat


def _encode_blocks(values: Tensor, *, levels: _Levels) -> Parts:
    flat = _flat(values)
    device, num_blocks = flat.device, -(-flat.numel() // BLOCK)
    codes = torch.empty(levels.num_bytes(flat.numel()), dtype=torch.uint8, device=device)
    scales = torch.empty(num_blocks, dtype=torch.bfloat16, device=device)
    peaks = torch.empty(num_blocks, device=device)
    top = torch.tensor(float(levels.top), device=device)
    scratch = torch.empty(0, device=device)
    for piece in _pieces(flat.numel(), device):
        first, end = piece.start // BLOCK, -(-piece.stop // BLOCK)
        blocks = _padded(flat[piece], (end - first) * BLOCK).view(-1, BLOCK)
        work = torch.abs(blocks, out=scratch.resize_(blocks.shape))
        peak = torch.amax(work, dim=1, out=peaks[first:end])
        scale = (peak / top).clamp_(SMALLEST_SCALE, levels.largest_scale).bfloat16()
        scales[first:end] = scale
        torch.div(blocks, scale.float()[:, None], out=work)
        target = codes[levels.num_bytes(piece.start) : levels.num_bytes(piece.stop)]
        target.copy_(levels.to_bytes(work)[: target.numel()])
    _refuse_non_finite(peaks)
    return {"codes": codes, "scales": scales}


def _decode_add_blocks(parts: Parts, out: Tensor, weight: float, *, levels: _Levels) -> None:
    flat = out.view(-1)
    scratch = torch.empty(0, device=flat.device)
    for piece in _pieces(flat.numel(), flat.device):
        first, end = piece.start // BLOCK, -(-piece.stop // BLOCK)
        codes = parts["codes"][levels.num_bytes(piece.start) : levels.num_bytes(piece.stop)]
        codes = _padded(codes, levels.num_bytes((end - first) * BLOCK))
        scale = parts["scales"][first:end].float() * weight
        work = scratch.resize_(end - first, BLOCK)
        work.view(-1).copy_(levels.to_levels(codes))
        flat[piece].add_(work.mul_(scale[:, None]).view(-1)[: piece.stop - piece.start])


def _check_blocks(parts: Parts, num_elements: int, *, levels: _Levels) -> str | None:
    scales, largest = parts["scales"].float(), levels.largest_scale
    if not ((scales >= 0) & (scales <= largest)).all():  # false for NaN
        return f"a scale is negative, infinite, NaN or too large; allowed: 0 to {largest:.4g}"
    for piece in _pieces(num_elements, scales.device):
        codes = parts["codes"][levels.num_bytes(piece.start) : levels.num_bytes(piece.stop)]
        if levels.to_levels(_padded(codes, -(-codes.numel() // 8) * 8)).amin() < -levels.top:
            return f"a code of {-levels.top - 1} given; allowed: {-levels.top} to {levels.top}"
    return None


def _blocks(name: str, levels: _Levels) -> Quantizer:
    return Quantizer(
        name=name,
        bits=levels.bits + 16 / BLOCK,
        encode=partial(_encode_blocks, levels=levels),
        decode_add=partial(_decode_add_blocks, levels=levels),
        layout=lambda num_elements: {
            "codes": (torch.uint8, levels.num_bytes(num_elements)),
            "scales": (torch.bfloat16, -(-num_elements // BLOCK)),
        },
        check=partial(_check_blocks, levels=levels),
    )


# ---- top-k: in each chunk the largest magnitudes, as sign and one of two levels, and where they are


def _num_kept(num_elements: int) -> int:
    """Of a tensor: 64 of every 4,096 elements, and as large a share of the rest, rounded up."""
    return -(-num_elements * NUM_KEPT // CHUNK)


def _largest(keys: Tensor, num_kept: int) -> Tensor:
    """(chunks, CHUNK) different integers -> (chunks, num_kept), the largest, in any order.

    The k largest of all lie in the k groups with the largest maxima: so k of 256 groups of 16, then k of 256 groups
    of 4 of those, and then k of 256 single ones.
    """
    while keys.shape[1] > 256:
        groups = keys.view(len(keys), -1, 256)
        best = groups.amax(1).topk(NUM_KEPT, dim=1, sorted=False).indices
        keys = groups.gather(2, best[:, None].expand(-1, groups.shape[1], -1)).flatten(1)
    return keys.topk(num_kept, dim=1, sorted=False).values


def sum_of_pairs(values: Tensor) -> Tensor:
    """(chunks, a power of two) -> (chunks, 1), halves added until one is left: no library's own order."""
    while (half := values.shape[1] // 2) > 0:
        values = values[:, :half] + values[:, half:]
    return values


def _two_levels(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """(chunks, k) fp32 -> whether each is above its chunk's mean, and the means below and above it: (chunks, 2) bf16.

    A level under 2^-126 is 0; without anything above the mean, both are the same.
    """
    num_kept = magnitudes.shape[1]
    wide = torch.nn.functional.pad(magnitudes.double(), (0, NUM_KEPT - num_kept))
    total, count = sum_of_pairs(wide), wide.new_tensor(float(num_kept))
    high = wide > total / count
    num_high, sum_high = sum_of_pairs(high.double()), sum_of_pairs(wide * high)
    low_mean = (total - sum_high) / (count - num_high)  # the smallest is never above the mean
    high_mean = torch.where(num_high > 0, sum_high / num_high.clamp(min=1), low_mean)
    means = torch.cat([low_mean, high_mean], 1).clamp_(max=LARGEST_BF16).float()
    return high[:, :num_kept], torch.where(means < SMALLEST_SCALE, 0, means).bfloat16()


def _encode_chunks(chunks: Tensor, num_kept: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(chunks, CHUNK) fp32 -> indices int64, codes uint8, both (chunks, num_kept); scales (chunks, 2); the peaks."""
    # A larger magnitude has larger bits, also infinity and NaN; below them the index makes every key different.
    backwards = torch.arange(CHUNK - 1, -1, -1, device=chunks.device)
    magnitude_bits = (chunks.view(torch.int32) & 0x7FFFFFFF).long()
    keys = _largest(torch.add(backwards, magnitude_bits, alpha=CHUNK), num_kept)
    indices = (CHUNK - 1 - (keys & (CHUNK - 1))).sort(dim=1).values
    kept = chunks.gather(1, indices)
    magnitudes = kept.abs()
    high, scales = _two_levels(magnitudes)
    return indices, torch.signbit(kept) + 2 * high.to(torch.uint8), scales, magnitudes.amax(1)


def _encode_topk(values: Tensor) -> Parts:
    flat = _flat(values)
    rows = []
    for piece in _pieces(flat.numel(), flat.device):
        part = flat[piece]
        whole = part.numel() // CHUNK * CHUNK
        if whole:
            rows.append(_encode_chunks(part[:whole].view(-1, CHUNK), NUM_KEPT))
        if whole < part.numel():  # the padding has the smallest keys
            rest = _padded(part[whole:], CHUNK).view(1, CHUNK)
            rows.append(_encode_chunks(rest, _num_kept(part.numel() - whole)))
    indices, codes, scales, peaks = (torch.cat([part.flatten() for part in parts]) for parts in zip(*rows, strict=True))
    _refuse_non_finite(peaks)
    return {"indices": _pack_indices(indices), "codes": _pack_codes(codes), "scales": scales}


def _pack_indices(indices: Tensor) -> Tensor:
    """int64 of 12 bits -> uint8: two in three bytes."""
    first, second = _padded(indices, -(-indices.numel() // 2) * 2).view(-1, 2).unbind(1)
    packed = torch.stack([first & 255, first >> 8 | (second & 15) << 4, second >> 4], 1).to(torch.uint8)
    return packed.view(-1)[: -(-indices.numel() * 3 // 2)]


def _unpack_indices(packed: Tensor, num_kept: int) -> Tensor:
    low, middle, high = _padded(packed, -(-num_kept // 2) * 3).view(-1, 3).long().unbind(1)
    return torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], 1).view(-1)[:num_kept]


def _pack_codes(codes: Tensor) -> Tensor:
    """uint8 of 2 bits -> uint8: four in a byte."""
    quads = _padded(codes, -(-codes.numel() // 4) * 4).view(-1, 4)
    return quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6


def _decode_add_topk(parts: Parts, out: Tensor, weight: float) -> None:
    flat, num_kept = out.view(-1), _num_kept(out.numel())
    chunks = torch.arange(num_kept, device=flat.device) // NUM_KEPT
    indices = _unpack_indices(parts["indices"], num_kept) + chunks * CHUNK
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=flat.device)
    codes = (parts["codes"][:, None] >> shifts).view(-1)[:num_kept]
    values = (parts["scales"].float() * weight)[2 * chunks + (codes >> 1 & 1)]
    flat[indices] += torch.where((codes & 1).bool(), -values, values)


def _check_topk(parts: Parts, num_elements: int) -> str | None:
    scales = parts["scales"]
    if not ((scales >= 0) & torch.isfinite(scales)).all():  # false for NaN
        return "a scale is negative, infinite or NaN; allowed: finite, 0 or more"
    num_kept = _num_kept(num_elements)
    indices = _unpack_indices(parts["indices"], num_kept)
    chunks = torch.arange(num_kept, device=indices.device) // NUM_KEPT
    places = indices + chunks * CHUNK
    if places[-1] >= num_elements:
        return f"an index points to element {places[-1]}; allowed: below {num_elements}"
    if not (places.diff() > 0).all():
        return "the indices of a chunk do not rise; allowed: each above the one before"
    return None


def _topk_layout(num_elements: int) -> dict[str, tuple[torch.dtype, int]]:
    num_kept = _num_kept(num_elements)
    return {
        "indices": (torch.uint8, -(-num_kept * 3 // 2)),
        "codes": (torch.uint8, -(-num_kept // 4)),
        "scales": (torch.bfloat16, 2 * -(-num_elements // CHUNK)),
    }


TOPK = Quantizer(
    name="topk",
    bits=(NUM_KEPT * (12 + 2) + 2 * 16) / CHUNK,
    encode=_encode_topk,
    decode_add=_decode_add_topk,
    layout=_topk_layout,
    check=_check_topk,
)

QUANTIZERS: dict[str, Quantizer] = {
    quantizer.name: quantizer
    for quantizer in (
        _values("fp32", torch.float32),
        _values("bf16", torch.bfloat16),
        _blocks("int8", INT8),
        _blocks("int4", INT4),
        # https://arxiv.org/abs/2501.18512 sends pseudo-gradients as E3M0
        _blocks("e3m0", E3M0),
        TOPK,
    )
}
