"""Merge the silos' pseudo-gradients of one tensor, one silo at a time."""

from collections.abc import Iterable

import torch
from torch import Tensor

LEAST_IMPORTANCE = 1e-8  # Adam's epsilon: what no silo has met is merged by tokens alone


def weighted_mean(weighted: Iterable[tuple[int, Tensor]], shape: torch.Size) -> tuple[Tensor, int]:
    """Mean of pseudo-gradients, float64, and the divisor: the weight of those that are in it, never of the roster.

    `weighted` yields (weight in tokens, pseudo-gradient of `shape`, float64); one is held at a time besides the sum.
    The mean moves towards each one by its share of the weight so far, so that the mean of equal tensors is that tensor
    to the last bit. The order matters only through float64 rounding: give them sorted by silo name.
    """
    mean = torch.zeros(shape, dtype=torch.float64)
    divisor = 0
    for weight, pseudo_gradient in weighted:
        if weight <= 0:
            raise ValueError(f"a weight of {weight} tokens given; allowed: 1 or more")
        divisor += weight
        add_to_mean(mean, pseudo_gradient, weight / divisor)
    if divisor <= 0:
        raise ValueError("nobody contributed: the total weight is 0")
    return mean, divisor


def add_to_mean(mean: Tensor, value: Tensor, share: float) -> None:
    """Move `mean` towards a value by its share of all weight so far.

    Multiplied and then added: one call for both may round once or twice, as the processor likes.
    """
    mean.add_((value - mean).mul_(share))


def add_to_importance_mean(mean: Tensor, total: Tensor, value: Tensor, importance: Tensor, weight: int) -> None:
    """The same where every element has weights of its own (https://arxiv.org/abs/2111.09832); `total` is their sum.

    All float64 of one shape, importance above 0. Where one silo alone has a say, its step is taken whole, not divided
    by all; the mean of equal tensors is that tensor to the last bit.
    """
    share = importance * weight
    total.add_(share)
    mean.add_((value - mean) * share.div_(total))


def importance(second_moment: Tensor) -> Tensor:
    """How much a silo's text has to say of each element, float64: the root of its second moment, and never 0."""
    return second_moment.double().sqrt_().add_(LEAST_IMPORTANCE)


def mean_cosine(sum_of_unit_vectors_norm_squared: float, num_silos: int) -> float:
    """Mean cosine over all pairs of silos, from |sum of unit pseudo-gradients|^2 = K + sum over i != j of cos(i, j)."""
    if num_silos < 2:
        return 1.0
    return (sum_of_unit_vectors_norm_squared - num_silos) / (num_silos * (num_silos - 1))


def unit_sum_squared(gram: Tensor) -> float:
    """|sum of unit pseudo-gradients|^2 from all scalar products, (num_silos, num_silos) in float64; zeros have none."""
    norms = gram.diagonal().sqrt()
    norms = torch.where(norms > 0, norms, torch.inf)
    return (gram / norms / norms[:, None]).sum().item()
