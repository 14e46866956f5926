"""Learning rates as a pure function of a cumulative count: of inner steps, or of rounds for the outer optimizer."""

import math


def scheduled_lr(
    step: int, *, lr: float, num_steps: int, schedule: str, warmup: int, decay: int, min_ratio: float
) -> float:
    """Learning rate of step `step` of `num_steps`, from 0, whatever the syncs and restarts before it.

    Linear warm-up over `warmup` steps to `lr`, then cosine to `lr * min_ratio`, or constant, or for wsd constant and
    linear to `lr * min_ratio` over the last `decay` steps.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    final = lr * min_ratio
    if schedule == "cosine":
        progress = (step - warmup) / max(1, num_steps - warmup)
        return final + (lr - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if schedule == "wsd" and step >= num_steps - decay:
        return final + (lr - final) * max(0.0, (num_steps - step) / decay)
    return lr
