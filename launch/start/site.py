"""What a site says of its cluster, once for all runs: the keys of `configs/site/*.yaml`."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from launch.show.display import AGGREGATOR
from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import RunConfig
from pretrain.config.load import Section, load_typed, spread
from pretrain.config.presets import SITE, find_preset

RUNTIMES = ("apptainer", "pyxis")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
BINDINGS = ("node", "socket", "exclusive", "core-complex")


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
    """Image in which the processes run."""
    runtime: str = "apptainer"
    """What runs the container: apptainer or pyxis."""
    mounts: list[str] = field(default_factory=list)
    """What of the node is visible in the container, as the runtime takes it: run directory, data, tokenizer, and the
    directory in which the launch is made."""
    python: str = ""
    """Interpreter that has atoll, in the container if there is one; empty: the one that submits."""
    scratch: str | None = None
    """Folder of a node's own, such as `$TMPDIR` (the batch script's): shards are copied there at each start and caches
    put there, and both removed at its end."""
    numa: str | None = None
    """How a process is bound to the cores near its GPU: node, socket, exclusive or core-complex."""
    interface: str | None = None
    """Network interface for NCCL and gloo."""
    warn_seconds: int = 120
    """How long before its time limit a job is told to save and stop."""
    max_crashes: int = 3
    """How often a job that crashed puts itself back into the queue."""
    exclude_after: int = 2
    """Crashes that began on a node, after which the job does without it."""


@dataclass(kw_only=True)
class SiteConfig:
    """One cluster: `job` for all jobs, and what is different for the aggregator and for single silos."""

    job: JobConfig = field(default_factory=JobConfig)
    aggregator: JobConfig = field(default_factory=JobConfig)
    silos: dict[str, JobConfig] = field(default_factory=dict)


def load_site(paths: list[Path], config: RunConfig) -> SiteConfig:
    """A site for the silos of a run. Raises ConfigError."""

    def prepare(given: Section) -> None:
        unknown = sorted(set(given.get("silos") or {}) - set(config.full_roster))
        if unknown:
            raise ConfigError(f"silos.{unknown[0]}: unknown silo given; allowed: {named(config.full_roster)}")
        sections = spread(given.get("job"), {AGGREGATOR: given.get(AGGREGATOR), **(given.get("silos") or {})})
        given[AGGREGATOR] = sections.pop(AGGREGATOR)
        given["silos"] = spread(given.get("job"), dict.fromkeys(config.silos)) | sections

    site = load_typed(SiteConfig, [_site_file(path) for path in paths], prepare=prepare)
    for name, job in {AGGREGATOR: site.aggregator, **site.silos}.items():
        for key, given, allowed in (("runtime", job.runtime, RUNTIMES), ("numa", job.numa, (None, *BINDINGS))):
            if given not in allowed:
                words = ", ".join(str(one or "null") for one in allowed)
                raise ConfigError(f"{name}: {key}: {given!r} given; allowed: {words}")
        _check_lines(name, job)
    return site


def _site_file(path: Path) -> Path:
    """A file as it is named, or the preset of that name. Raises ConfigError."""
    return path if path.suffix or path.exists() else find_preset(SITE, str(path), key="--site").path


def _check_lines(name: str, job: JobConfig) -> None:
    """Raise ConfigError for what would be more than a value in a batch script; `setup` is meant to be."""
    for key, value in vars(job).items():
        texts = [value] if isinstance(value, str) else [*value] if isinstance(value, list | dict) else []
        texts += value.values() if isinstance(value, dict) else []
        for text in texts:
            if key != "setup" and not text.isprintable():
                raise ConfigError(f"{name}: {key}: {text!r} given; allowed: one line, without control characters")
    for variable in job.environment:
        if not VARIABLE.fullmatch(variable):
            raise ConfigError(f"{name}: environment: {variable!r} given; allowed: letters, digits, _")
