"""A comparison on a cluster: each run is one SLURM job, that does on one node what `atoll launch local` does.

The jobs go on without the command that submitted them: killed and called again, it finds and follows them.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from launch.compare.compare import CompareConfig, Planned, plan_runs
from launch.compare.run import LAUNCH_GRACE_SECONDS, Started, export_origin
from launch.start.local import WHOLE, next_attempt
from launch.start.processes import Children
from launch.start.site import JobConfig, load_site
from launch.start.slurm import (
    Job,
    batch_script,
    check_installed,
    check_jobs,
    job_end,
    job_states,
    launch_whole,
    living_jobs,
    submitted_jobs,
)
from launch.start.stop import stop_jobs
from pretrain.config.errors import ConfigError, require
from pretrain.config.load import load_config

ASK_SECONDS = 5.0  # between two questions to SLURM, and before a job that it did not take is submitted again
LIVING = {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "RESIZING", "STOPPED"}
"""States in which a job may still come to its end; squeue leaves some of them out."""


@dataclass(kw_only=True)
class Submitted:
    """A run as a job."""

    planned: Planned
    cluster: "Cluster" = field(repr=False)
    job: str
    state: str = "PENDING"
    code: int | None = None
    """Its script's exit code, once it has ended."""

    @property
    def is_running(self) -> bool:
        """Whether it is at work, and not in the queue."""
        return self.state in ("RUNNING", "COMPLETING")

    @property
    def returncode(self) -> int | None:
        """Exit status; None while it may still come to its end."""
        self.cluster.look()
        return self.code

    def outcome(self) -> str:
        """How it ended, in a line."""
        if self.planned.is_finished:
            return f"{self.planned.name}: finished (job {self.job})"
        attempt, _ = submitted_jobs(self.planned.directory)
        where = f"{self.planned.directory}; see {attempt}/{WHOLE}.log"
        return f"{self.planned.name}: job {self.job} is {self.state}, exit status {self.code}, in {where}"


class Cluster:
    """Submits runs, and follows their jobs."""

    poll_seconds = 1.0

    def __init__(self, job: JobConfig) -> None:
        """`job` is how the site wants each of them."""
        self.job = job
        self._following: list[Submitted] = []
        self._next_look = self._next_start = 0.0
        self._said = ""

    def found(self, planned: Planned) -> Submitted | None:
        """The job of an earlier call, if it is still there. Raises ConfigError if SLURM does not answer."""
        if job := living_jobs(planned.directory).get(WHOLE):
            self._say(f"{planned.name}: job {job} of an earlier call is still there")
            return self._follow(planned, job)
        return None

    def start(self, planned: Planned) -> Started | None:
        """Submit it; None while SLURM does not take it beside those that are there. Raises ConfigError."""
        if time.monotonic() < self._next_start:
            return None
        with Children(grace_seconds=LAUNCH_GRACE_SECONDS) as children:
            if failed := export_origin(planned, children):
                return failed
        try:
            if found := self.found(planned):  # which another call has submitted meanwhile
                return found
            job = launch_whole(planned.config, self.job)
        except ConfigError as error:
            if not self._following:
                raise
            self._once(f"{planned.name} is not submitted yet: {error}")
            self._next_start = time.monotonic() + ASK_SECONDS
            return None
        self._say(f"{planned.name}: job {job}")
        return self._follow(planned, job)

    def _follow(self, planned: Planned, job: str) -> Submitted:
        submitted = Submitted(planned=planned, cluster=self, job=job)
        self._following.append(submitted)
        return submitted

    def look(self) -> None:
        """Ask SLURM about all jobs, now and then."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + ASK_SECONDS
        try:
            states = job_states({one.job: f"{one.planned.config.name}-{WHOLE}" for one in self._following})
            for one in list(self._following):
                config = one.planned.config
                state, code = (states[one.job], 0) if one.job in states else job_end(one.job)
                one.state = state
                if one.job not in states and state not in LIVING:
                    self._following.remove(one)
                    one.code = code
                    for folder in (one.planned.directory, *map(config.silo_directory, config.silos)):
                        with suppress(OSError):
                            os.listdir(folder)  # has NFS look again
        except ConfigError as error:  # SLURM does not answer at the moment
            self._once(str(error))

    def _say(self, line: str) -> None:
        print(line, flush=True)

    def _once(self, line: str) -> None:
        if line != self._said:
            self._say(line)
        self._said = line

    def stop(self, hurry: Callable[[], bool]) -> None:
        """Have all jobs save and stop, or leave the queue."""
        directories = {one.planned.directory: one.planned.name for one in self._following}
        while directories:
            try:
                stop_jobs(directories, self._say, hurry)
                return
            except ConfigError as error:  # SLURM does not answer at the moment
                self._once(str(error))
            if hurry():
                return
            time.sleep(ASK_SECONDS)


def cluster_of(spec: CompareConfig, site: Sequence[Path]) -> Cluster:
    """The cluster that a site describes, for the jobs of a comparison. Raises ConfigError for what does not fit."""
    job = load_site(list(site), load_config(spec.run, spec.settings)).job
    for key, given in (("scratch", job.scratch), ("numa", job.numa)):
        require(given is None, f"job.{key}", given, "null in a comparison, whose silos share a node")
    for planned in plan_runs(spec):
        num_processes = sum(silo.processes_per_node for silo in planned.config.silos.values())
        if 0 < job.gpus_per_node < num_processes:
            raise ConfigError(
                f"job.gpus_per_node: {job.gpus_per_node} given; allowed: 0, or one for each of the {num_processes} "
                f"processes of {planned.name}, which run on one node"
            )
    check_installed("atoll compare --site")
    return Cluster(job)


def describe_jobs(runs: Sequence[Planned], cluster: Cluster) -> str:
    """What SLURM says of the job of each run that is left, and the script of the first; writes nothing that stays."""
    lines, script = [], ""
    with tempfile.TemporaryDirectory(prefix="atoll-") as folder:
        for planned in (one for one in runs if not one.is_finished):
            if job := living_jobs(planned.directory).get(WHOLE):
                lines.append(f"{planned.name}: job {job} is still there")
                continue
            file = Path(folder) / f"{planned.config.name}.sbatch"
            attempt = next_attempt(planned.directory)
            file.write_text(batch_script(planned.config, WHOLE, cluster.job, attempt))
            script = script or file.read_text()
            said = check_jobs([Job(name=planned.name, script=file, settings=cluster.job)])
            lines += [f"{name}: {words}" for name, words in said.items()]
    return "\n".join([*lines, *([f"the script of the first:\n\n{script}"] if script else [])])
