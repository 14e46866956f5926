"""`atoll compare`: central, isolated, federated and personalised models at equal tokens, several seeds, one table.

Every run is an ordinary run with a directory of its own, so an interrupted comparison goes on where it was.
"""

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from launch.processes import POLL_SECONDS, STOP_SIGNALS
from pretrain.check import check_config
from pretrain.config import (
    ConfigError,
    MembershipConfig,
    OuterConfig,
    RunConfig,
    SiloConfig,
    load_config,
    load_typed,
    save_config,
)
from pretrain.silo.shards import read_manifest

KINDS = ("central", "isolated", "federated", "personalised")
CHOICES = ("last", "best")
ORIGIN = "model"  # the exported model beside a federated run that personalised ones go on from


@dataclass(kw_only=True)
class ModelSpec:
    """One model of a comparison."""

    kind: str = "federated"
    """central: all text in one place; isolated: every silo alone; federated; personalised: every silo goes on alone."""
    settings: list[str] = field(default_factory=list)
    """What differs from the run's configuration, key=value."""
    of: str = ""
    """personalised: the federated model that every silo goes on from."""
    steps: int = 0
    """personalised: for how many inner steps."""


@dataclass(kw_only=True)
class CompareConfig:
    """A comparison."""

    directory: str = "comparisons/run"
    """Where all its runs, the tables and the plots go."""
    run: list[str] = field(default_factory=list)
    """YAML files of the federated run, merged in order."""
    settings: list[str] = field(default_factory=list)
    """Changes for all models, key=value."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Each makes initial weights and order of text of its own, the same for all models."""
    models: dict[str, ModelSpec] = field(default_factory=dict)
    """The models, in the order of the table."""
    reference: str = "central"
    """The model that the others are compared with."""
    choice: str = "last"
    """last: every model as it is at the end; best: where its held-out loss is lowest, a silo's own on its own text."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of a comparison."""

    model: str
    kind: str
    seed: int
    silo: str
    """Whose text it is about; empty for central and federated models."""
    config: RunConfig

    @property
    def directory(self) -> Path:
        """Its run directory."""
        return Path(self.config.directory)

    @property
    def tokens(self) -> int:
        """What it trains on, all silos together."""
        sequences = sum(silo.global_batch_sequences for silo in self.config.silos.values())
        return sequences * self.config.inner.num_steps * self.config.sequence_tokens

    @property
    def is_finished(self) -> bool:
        """Whether its last step is done and summed up."""
        file = self.directory / "summary.json"
        return file.is_file() and json.loads(file.read_text())["steps"] == self.config.inner.num_steps


def load_comparison(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> CompareConfig:
    """Read and check a comparison. Raises ConfigError."""
    spec = load_typed(CompareConfig, paths, overrides)
    if not spec.run:
        raise ConfigError("run: [] given; allowed: the YAML files of the federated run")
    if not spec.seeds or len(set(spec.seeds)) < len(spec.seeds):
        raise ConfigError(f"seeds: {spec.seeds} given; allowed: one or more, each once")
    if spec.choice not in CHOICES:
        raise ConfigError(f"choice: {spec.choice!r} given; allowed: {', '.join(CHOICES)}")
    if spec.reference not in spec.models:
        raise ConfigError(f"reference: {spec.reference!r} given; allowed: {', '.join(spec.models) or 'one of models'}")
    for name, model in spec.models.items():
        _check_model(spec, name, model)
    return spec


def _check_model(spec: CompareConfig, name: str, model: ModelSpec) -> None:
    key = f"models.{name}"
    if not name or Path(name).name != name:
        raise ConfigError(f"models: {name!r} given; allowed: the name of a folder")
    if model.kind not in KINDS:
        raise ConfigError(f"{key}.kind: {model.kind!r} given; allowed: {', '.join(KINDS)}")
    if model.kind != "personalised":
        if model.of or model.steps:
            raise ConfigError(f"{key}.of, {key}.steps: given; allowed: with kind personalised")
        return
    federated = [other for other, found in spec.models.items() if found.kind == "federated"]
    if model.of not in federated:
        raise ConfigError(f"{key}.of: {model.of!r} given; allowed: {', '.join(federated) or 'a federated model'}")
    if model.steps < 1:
        raise ConfigError(f"{key}.steps: {model.steps} given; allowed: 1 or more")


# ---- what is to run


def plan_runs(spec: CompareConfig) -> list[Planned]:
    """All runs, each after those that it goes on from. Raises ConfigError."""
    order = sorted(spec.models.items(), key=lambda item: item[1].kind == "personalised")
    return [planned for seed in spec.seeds for name, model in order for planned in _runs_of(spec, name, model, seed)]


def _runs_of(spec: CompareConfig, name: str, model: ModelSpec, seed: int) -> Iterator[Planned]:
    place = Path(spec.directory) / "runs" / name
    base = load_config(spec.run, [*spec.settings, *model.settings, f"model.seed={seed}"])
    num_steps = base.inner.num_steps
    if model.kind == "isolated":
        num_steps += max((m.steps for m in spec.models.values() if m.kind == "personalised"), default=0)
    if model.kind == "personalised":
        num_steps = model.steps
        origin = Path(spec.directory) / "runs" / model.of / f"seed-{seed}" / ORIGIN
        base = dataclasses.replace(base, model=dataclasses.replace(base.model, config={}, checkpoint=str(origin)))
    for silo_name, silo in base.silos.items():
        if silo.num_nodes != 1:
            raise ConfigError(f"silos.{silo_name}.num_nodes: {silo.num_nodes} given; allowed: 1 in a comparison")
        silo.data_seed = zlib.crc32(f"{seed}/{silo_name}".encode())

    def planned(config: RunConfig, silo: str = "") -> Planned:
        directory = place / silo / f"seed-{seed}"
        config = dataclasses.replace(config, directory=str(directory), name=f"{name}-{seed}")
        check_config(config)
        return Planned(model=name, kind=model.kind, seed=seed, silo=silo, config=config)

    if model.kind == "federated":
        first = min(base.silos)  # all silos hold the same global model: one evaluates it
        valid = {first: all_held_out(base)}
        silos = {n: dataclasses.replace(silo, valid=valid.get(n, {})) for n, silo in base.silos.items()}
        yield planned(dataclasses.replace(base, silos=silos))
    elif model.kind == "central":
        yield planned(central_config(base, seed=seed))
    else:
        for silo_name in base.silos:
            yield planned(isolated_config(base, silo_name, num_steps=num_steps), silo_name)


def _alone(config: RunConfig, name: str, silo: SiloConfig, *, num_steps: int) -> RunConfig:
    """A silo by itself: a round is only the time between two evaluations, and the last one ends with the run."""
    interval = math.gcd(num_steps, config.outer.sync_interval_steps)
    rounds = silo.eval_interval_rounds * config.outer.sync_interval_steps // interval
    inner = dataclasses.replace(
        config.inner, num_steps=num_steps, warmup_steps=min(config.inner.warmup_steps, num_steps)
    )
    return dataclasses.replace(
        config,
        exchange=dataclasses.replace(config.exchange, kind="none", url=""),
        outer=OuterConfig(sync_interval_steps=interval),
        membership=MembershipConfig(),
        inner=inner,
        silos={name: dataclasses.replace(silo, eval_interval_rounds=rounds)},
        roster=[],
    )


def all_held_out(config: RunConfig) -> dict[str, str]:
    """The held-out text of all silos."""
    return {corpus: path for silo in config.silos.values() for corpus, path in silo.valid.items()}


def isolated_config(config: RunConfig, name: str, *, num_steps: int | None = None) -> RunConfig:
    """One silo alone: the same batch and steps, unless others are given, and everybody's held-out text."""
    silo = dataclasses.replace(config.silos[name], valid=all_held_out(config))
    return _alone(config, name, silo, num_steps=num_steps or config.inner.num_steps)


def central_config(config: RunConfig, *, seed: int = 0) -> RunConfig:
    """One model on the text of all silos: as many tokens at every step, and of each silo's text the same share."""
    template = config.silos[min(config.silos)]
    num_sequences = sum(silo.global_batch_sequences for silo in config.silos.values())
    num_ranks = template.processes_per_node if num_sequences % template.processes_per_node == 0 else 1
    per_rank = num_sequences // num_ranks
    micro = max(n for n in range(1, min(per_rank, template.micro_batch_sequences) + 1) if per_rank % n == 0)
    shares = [share for silo in config.silos.values() for share in _shares(silo)]
    central = dataclasses.replace(
        template,
        data=[directory for silo in config.silos.values() for directory in silo.data],
        data_weights=shares,
        data_seed=zlib.crc32(f"{seed}/central".encode()),
        valid=all_held_out(config),
        processes_per_node=num_ranks,
        global_batch_sequences=num_sequences,
        micro_batch_sequences=micro,
        accumulation_steps=per_rank // micro,
    )
    return _alone(config, "central", central, num_steps=config.inner.num_steps)


def _shares(silo: SiloConfig) -> list[float]:
    """How many sequences of a step come from each entry of a silo's data."""
    weights = silo.data_weights or [float(read_manifest(Path(path), key="data").num_tokens) for path in silo.data]
    return [silo.global_batch_sequences * weight / sum(weights) for weight in weights]


# ---- running it


def compare(spec: CompareConfig, *, jobs: int = 1, console: Console | None = None) -> int:
    """Run what is not finished, `jobs` runs at a time; returns the exit status of the first that fails, or 0.

    Raises ConfigError if a finished or begun run has other settings than the comparison asks for now.
    """
    console = console or Console()
    runs = plan_runs(spec)
    for planned in runs:
        _check_same(planned)
    todo = [planned for planned in runs if not planned.is_finished]
    console.print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished ({spec.directory})")
    waiting, running = list(todo), dict[int, tuple[Planned, subprocess.Popen[bytes], float]]()
    stopped: list[int] = []
    before = {number: signal.signal(number, lambda number, _: stopped.append(number)) for number in STOP_SIGNALS}
    code = 0
    try:
        while running or (waiting and not code and not stopped):
            free = [planned for planned in waiting if _is_ready(planned, runs)] if not code and not stopped else []
            for planned in free[: max(0, jobs - len(running))]:
                waiting.remove(planned)
                child = _start(planned)
                running[child.pid] = (planned, child, time.monotonic())
            for number in stopped[:1]:
                for _, child, _ in running.values():
                    child.send_signal(number)
                stopped[:1] = [0]
            for pid, (planned, child, began) in list(running.items()):
                if child.poll() is not None:
                    del running[pid]
                    console.print(_outcome(planned, child.returncode, time.monotonic() - began))
                    code = code or child.returncode
            time.sleep(POLL_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code


def _is_ready(planned: Planned, runs: Sequence[Planned]) -> bool:
    """Whether the model that a personalised one goes on from is there."""
    origin = Path(planned.config.model.checkpoint or "")
    return all(run.is_finished or run.directory != origin.parent for run in runs)


def _start(planned: Planned) -> "subprocess.Popen[bytes]":
    """A launch of its own, in a session of its own, so that a Ctrl-C reaches it once."""
    _export_origin(planned)
    asked = planned.directory.parent / f"{planned.directory.name}.yaml"
    save_config(planned.config, asked)
    with asked.with_suffix(".console").open("ab") as console:
        command = [sys.executable, "-m", "launch.cli", "launch", "local", "--config", str(asked)]
        return subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT, start_new_session=True)


def _export_origin(planned: Planned) -> None:
    """The federated model that a personalised one goes on from, as a `transformers` directory beside its run."""
    if planned.kind != "personalised":
        return
    from pretrain.export import export_global_model

    origin = Path(str(planned.config.model.checkpoint))
    if not origin.exists():
        export_global_model(load_config([origin.parent / "config.yaml"]), origin)


def _outcome(planned: Planned, code: int, seconds: float) -> str:
    name = " ".join(filter(None, (planned.model, planned.silo, f"seed {planned.seed}")))
    if code == 0:
        return f"{name}: finished in {seconds:,.0f} s"
    return f"{name}: exit status {code}; see {planned.directory.parent / planned.directory.name}.console"


def _check_same(planned: Planned) -> None:
    """Raise ConfigError if the run's directory holds one with other settings."""
    stored = planned.directory / "config.yaml"
    if not stored.is_file():
        return
    theirs, ours = dataclasses.asdict(load_config([stored])), dataclasses.asdict(planned.config)
    different = [key for key in _leaves(ours) if _leaves(ours)[key] != _leaves(theirs).get(key)]
    if different:
        raise ConfigError(
            f"directory: {str(planned.directory)!r} holds a run with another {', '.join(sorted(different)[:4])}; "
            "delete it, or name another directory"
        )


def _leaves(section: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in section.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found
