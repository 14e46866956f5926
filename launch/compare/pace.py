"""How far a comparison is while its runs go on, and how long it will still take."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.show.display import Progress, format_seconds
from launch.show.metrics import MetricsReader
from pretrain.config.keys import RunConfig

FIRST_SECONDS, LONGEST_SECONDS = 30.0, 600.0  # from one line to the next: each time twice as long


@dataclass(kw_only=True)
class Followed:
    """One run, as its metrics tell it."""

    name: str
    config: RunConfig
    state: str = ""
    """running, or queued at a cluster."""
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        self.progress = Progress(config=self.config)
        self._reader = MetricsReader(Path(self.config.directory) / "metrics.jsonl")

    def _tokens(self, silo: str, num_steps: int) -> int:
        return num_steps * self.config.silos[silo].global_batch_sequences * self.config.sequence_tokens

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return sum(self._tokens(silo, self.config.inner.num_steps) for silo in self.config.silos)

    def tokens_done(self) -> int:
        """What its silos have trained on by now."""
        for record in self._reader.read_new():
            self.progress.take(record)
        return sum(self._tokens(name, silo.step) for name, silo in self.progress.silos.items())

    @property
    def words(self) -> str:
        """Its name, and the step of its slowest silo."""
        step = min(silo.step for silo in self.progress.silos.values())
        return f"{self.name} at step {step:,} of {self.config.inner.num_steps:,}"


class Pace:
    """Says now and then where all runs are."""

    def __init__(self, runs: Sequence[Followed]) -> None:
        """Time left is estimated from what is trained on from now on."""
        self._runs = runs
        self._total = sum(run.tokens for run in runs)
        self._began, self._before = time.monotonic(), self._done()
        self._pause = FIRST_SECONDS
        self._next = self._began + self._pause

    def _done(self) -> int:
        return sum(run.tokens_done() for run in self._runs)

    def due(self) -> str | None:
        """A line, if it is time for one."""
        if time.monotonic() < self._next:
            return None
        self._pause = min(2 * self._pause, LONGEST_SECONDS)
        self._next = time.monotonic() + self._pause
        return self.line()

    def line(self) -> str:
        """Share of all tokens, what runs, and time left."""
        done, passed = self._done(), time.monotonic() - self._began
        running = ", ".join(run.words for run in self._runs if run.state == "running") or "nothing"
        if queued := ", ".join(run.name for run in self._runs if run.state == "queued"):
            running += f"; in the queue: {queued}"
        left = "measuring the time left"
        if done > self._before and passed > 0:
            left = f"about {format_seconds((self._total - done) * passed / (done - self._before))} left"
        return f"{done / self._total:.0%} of all tokens, {left}; running: {running}"
