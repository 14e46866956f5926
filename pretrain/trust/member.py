"""The budget of all silos: the noise of a secure sum, how it is shared out, and what its versions spend. No torch.

A version is one Gaussian mechanism: in its sum a silo's part is at most `clip_norm` long, and the noise has at least
`noise_multiplier * clip_norm`. V versions, each made when those before are known, are no worse than one whose noise is
divided by sqrt(V) (arXiv 1905.02383). No version is summed twice, so what is spent follows from its number alone, and
there is no account to lose.

**Shares.** T silos have to deliver (`membership.quorum`, or all), and C of them may lie (`num_colluding`). Each silo's
noise has `noise_multiplier * clip_norm / sqrt(T - C)`: so whichever T are in the sum, T - C honest ones make all that
was promised, and whoever else is in it, more. Where more than C leave theirs out, or put together what they know of
their own, h honest silos are left, and the noise is sqrt(h / (T - C)) of what was promised.

**Rounding.** Each silo adds its noise in float64 and rounds then, to whole numbers: a sum of rounded values is not the
rounded sum. Yet a value y with normal noise of deviation s, rounded, is j with the density at j - y of that noise and a
uniform number from -1/2 to 1/2. The sum of T of them has, by Poisson's summation, to within a factor of
1 + 3 exp(-pi^2 s^2) for each value and silo, the probabilities of this: the whole noise is added to the sum of all y,
then a uniform number for each silo but one, then it is rounded. That is made of the Gaussian mechanism's outcome alone.
With `LEAST_STEPS` for s, the least that is allowed, the factor differs from 1 by less than 10^-67.
"""

import math
from dataclasses import dataclass

from pretrain.config.errors import ConfigError, require
from pretrain.config.keys import RunConfig
from pretrain.config.privacy import MEMBER
from pretrain.silo.account import ROUNDING, gaussian

LEAST_STEPS = 4.0  # a share's standard deviation, in steps of the whole numbers that are added up


@dataclass(frozen=True, kw_only=True)
class MemberBudget:
    """What all silos have agreed on."""

    noise_multiplier: float
    delta: float
    clip_norm: float
    num_colluding: int

    def epsilon(self, version: int) -> float:
        """What the versions up to one spend."""
        return gaussian("epsilon", self.noise_multiplier / math.sqrt(version), self.delta) if version else 0.0

    def spent(self, version: int) -> dict[str, float]:
        """The same, as a commit says it."""
        return {"epsilon": self.epsilon(version), "delta": self.delta}

    def deviation(self, threshold: int) -> float:
        """Of one silo's noise, where so many have to deliver."""
        return self.noise_multiplier * self.clip_norm / math.sqrt(threshold - self.num_colluding)


def member_budget(config: RunConfig) -> MemberBudget | None:
    """Of a run; None if it has none. Raises ConfigError for one that the run's versions exceed."""
    given, num_versions = config.outer.member_privacy, config.schedule.num_versions
    if given.epsilon is None:
        return None
    needed = gaussian("sigma", given.epsilon, given.delta) * math.sqrt(num_versions) * (1 + ROUNDING)
    noise = given.noise_multiplier or needed
    if noise < needed:
        most = math.floor(num_versions * (noise / needed) ** 2)
        raise ConfigError(
            f"{MEMBER}.noise_multiplier: {noise:g} given; with it a budget of epsilon {given.epsilon:g}, delta "
            f"{given.delta:g} allows {most:,} of {num_versions:,} versions; allowed: {math.ceil(needed * 1e4) / 1e4:g} "
            "or more, null, another budget, or as many inner.num_steps"
        )
    return MemberBudget(
        noise_multiplier=noise, delta=given.delta, clip_norm=given.clip_norm, num_colluding=given.num_colluding
    )


def check_room(config: RunConfig, budget: MemberBudget, threshold: int) -> None:
    """Raise ConfigError where noise could leave the range of a secure sum, or is too little beside its rounding."""
    from pretrain.outer.fixed_point import scale  # both take torch
    from pretrain.silo.noise import MOST_DEVIATIONS

    fits = budget.num_colluding < threshold
    require(fits, f"{MEMBER}.num_colluding", budget.num_colluding, f"below {threshold}, the silos that have to deliver")
    outer, deviation = config.outer, budget.deviation(threshold)
    longest = budget.clip_norm + MOST_DEVIATIONS * deviation
    needed = f"{math.ceil(longest * 100) / 100:g} or more with {MEMBER}, where the noise of one value comes so far"
    require(outer.sum_range >= longest, "outer.sum_range", outer.sum_range, needed)
    most = scale(len(config.full_roster), outer.sum_range)
    needed = f"less with a noise of {deviation:.3g} a silo, which has to be {LEAST_STEPS:g} steps of the sum or more"
    require(deviation * most >= LEAST_STEPS, "outer.sum_range", outer.sum_range, needed)


def check_budget(config: RunConfig) -> None:
    """Raise ConfigError, before anything starts, for a budget that the run exceeds, or has no room for."""
    if budget := member_budget(config):
        check_room(config, budget, config.membership.quorum or len(config.full_roster))
