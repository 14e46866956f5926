"""Who takes part in a round, how long a commit waits, and how many steps a slow silo makes: pure functions."""

import hashlib
import statistics
from collections.abc import Mapping, Sequence

MUCH_FASTER = 4.0


def participants(roster: Sequence[str], round: int, *, sample: int | None, seed: int) -> list[str]:
    """The silos that train in a round, sorted: all, or `sample` of them, drawn by hash, anywhere alike."""
    if sample is None:
        return sorted(roster)
    return sorted(sorted(roster, key=lambda silo: hashlib.sha256(f"{seed}/{round}/{silo}".encode()).digest())[:sample])


def deadline_seconds(arrivals: Sequence[float], *, mads: float, floor: float, ceiling: float) -> float:
    """How long after the commit before a commit waits for more than its quorum.

    `arrivals` are the seconds that earlier deliveries took. Median and median absolute deviation, as a few stragglers
    must not move it; with none observed, the ceiling.
    """
    if not arrivals:
        return ceiling
    median = statistics.median(arrivals)
    spread = statistics.median(abs(seconds - median) for seconds in arrivals)
    return min(max(median + mads * spread, floor), ceiling)


def steps_of_round(seconds_per_step: Mapping[str, float], silo: str, sync_interval_steps: int) -> int:
    """Inner steps of a silo's next round, so that all arrive together: H for the fastest, at least 1 for any.

    However fast one says that it is, it counts as at most `MUCH_FASTER` times as fast as the median silo (the lower of
    two), so that where most say the truth their rounds do not shrink to nothing.
    """
    own = seconds_per_step.get(silo)
    if not own:
        return sync_interval_steps
    told = [seconds for seconds in seconds_per_step.values() if seconds > 0]
    fastest = max(min(told), statistics.median_low(told) / MUCH_FASTER)
    return max(1, round(sync_interval_steps * fastest / own))


def next_step(step: int, sync_interval_steps: int, round_steps: int) -> int:
    """The schedule's step after one more inner step, where `round_steps` inner steps make up the H of a round."""
    begin = step - step % sync_interval_steps
    done = -(-(step - begin) * round_steps // sync_interval_steps)
    return begin + (done + 1) * sync_interval_steps // round_steps


def passes(before: int, step: int, interval_steps: int) -> bool:
    """Whether a multiple of an interval lies after one step, up to another."""
    return step // interval_steps > before // interval_steps
