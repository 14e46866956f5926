"""The rule of a contract's gate, as anybody can compute it from what silos and operator have signed. No torch."""

from collections.abc import Collection, Mapping
from statistics import fmean

from pretrain.config.gate import GateConfig
from pretrain.config.keys import OPERATOR

MOST_LOSS = 1e9  # what a judge says of a loss that is no number

Losses = Mapping[str, float]
"""By silo, and by OPERATOR of the public splits, the mean over the splits, in nats per token."""


def faults(
    gate: GateConfig, found: Losses, current: Losses, *, compared_with: int, expected: Collection[str]
) -> list[str]:
    """Why a candidate does not become the current model, a line each; none: it does.

    `found` is what it was judged to be, `current` the same of version `compared_with`, `expected` the silos that were
    asked.
    """
    silos = {name: loss for name, loss in found.items() if name != OPERATOR}
    return [
        *_missing(gate, silos, expected),
        *_of_silos(gate, silos),
        *_compared(gate, silos, current, compared_with),
        *_public(gate, found.get(OPERATOR), current.get(OPERATOR), compared_with),
    ]


def num_needed(gate: GateConfig, expected: Collection[str]) -> int:
    """Silos whose results are enough once the deadline has passed."""
    return len(expected) if gate.quorum is None else gate.quorum


def _missing(gate: GateConfig, silos: Losses, expected: Collection[str]) -> list[str]:
    needed = num_needed(gate, expected)
    said = f"{len(silos)} of {len(expected)} silos have judged it in time; allowed: {needed} or more (gate.quorum)"
    return [said] if len(silos) < needed else []


def _of_silos(gate: GateConfig, silos: Losses) -> list[str]:
    said = []
    if silos and gate.max_mean is not None and (mean := fmean(silos.values())) > gate.max_mean:
        said.append(f"the mean of {len(silos)} silos is {mean:.4f}; allowed: up to {gate.max_mean:g} (gate.max_mean)")
    if (most := gate.max_worst) is not None:
        worse = {silo: loss for silo, loss in sorted(silos.items()) if loss > most}
        said += [
            f"silo {silo} finds {loss:.4f}; allowed: up to {most:g} (gate.max_worst)" for silo, loss in worse.items()
        ]
    return said


def _compared(gate: GateConfig, silos: Losses, current: Losses, with_version: int) -> list[str]:
    if gate.max_mean_rise is None and gate.max_silo_rise is None:
        return []
    both = sorted(silo for silo in silos if silo in current)
    if not both:
        return [f"no silo has judged both it and version {with_version}"]
    said, beside = [], f"above version {with_version}"
    before, after = fmean(current[silo] for silo in both), fmean(silos[silo] for silo in both)
    if gate.max_mean_rise is not None and after - before > gate.max_mean_rise:
        said.append(
            f"the mean of {len(both)} silos is {after:.4f}, {after - before:+.4f} {beside}; allowed: "
            f"{gate.max_mean_rise:+g} (gate.max_mean_rise)"
        )
    if (most := gate.max_silo_rise) is not None:
        rises = {silo: silos[silo] - current[silo] for silo in both}
        said += [
            f"silo {silo} finds {silos[silo]:.4f}, {rise:+.4f} {beside}; allowed: {most:+g} (gate.max_silo_rise)"
            for silo, rise in rises.items()
            if rise > most
        ]
    return said


def _public(gate: GateConfig, found: float | None, current: float | None, with_version: int) -> list[str]:
    if not gate.public:
        return []
    if found is None:
        return ["the operator has not judged it by the public splits"]
    said = []
    if gate.max_public is not None and found > gate.max_public:
        said.append(f"the public splits have {found:.4f}; allowed: up to {gate.max_public:g} (gate.max_public)")
    if gate.max_public_rise is not None and current is not None and found - current > gate.max_public_rise:
        said.append(
            f"the public splits have {found:.4f}, {found - current:+.4f} above version {with_version}; allowed: "
            f"{gate.max_public_rise:+g} (gate.max_public_rise)"
        )
    return said
