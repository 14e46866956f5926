"""Running a comparison: what is not finished, so many runs at a time, each in a launch of its own."""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console

from launch.compare.compare import CompareConfig, Planned, is_ready, plan_runs
from launch.compare.pace import Followed, Pace
from launch.show.display import format_seconds
from launch.start.local import GRACE_SECONDS, StopSignals
from launch.start.processes import POLL_SECONDS, Child, ChildCommand, Children
from pretrain.config.load import save_config

ATOLL = [sys.executable, "-m", "launch.cli"]
# A launch of a run ends what is left of it after GRACE_SECONDS, and then itself.
LAUNCH_GRACE_SECONDS = GRACE_SECONDS + 10.0


class Started(Protocol):
    """A run that was started."""

    @property
    def is_running(self) -> bool:
        """Whether it is at work, and not in a queue."""

    @property
    def returncode(self) -> int | None:
        """Exit status; None until it has ended."""

    def outcome(self) -> str:
        """How it ended, in a line."""


class Place(Protocol):
    """Where runs are started: on this machine, or on a cluster (`site.py`)."""

    poll_seconds: float
    """How long to wait before looking again."""

    def found(self, planned: Planned) -> Started | None:
        """What an earlier call has started, and is still there."""

    def start(self, planned: Planned) -> Started | None:
        """Start a run; None where that cannot be now, but perhaps later. Raises ConfigError."""

    def stop(self, hurry: Callable[[], bool]) -> None:
        """Have all save and stop, and wait for them until `hurry` says that it is enough."""


def compare(spec: CompareConfig, *, jobs: int = 1, place: Place | None = None, console: Console | None = None) -> int:
    """Run what is not finished, `jobs` runs at a time, until one fails or a signal comes; here, or at a place.

    Returns the exit status: 0 finished, 1 a run crashed, 2 a user's mistake in a run, 128 + n stopped by signal n.
    Whatever is running then saves and stops, and the next call goes on with it. Raises ConfigError as `plan_runs`
    does. Call it from the main thread.
    """
    console = console or Console()
    runs = plan_runs(spec)
    waiting = [planned for planned in runs if not planned.is_finished]
    for planned in () if spec.keep_checkpoints else [one for one in runs if one not in waiting]:
        drop_checkpoints(planned)
    followed = {planned.directory: Followed(name=planned.name, config=planned.config) for planned in runs}
    pace = Pace(list(followed.values()))

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    say(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished ({spec.directory})")
    with StopSignals() as signals, Children(grace_seconds=LAUNCH_GRACE_SECONDS) as children:
        place, code = place or Here(children), None
        running = [(planned, started) for planned in waiting if (started := place.found(planned))]
        for planned, _ in running:
            waiting.remove(planned)
        while (waiting or running) and signals.first is None and code is None:
            ready = [one for one in waiting if is_ready(one, runs)] if len(running) < jobs else []
            for planned in ready[: jobs - len(running)]:
                if started := place.start(planned):
                    waiting.remove(planned)
                    running.append((planned, started))
            for planned, started in running:
                followed[planned.directory].state = "running" if started.is_running else "queued"
            for planned, started in [pair for pair in running if pair[1].returncode is not None]:
                running.remove((planned, started))
                followed[planned.directory].state = ""
                say(started.outcome())
                if not planned.is_finished:
                    code = started.returncode if started.returncode in (1, 2) else 1
                    break
                if not spec.keep_checkpoints:
                    drop_checkpoints(planned)
            if line := pace.due():
                say(line)
            time.sleep(place.poll_seconds)
        if code is None and signals.first is not None:
            say("stopping: what is running saves; the same command goes on")
            code = 128 + signals.first
        if code is not None:
            count = signals.count
            place.stop(lambda: signals.count > count)
    return code or 0


def drop_checkpoints(planned: Planned) -> None:
    """Delete what a finished run would only resume from; its model is in the store, or beside the checkpoints."""
    for silo in planned.config.silos:
        shutil.rmtree(planned.config.silo_directory(silo) / "checkpoints", ignore_errors=True)


@dataclass(frozen=True)
class Launched:
    """A run, or the export before it, as a process of this machine."""

    planned: Planned
    child: Child
    is_running: bool = True

    @property
    def returncode(self) -> int | None:
        """Exit status; None until it has ended."""
        return self.child.returncode

    def outcome(self) -> str:
        """How it ended, in a line."""
        if self.planned.is_finished:
            return f"{self.planned.name}: finished in {format_seconds(time.monotonic() - self.child.began)}"
        where = f"{self.planned.directory}; see {self.child.log_path}"
        return f"{self.planned.name}: exit status {self.child.returncode} in {where}"


class Here:
    """This machine: a launch of its own for each run, in a session of its own, so that a Ctrl-C reaches it once."""

    poll_seconds = POLL_SECONDS

    def __init__(self, children: Children) -> None:
        self._children = children

    def found(self, _planned: Planned) -> None:
        """Nothing outlives the call that has started it."""

    def start(self, planned: Planned) -> Started:
        """Start a launch, or say which export has failed."""
        if failed := export_origin(planned, self._children):
            return failed
        asked = planned.log.with_suffix(".yaml")
        save_config(planned.config, asked)
        launch = ChildCommand(name=planned.model, argv=[*ATOLL, "launch", "local", "--config", str(asked)])
        return Launched(planned, self._children.start(launch, planned.log))

    def stop(self, hurry: Callable[[], bool]) -> None:
        """Have all save and stop; what is left when `hurry` says so, or their time is over, is killed."""
        self._children.stop(hurry)


def export_origin(planned: Planned, children: Children) -> Launched | None:
    """Export the model that a personalised run goes on from, unless that is done; returns an export that failed."""
    origin = Path(str(planned.config.model.checkpoint))
    if planned.kind != "personalised" or origin.exists():
        return None
    # A program of its own: this one stays without torch and its threads.
    form = ["--merged"] if planned.config.model.adapter.is_on else []  # a new adapter goes on beside that
    argv = [*ATOLL, "export", str(origin.parent), "--output", str(origin), *form]
    planned.log.parent.mkdir(parents=True, exist_ok=True)
    export = children.start(ChildCommand(name="export", argv=argv), planned.log)
    return Launched(planned, export) if export.process.wait() else None
