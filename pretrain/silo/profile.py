"""Where the time of every n-th round goes, part by part, and a trace of its last step that Perfetto opens."""

import gzip
import itertools
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from pretrain.host.journal import Journal

OF_A_ROUND = ("sync", "waiting")  # what is measured all round long; all else is of the recorded step
KEPT_TRACES = 16


class RoundProfile:
    """Measures the rounds that are due; of a rank without a journal, and of other rounds, nothing.

    A step's parts are measured in the round's last one, which torch's profiler records, with the fragment that leaves
    after it, up to the wait for what comes back. There the device is waited for at the end of each part, so that its
    time is its own; no value depends on that.
    """

    def __init__(self, directory: Path, journal: Journal | None, every_rounds: int) -> None:
        """`directory` is the silo's, traces go to `traces` in it; with `every_rounds` 0 no round is due."""
        self._directory, self._journal = directory / "traces", journal
        self._every_rounds = every_rounds if journal else 0
        self._round = self._step = 0
        self._profiler: torch.profiler.profile | None = None
        self._is_recording = False
        self._begin(0)

    def _begin(self, round: int) -> None:
        self.close()
        self._round, self._num_steps, self._step_seconds = round, 0, 0.0
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def step(self, round: int, step: int, *, is_last: bool) -> Iterator[None]:
        """Around inner step number `step` of a round, both from 1; `is_last`: of the round."""
        if not self._every_rounds or round % self._every_rounds:
            yield
            return
        if round != self._round:
            self._begin(round)
        self._num_steps += 1
        if not is_last:
            yield
            return
        get_accelerator().synchronize()
        self._profiler, self._step = torch.profiler.profile(), step
        self._profiler.start()
        self._is_recording, began = True, time.perf_counter()
        yield
        self._step_seconds = time.perf_counter() - began

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around a part of the loop: data, forward, backward, optimizer, sync, waiting."""
        if name == "waiting":
            self._stop()  # it may take hours, in which ranks talk
        if not (self._is_recording or (self._round and name in OF_A_ROUND)):
            yield
            return
        began = time.perf_counter()
        with torch.profiler.record_function(name):
            yield
            get_accelerator().synchronize()
        self._seconds[name] += time.perf_counter() - began

    def end_round(self) -> None:
        """Write the trace and the record of the round that has ended, if it was measured."""
        self._stop()
        if self._journal and self._profiler:
            trace = self._write_trace(self._profiler).relative_to(self._directory.parent)
            self._journal.record("profile", step=self._step, round=self._round, shares=self._shares(), trace=str(trace))
        self._begin(0)

    def _shares(self) -> dict[str, float]:
        """Of the time that a step takes with its share of the round's syncs."""
        of_round = {name: self._seconds.pop(name, 0.0) / self._num_steps for name in OF_A_ROUND}
        of_step = {**self._seconds, "other": max(0.0, self._step_seconds - sum(self._seconds.values()))}
        total = sum(of_step.values()) + sum(of_round.values())
        return {name: seconds / total for name, seconds in (of_step | of_round).items()}

    def _write_trace(self, profiler: torch.profiler.profile) -> Path:
        """Its path. None is overwritten, and the newest KEPT_TRACES stay."""
        self._directory.mkdir(parents=True, exist_ok=True)
        names = (self._directory / f"round-{self._round:06d}-{number}.json.gz" for number in itertools.count(1))
        path = next(name for name in names if not name.exists())
        plain, packed = self._directory / "trace.json", self._directory / "trace.tmp"
        profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(packed, "wb") as target:
            shutil.copyfileobj(source, target)
        plain.unlink()
        packed.rename(path)
        written = sorted(self._directory.glob("round-*.json.gz"), key=lambda file: (file.stat().st_mtime_ns, file.name))
        for old in written[:-KEPT_TRACES]:
            old.unlink()
        return path

    def _stop(self) -> None:
        if self._is_recording and self._profiler:
            self._profiler.stop()
        self._is_recording = False

    def close(self) -> None:
        """Drop what was recorded of a round that has not ended."""
        self._stop()
        self._profiler = None
