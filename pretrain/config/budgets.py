"""The keys of the two budgets of differential privacy: a silo's own, and that of all silos. Imports no torch."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class PrivateConfig:
    """Differential privacy inside a silo, for one packed sequence of its text (docs/privacy.md)."""

    epsilon: float | None = None
    """The silo's budget: what it delivers in the whole run is (epsilon, delta)-private; null: it is not private at
    all."""
    delta: float = 1e-6
    """The other half of the budget, below 1 / sequences of the text."""
    clip_norm: float = 1.0
    """L2 norm that the gradient of one sequence is clipped to; of its mean loss over its tokens."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise on the sum of a batch's gradients, divided by `clip_norm`; null: the least with
    which inner.num_steps stay within the budget. With one that allows fewer, a silo with which others need not go on
    (membership.quorum) stops at its budget."""


@dataclass(kw_only=True)
class MemberPrivacyConfig:
    """Differential privacy in a secure sum, for all that one silo delivers in the whole run (docs/privacy.md)."""

    epsilon: float | None = None
    """The budget: the sums of all versions are (epsilon, delta)-private for each silo's whole text; null: they are not
    private at all."""
    delta: float = 1e-6
    """The other half of the budget, below 1 / silos of the roster."""
    clip_norm: float = 1.0
    """L2 norm that a silo's pseudo-gradient of a version is clipped to, all tensors of the fragment together."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise on a version's sum, divided by `clip_norm`; null: the least with which all
    versions of the run stay within the budget."""
    num_colluding: int = 1
    """Silos that may leave their share of the noise out, or tell it, without the promise being less: the others' shares
    are larger. Each silo knows its own, so with 0 the promise does not hold against a member."""
