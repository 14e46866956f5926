"""Merging where some silos may send anything: what each way tolerates, of K silos f of which are malicious.

clip          size only: no silo moves the mean further than the median silo would; its direction still counts.
trimmed_mean  f < K / 2: in every coordinate the f smallest and the f largest values are left out.
median        f < K / 2: the middle value of every coordinate; with few silos it moves slowest.
krum          f <= (K - 3) / 2: the one pseudo-gradient that is nearest to its K - f - 2 nearest others.

Trimmed mean and median: https://arxiv.org/abs/1803.01498; Krum: https://arxiv.org/abs/1703.02757. These three count
every silo alike, as weights are what a silo says of itself.
"""

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor


def clip_factors(norms: Sequence[float]) -> list[float]:
    """What each pseudo-gradient is multiplied by, so that none has a larger norm than the median."""
    limit = statistics.median(norms)
    return [1.0 if norm <= limit else limit / norm for norm in norms]


def trimmed_mean(stacked: Tensor, num_malicious: int) -> Tensor:
    """Mean over the first dimension of (num_silos, ...) without the extremes. Raises ValueError with too few silos."""
    num_silos = len(stacked)
    if num_silos <= 2 * num_malicious:
        raise ValueError(f"{num_silos} silos given; allowed: more than twice {num_malicious} malicious ones")
    return stacked.sort(dim=0).values[num_malicious : num_silos - num_malicious].mean(dim=0)


def coordinate_median(stacked: Tensor) -> Tensor:
    """Median over the first dimension of (num_silos, ...); of an even number, the mean of the two in the middle."""
    middle = (len(stacked) - 1) // 2
    return trimmed_mean(stacked, middle)


def krum(gram: Tensor, num_malicious: int) -> int:
    """The index of the silo that Krum chooses, from all scalar products (num_silos, num_silos), float64.

    Of several that are equally near, the first. Raises ValueError with too few silos.
    """
    num_silos = len(gram)
    if num_silos < 2 * num_malicious + 3:
        raise ValueError(
            f"{num_silos} silos given; allowed: {2 * num_malicious + 3} or more (twice the malicious, plus 3)"
        )
    squared = gram.diagonal()
    distances = squared[:, None] + squared - 2 * gram
    distances.fill_diagonal_(torch.inf)
    nearest = distances.sort(dim=1).values[:, : num_silos - num_malicious - 2]
    return int(nearest.sum(dim=1).argmin())
