"""`atoll stop`: end what runs of a run directory on this machine and its cluster, with everything saved."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from launch.start.slurm import STOP_FILE, job_names, job_states, living_jobs, run_command, submitted_jobs
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
    return [*stop_jobs({directory: ""}, say), *_stop_processes(directory, say)]


def stop_jobs(runs: Mapping[Path, str], say: Say = print, hurry: Callable[[], bool] = lambda: False) -> list[str]:
    """Ask the jobs of run directories to save and stop; wait until all have ended, or `hurry` says that it is enough.

    Each directory has words that are said in place of a silo's name, if there are any. Returns what was stopped.
    """
    names, words = dict[str, str](), dict[str, str]()
    for directory, run in runs.items():
        attempt, _ = submitted_jobs(directory)
        for name, job in living_jobs(directory).items():
            assert attempt
            (attempt / STOP_FILE).touch()  # launch/start/requeue.py looks for it
            names[job], words[job] = job_names(directory)[job], run or name
    living, asked = list(names), set[str]()
    while living:
        try:
            for job in living:
                if job not in asked and _ask(job):
                    say(f"{words[job]}: job {job} saves and stops")
                    asked.add(job)
            living = list(job_states(names))
        except ConfigError as error:  # SLURM does not answer at the moment
            say(str(error))
        if hurry():
            break
        time.sleep(POLL_SECONDS)
    return [f"{words[job]} (job {job})" for job in names]


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
