"""What a key may be whatever the others are: one of these names, or a number from here to there. Imports no torch.

`check.py` refuses the rest, and knows what has to fit together; `atoll config keys` shows it.
"""

import math
from dataclasses import dataclass

SCHEDULES = ("cosine", "wsd", "constant")
MERGES = ("mean", "importance", "clip", "trimmed_mean", "median", "krum")
TIERS = ("public", "consortium", "member")
METRICS = ("loss", "held_out", "pseudo_gradient_norm", "seconds_per_step", "tokens", "epochs")
PRECISIONS = ("fp32", "bf16")
DPO = "dpo"  # the loss of preference pairs
SPENT = ("epsilon", "delta")  # of a private silo's budget, or of all silos': they tell of steps, and nothing of text
SUM32 = "sum32"  # what a secure sum is of; no codec that a key may name
CODECS = ("fp32", "bf16", "int8", "int4", "e3m0", "topk")


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Finite numbers between two."""

    least: float = 0
    most: float = math.inf
    without_least: bool = False
    without_most: bool = False

    def __contains__(self, number: float) -> bool:
        above = self.least < number if self.without_least else self.least <= number
        below = number < self.most if self.without_most else number <= self.most
        return above and below and math.isfinite(number)

    @property
    def words(self) -> str:
        """As an error says it."""
        if self.most == math.inf:
            return f"above {self.least:g}" if self.without_least else f"{self.least:g} or more"
        from_here = f"above {self.least:g}, to" if self.without_least else f"{self.least:g} to"
        return f"{from_here}{' below' if self.without_most else ''} {self.most:g}"


NONE_LESS, ONE, ABOVE = Numbers(), Numbers(least=1), Numbers(without_least=True)
SHARE, BELOW_ONE = Numbers(most=1), Numbers(most=1, without_most=True)
PROBABILITY = Numbers(most=1, without_least=True, without_most=True)

ALLOWED: dict[str, tuple[str, ...] | Numbers] = {
    "sequence_tokens": Numbers(least=2),
    "model.adapter.kind": ("none", "lora", "prompt"),
    "model.adapter.rank": ONE,
    "model.adapter.alpha": ABOVE,
    "model.adapter.dropout": BELOW_ONE,
    "model.adapter.merge": ("factors", "alternate"),
    "model.adapter.tokens": ONE,
    "inner.num_steps": ONE,
    "inner.optimizer": ("adamw", "sgd", "muon"),
    "inner.lr": ABOVE,
    "inner.muon_lr": ABOVE,
    "inner.muon_momentum": BELOW_ONE,
    "inner.eps": ABOVE,
    "inner.weight_decay": NONE_LESS,
    "inner.schedule": SCHEDULES,
    "inner.warmup_steps": NONE_LESS,
    "inner.decay_steps": NONE_LESS,
    "inner.min_lr_ratio": SHARE,
    "inner.clip_norm": NONE_LESS,
    "inner.loss": ("masked", DPO),
    "inner.dpo_beta": ABOVE,
    "outer.sync_interval_steps": ONE,
    "outer.optimizer": ("nesterov", "sgd", "adam"),
    "outer.lr": ABOVE,
    "outer.momentum": BELOW_ONE,
    "outer.eps": ABOVE,
    "outer.schedule": SCHEDULES,
    "outer.warmup_rounds": NONE_LESS,
    "outer.decay_rounds": NONE_LESS,
    "outer.min_lr_ratio": SHARE,
    "outer.merge": MERGES,
    "outer.weight_power": SHARE,
    "outer.max_share": Numbers(most=1, without_least=True),
    "outer.quality_floor": ONE,  # with less, the best of all could count nothing
    "outer.max_batch_sequences": ONE,
    "outer.codec": CODECS,
    "outer.downlink_codec": CODECS,
    "outer.error_feedback": SHARE,
    "outer.sum_range": ABOVE,
    "outer.num_fragments": ONE,
    "outer.overlap_steps": NONE_LESS,
    "outer.second_moments": ("local", "shared"),
    "outer.control_variates": SHARE,
    "outer.mixing": SHARE,
    "outer.state": ("memory", "disk"),
    "outer.member_privacy.epsilon": ABOVE,
    "outer.member_privacy.delta": PROBABILITY,
    "outer.member_privacy.clip_norm": ABOVE,
    "outer.member_privacy.noise_multiplier": ABOVE,
    "outer.member_privacy.num_colluding": NONE_LESS,
    "membership.quorum": ONE,
    "membership.deadline_mads": NONE_LESS,
    "membership.deadline_floor_seconds": NONE_LESS,
    "membership.deadline_ceiling_seconds": NONE_LESS,
    "membership.away_after_versions": ONE,
    "membership.stale_weight": SHARE,
    "membership.sample": ONE,
    "membership.steps": ("equal", "speed"),
    "membership.rejoin_warmup_steps": NONE_LESS,
    "membership.max_norm_ratio": ABOVE,
    "membership.max_loss_rise": ABOVE,
    "gate.every_versions": NONE_LESS,
    "gate.eval_sequences": NONE_LESS,
    "gate.max_mean": ABOVE,  # of a loss that is 0 or less nobody has heard
    "gate.max_worst": ABOVE,
    "gate.max_mean_rise": Numbers(least=-100),
    "gate.max_silo_rise": Numbers(least=-100),
    "gate.max_public": ABOVE,
    "gate.max_public_rise": Numbers(least=-100),
    "gate.quorum": ONE,
    "gate.deadline_seconds": NONE_LESS,
    "gate.otherwise": ("go_on", "go_back"),
    "exchange.kind": ("store", "collective", "none"),
    "exchange.poll_seconds": ABOVE,
    "exchange.retry_seconds": NONE_LESS,
    "exchange.stall_seconds": ABOVE,
    "exchange.lease_seconds": ABOVE,
    "exchange.dead_seconds": ABOVE,
    "exchange.hung_seconds": ABOVE,
    "exchange.keep_versions": ONE,
    "exchange.snapshot_versions": ONE,
    "silo.num_nodes": ONE,
    "silo.min_nodes": NONE_LESS,
    "silo.processes_per_node": ONE,
    "silo.global_batch_sequences": ONE,
    "silo.micro_batch_sequences": ONE,
    "silo.accumulation_steps": NONE_LESS,
    "silo.precision": PRECISIONS,
    "silo.activation_checkpointing_every": ONE,
    "silo.loss_chunk_tokens": NONE_LESS,
    "silo.prefetch_batches": NONE_LESS,
    "silo.checkpoint_interval_steps": ONE,
    "silo.keep_checkpoints": ONE,
    "silo.eval_interval_rounds": NONE_LESS,
    "silo.eval_sequences": NONE_LESS,
    "silo.log_interval_steps": ONE,
    "silo.profile_rounds": NONE_LESS,
    "silo.num_threads": ONE,
    "silo.private.epsilon": ABOVE,
    "silo.private.delta": PROBABILITY,
    "silo.private.clip_norm": ABOVE,
    "silo.private.noise_multiplier": ABOVE,
    "silo.personal_adapter.rank": NONE_LESS,
    "silo.personal_adapter.alpha": ABOVE,
    "silo.personal_adapter.dropout": BELOW_ONE,
    "practice.every_rounds": NONE_LESS,
    "practice.after_rounds": NONE_LESS,
    "silo.practice.samples": ONE,
    "silo.practice.keep": ONE,
    "silo.practice.num_tokens": ONE,
    "silo.practice.temperature": NONE_LESS,
    "silo.practice.share": Numbers(most=1, without_least=True),
    "silo.practice.iterations": ONE,
    "silo.practice.batch_sequences": ONE,
    "silo.practice.time_limit_seconds": ABOVE,
    "silo.practice.memory_mib": Numbers(least=64),
    "trust.keep_deliveries": NONE_LESS,
    "trust.software": ("recorded", "exact"),
    "wandb.mode": ("offline", "online", "disabled"),
}
