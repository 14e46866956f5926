"""Merge the silos' pseudo-gradients of one tensor, one silo at a time."""

from collections.abc import Iterable

import torch
from torch import Tensor


def weighted_mean(weighted: Iterable[tuple[int, Tensor]], shape: torch.Size) -> tuple[Tensor, int]:
    """Mean of pseudo-gradients, float64, and the divisor: the weight of those that are in it, never of the roster.

    `weighted` yields (weight in tokens, pseudo-gradient of `shape`, float64); one is held at a time besides the sum.
    The result depends on the order only through float64 rounding: give them sorted by silo name.
    """
    total = torch.zeros(shape, dtype=torch.float64)
    divisor = 0
    for weight, pseudo_gradient in weighted:
        total.add_(pseudo_gradient, alpha=weight)
        divisor += weight
    if divisor <= 0:
        raise ValueError("nobody contributed: the total weight is 0")
    return total.div_(divisor), divisor


def mean_cosine(sum_of_unit_vectors_norm_squared: float, num_silos: int) -> float:
    """Mean cosine over all pairs of silos, from |sum of unit pseudo-gradients|^2 = K + sum over i != j of cos(i, j)."""
    if num_silos < 2:
        return 1.0
    return (sum_of_unit_vectors_norm_squared - num_silos) / (num_silos * (num_silos - 1))
