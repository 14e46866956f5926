"""A silo's change of one named tensor, to the tensors that travel and back.

A codec codes `local` against `base`, the global tensor that both ends hold; decoding gives the pseudo-gradient
`base - local` in float64. `fp32` sends the local values themselves: a difference rounded to fp32 would not lead back
to them, whereas in float64 it is exact (unless a value shrinks below 2^-29 of what it was), so that one silo with outer
SGD of lr 1 trains as if it were alone, to the last bit (but -0.0 becomes 0.0). `bf16` sends the rounded
pseudo-gradient in half the bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

KIND = "parameter"  # the kind of a tensor is part of its key, so that optimizer moments can travel the same way


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A pure pair of functions and the dtype that travels."""

    dtype: torch.dtype
    encode: Callable[[Tensor, Tensor], Tensor]  # (base fp32, local fp32) -> what travels, same shape
    decode: Callable[[Tensor, Tensor], Tensor]  # (base fp32, what travelled) -> pseudo-gradient, float64, same shape


CODECS = {
    "fp32": Codec(
        dtype=torch.float32,
        encode=lambda base, local: local.contiguous(),
        decode=lambda base, coded: base.double() - coded.double(),
    ),
    "bf16": Codec(
        dtype=torch.bfloat16,
        encode=lambda base, local: (base - local).bfloat16(),
        decode=lambda base, coded: coded.double(),
    ),
}


def key(name: str) -> str:
    """The key of parameter `name` in a payload."""
    return f"{KIND}/{name}"
