"""`atoll stop`: end what runs of a run directory on this machine and its cluster, with everything saved."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from launch.start.slurm import STOP_FILE, living_jobs, run_command, submitted_jobs
from pretrain.config.errors import ConfigError
from pretrain.host.lock import lock_holder

POLL_SECONDS = 0.5

Say = Callable[[str], object]


def stop_run(directory: Path, say: Say = print) -> list[str]:
    """Ask the jobs, the launcher, and what was started without one to save and stop; wait until all have ended.

    Returns what was stopped. Raises ConfigError if this is no run directory, or something of it runs elsewhere.
    """
    if not (directory / "config.yaml").is_file():
        raise ConfigError(f"run directory: {str(directory)!r} given; there is no config.yaml in it")
    return [*_stop_jobs(directory, say), *_stop_processes(directory, say)]


def _stop_jobs(directory: Path, say: Say) -> list[str]:
    attempt, _ = submitted_jobs(directory)
    living = living_jobs(directory)
    if not attempt or not living:
        return []
    (attempt / STOP_FILE).touch()  # launch/start/requeue.py looks for it
    asked: set[str] = set()
    stopped = [f"{name} (job {job})" for name, job in living.items()]
    while living:
        try:
            for name, job in living.items():
                if job not in asked and _ask(job):
                    say(f"{name}: job {job} saves and stops")
                    asked.add(job)
            living = living_jobs(directory)
        except ConfigError as error:  # SLURM does not answer at the moment
            say(str(error))
        time.sleep(POLL_SECONDS)
    return stopped


def _ask(job: str) -> bool:
    """Cancel a job that waits; ask one that runs to save and stop, as before its time limit. Whether it was asked.

    One whose script has not come to its srun looks for the file. What SIGTERM starts, SLURM ends after KillWait.
    """
    subprocess.run(["scancel", "--state=PENDING", job], check=False)
    steps = run_command(["squeue", "--steps", "--noheader", f"--jobs={job}", "--format=%i"]).split()
    runs = any(step.rpartition(".")[2].isdigit() for step in steps)
    return runs and subprocess.run(["scancel", "--signal=USR1", job], check=False).returncode == 0


def _stop_processes(directory: Path, say: Say) -> list[str]:
    """The launcher, which stops its children; then what holds a silo's folder, or the aggregator's, without one."""
    stopped = []
    for folder, what in _folders(directory):
        holder = lock_holder(folder)
        if holder is None:
            continue
        if holder.elsewhere:
            raise ConfigError(
                f"run directory: {str(directory)!r} given; {what} runs on another machine as process {holder.process}; "
                "stop it there"
            )
        say(f"{what}: process {holder.process} saves and stops")
        with suppress(ProcessLookupError):
            os.kill(holder.process, signal.SIGTERM)
        while lock_holder(folder):
            time.sleep(POLL_SECONDS)
        stopped.append(f"{what} (process {holder.process})")
    return stopped


def _folders(directory: Path) -> Iterator[tuple[Path, str]]:
    yield directory, "the launch"
    yield directory / "aggregator", "aggregator"
    yield directory / "relay", "relay"
    for folder in sorted((directory / "silos").glob("*")):
        yield folder, folder.name
