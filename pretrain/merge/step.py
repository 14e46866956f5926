"""The merge and the outer step of one version, from K coded deliveries to a coded change, for whoever merges.

The aggregator takes one whole tensor after another, a silo of a collective the pieces that fell to it; what is made of
an element is the same, to the last bit.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from pretrain.config.keys import OuterConfig, RunConfig
from pretrain.merge.terms import merge_weight, outer_optimizer, shared_moments
from pretrain.outer.blocks import Coded, OutOfRangeError, Rule, Target, take_steps
from pretrain.outer.moments import SecondMoment, bounded
from pretrain.outer.optimizer import MOMENTS
from pretrain.outer.pieces import Piece
from pretrain.outer.quantize import Parts
from pretrain.outer.robust import clip_factors, coordinate_median, krum, trimmed_mean
from pretrain.outer.state import OuterTensors
from pretrain.trust.ledger import Manifest
from pretrain.trust.quality import below, told_by

COUNT_ALL_ALIKE = ("trimmed_mean", "median", "krum")
ROBUST = ("clip", "trimmed_mean", "median")  # krum takes one silo's parameters and its moments with them


class Step:
    """One version's: merges all pieces, takes their outer steps in place, and sums up what was done."""

    def __init__(
        self,
        config: RunConfig,
        version: int,
        state: OuterTensors,
        *,
        weights: Sequence[int],
        told: Sequence[Mapping[str, Parts]],
        shapes: Mapping[str, torch.Size],
        gram: bool = False,
    ) -> None:
        """`weights` of the deliveries (0: none of it counts), what each told of its moments, all in one order;
        `shapes` of the fragment's whole tensors by name. With `gram` all scalar products are asked for."""
        self._outer, self._version, self._state = config.outer, version, state
        self._rule = Rule(
            codec=config.outer.sent_codec,
            downlink_codec=config.outer.downlink_codec,
            optimizer=outer_optimizer(config.outer),
            lr=config.outer_lr(version),
            count=config.schedule.count(version),
            merge=_robust(config.outer),
            gram=gram,
        )
        self._weights, self._moments = weights, shared_moments(config, shapes, shapes)
        self._told = bounded(told, self._moments)
        self.update_squared = 0.0
        """Squared norm of all updates."""
        self.units_squared = 0.0
        """Squared norm of the sum of all silos' directions, unless scalar products are asked for."""
        self.gram = torch.zeros(len(weights), len(weights), dtype=torch.float64)
        """Of all silos' pseudo-gradients, if asked for."""

    def take(
        self,
        pieces: Sequence[Piece],
        coded: Callable[[Piece], Sequence[tuple[Parts, Tensor]]],
        *,
        factors: Sequence[float] = (),
        norms: Sequence[float] = (),
        num_threads: int = 1,
    ) -> dict[str, Parts]:
        """Merge the pieces and take their outer steps; returns the coded changes of the published parameters by key.

        `coded` has of a piece what each silo delivered, checked, and what that was coded against. What each
        pseudo-gradient is multiplied by is in `factors`, and its norm, if known, in `norms`. Raises ValueError if a
        step leaves the range of fp32.
        """
        units = [1 / norm if norm else 0.0 for norm in norms] or [0.0] * len(self._weights)
        works = [(self._target(piece), self._coded(piece, coded(piece), factors, units)) for piece in pieces]
        try:
            stepped = take_steps(self._rule, works, num_threads)
        except OutOfRangeError as error:
            name = pieces[error.args[0]].name
            raise ValueError(f"version {self._version}: {name}: the outer step leaves the range of fp32") from None
        self.update_squared = math.fsum(one for done in stepped for one in done.update_squared)
        self.units_squared = math.fsum(one for done in stepped for one in done.units_squared)
        self.gram += sum(done.gram for done in stepped if done.gram is not None)
        return {piece.key: done.change for piece, done in zip(pieces, stepped, strict=True)}

    def _target(self, piece: Piece) -> Target:
        state = self._state
        kinds = MOMENTS[self._rule.optimizer.name]
        return Target(
            published=state.parameters[piece.key],
            target=state.target[piece.key],
            moments={kind: state.kept[kind][piece.key] for kind in kinds},
        )

    def _coded(
        self, piece: Piece, coded: Sequence[tuple[Parts, Tensor]], factors: Sequence[float], units: Sequence[float]
    ) -> list[Coded]:
        moment = self._moments.get(piece.name)
        second = moment if self._outer.merge == "importance" and isinstance(moment, SecondMoment) else None
        return [
            Coded(
                parts=parts,
                base=base,
                weight=weight,
                factor=factor,
                unit=unit,
                importance=(*second.factors(told[piece.name]), piece.start) if second else None,
            )
            for (parts, base), weight, factor, unit, told in zip(
                coded, self._weights, factors or [1.0] * len(coded), units, self._told, strict=True
            )
        ]

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


def _robust(outer: OuterConfig) -> Callable[[Tensor], Tensor] | None:
    """What makes one of all silos' values, if it is no mean."""
    if outer.merge == "median":
        return coordinate_median
    return partial(trimmed_mean, num_malicious=outer.num_malicious) if outer.merge == "trimmed_mean" else None


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
    left_out = below(outer.quality_floor, told_by(manifests)) if outer.quality_floor is not None else {}
    counting = iter(capped([w for place, w in enumerate(weights) if place not in left_out], outer.max_share))
    found = [0 if place in left_out else next(counting) for place in range(len(weights))]
    return found, factors_of(outer, norms) or ones


def factors_of(outer: OuterConfig, norms: Sequence[float]) -> list[float]:
    """What the pseudo-gradients of these norms are multiplied by in the merge; none: by 1."""
    return clip_factors(norms) if outer.merge == "clip" else []


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
