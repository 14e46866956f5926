"""Inner optimizers and their learning rate."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pretrain.config.errors import ConfigError
from pretrain.config.keys import InnerConfig
from pretrain.outer.learning_rate import scheduled_lr
from pretrain.silo.muon import MuonAdamW

MEAN_STEPS = 20  # of a mean gradient, at least; docs/log.md


def learning_rate(step: int, inner: InnerConfig) -> float:
    """Learning rate of inner step `step` (from 0), whatever the rounds, syncs and restarts before it."""
    return scheduled_lr(
        step,
        lr=inner.lr,
        num_steps=inner.num_steps,
        schedule=inner.schedule,
        warmup=inner.warmup_steps,
        decay=inner.decay_steps,
        min_ratio=inner.min_lr_ratio,
    )


def is_muon_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether Muon trains this parameter: a matrix in a numbered layer (`layers.3.mlp.up`), not embeddings or head."""
    return len(shape) == 2 and any(part.isdecimal() for part in name.split("."))


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    inner: InnerConfig,
    *,
    on_cpu: bool,
    fused: bool = True,
    sums_gradients: bool = False,
    turns: Mapping[str, int] | None = None,
) -> torch.optim.Optimizer:
    """AdamW, SGD, or Muon beside AdamW; matrices are decayed, vectors are not.

    Each group's learning rate is the schedule's times the group's `lr_factor`. `on_cpu`: optimizer states are offloaded
    to the host; `fused`: see SiloConfig.fused_adamw; `sums_gradients`: see MuonAdamW. Parameters that take turns,
    by `turns`, are in groups of their own. Raises ConfigError if there is nothing for Muon to train.
    """
    for_muon: list[nn.Parameter] = []
    others: dict[tuple[bool, int], list[nn.Parameter]] = {}  # whether they are vectors, and their turn
    for name, parameter in named_parameters:
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 flattens the parameter itself
        if parameter.requires_grad and inner.optimizer == "muon" and is_muon_matrix(name, shape):
            for_muon.append(parameter)
        elif parameter.requires_grad:
            others.setdefault((len(shape) < 2, (turns or {}).get(name, 0)), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": others[is_vector, turn],
            "weight_decay": 0.0 if is_vector else inner.weight_decay,
            "lr_factor": 1.0,
            "turn": turn,
            "muon": False,
        }
        for is_vector, turn in sorted(others)
    ]
    if inner.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=inner.lr)
    if inner.optimizer == "muon" and not for_muon:
        raise ConfigError(
            "inner.optimizer: 'muon' given; allowed for a model without matrices in numbered layers: adamw, sgd"
        )
    adamw = _adamw(groups, inner, on_cpu, fused)
    if inner.optimizer == "adamw":
        return adamw
    matrix_group = {
        "params": for_muon,
        "turn": 0,
        "muon": True,
        "lr": inner.muon_lr,
        "lr_factor": inner.muon_lr / inner.lr,
        "momentum": inner.muon_momentum,
        "weight_decay": inner.weight_decay,
    }
    return MuonAdamW(matrix_group, adamw, sums_gradients)


def _adamw(groups: list[dict[str, Any]], inner: InnerConfig, on_cpu: bool, fused: bool) -> torch.optim.Optimizer:
    betas = (inner.betas[0], inner.betas[1])
    if on_cpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=inner.lr, betas=betas, eps=inner.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=inner.lr, betas=betas, eps=inner.eps, fused=fused)
