"""One name for a set of tensors: equal digests mean equal bits."""

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of the tensor's little-endian bytes (CPU)."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over the sorted list of (name, dtype, shape, sha256 of the bytes), as JSON."""
    rows = sorted([name, str(t.dtype), list(t.shape), tensor_sha256(t)] for name, t in tensors)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
