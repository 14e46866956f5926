"""The merge and the outer step of one version, from K coded deliveries to a coded change, for whoever merges.

The aggregator takes one whole tensor after another, a silo of a collective the pieces that fell to it; what is made of
an element is the same, to the last bit.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pretrain.config.keys import OuterConfig, RunConfig
from pretrain.merge.terms import merge_weight, outer_optimizer, shared_moments
from pretrain.outer.merge import importance_mean, weighted_mean
from pretrain.outer.moments import SecondMoment, bounded, importance
from pretrain.outer.pieces import Piece
from pretrain.outer.quantize import Parts
from pretrain.outer.robust import clip_factors, coordinate_median, krum, trimmed_mean
from pretrain.outer.state import OuterTensors
from pretrain.trust.ledger import Manifest

COUNT_ALL_ALIKE = ("trimmed_mean", "median", "krum")
ROBUST = ("clip", "trimmed_mean", "median")  # krum takes one silo's parameters and its moments with them


class Step:
    """One version's: merges piece after piece, takes the outer step of each in place, and sums up what was done."""

    def __init__(
        self,
        config: RunConfig,
        version: int,
        state: OuterTensors,
        *,
        weights: Sequence[int],
        told: Sequence[Mapping[str, Parts]],
        shapes: Mapping[str, torch.Size],
    ) -> None:
        """`weights` of the deliveries (0: none of it counts), what each told of its moments, all in one order;
        `shapes` of the fragment's whole tensors by name."""
        self._outer, self._version, self._state = config.outer, version, state
        self._optimizer, self._lr = outer_optimizer(config.outer), config.outer_lr(version)
        self._count = config.schedule.count(version)
        self._weights, self._moments = weights, shared_moments(config, shapes, shapes)
        self._told = bounded(told, self._moments)
        self.update_squared = 0.0
        """Squared norm of all updates so far."""

    def take(self, piece: Piece, pseudo_gradients: Iterable[Tensor]) -> Parts:
        """Merge a piece, take its outer step; returns the coded change of the published parameters.

        `pseudo_gradients` are the deliveries', float64 of the piece's shape. Where the merge allows it one is held at a
        time. Raises ValueError if the step leaves the range of fp32.
        """
        try:
            change, squared = self._state.step(
                piece.key,
                self._merged(piece, pseudo_gradients),
                self._optimizer,
                lr=self._lr,
                count=self._count,
                codec=self._outer.downlink_codec,
            )
        except ValueError as error:
            raise ValueError(f"version {self._version}: {piece.name}: {error}") from None
        self.update_squared += squared
        return change

    def _merged(self, piece: Piece, pseudo_gradients: Iterable[Tensor]) -> Tensor:
        shape, way = self._state.parameters[piece.key].shape, self._outer.merge
        if way == "median":
            return coordinate_median(torch.stack(list(pseudo_gradients)))
        if way == "trimmed_mean":
            return trimmed_mean(torch.stack(list(pseudo_gradients)), self._outer.num_malicious)
        weighted = zip(self._weights, pseudo_gradients, strict=True)
        if way == "importance" and isinstance(moment := self._moments.get(piece.name), SecondMoment):
            said = (piece.of(importance(moment.decode(told[piece.name]))) for told in self._told)
            return importance_mean(((*one, other) for one, other in zip(weighted, said, strict=True)), shape)
        return weighted_mean((one for one in weighted if one[0]), shape)[0]

    def merged_moments(self) -> dict[str, Parts]:
        """What all silos are told of each other's gradients: weighted like the merge, or as robust."""
        robust = self._outer.merge in ROBUST
        return {
            name: moment.merge(
                [(weight, told[name]) for weight, told in zip(self._weights, self._told, strict=True) if weight],
                robust=robust,
            )
            for name, moment in self._moments.items()
        }


def shares(
    outer: OuterConfig,
    manifests: Sequence[Manifest],
    *,
    norms: Sequence[float] = (),
    staleness: Sequence[float] = (),
    pseudo_gradients: Iterable[Sequence[Tensor]] = (),
) -> tuple[list[int], list[float]]:
    """The weight of each delivery in the merge, and what its pseudo-gradient is multiplied by.

    `staleness` has the share of its weight with which each delivery counts, if not all count in full. Clip needs the
    `norms` of the pseudo-gradients, krum the `pseudo_gradients`: all deliveries' of one tensor after another.
    """
    ones = [1.0] * len(manifests)
    if outer.merge == "krum":
        gram = torch.zeros(len(manifests), len(manifests), dtype=torch.float64)
        for of_one_tensor in pseudo_gradients:
            flat = torch.stack([value.flatten() for value in of_one_tensor])
            gram += flat @ flat.T
        chosen = krum(gram, outer.num_malicious)
        return [int(index == chosen) for index in range(len(manifests))], ones
    if outer.merge in COUNT_ALL_ALIKE:
        return [1] * len(manifests), ones
    weights = [
        max(1, round(merge_weight(manifest.tokens, outer.weight_power) * share))
        for manifest, share in zip(manifests, staleness or ones, strict=True)
    ]
    return capped(weights, outer.max_share), clip_factors(norms) if outer.merge == "clip" else ones


def capped(weights: Sequence[int], max_share: float) -> list[int]:
    """The weights, none above `max_share` of their sum: the heaviest are lowered to it, or all are made equal where
    there are too few silos for that.
    """
    falling = sorted(weights, reverse=True)
    for num_lowered, weight in enumerate(falling):
        left = 1 - num_lowered * max_share
        most = max_share * sum(falling[num_lowered:]) / left if left > 0 else 0.0
        if weight <= most:
            return [min(weight, max(1, round(most))) for weight in weights] if num_lowered else list(weights)
    return [falling[-1]] * len(weights)
