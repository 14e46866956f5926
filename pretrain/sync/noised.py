"""A silo's part of a noised sum: its whole delivery is clipped, and gets a share of the noise (trust/member.py).

Noise follows from the silo's secret and from all that the delivery depends on: contract, version, and every bit of the
base and of the silo's own parameters. Coded again after a kill, the same values get the same noise; others get another.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pretrain.config.keys import RunConfig
from pretrain.outer.plain import array
from pretrain.silo.noise import add_noise, derived, secret_key
from pretrain.trust.member import MemberBudget, check_room

BLOCK_ELEMENTS = 1 << 16  # what lies in the cache
ROUNDING = 1e-9  # of a norm in float64, by which what is clipped is made shorter, so that it is never longer
SECRET = "member.key"

Pair = tuple[Tensor, Tensor]


class Noised:
    """One silo's."""

    def __init__(self, config: RunConfig, budget: MemberBudget, directory: Path) -> None:
        """`directory` is the silo's own for its secret."""
        self._config, self._budget, self._key = config, budget, secret_key(directory / SECRET)

    def pairs(self, pairs: Sequence[Pair], version: int, terms_sha256: str, threshold: int) -> Iterator[Pair]:
        """Of each base and value, fp32, in an order that stays, the noised difference, fp64, and nothing to subtract.

        `threshold`: how many silos have to deliver. What is not finite counts as nothing. Memory: one tensor at a time.
        Raises ConfigError where the range has no room for the noise.
        """
        check_room(self._config, self._budget, threshold)
        place = json.dumps([terms_sha256, version, threshold, *vars(self._budget).values()]).encode()
        content = (_bytes(one) for pair in pairs for one in pair)
        key = derived(self._key, b"delivery", place, *content)
        length = math.sqrt(math.fsum(_squared(*pair) for pair in pairs))
        limit = self._budget.clip_norm * (1 - ROUNDING)
        factor = min(1.0, limit / max(length, limit)) if math.isfinite(length) else 0.0
        for number, (base, value) in enumerate(pairs):
            found = (base.double() - value.double()).mul_(factor) if factor else torch.zeros_like(base).double()
            add_noise(found.view(-1), derived(key, number.to_bytes(8, "little")), self._budget.deviation(threshold))
            yield found, torch.zeros_like(base)


def _squared(base: Tensor, value: Tensor) -> float:
    """Of the difference's length, the same whatever the number of threads."""
    of_base, of_value, sums = array(base), array(value.contiguous()), []
    for start in range(0, len(of_base), BLOCK_ELEMENTS):
        stop = start + BLOCK_ELEMENTS
        with np.errstate(invalid="ignore"):  # infinite minus infinite, which counts as nothing
            difference = np.subtract(of_base[start:stop], of_value[start:stop], dtype=np.float64)
        sums.append(float(np.square(difference, out=difference).sum()))
    return math.fsum(sums)


def _bytes(values: Tensor) -> "memoryview[int]":
    return array(values.contiguous()).view(np.uint8).data
