"""`atoll launch slurm`: one batch job for each silo and one for the aggregator, from a site's description.

A job is written, checked by `sbatch --test-only`, and only when all are in order is any submitted. Inside it, one srun
starts torchrun on every node. Before the time limit, and when it is preempted, the silo saves and stops, and the job
puts itself back into the queue (`launch/requeue.py`), so that a run of any length passes through limits of any length.
"""

import json
import os
import shlex
import subprocess
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launch.display import AGGREGATOR
from launch.local import hold_directory, process_directory
from pretrain.config import ConfigError, RunConfig, Section, load_typed, save_config, spread

TEMPLATES = Path(__file__).parent.parent / "slurm"
FIRST_PORT, NUM_PORTS = 20_000, 10_000


@dataclass(kw_only=True)
class JobConfig:
    """How a site wants its jobs; every null leaves the choice to SLURM."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time_limit: str | None = None
    """As sbatch takes it; the run passes through it."""
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    """CPU cores of a node that a silo's processes share; null: their threads."""
    memory: str | None = None
    """Of a node, as sbatch takes it."""
    exclude: str | None = None
    """Nodes that are not to be used."""
    sbatch: list[str] = field(default_factory=list)
    """More options of sbatch, each a whole one: `--mail-type=FAIL`."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for all processes of the job."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash before anything starts."""
    container: str | None = None
    """Apptainer image in which the processes run; the run directory, data and tokenizer must be visible inside."""
    python: str = ""
    """Interpreter that has atoll; empty: the one that submits."""
    interface: str | None = None
    """Network interface for NCCL and gloo."""
    warn_seconds: int = 120
    """How long before its time limit a job is told to save and stop."""
    max_crashes: int = 3
    """How often a job that crashed puts itself back into the queue."""


@dataclass(kw_only=True)
class SiteConfig:
    """One cluster: `job` for all jobs, and what is different for the aggregator and for single silos."""

    job: JobConfig = field(default_factory=JobConfig)
    aggregator: JobConfig = field(default_factory=JobConfig)
    silos: dict[str, JobConfig] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A batch script and the silo, or aggregator, that it runs."""

    name: str
    script: Path
    settings: JobConfig


def load_site(paths: list[Path], config: RunConfig) -> SiteConfig:
    """A site for the silos of a run. Raises ConfigError."""

    def prepare(given: Section) -> None:
        unknown = sorted(set(given.get("silos") or {}) - set(config.full_roster))
        if unknown:
            raise ConfigError(f"silos.{unknown[0]}: unknown silo given; allowed: {', '.join(config.full_roster)}")
        sections = spread(given.get("job"), {AGGREGATOR: given.get(AGGREGATOR), **(given.get("silos") or {})})
        given[AGGREGATOR] = sections.pop(AGGREGATOR)
        given["silos"] = spread(given.get("job"), dict.fromkeys(config.silos)) | sections

    return load_typed(SiteConfig, paths, prepare=prepare)


def render_jobs(config: RunConfig, site: SiteConfig, *, aggregator: bool = True) -> list[Job]:
    """Write the resolved configuration and a script for each job into the run directory."""
    directory = Path(config.directory).absolute()
    save_config(config, directory / "config.yaml")
    folder = directory / "slurm"
    folder.mkdir(exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["quote"] = lambda value: shlex.quote(str(value))
    jobs = []
    names = ([AGGREGATOR] if aggregator and config.exchange.kind == "store" else []) + sorted(config.silos)
    for number, name in enumerate(names):
        job = site.aggregator if name == AGGREGATOR else site.silos[name]
        script = folder / f"{name}.sbatch"
        text = templates.get_template("aggregator.sbatch.j2" if name == AGGREGATOR else "silo.sbatch.j2").render(
            name=name,
            run=config.name,
            directory=directory,
            config_path=directory / "config.yaml",
            status_path=process_directory(config, name).absolute() / "status.json",
            silo=config.silos.get(name),
            job=job,
            python=job.python or sys.executable,
            # Jobs of one user on one node must not meet: each run's silos have ports of their own.
            port=FIRST_PORT + (zlib.crc32(str(directory).encode()) + number) % NUM_PORTS,
        )
        script.write_text(text)
        jobs.append(Job(name=name, script=script, settings=job))
    return jobs


def check_jobs(jobs: list[Job]) -> dict[str, str]:
    """What `sbatch --test-only` says of each job: when and where it would start. Raises ConfigError if it would not."""
    said = {job.name: _sbatch(job, "--test-only") for job in jobs}
    for job in jobs:
        _check_time_limit(job)
    return said


def _check_time_limit(job: Job) -> None:
    """Raise ConfigError for a limit above the partition's, which many clusters take, and never start."""
    limit = job.settings.time_limit
    partition = [f"--partition={job.settings.partition}"] if job.settings.partition else []
    most = _run(["sinfo", "--noheader", "--format=%P %l", *partition]).split()
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


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def submit_jobs(jobs: list[Job], directory: Path) -> dict[str, str]:
    """Submit all; returns and writes down their job ids. Those submitted are cancelled if one cannot be."""
    submitted: dict[str, str] = {}
    try:
        for job in jobs:
            submitted[job.name] = _sbatch(job, "--parsable").split(";")[0]
    except ConfigError:
        if submitted:
            subprocess.run(["scancel", *submitted.values()], check=False)
        raise
    (directory / "slurm" / "jobs.json").write_text(json.dumps(submitted, indent=1) + "\n")
    return submitted


def launch_slurm(
    config: RunConfig, site: SiteConfig, *, aggregator: bool = True, dry_run: bool = False
) -> dict[str, str]:
    """Write, check and submit the jobs; returns each one's id, or with `dry_run` what sbatch says of it.

    Raises ConfigError, before anything is submitted, for what sbatch would not take and if jobs of this run directory
    are still there.
    """
    with hold_directory(Path(config.directory)):
        running = living_jobs(Path(config.directory))
        if running:
            raise ConfigError(
                f"directory: {config.directory!r} given; its jobs {', '.join(running.values())} are still there; stop "
                "them with scancel first"
            )
        jobs = render_jobs(config, site, aggregator=aggregator)
        checked = check_jobs(jobs)
        return checked if dry_run else submit_jobs(jobs, Path(config.directory).absolute())


def living_jobs(directory: Path) -> dict[str, str]:
    """Silo, or aggregator, to the id of its job, for those that are in the queue or run."""
    file = directory / "slurm" / "jobs.json"
    submitted: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
    return {name: job for name, job in submitted.items() if job_state(job)}


def job_state(job: str) -> str:
    """PENDING, RUNNING, COMPLETING ...; empty when it has ended."""
    return _run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"]).strip()


def _sbatch(job: Job, *options: str) -> str:
    try:
        done = subprocess.run(["sbatch", *options, str(job.script)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError("atoll launch slurm: sbatch is not installed here; run it on a login node") from None
    said = " ".join((done.stdout + done.stderr).split())
    if done.returncode:
        reason = said.replace("sbatch: error: ", "").replace("allocation failure: ", "")
        raise ConfigError(f"{job.name}: sbatch does not take {os.path.relpath(job.script)}: {reason}")
    return said
