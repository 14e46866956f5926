"""The keys of a run's configuration, their defaults and units. Imports no torch, so a login node can validate it.

Order: the defaults below < YAML files in the order given < `key=value` on the command line (load.py). Sections `model`,
`tokenizer`, `chat_template`, `sequence_tokens`, `document_masking`, `inner`, `outer` and `membership` are what all
silos must agree on (see trust/contract.py); `silo` holds the defaults of every silo of this file and `silos.NAME` what
differs for one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.config.adapter import AdapterConfig
from pretrain.config.allowed import SUM32
from pretrain.config.budgets import MemberPrivacyConfig, PrivateConfig
from pretrain.config.gate import GateConfig
from pretrain.config.personal import PersonalConfig
from pretrain.config.practice import PracticeConfig, TasksConfig
from pretrain.config.trust import TrustConfig
from pretrain.outer.fragments import cut_factors, cut_fragments
from pretrain.outer.learning_rate import scheduled_lr
from pretrain.outer.schedule import Schedule

OPERATOR = "aggregator"  # the member who runs it


@dataclass(kw_only=True)
class ModelConfig:
    """The language model. Every silo holds the same one."""

    config: dict[str, Any] = field(default_factory=dict)
    """A `transformers` configuration with `model_type`; a missing `vocab_size` is the tokenizer's."""
    checkpoint: str | None = None
    """A local `transformers` directory to continue from, instead of `config` and fresh weights."""
    seed: int = 0
    """Seed of fresh weights, and of an adapter's."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """What is trained in place of its own parameters."""


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
    muon_momentum: float = 0.95
    """Muon's (Nesterov) momentum; all else is as in torch.optim.Muon."""
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
    loss: str = "masked"
    """masked: of every token that is trained; dpo: of preference pairs, against `model.checkpoint`."""
    dpo_beta: float = 0.1
    """How much the log-odds of a pair against the checkpoint count; a small one goes further from it."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 does not clip. What a secure sum has of gradients is rounded
    by it."""


@dataclass(kw_only=True)
class OuterConfig:
    """The outer step between silos. DiLoCo's defaults, arXiv 2311.08105."""

    sync_interval_steps: int = 500
    """H: inner steps between two syncs."""
    optimizer: str = "nesterov"
    """nesterov, sgd or adam."""
    lr: float = 0.7
    """Outer learning rate at its peak; sgd with 1.0 is plain averaging."""
    momentum: float = 0.9
    """Nesterov's momentum."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Adam's two decay rates."""
    eps: float = 0.1
    """Adam's epsilon: small ones are unstable here (arXiv 2311.08105)."""
    schedule: str = "constant"
    """How `lr` changes, in rounds: constant, cosine or wsd (warm-up, stable, linear decay)."""
    warmup_rounds: int = 0
    """Linear warm-up; always harmful where it was measured (arXiv 2509.10439)."""
    decay_rounds: int = 0
    """Length of wsd's decay at the end."""
    min_lr_ratio: float = 0.1
    """Final learning rate divided by `lr` (cosine and wsd)."""
    merge: str = "mean"
    """mean by tokens; importance: and, element by element, by the root of each silo's second moment; clip (norms to
    their median), trimmed_mean, median or krum where silos may send anything."""
    weight_power: float = 1.0
    """A silo's weight in mean, importance and clip is its tokens to this power: 0 gives all the same, so that between 0
    and 1 small silos count for more than their tokens."""
    max_share: float = 0.8
    """No silo's weight in mean, importance and clip is above this share of all in a commit; where there are too few
    silos for that, all count alike."""
    quality_floor: float | None = None
    """A delivery whose loss, as its manifest tells it, is above this many times the median of the other silos' in its
    version has weight 0; 1 or more, null: whatever the losses, all count. See trust/quality.py."""
    max_batch_sequences: int | None = None
    """Most sequences of one inner step of any silo: who says that it trained on more is refused; null: nobody is."""
    num_malicious: int = 1
    """Silos that clip, trimmed_mean, median or krum must stand; ignored by mean."""
    codec: str = "fp32"
    """How a pseudo-gradient is coded on its way up: fp32, bf16, int8, int4, e3m0 or topk (docs/formats.md)."""
    downlink_codec: str = "fp32"
    """How the change of the global parameters is coded on its way down; what it leaves out is sent with the next."""
    error_feedback: float | None = None
    """Share of what `codec` leaves out that is added to the next pseudo-gradient; null: 0.95 for topk, else 0."""
    secure_sum: bool = False
    """The aggregator learns the weighted sum of a version alone, and not what any silo delivered: values, and what is
    told of gradients, are whole numbers under masks that are gone in the sum. Needs `trust.keys` (docs/security.md)."""
    sum_range: float = 1.0
    """The largest magnitude of a pseudo-gradient's value that a secure sum has room for; a silo that has a larger one
    stops before anything wraps. Half of it is half as much rounding."""
    num_fragments: int = 1
    """Sets of whole tensors that take turns: each is synced every H steps, evenly apart (Streaming DiLoCo)."""
    overlap_steps: int = 0
    """Inner steps between the delivery of a fragment and the adoption of what was merged; below H."""
    second_moments: str = "local"
    """local: each silo has its own of AdamW's; shared: averaged at every sync, as means of rows and columns."""
    control_variates: float = 0.0
    """Share of (all silos' mean gradient of the last round - one's own) that Muon adds to each gradient of a matrix;
    with 0 none is told."""
    mixing: float = 0.0
    """Share of the local parameters that stays when merged ones are adopted; 0 takes the merged, 1 never syncs."""
    state: str = "memory"
    """Where the aggregator keeps the outer state: memory, or disk: files in its run directory, for models that are
    larger than its memory. Its own affair, and no part of the contract."""
    member_privacy: MemberPrivacyConfig = field(default_factory=MemberPrivacyConfig)
    """Clipped and noised deliveries, accounted over the run."""

    @property
    def sent_codec(self) -> str:
        """How what a silo delivers is coded."""
        return SUM32 if self.secure_sum else self.codec


@dataclass(kw_only=True)
class MembershipConfig:
    """Who must have delivered before a version is committed, and what becomes of silos that are late, slow or away."""

    quorum: int | None = None
    """Silos that are enough for a commit once its deadline has passed; null: all of the roster, however long it takes.
    With a quorum, silos may join at any version, leave, and come back."""
    deadline_mads: float = 8.0
    """The deadline is the median of earlier arrivals plus this many median absolute deviations ..."""
    deadline_floor_seconds: float = 60.0
    """... but not below this, counted from the commit before, ..."""
    deadline_ceiling_seconds: float = 7200.0
    """... nor above this, which holds too while no arrival has been observed."""
    away_after_versions: int = 3
    """Nobody waits for a silo that missed as many commits in a row, until it delivers or joins again."""
    stale_weight: float = 0.0
    """Share of its weight with which a delivery that came too late counts in the next commit of its fragment; 0 drops
    it."""
    sample: int | None = None
    """Silos that train in a round, drawn anew for each; null: all."""
    sample_seed: int = 0
    """Seed of that draw."""
    steps: str = "equal"
    """equal: H inner steps a round for every silo; speed: for the fastest, and for others by their measured speed."""
    rejoin_warmup_steps: int = 0
    """Linear warm-up of the inner learning rate, in inner steps, after a silo has joined, caught up, gone back, or gone
    on from a version without a checkpoint, as after a rollback."""
    max_norm_ratio: float | None = None
    """A pseudo-gradient with a norm above this many times the median of its round, and of the silo's own last ones, is
    refused; null refuses only what is not finite."""
    max_loss_rise: float | None = None
    """A silo whose loss is not finite, or this far above its running mean, in nats, goes back to the last commit."""

    @property
    def is_elastic(self) -> bool:
        """Whether a commit can do without a silo of the roster."""
        return self.quorum is not None


@dataclass(kw_only=True)
class ExchangeConfig:
    """How bytes travel between silos and aggregator."""

    kind: str = "store"
    """store; collective: the silos among themselves, without aggregator; none: a silo that trains alone."""
    url: str = ""
    """Any fsspec URL (directory, s3://, gs://, ...), empty for `store` inside the run directory; for a collective
    tcp://HOST:PORT, where the first silo of the roster (sorted) listens and all others find it."""
    options: dict[str, Any] = field(default_factory=dict)
    """How a store in a network is reached, passed through to fsspec: endpoint_url, config_kwargs, ... No secrets."""
    ca_file: str = ""
    """PEM file of the authorities whose certificates an s3:// store may show; empty: $AWS_CA_BUNDLE, or the public
    ones."""
    client_certificate: str = ""
    """PEM file of the certificate, and those up to its authority, with which this site shows an s3:// store who it is;
    empty: none."""
    client_key: str = ""
    """PEM file of its private key, without a password, of mode 600; empty: it is in `client_certificate`."""
    poll_seconds: float = 0.5
    """How often a waiting process looks into the store."""
    retry_seconds: float = 600.0
    """How long a store that is in trouble (unreachable, slow, full) is tried again before a process stops."""
    stall_seconds: float = 60.0
    """A store in a network of which less than 256 KiB of an object come in this long, or no answer, is in trouble."""
    lease_seconds: float = 30.0
    """An aggregator that has not been heard of in the store for this long may be replaced by another; it and the silos
    leave a sign of life five times as often."""
    num_lanes: int = 1
    """Ranks of each silo that carry its bytes in a collective."""
    dead_seconds: float = 30.0
    """In a collective, a silo of which nothing was heard for this long is taken for dead, and all others stop."""
    hung_seconds: float = 1800.0
    """The same for one that is there but does not go on: above its longest evaluation, checkpoint or logged step."""
    keep_versions: int = 2
    """Newest versions of the global parameters that pruning always keeps."""
    snapshot_versions: int | None = None
    """The outer state of each fragment is written at every so many of its outer steps; in between, a restart follows it
    from the deliveries. Null: so often that it is a fifth of the payloads' bytes at most."""


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
    """Nodes of the silo; several are started by torchrun."""
    min_nodes: int = 0
    """With how few of them a SLURM job starts, at every start anew, where no more are free; 0: with all."""
    processes_per_node: int = 1
    """Processes on each node, one per GPU."""
    global_batch_sequences: int = 8
    """Sequences of one inner step over all ranks."""
    micro_batch_sequences: int = 8
    """Sequences of one forward pass on one rank."""
    accumulation_steps: int = 0
    """Forward and backward passes per inner step; 0: as many as the batch needs on the ranks that there are."""
    precision: str = "fp32"
    """fp32 or bf16 (fp32 master weights either way)."""
    activation_checkpointing: str = "none"
    """What the backward pass computes again to save device memory: none; layers: all of a layer; selective: all but
    products with matrices and attention, which are most of the work and less than half of the memory."""
    activation_checkpointing_every: int = 1
    """One of so many layers is computed again, all others are kept."""
    fused_adamw: bool = True
    """AdamW's step in one pass over memory, by torch's fused kernel; false: one operation after another. Offloaded
    states have DeepSpeed's own, in one pass either way."""
    compile: bool = False
    """Compile the model's layers and the loss (torch.compile), at ZeRO 0 to 2; the first step takes minutes, that of a
    later start less, by what is kept in TORCHINDUCTOR_CACHE_DIR (by itself ~/.cache/atoll/compiled-...)."""
    attention: str = ""
    """sdpa, or another implementation that `transformers` has here; documents: each of a packed sequence by itself;
    empty: that with `document_masking` on a CPU, where the type of model allows it, else what the model asks for."""
    loss_chunk_tokens: int = 0
    """Tokens of which there are logits at once, made twice, for large vocabularies; 0: those of a micro batch."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's own configuration, passed through; batch sizes, precision and clipping are set from above."""
    data_seed: int | None = None
    """Seed of the order of sequences; null derives one from the silo's name."""
    accept_other_data: bool = False
    """Go on from a checkpoint although text, shares or their order are others than when it was written."""
    prefetch_batches: int = 2
    """Micro batches of each rank that a thread reads ahead; 0 reads when a batch is asked for."""
    checkpoint_interval_steps: int = 500
    """Inner steps between checkpoints; one more is written at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    eval_interval_rounds: int = 1
    """Rounds between evaluations of the global model on `valid`; 0 evaluates before the first and after the last."""
    eval_sequences: int = 64
    """Sequences per corpus in one evaluation, spread evenly over it; 0 takes all."""
    log_interval_steps: int = 1
    """Inner steps between two log lines, and at most between a stop signal and the stop."""
    num_threads: int = 1
    """CPU threads per process (OMP_NUM_THREADS)."""
    profile_rounds: int = 0
    """Of every so many rounds metrics and report say where a step's time went, and torch's profiler records the last
    step, which takes longer, as a trace for Perfetto; the newest 16 stay in `traces` of the silo's directory. 0: never.
    """
    private: PrivateConfig = field(default_factory=PrivateConfig)
    """Clipped, noised and accounted training."""
    personal_adapter: PersonalConfig = field(default_factory=PersonalConfig)
    """An adapter of its own."""
    practice: TasksConfig = field(default_factory=TasksConfig)
    """What it tries itself."""

    @property
    def is_private(self) -> bool:
        """Whether it trains with differential privacy."""
        return self.private.epsilon is not None

    @property
    def fewest_nodes(self) -> int:
        """With how few nodes it may start."""
        return self.min_nodes or self.num_nodes

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage in its DeepSpeed section; DeepSpeed's default is 0."""
        section: dict[str, Any] = self.deepspeed.get("zero_optimization") or {}
        return int(section.get("stage", 0))


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases."""

    mode: str = "offline"
    """offline, online or disabled."""
    project: str = "atoll"
    """Project name."""
    entity: str = ""
    """User or team whose project it is; empty: the login's own."""


@dataclass(kw_only=True)
class RunConfig:
    """One run, as this machine sees it."""

    name: str = "run"
    """Name of the run; part of the contract."""
    run_id: str = ""
    """Tells the run from others of the same configuration, whose deliveries do not count in it; empty: drawn at random
    when the contract is first written (in a collective: none)."""
    directory: str = "runs/run"
    """Run directory: resolved configuration, logs, metrics, checkpoints, summary, report."""
    tokenizer: str = ""
    """A tokenizer.json file, or a directory that holds one."""
    chat_template: str = ""
    """Where silos train on conversations: the chat template (Jinja) that makes text of them, or a directory with a
    chat_template.jinja; `document_masking` has to be true."""
    sequence_tokens: int = 512
    """Tokens of one training sequence."""
    document_masking: bool = False
    """No attention from one document to another of the same sequence, and positions count from each one's beginning."""
    model: ModelConfig = field(default_factory=ModelConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    membership: MembershipConfig = field(default_factory=MembershipConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    practice: PracticeConfig = field(default_factory=PracticeConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    silo: SiloConfig = field(default_factory=SiloConfig)
    """Defaults of every silo of this file."""
    silos: dict[str, SiloConfig] = field(default_factory=dict)
    """The silos that this file describes: name to what differs from `silo`."""
    roster: list[str] = field(default_factory=list)
    """All silos of the federation, part of the contract; empty means those of `silos`."""
    trust: TrustConfig = field(default_factory=TrustConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    """Also write TensorBoard's event files, into `tensorboard` of every process's folder (extra `tensorboard`)."""

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
            in_turns=self.model.adapter.takes_turns,
        )

    def cut(self, num_elements: Mapping[str, int]) -> list[list[str]]:
        """The names of each fragment. Raises ValueError if there are fewer tensors than fragments."""
        if self.model.adapter.takes_turns:
            return cut_factors(num_elements)
        return cut_fragments(num_elements, self.outer.num_fragments)

    def round_of(self, version: int) -> int:
        """The round, from 1, at whose steps a version is sent; 0 for version 0."""
        return min(-(-version // self.outer.num_fragments), self.num_rounds)

    def outer_lr(self, version: int) -> float:
        """The outer learning rate of the step that makes a version."""
        outer = self.outer
        return scheduled_lr(
            self.round_of(version) - 1,
            lr=outer.lr,
            num_steps=self.num_rounds,
            schedule=outer.schedule,
            warmup=outer.warmup_rounds,
            decay=outer.decay_rounds,
            min_ratio=outer.min_lr_ratio,
        )

    def round_at(self, step: int) -> int:
        """The round, from 1, that inner step number `step` belongs to."""
        return max(1, -(-step // self.outer.sync_interval_steps))

    @property
    def agreed_roster(self) -> list[str]:
        """Names of all silos that the contract has, sorted."""
        return sorted(self.roster or self.silos.keys() - self.trust.added.keys())

    @property
    def full_roster(self) -> list[str]:
        """Names of all silos of the federation, sorted: those of the contract, and those added since."""
        return sorted({*self.agreed_roster, *self.trust.added})

    def key_file(self, name: str) -> Path:
        """The private key of a member on this machine."""
        return Path(self.trust.directory or Path(self.directory) / "keys") / f"{name}.key"

    @property
    def store_url(self) -> str:
        """Where the store is: `exchange.url`, or `store` inside the run directory."""
        return self.exchange.url or str(Path(self.directory).absolute() / "store")

    def ledger_url(self, silo: str) -> str:
        """Where the commits are that a silo of this machine has seen: the store, or its own record of a collective."""
        if self.exchange.kind == "collective":
            return str(self.silo_directory(silo).absolute() / "ledger")
        return self.store_url

    def silo_directory(self, silo: str) -> Path:
        """A silo's own folder in the run directory."""
        return Path(self.directory) / "silos" / silo

    def final_parameters(self, silo: str) -> Path:
        """Where a silo that trains alone leaves its fp32 parameters."""
        return self.silo_directory(silo) / "final.safetensors"

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer.json of `tokenizer`; of none an empty path, not what lies in the current directory."""
        path = Path(self.tokenizer)
        return path / "tokenizer.json" if self.tokenizer and path.is_dir() else path

    @property
    def template_file(self) -> Path | None:
        """The file of `chat_template`; None where there is to be text alone."""
        path = Path(self.chat_template)
        return (path / "chat_template.jinja" if path.is_dir() else path) if self.chat_template else None
