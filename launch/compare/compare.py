"""`atoll compare`: central, isolated, federated and personalised models at equal tokens, several seeds, one table.

Here is what runs there are; `run.py` starts them. Every run is an ordinary run with a directory of its own, so an
interrupted comparison goes on where it was.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from launch.show.metrics import read_status
from pretrain.config.adapter import PROMPT
from pretrain.config.check import check_config, check_has_silo
from pretrain.config.errors import ConfigError, require
from pretrain.config.gate import GateConfig
from pretrain.config.keys import MembershipConfig, OuterConfig, RunConfig, SiloConfig
from pretrain.config.load import load_config, load_run, load_typed
from pretrain.config.paths import absolute, expand_home
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
    seeds: list[int] = field(default_factory=list)
    """Only these of the comparison's seeds; empty means all."""


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
    choose_on: list[str] = field(default_factory=list)
    """Names of held-out corpora by which the best is chosen (`*` stands for any letters); empty means all."""
    report_on: list[str] = field(default_factory=list)
    """Names of those of which tables and plots tell; empty means all."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of runs that are finished; the models at their end stay in any case."""


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
    def name(self) -> str:
        """In words."""
        return " ".join(filter(None, (self.model, self.silo, f"seed {self.seed}")))

    @property
    def directory(self) -> Path:
        """Its run directory."""
        return Path(self.config.directory)

    @property
    def log(self) -> Path:
        """Where what starts it on this machine prints."""
        return self.directory.parent / f"{self.directory.name}.console"

    @property
    def tokens_by_silo(self) -> dict[str, int]:
        """What each of its silos trains on."""
        tokens = self.config.inner.num_steps * self.config.sequence_tokens
        return {name: silo.global_batch_sequences * tokens for name, silo in self.config.silos.items()}

    @property
    def tokens(self) -> int:
        """What it trains on, all silos together."""
        return sum(self.tokens_by_silo.values())

    @property
    def is_finished(self) -> bool:
        """Whether every silo has come to its end, the last evaluation included, and the run is summed up."""
        file = self.directory / "summary.json"
        if not file.is_file() or json.loads(file.read_text())["steps"] != self.config.inner.num_steps:
            return False
        statuses = [self.config.silo_directory(silo) / "status.json" for silo in self.config.silos]
        return all(read_status(status).phase == "finished" for status in statuses)

    @property
    def state(self) -> str:
        """finished, to resume or to do."""
        if self.is_finished:
            return "finished"
        return "to resume" if (self.directory / "config.yaml").is_file() else "to do"


def load_comparison(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> CompareConfig:
    """Read and check a comparison. Raises ConfigError."""
    spec = load_typed(CompareConfig, paths, overrides)
    spec.directory = expand_home("directory", spec.directory)
    spec.run = [expand_home("run", path) for path in spec.run]
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
    if spec.choose_on and spec.choice == "last":
        raise ConfigError(f"choose_on: {spec.choose_on} given; allowed: [] with choice: last, which chooses nothing")
    return spec


def named_by(key: str, patterns: Sequence[str], corpora: Iterable[str], silo: str) -> list[str]:
    """Those corpora of a silo that `patterns` name, all without any. Raises ConfigError if there are none of it."""
    every = list(corpora)
    found = [corpus for corpus in every if not patterns or any(fnmatchcase(corpus, one) for one in patterns)]
    if not found:
        raise ConfigError(f"{key}: {list(patterns)} given; allowed: names of {', '.join(every)}, one of silo {silo}'s")
    return found


def _check_model(spec: CompareConfig, name: str, model: ModelSpec) -> None:
    key = f"models.{name}"
    if not name or Path(name).name != name or name == "..":
        raise ConfigError(f"models: {name!r} given; allowed: the name of a folder")
    if model.kind not in KINDS:
        raise ConfigError(f"{key}.kind: {model.kind!r} given; allowed: {', '.join(KINDS)}")
    _check_seeds(f"{key}.seeds", model.seeds, spec.seeds)
    if model.kind != "personalised":
        if model.of or model.steps:
            raise ConfigError(f"{key}.of, {key}.steps: given; allowed: with kind personalised")
        return
    federated = [other for other, found in spec.models.items() if found.kind == "federated"]
    if model.of not in federated:
        raise ConfigError(f"{key}.of: {model.of!r} given; allowed: {', '.join(federated) or 'a federated model'}")
    if model.steps < 1:
        raise ConfigError(f"{key}.steps: {model.steps} given; allowed: 1 or more")
    _check_seeds(f"{key}.seeds", seeds_of(spec, model), seeds_of(spec, spec.models[model.of]))


def _check_seeds(key: str, seeds: Sequence[int], allowed: Sequence[int]) -> None:
    if not set(seeds) <= set(allowed):
        raise ConfigError(f"{key}: {list(seeds)} given; allowed: {', '.join(map(str, allowed))}")


def seeds_of(spec: CompareConfig, model: ModelSpec) -> list[int]:
    """The seeds that a model is trained with."""
    return model.seeds or spec.seeds


# ---- what is to run


def plan_runs(spec: CompareConfig) -> list[Planned]:
    """All runs, each after those that it goes on from. Raises ConfigError, also for a begun run that is another."""
    order = sorted(spec.models.items(), key=lambda item: item[1].kind == "personalised")
    runs = [
        planned
        for seed in spec.seeds
        for name, model in order
        if seed in seeds_of(spec, model)
        for planned in _runs_of(spec, name, model, seed)
    ]
    for planned in runs:
        _check_begun(planned, runs)
    return runs


def describe_runs(runs: Sequence[Planned]) -> str:
    """A line for each run, with its tokens and whether it is finished, and one for all."""
    lines = []
    for planned in runs:
        tokens = ", ".join(f"{silo} {count:,}" for silo, count in planned.tokens_by_silo.items())
        lines.append(f"{planned.directory}  {planned.state}  {planned.tokens:,} tokens ({tokens})")
    left = [planned for planned in runs if not planned.is_finished]
    total, missing = sum(planned.tokens for planned in runs), sum(planned.tokens for planned in left)
    lines.append(f"{len(runs)} runs, {total:,} tokens; left: {len(left)} runs, {missing:,} tokens")
    return "\n".join(lines)


def _runs_of(spec: CompareConfig, name: str, model: ModelSpec, seed: int) -> Iterator[Planned]:
    place = Path(spec.directory) / "runs" / name
    base = load_config(spec.run, [*spec.settings, *model.settings, f"model.seed={seed}"])
    check_has_silo(base)
    num_steps = base.inner.num_steps
    if model.kind == "isolated":
        num_steps += max((m.steps for m in spec.models.values() if m.kind == "personalised"), default=0)
    if model.kind == "personalised":
        num_steps, kind = model.steps, base.model.adapter.kind
        allowed = "none, lora with kind personalised, which goes on from a whole model"
        require(kind != PROMPT, f"models.{name}: model.adapter.kind", kind, allowed)
        origin = Path(spec.directory) / "runs" / model.of / f"seed-{seed}" / ORIGIN
        base = dataclasses.replace(base, model=dataclasses.replace(base.model, config={}, checkpoint=str(origin)))
    for silo_name, silo in base.silos.items():
        if silo.num_nodes != 1:
            raise ConfigError(f"silos.{silo_name}.num_nodes: {silo.num_nodes} given; allowed: 1 in a comparison")
        if not silo.valid:
            raise ConfigError(f"silos.{silo_name}.valid: {{}} given; allowed: held-out text of its own in a comparison")
        for key, patterns in (("choose_on", spec.choose_on), ("report_on", spec.report_on)):
            named_by(key, patterns, silo.valid, silo_name)
        more = "/personalised" if model.kind == "personalised" else ""  # not the sequences that it began with again
        silo.data_seed = zlib.crc32(f"{seed}/{silo_name}{more}".encode())

    def planned(config: RunConfig, silo: str = "") -> Planned:
        directory = place / silo / f"seed-{seed}"
        config = dataclasses.replace(config, directory=str(directory), name=f"{name}-{seed}")
        check_config(config)
        return Planned(model=name, kind=model.kind, seed=seed, silo=silo, config=config)

    if model.kind == "federated":
        first = min(base.silos)  # all silos hold the same global model: one evaluates it
        valid = {first: all_held_out(base)}
        silos = {n: dataclasses.replace(silo, valid=valid.get(n, {})) for n, silo in base.silos.items()}
        yield planned(dataclasses.replace(base, silos=silos, gate=GateConfig()))
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
    adapter = dataclasses.replace(config.model.adapter, merge="factors")  # which take turns only to be merged
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, adapter=adapter),
        exchange=dataclasses.replace(config.exchange, kind="none", url=""),
        outer=OuterConfig(sync_interval_steps=interval),
        membership=MembershipConfig(),
        gate=GateConfig(),
        inner=inner,
        silos={name: dataclasses.replace(silo, eval_interval_rounds=rounds)},
        roster=[],
    )


def all_held_out(config: RunConfig) -> dict[str, str]:
    """The held-out text of all silos. Raises ConfigError if two mean different text by one name."""
    found: dict[str, str] = {}
    for name, silo in config.silos.items():
        for corpus, path in silo.valid.items():
            if found.setdefault(corpus, path) != path:
                raise ConfigError(
                    f"silos.{name}.valid.{corpus}: {path!r} given; another silo's {corpus} is {found[corpus]!r}; "
                    "allowed: one text for each name"
                )
    return found


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


def is_ready(planned: Planned, runs: Sequence[Planned]) -> bool:
    """Whether the model that a personalised one goes on from is there."""
    if planned.kind != "personalised":
        return True
    origin = Path(str(planned.config.model.checkpoint))
    return all(run.is_finished for run in runs if run.directory == origin.parent)


def _check_begun(planned: Planned, runs: Sequence[Planned]) -> None:
    """Raise ConfigError if the directory holds a run with other settings, or one that went on from a model now gone."""
    stored = planned.directory / "config.yaml"
    if not stored.is_file():
        return
    begun = load_run(planned.directory)
    if not planned.config.trust.keys:  # a launch of all silos has made some
        begun = dataclasses.replace(begun, trust=dataclasses.replace(begun.trust, keys={}))
    theirs, ours = (_leaves(dataclasses.asdict(absolute(config))) for config in (begun, planned.config))
    different = sorted(key for key in theirs | ours if (key in theirs, theirs.get(key)) != (key in ours, ours.get(key)))
    if different:
        more = f" and {len(different) - 4} more" if len(different) > 4 else ""
        raise ConfigError(
            f"directory: {str(planned.directory)!r} holds a run with another {', '.join(different[:4])}{more}; "
            "delete it, or name another directory"
        )
    if not is_ready(planned, runs):
        origin = Path(str(planned.config.model.checkpoint)).parent
        raise ConfigError(
            f"directory: {str(planned.directory)!r} holds a run that went on from {str(origin)!r}, which is not "
            "finished; delete it, too, or name another directory"
        )


def _leaves(section: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in section.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
