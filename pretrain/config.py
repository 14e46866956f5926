"""The typed configuration of a run. Imports no torch, so a login node can validate it in a second.

Order: the defaults below < YAML files in the order given < `key=value` on the command line. Sections `model`,
`tokenizer`, `sequence_tokens`, `document_masking`, `inner` and `outer` are what all silos must agree on (see
trust/contract.py); `silo` holds the defaults of every silo of this file and `silos.NAME` what differs for one.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.outer.schedule import Schedule

CODECS = ("fp32", "bf16", "int8", "int4", "e3m0", "topk")


class ConfigError(ValueError):
    """A user's mistake, said in one line: what was given, what is allowed, which key to change."""


@dataclass(kw_only=True)
class ModelConfig:
    """The language model. Every silo holds the same one."""

    config: dict[str, Any] = field(default_factory=dict)
    """A `transformers` configuration with `model_type`; a missing `vocab_size` is the tokenizer's."""
    checkpoint: str | None = None
    """A local `transformers` directory to continue from, instead of `config` and fresh weights."""
    seed: int = 0
    """Seed of fresh weights."""


@dataclass(kw_only=True)
class InnerConfig:
    """The inner optimizer and its schedule, indexed by the cumulative inner step, never by rounds or restarts."""

    num_steps: int = 1000
    """Inner steps of the whole run, the same for every silo; a multiple of the sync interval."""
    optimizer: str = "adamw"
    """adamw, sgd, or muon: Muon for the matrices inside the layers, AdamW for all else."""
    lr: float = 3e-4
    """Peak learning rate."""
    muon_lr: float = 0.02
    """Peak learning rate of the matrices that Muon trains; follows the same schedule as `lr`."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's two decay rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors (norms, biases) are not decayed."""
    schedule: str = "cosine"
    """cosine, wsd (warm-up, stable, linear decay) or constant."""
    warmup_steps: int = 0
    """Linear warm-up, in inner steps."""
    decay_steps: int = 0
    """Length of wsd's decay at the end, in inner steps."""
    min_lr_ratio: float = 0.1
    """Final learning rate divided by `lr` (cosine and wsd)."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 does not clip."""


@dataclass(kw_only=True)
class OuterConfig:
    """The outer step between silos. DiLoCo's defaults, arXiv 2311.08105."""

    sync_interval_steps: int = 500
    """H: inner steps between two syncs."""
    optimizer: str = "nesterov"
    """nesterov or sgd."""
    lr: float = 0.7
    """Outer learning rate; sgd with 1.0 is plain averaging."""
    momentum: float = 0.9
    """Nesterov momentum; unused by sgd."""
    codec: str = "fp32"
    """How a pseudo-gradient is coded on its way up: fp32, bf16, int8, int4, e3m0 or topk (docs/formats.md)."""
    downlink_codec: str = "fp32"
    """How the change of the global parameters is coded on its way down; what it leaves out is sent with the next."""
    error_feedback: float | None = None
    """Share of what `codec` leaves out that is added to the next pseudo-gradient; null: 0.95 for topk, else 0."""
    num_fragments: int = 1
    """Sets of whole tensors that take turns: each is synced every H steps, evenly apart (Streaming DiLoCo)."""
    overlap_steps: int = 0
    """Inner steps between the delivery of a fragment and the adoption of what was merged; below H."""
    mixing: float = 0.0
    """Share of the local parameters that stays when merged ones are adopted; 0 takes the merged, 1 never syncs."""


@dataclass(kw_only=True)
class ExchangeConfig:
    """How bytes travel between silos and aggregator."""

    kind: str = "store"
    """store, or none: a silo that trains alone and never syncs."""
    url: str = ""
    """Any fsspec URL (directory, s3://, gs://, ...); empty means `store` inside the run directory."""
    poll_seconds: float = 0.5
    """How often a waiting process looks into the store."""
    keep_versions: int = 2
    """Newest versions of the global parameters that pruning always keeps."""


@dataclass(kw_only=True)
class SiloConfig:
    """One institution's training job."""

    data: list[str] = field(default_factory=list)
    """Directories of packed shards, read as one corpus unless `data_weights` says otherwise."""
    data_weights: list[float] = field(default_factory=list)
    """Each entry of `data` is a corpus of its own, and this its share of the sequences (any scale); empty: none is."""
    valid: dict[str, str] = field(default_factory=dict)
    """Held-out text: corpus name to a directory of packed shards."""
    num_nodes: int = 1
    """Nodes of the silo's torchrun job."""
    processes_per_node: int = 1
    """Processes on each node, one per GPU."""
    global_batch_sequences: int = 8
    """Sequences of one inner step over all ranks."""
    micro_batch_sequences: int = 8
    """Sequences of one forward pass on one rank."""
    accumulation_steps: int = 1
    """Forward and backward passes per inner step."""
    precision: str = "fp32"
    """fp32 or bf16 (fp32 master weights either way)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save device memory."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's own configuration, passed through; batch sizes, precision and clipping are set from above."""
    data_seed: int | None = None
    """Seed of the order of sequences; null derives one from the silo's name."""
    prefetch_batches: int = 2
    """Micro batches of each rank that a thread reads ahead; 0 reads when a batch is asked for."""
    checkpoint_interval_steps: int = 500
    """Inner steps between checkpoints; one more is written at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    eval_interval_rounds: int = 1
    """Rounds between evaluations of the global model on `valid`; 0 evaluates before the first and after the last."""
    eval_sequences: int = 64
    """Sequences per corpus in one evaluation; 0 takes all."""
    log_interval_steps: int = 1
    """Inner steps between two log lines, and at most between a stop signal and the stop."""
    num_threads: int = 1
    """CPU threads per process (OMP_NUM_THREADS)."""


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases."""

    mode: str = "offline"
    """offline, online or disabled."""
    project: str = "atoll"
    """Project name."""


@dataclass(kw_only=True)
class RunConfig:
    """One run, as this machine sees it."""

    name: str = "run"
    """Name of the run; part of the contract."""
    directory: str = "runs/run"
    """Run directory: resolved configuration, logs, metrics, checkpoints, summary, report."""
    tokenizer: str = ""
    """A tokenizer.json file, or a directory that holds one."""
    sequence_tokens: int = 512
    """Tokens of one training sequence."""
    document_masking: bool = False
    """No attention from one document to another of the same sequence, and positions count from each one's beginning."""
    model: ModelConfig = field(default_factory=ModelConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    silo: SiloConfig = field(default_factory=SiloConfig)
    """Defaults of every silo of this file."""
    silos: dict[str, SiloConfig] = field(default_factory=dict)
    """The silos that this file describes: name to what differs from `silo`."""
    roster: list[str] = field(default_factory=list)
    """All silos of the federation, part of the contract; empty means those of `silos`."""
    wandb: WandbConfig = field(default_factory=WandbConfig)

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run."""
        return self.inner.num_steps // self.outer.sync_interval_steps

    @property
    def schedule(self) -> Schedule:
        """When which fragment is synced."""
        return Schedule(
            num_steps=self.inner.num_steps,
            sync_interval_steps=self.outer.sync_interval_steps,
            num_fragments=self.outer.num_fragments,
            overlap_steps=self.outer.overlap_steps,
        )

    def round_of(self, version: int) -> int:
        """The round, from 1, at whose steps a version is sent; 0 for version 0."""
        return min(-(-version // self.outer.num_fragments), self.num_rounds)

    def round_at(self, step: int) -> int:
        """The round, from 1, that inner step number `step` belongs to."""
        return max(1, -(-step // self.outer.sync_interval_steps))

    @property
    def full_roster(self) -> list[str]:
        """Names of all silos of the federation, sorted."""
        return sorted(self.roster or self.silos)

    @property
    def store_url(self) -> str:
        """Where the store is: `exchange.url`, or `store` inside the run directory."""
        return self.exchange.url or str(Path(self.directory).absolute() / "store")

    def silo_directory(self, silo: str) -> Path:
        """A silo's own folder in the run directory."""
        return Path(self.directory) / "silos" / silo

    def final_parameters(self, silo: str) -> Path:
        """Where a silo that trains alone leaves its fp32 parameters."""
        return self.silo_directory(silo) / "final.safetensors"

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer.json of `tokenizer`."""
        path = Path(self.tokenizer)
        return path / "tokenizer.json" if path.is_dir() else path


SILO_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")

# Keys of DeepSpeed's configuration that are computed from ours; giving them twice could only contradict.
OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "global_batch_sequences",
    "train_micro_batch_size_per_gpu": "micro_batch_sequences",
    "gradient_accumulation_steps": "accumulation_steps",
    "gradient_clipping": "inner.clip_norm",
    "bf16": "precision",
    "fp16": "precision",
    "optimizer": "inner.optimizer",
    "scheduler": "inner.schedule",
}


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> RunConfig:
    """Merge defaults, YAML files and `key=value` overrides; check every key, type and value.

    Raises ConfigError for anything that a user can have got wrong.
    """
    layers = [_read_yaml(Path(path)) for path in paths]
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"command line: {override!r} given; allowed: key=value")
        try:
            layers.append(OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"command line: {override!r} given; {_first_line(error)}") from None
    try:
        given = OmegaConf.to_container(OmegaConf.merge({}, *layers), resolve=True)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'configuration'}: {_first_line(error)}") from None
    if not isinstance(given, dict):
        raise ConfigError("configuration: a list given; allowed: a mapping of keys to values")
    _check_keys(given, RunConfig, "")
    _spread_silo_defaults(given)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(RunConfig), given)
        config = OmegaConf.to_object(typed)
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'configuration'}: {_first_line(error)}") from None
    assert isinstance(config, RunConfig)
    check_config(config)
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back to the same values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    temporary.replace(path)


def _read_yaml(path: Path) -> Any:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"--config: {str(path)!r} given; there is no such file") from None
    except (OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {' '.join(str(error).split())}") from None
    return loaded


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _check_keys(given: dict[Any, Any], schema: type, prefix: str) -> None:
    """Refuse keys that the dataclass `schema` lacks, at any depth, with the nearest allowed one."""
    fields = {f.name: f.type for f in dataclasses.fields(schema)}
    for key, value in given.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ConfigError(f"{prefix}{key}: unknown key given; allowed: {', '.join(fields)}{hint}")
        kind = fields[key]
        section = kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None
        if section and not isinstance(value, dict | None):
            raise ConfigError(f"{prefix}{key}: {value!r} given; allowed: a section of keys and values")
        if section and value is not None:
            _check_keys(value, section, f"{prefix}{key}.")
        if str(kind).startswith("dict") and not isinstance(value, dict | None):
            raise ConfigError(f"{prefix}{key}: {value!r} given; allowed: a section of keys and values")
        if key == "silos":
            for name, silo in (value or {}).items():
                if silo is not None and not isinstance(silo, dict):
                    raise ConfigError(f"silos.{name}: {silo!r} given; allowed: a section of keys and values")
                _check_keys(silo or {}, SiloConfig, f"silos.{name}.")


def _spread_silo_defaults(given: dict[Any, Any]) -> None:
    """Put the values of `silo` under every silo of the roster that does not say otherwise."""
    defaults = given.get("silo") or {}
    given["silos"] = {
        str(name): OmegaConf.to_container(OmegaConf.merge(defaults, silo or {}))
        for name, silo in (given.get("silos") or {}).items()
    }


def _require(ok: bool, key: str, given: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{key}: {given!r} given; allowed: {allowed}")


def check_config(config: RunConfig) -> None:
    """Check the values; raises ConfigError naming the key."""
    one_of = {
        "inner.optimizer": (config.inner.optimizer, ("adamw", "sgd", "muon")),
        "inner.schedule": (config.inner.schedule, ("cosine", "wsd", "constant")),
        "outer.optimizer": (config.outer.optimizer, ("nesterov", "sgd")),
        "outer.codec": (config.outer.codec, CODECS),
        "outer.downlink_codec": (config.outer.downlink_codec, CODECS),
        "exchange.kind": (config.exchange.kind, ("store", "none")),
        "wandb.mode": (config.wandb.mode, ("offline", "online", "disabled")),
    }
    for key, (value, allowed) in one_of.items():
        _require(value in allowed, key, value, ", ".join(allowed))
    at_least = {
        "sequence_tokens": (config.sequence_tokens, 2),
        "inner.num_steps": (config.inner.num_steps, 1),
        "inner.warmup_steps": (config.inner.warmup_steps, 0),
        "inner.decay_steps": (config.inner.decay_steps, 0),
        "inner.weight_decay": (config.inner.weight_decay, 0),
        "inner.clip_norm": (config.inner.clip_norm, 0),
        "outer.sync_interval_steps": (config.outer.sync_interval_steps, 1),
        "outer.num_fragments": (config.outer.num_fragments, 1),
        "outer.overlap_steps": (config.outer.overlap_steps, 0),
        "exchange.keep_versions": (config.exchange.keep_versions, 1),
    }
    for key, (number, minimum) in at_least.items():
        _require(number >= minimum, key, number, f"{minimum} or more")
    positive = {
        "inner.lr": config.inner.lr,
        "inner.muon_lr": config.inner.muon_lr,
        "inner.eps": config.inner.eps,
        "outer.lr": config.outer.lr,
        "exchange.poll_seconds": config.exchange.poll_seconds,
    }
    for key, rate in positive.items():
        _require(0 < rate < math.inf, key, rate, "above 0")
    _require(0 <= config.inner.min_lr_ratio <= 1, "inner.min_lr_ratio", config.inner.min_lr_ratio, "0 to 1")
    betas = config.inner.betas
    _require(len(betas) == 2 and all(0 <= b < 1 for b in betas), "inner.betas", betas, "two numbers from 0 to below 1")
    ramp_steps = config.inner.warmup_steps + (config.inner.decay_steps if config.inner.schedule == "wsd" else 0)
    _require(
        ramp_steps <= config.inner.num_steps,
        "inner.warmup_steps",
        ramp_steps,
        f"warm-up and decay within inner.num_steps={config.inner.num_steps}",
    )
    _require(0 <= config.outer.momentum < 1, "outer.momentum", config.outer.momentum, "0 to below 1")
    _require(
        config.inner.num_steps % config.outer.sync_interval_steps == 0 or config.exchange.kind == "none",
        "inner.num_steps",
        config.inner.num_steps,
        f"a multiple of outer.sync_interval_steps={config.outer.sync_interval_steps}",
    )
    _check_streaming(config.outer)
    _check_model(config.model)
    _check_roster(config)
    for name, silo in config.silos.items() if config.inner.optimizer == "muon" else ():
        _check_muon(name, silo.deepspeed.get("zero_optimization", {}))


def _check_muon(name: str, zero: dict[str, Any]) -> None:
    """Refuse what splits the matrices, or the work on them, in ways that Muon does not follow."""
    offload = zero.get("offload_optimizer") or {}
    refused = {
        "offload_optimizer.ratio": offload.get("ratio", 1) != 1,
        "offload_optimizer.super_offload": offload.get("super_offload"),
        "zenflow": zero.get("zenflow"),
        "mics_shard_size": zero.get("mics_shard_size", 0) > 0,
    }
    for key in filter(refused.get, refused):
        raise ConfigError(
            f"inner.optimizer: 'muon' given with silos.{name}.deepspeed.zero_optimization.{key} at stage "
            f"{zero.get('stage', 0)}; allowed: any stage, on the device or with offload_optimizer to cpu, without {key}"
        )


def _check_streaming(outer: OuterConfig) -> None:
    interval = outer.sync_interval_steps
    gap = f"outer.sync_interval_steps={interval}"
    _require(outer.num_fragments <= interval, "outer.num_fragments", outer.num_fragments, f"1 to {gap}")
    _require(
        outer.overlap_steps < interval,
        "outer.overlap_steps",
        outer.overlap_steps,
        f"below {gap}, the steps between two syncs of a fragment",
    )
    _require(0 <= outer.mixing <= 1, "outer.mixing", outer.mixing, "0 to 1")
    decay = outer.error_feedback
    _require(decay is None or 0 <= decay <= 1, "outer.error_feedback", decay, "null, or 0 to 1")
    _require(
        not decay or outer.codec != "fp32", "outer.error_feedback", decay, "null or 0: codec fp32 leaves nothing out"
    )


def _check_model(model: ModelConfig) -> None:
    _require(
        bool(model.config) != bool(model.checkpoint),
        "model",
        {"config": model.config, "checkpoint": model.checkpoint},
        "either model.config or model.checkpoint",
    )
    if model.config:
        _require("model_type" in model.config, "model.config", model.config, "a mapping with model_type")


def _check_roster(config: RunConfig) -> None:
    _require(bool(config.silos), "silos", {}, "at least one silo")
    _require(len(set(config.roster)) == len(config.roster), "roster", config.roster, "each name once")
    for name in config.full_roster:
        key = "roster" if config.roster else "silos"
        _require(bool(SILO_NAME.fullmatch(name)), key, name, "names of a-z, 0-9, _ and -")
    for name, silo in config.silos.items():
        _require(name in config.full_roster, "silos", name, f"names of the roster: {', '.join(config.full_roster)}")
        _check_silo(name, silo)


def _check_silo(name: str, silo: SiloConfig) -> None:
    key = f"silos.{name}"
    for unit in (
        *("num_nodes", "processes_per_node", "num_threads"),
        *("global_batch_sequences", "micro_batch_sequences", "accumulation_steps"),
        *("checkpoint_interval_steps", "keep_checkpoints", "log_interval_steps"),
    ):
        _require(getattr(silo, unit) >= 1, f"{key}.{unit}", getattr(silo, unit), "1 or more")
    for unit in ("eval_interval_rounds", "eval_sequences", "prefetch_batches"):
        _require(getattr(silo, unit) >= 0, f"{key}.{unit}", getattr(silo, unit), "0 or more")
    weights = silo.data_weights
    _require(
        len(weights) in (0, len(silo.data)),
        f"{key}.data_weights",
        weights,
        f"none, or one weight for each of the {len(silo.data)} entries of {key}.data",
    )
    _require(all(0 < weight < math.inf for weight in weights), f"{key}.data_weights", weights, "numbers above 0")
    _require(silo.precision in ("fp32", "bf16"), f"{key}.precision", silo.precision, "fp32, bf16")
    for owned, ours in OWNED_DEEPSPEED_KEYS.items():
        if owned in silo.deepspeed:
            raise ConfigError(f"{key}.deepspeed.{owned}: {silo.deepspeed[owned]!r} given; set {ours} instead")
    zero = silo.deepspeed.get("zero_optimization", {})
    _require(isinstance(zero, dict), f"{key}.deepspeed.zero_optimization", zero, "a mapping")
    stage = zero.get("stage", 0)
    _require(stage in (0, 1, 2, 3), f"{key}.deepspeed.zero_optimization.stage", stage, "0, 1, 2, 3")
    check_batch(name, silo, silo.num_nodes * silo.processes_per_node)


def check_batch(name: str, silo: SiloConfig, num_ranks: int) -> None:
    """`global batch = micro batch x accumulation x ranks`, all four numbers in the message."""
    micro, accumulation = silo.micro_batch_sequences, silo.accumulation_steps
    if silo.global_batch_sequences != micro * accumulation * num_ranks:
        raise ConfigError(
            f"silos.{name}.global_batch_sequences: {silo.global_batch_sequences} given; allowed: micro_batch_sequences "
            f"{micro} x accumulation_steps {accumulation} x ranks {num_ranks} = {micro * accumulation * num_ranks}"
        )
