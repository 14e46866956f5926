"""What averaging the two factors of an adapter costs: the mean of B times the mean of A is not the mean of B A."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pretrain.outer.fragments import FACTORS


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names of each A and B that belong together, of those names where both are among them."""
    given = set(names)
    found = [(name, name.replace(*FACTORS)) for name in sorted(given) if FACTORS[0] in name]
    return [(a, b) for a, b in found if b in given]


def aggregation_error(factors: Iterable[Sequence[tuple[Tensor, Tensor]]], weights: Sequence[float]) -> float:
    """|mean(B) mean(A) - mean(B A)| / |mean(B A)|, Frobenius norms over all pairs; 0 where the latter is 0.

    `factors` has for one pair after another what each silo delivered: A (rank, columns) and B (rows, rank), float64.
    Means are weighted. No product is made: the difference is the mean of (B - mean(B)) (A - mean(A)), and the norm of a
    sum of products follows from scalar products between factors.
    """
    shares = torch.tensor(list(weights), dtype=torch.float64) / sum(weights)
    off = whole = 0.0
    for of_silos in factors:
        a, b = (torch.stack([pair[i].double() for pair in of_silos]) for i in (0, 1))
        whole += _squared(shares, a, b)
        off += _squared(shares, a - torch.einsum("k,krc->rc", shares, a), b - torch.einsum("k,kdr->dr", shares, b))
    return (off / whole) ** 0.5 if whole > 0 else 0.0


def _squared(shares: Tensor, a: Tensor, b: Tensor) -> float:
    """|sum of share B A|^2 of (silos, rank, columns) and (silos, rows, rank)."""
    right = a.flatten(0, 1)  # (silos * rank, columns)
    left = (shares[:, None, None] * b).transpose(1, 2).flatten(0, 1)  # (silos * rank, rows)
    return max(0.0, ((left @ left.T) * (right @ right.T)).sum().item())
