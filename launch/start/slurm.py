"""`atoll launch slurm`: one batch job for each silo and one for the aggregator, from a site's description.

A job is written, checked by `sbatch --test-only`, and only when all are in order is any submitted. Inside it, one srun
starts the silo on every node (`node.py`). Before the time limit, and when it is preempted, the silo saves and stops,
and the job puts itself back into the queue (`requeue.py`), so that a run of any length passes through limits of any
length.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launch.show.display import AGGREGATOR
from launch.start.gpus import check_gpus
from launch.start.local import WHOLE, hold_directory, make_attempt, point_latest, process_directory
from launch.start.site import JobConfig, SiteConfig
from pretrain.config.check import accumulation_steps
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig, SiloConfig
from pretrain.config.load import load_config, save_config
from pretrain.trust.members import with_keys

TEMPLATES = Path(__file__).parents[2] / "slurm"
JOBS_FILE = "jobs.json"
"""In an attempt's folder: silo, or aggregator, to the id of its job."""
STOP_FILE = "stop"
"""In an attempt's folder: its jobs are not to come back."""
OPTIONS = ("partition", "account", "qos", "constraint", "exclude")
"""Keys of a job that sbatch and srun take as they are."""
FORGOTTEN = "Invalid job id"
"""In what squeue says of a job that ended some minutes ago."""
PROBE_SECONDS = 10
# What a compute node lacks of the files given to it.
PROBE = 'for file in "$@"; do [ -r "$file" ] || echo "$SLURMD_NODENAME $file"; done'


@dataclass(frozen=True, kw_only=True)
class Job:
    """A batch script and the silo, or aggregator, that it runs."""

    name: str
    script: Path
    settings: JobConfig


def render_jobs(config: RunConfig, site: SiteConfig, attempt: Path, *, aggregator: bool = True) -> list[Job]:
    """Write the resolved configuration, and a script for each job into the attempt's folder."""
    names = ([AGGREGATOR] if aggregator and config.exchange.kind == "store" else []) + sorted(config.silos)
    return _write_jobs(
        config, {name: site.aggregator if name == AGGREGATOR else site.silos[name] for name in names}, attempt
    )


def _write_jobs(config: RunConfig, settings: Mapping[str, JobConfig], attempt: Path) -> list[Job]:
    config = with_keys(config, make=True)
    save_config(config, Path(config.directory).absolute() / "config.yaml")
    jobs = []
    for name, job in settings.items():
        script = attempt.absolute() / f"{name}.sbatch"
        script.write_text(batch_script(config, name, job, attempt))
        jobs.append(Job(name=name, script=script, settings=job))
    return jobs


def batch_script(config: RunConfig, name: str, job: JobConfig, attempt: Path) -> str:
    """What a job runs: a silo, the aggregator, or with `WHOLE` as name all of the run on one node."""
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=in_a_line,
    )
    templates.filters |= {"quote": lambda value: shlex.quote(str(value)), "bash": Bash}
    kind = name if name == AGGREGATOR else "whole" if name == WHOLE else "silo"
    return templates.get_template(f"{kind}.sbatch.j2").render(
        name=name,
        run=config.name,
        attempt=attempt.absolute(),
        config_path=Path(config.directory).absolute() / "config.yaml",
        own_directory=process_directory(config, name).absolute(),
        silo=config.silos.get(name),
        num_threads=sum(silo.processes_per_node * silo.num_threads for silo in config.silos.values()),
        node_counts=node_counts(name, config.silos[name]) if name in config.silos else [],
        job=job,
        options=OPTIONS,
        stop_file=attempt.absolute() / STOP_FILE,
        python=job.python or sys.executable,
        host_python=host_python(job),
    )


def node_counts(name: str, silo: SiloConfig) -> list[int]:
    """With how many nodes its job can train, the fewest first: of its range, those that the batch divides among."""
    found = []
    for num_nodes in range(silo.fewest_nodes, silo.num_nodes + 1):
        with suppress(ConfigError):
            accumulation_steps(name, silo, num_nodes * silo.processes_per_node)
            found.append(num_nodes)
    return found


class Bash(str):
    """Lines of bash that a site wants run: the one thing in a script that may be more than a value."""


def in_a_line(value: object) -> object:
    """What is put into a script, as it is. Raises ConfigError if it would end its line: sbatch reads a quoted value no
    further, and bash would run the rest.
    """
    if not isinstance(value, Bash) and not str(value).isprintable():
        raise ConfigError(f"{str(value)!r} given for a batch script; allowed: one line, without control characters")
    return value


def host_python(job: JobConfig) -> Path:
    """The interpreter of what runs on a node beside a container."""
    return Path(sys.executable if job.container or not job.python else job.python)


def check_jobs(jobs: list[Job]) -> dict[str, str]:
    """What `sbatch --test-only` says of each job: when and where it would start. Raises ConfigError if it would not."""
    said = {job.name: _sbatch(job, "--test-only") for job in jobs}
    for job in jobs:
        _check_time_limit(job)
    return said


def _check_time_limit(job: Job) -> None:
    """Raise ConfigError for a limit above the partition's, which many clusters take, and never start, or one that
    leaves no time to train.
    """
    limit, warn_seconds = job.settings.time_limit, job.settings.warn_seconds
    # SLURM may send the signal up to a minute early.
    if limit and time_limit_seconds(limit) <= warn_seconds + 60:
        raise ConfigError(
            f"{job.name}: time_limit: {limit!r} given; allowed: more than a minute above the {warn_seconds} seconds "
            "before it at which warn_seconds stops the job"
        )
    partition = [f"--partition={job.settings.partition}"] if job.settings.partition else []
    most = run_command(["sinfo", "--noheader", "--format=%P %l", *partition]).split()
    for name, allowed in zip(most[::2], most[1::2], strict=True):
        is_ours = name.rstrip("*") == job.settings.partition or (name.endswith("*") and not partition)
        if is_ours and limit and allowed != "infinite" and time_limit_seconds(limit) > time_limit_seconds(allowed):
            raise ConfigError(
                f"{job.name}: time_limit: {limit!r} given; allowed: up to {allowed}, the limit of partition "
                f"{name.rstrip('*')}"
            )


def time_limit_seconds(limit: str) -> int:
    """SLURM's ways to write a time: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises ConfigError."""
    days, _, rest = limit.rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
        if days:
            hours, minutes, seconds = [*parts, 0, 0][:3]
        else:
            hours, minutes, seconds = [0, *parts, 0][:3] if len(parts) == 1 else [0, *parts][-3:]
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    except ValueError:
        raise ConfigError(f"time_limit: {limit!r} given; allowed: as sbatch takes it, 1-12:00:00 for example") from None


def check_nodes(config: RunConfig, jobs: list[Job]) -> str:
    """Have free nodes look for what all must see, for the largest silo of each kind of nodes.

    Returns a note on those that were not free. Raises ConfigError if a node lacks something.
    """
    largest: dict[tuple[str, ...], Job] = {}
    for job in sorted(
        (job for job in jobs if job.name in config.silos), key=lambda job: config.silos[job.name].num_nodes
    ):
        largest[tuple(getattr(job.settings, key) or "" for key in OPTIONS)] = job
    return "; ".join(filter(None, (_probe(config, job) for job in largest.values())))


def _probe(config: RunConfig, job: Job) -> str:
    silo = config.silos[job.name]
    files = [job.script, config.tokenizer_file.absolute(), *(Path(path).absolute() for path in silo.data)]
    files += [config.template_file.absolute()] if config.template_file else []
    files += [host_python(job.settings)]
    where = [f"--{key}={value}" for key in OPTIONS if (value := getattr(job.settings, key))]
    srun = ["srun", f"--immediate={PROBE_SECONDS}", "--quiet", "--time=1", *where, *job.settings.sbatch]
    command = [*srun, f"--nodes={silo.fewest_nodes}-{silo.num_nodes}", "bash", "-c", PROBE, "probe"]  # a task on each
    done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, check=False, cwd="/")
    if done.returncode:
        reason = " ".join(done.stderr.split()).replace("srun: error: ", "")
        return f"not checked whether the nodes of {job.name} see {config.directory}: {reason or 'no answer'}"
    for line in sorted(done.stdout.splitlines()):
        node, file = line.split(" ", 1)
        raise ConfigError(f"{job.name}: node {node} does not see {file}; allowed: a file system that all nodes share")
    return ""


def submit_jobs(jobs: list[Job], attempt: Path) -> dict[str, str]:
    """Submit all; returns and writes down their job ids. Those submitted are cancelled if one cannot be."""
    submitted: dict[str, str] = {}
    try:
        for job in jobs:
            submitted[job.name] = _sbatch(job, "--parsable").split(";")[0]
            (attempt / JOBS_FILE).write_text(json.dumps(submitted, indent=1) + "\n")
    except BaseException:
        if submitted:
            subprocess.run(["scancel", *submitted.values()], check=False)
        raise
    point_latest(attempt)
    return submitted


def launch_slurm(
    config: RunConfig, site: SiteConfig, *, aggregator: bool = True, dry_run: bool = False
) -> tuple[dict[str, str], list[str]]:
    """Write, check and submit the jobs.

    Returns each one's id, or with `dry_run` what sbatch says of it, and notes for the user. Raises ConfigError, before
    anything is submitted, for what sbatch would not take, nodes that do not see the files, and if jobs of this run
    directory are still there.
    """
    directory = Path(config.directory)
    for name, silo in config.silos.items():
        job, where = site.silos[name], "that the site's jobs have on a node"
        check_gpus(name, silo.processes_per_node, job.gpus_per_node, where)
    check_installed("atoll launch slurm")
    with hold_directory(directory):
        _check_no_jobs(directory)
        attempt = make_attempt(directory)
        jobs = render_jobs(config, site, attempt, aggregator=aggregator)
        said = check_jobs(jobs)
        notes = [f"scripts and logs: {attempt}"]
        if note := check_nodes(config, jobs):
            notes.append(note)
        return (said if dry_run else submit_jobs(jobs, attempt)), notes


def launch_whole(config: RunConfig, job: JobConfig) -> str:
    """Write, check and submit one job that runs all of a run on one node; returns its id.

    Raises ConfigError as `launch_slurm` does.
    """
    directory = Path(config.directory)
    with hold_directory(directory):
        _check_no_jobs(directory)
        attempt = make_attempt(directory)
        jobs = _write_jobs(config, {WHOLE: job}, attempt)
        check_jobs(jobs)
        return submit_jobs(jobs, attempt)[WHOLE]


def check_installed(command: str) -> None:
    """Raise ConfigError where there is no SLURM."""
    if not shutil.which("sbatch"):
        raise ConfigError(f"{command}: sbatch is not installed here; run it on a login node")


def _check_no_jobs(directory: Path) -> None:
    if running := living_jobs(directory):
        raise ConfigError(
            f"directory: {str(directory)!r} given; its jobs {', '.join(running.values())} are still there; stop "
            "them with atoll stop first"
        )


def submitted_jobs(directory: Path) -> tuple[Path | None, dict[str, str]]:
    """The last attempt that submitted jobs, and their ids; an attempt is made only when those before have ended."""
    attempts = sorted((directory / "logs").glob(f"attempt-*/{JOBS_FILE}"), key=_attempt_number)
    return (attempts[-1].parent, json.loads(attempts[-1].read_text())) if attempts else (None, {})


def _attempt_number(file: Path) -> int:
    return int(file.parent.name.removeprefix("attempt-"))


def living_jobs(directory: Path) -> dict[str, str]:
    """Silo, or aggregator, to the id of its job, for those that are in the queue or run."""
    names = job_names(directory)
    living = job_states(names)
    return {name: job for name, job in submitted_jobs(directory)[1].items() if job in living}


def job_names(directory: Path) -> dict[str, str]:
    """Of the jobs that were submitted last, each one's id to its name in the queue."""
    jobs = submitted_jobs(directory)[1]
    run = load_config([directory / "config.yaml"]).name if jobs else ""
    return {job: f"{run}-{name}" for name, job in jobs.items()}


def job_state(job: str, name: str) -> str:
    """PENDING, RUNNING, COMPLETING ...; empty when it has ended. Raises ConfigError as `job_states` does."""
    return job_states({job: name}).get(job, "")


def job_states(names: Mapping[str, str]) -> dict[str, str]:
    """Of the jobs with these ids and names, those in the queue or running: PENDING, RUNNING, COMPLETING ...

    A job with another name is another cluster's, or a later one. Raises ConfigError if SLURM does not answer.
    """
    if not names:
        return {}
    try:
        said = run_command(["squeue", "--noheader", f"--jobs={','.join(names)}", "--format=%i|%T|%j"])
    except ConfigError as error:
        if FORGOTTEN in str(error):
            return {}
        raise
    found = (line.strip().split("|", 2) for line in said.splitlines())
    return {job: state for job, state, name in found if names.get(job) == name}


def job_end(job: str) -> tuple[str, int]:
    """How a job that `job_states` has no more ended, as COMPLETED, FAILED, CANCELLED, TIMEOUT, and its exit code.

    SLURM forgets it after some minutes: then it is UNKNOWN. Raises ConfigError if SLURM does not answer.
    """
    try:
        shown = run_command(["scontrol", "show", "job", job, "--oneliner"])
    except ConfigError as error:
        if FORGOTTEN in str(error):
            return "UNKNOWN", 1
        raise
    state, code = re.search(r" JobState=(\S+)", shown), re.search(r" ExitCode=(\d+):", shown)
    return state[1] if state else "UNKNOWN", int(code[1]) if code else 1


def run_command(command: list[str]) -> str:
    """What one of SLURM's commands prints. Raises ConfigError with what it says when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{command[0]} is not installed here; use a login node of the cluster") from None
    if done.returncode:
        raise ConfigError(f"{command[0]}: {' '.join((done.stderr or done.stdout).split()) or 'no answer'}")
    return done.stdout


def _sbatch(job: Job, *options: str) -> str:
    done = subprocess.run(["sbatch", *options, str(job.script)], capture_output=True, text=True, check=False)
    said = " ".join((done.stdout + done.stderr).split())
    if done.returncode:
        reason = said.replace("sbatch: error: ", "").replace("allocation failure: ", "")
        raise ConfigError(f"{job.name}: sbatch does not take {os.path.relpath(job.script)}: {reason}")
    return done.stdout.strip() or said  # a site's own notes go to stderr, and so does what --test-only says
