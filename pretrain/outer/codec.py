"""A change of one named tensor, to the tensors that travel and back.

A codec codes `value` against `base`, the tensor that both ends hold; decoding gives the difference `base - value` in
float64. For a silo these are its local and the global parameters, and the difference is its pseudo-gradient; for the
aggregator the new and the published global parameters. `fp32` sends the values themselves: a difference rounded to
fp32 would not lead back to them, whereas in float64 it is exact (unless a value shrinks below 2^-29 of what it was), so
that one silo with outer SGD of lr 1 trains as if it were alone, to the last bit (but -0.0 becomes 0.0). All others send
the fp32 difference in one of the formats of quantize.py.

With error feedback what a format leaves out is kept and added, times a decay, to the next difference: what was sent so
far and what is kept add up to all differences (decay 1).
"""

import torch
from torch import Tensor

from pretrain.outer.quantize import QUANTIZERS, Parts, all_finite, check_parts, check_sizes, decode

CODECS = tuple(QUANTIZERS)
SUM32 = "sum32"  # of a secure sum (fixed_point.py), where no delivery is looked at: it has a layout, and the rest not
# What a codec needs unless the configuration says otherwise; top-k: SparseLoCo, https://arxiv.org/abs/2508.15706
FEEDBACK_DECAY = dict.fromkeys(CODECS, 0.0) | {"topk": 0.95}


def encode(codec: str, base: Tensor, value: Tensor, *, residual: Tensor | None = None, decay: float = 0.0) -> Parts:
    """What travels; `residual`, fp32 of the same shape, is replaced by what is kept for the next time.

    It is multiplied and then added: one call for both rounds once or twice, as the processor likes. Raises ValueError
    if a value is infinite or NaN.
    """
    if codec == "fp32":
        if not all_finite(value):
            raise ValueError("infinite or NaN given; allowed: finite values")
        return {"values": value.contiguous()}
    difference = base - value
    if residual is not None:
        difference.add_(residual * decay)
    parts = QUANTIZERS[codec].encode(difference)
    if residual is not None:
        QUANTIZERS[codec].decode_add(parts, residual.copy_(difference), -1.0)
    return parts


def decoded(codec: str, base: Tensor, parts: Parts) -> Tensor:
    """The difference `base - value`, float64, of base's shape."""
    if codec == "fp32":
        return base.double() - parts["values"].double()
    return decode(QUANTIZERS[codec], parts, base.shape).double()


def apply_change(codec: str, published: Tensor, parts: Parts) -> None:
    """Turn `published` in place into what the parts say, the same bits wherever it is done."""
    if codec == "fp32":
        published.copy_(parts["values"])
    else:
        QUANTIZERS[codec].decode_add(parts, published, -1.0)


def check(codec: str, parts: Parts, shape: torch.Size) -> None:
    """Raise ValueError, in one line, unless the parts, of another party, are of this codec and shape and finite."""
    if codec != "fp32":
        check_parts(QUANTIZERS[codec], parts, shape)
        return
    check_layout(codec, parts, shape)
    if not all_finite(parts["values"]):
        raise ValueError("infinite or NaN given; allowed: finite values")


def check_layout(codec: str, parts: Parts, shape: torch.Size) -> None:
    """Raise ValueError, in one line, unless the parts, of another party, are of this codec and shape, as far as names,
    dtypes and sizes tell.
    """
    if codec not in ("fp32", SUM32):
        check_sizes(QUANTIZERS[codec], parts, shape)
        return
    dtype = torch.int32 if codec == SUM32 else torch.float32
    given = {part: f"{value.dtype} {list(value.shape)}" for part, value in parts.items()}
    expected = {"values": f"{dtype} {list(shape)}"}
    if given != expected:
        raise ValueError(f"{given} given; allowed: {expected}")
