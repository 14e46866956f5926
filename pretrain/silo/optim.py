"""Inner optimizers, and the learning rate as a pure function of the cumulative inner step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from pretrain.config import InnerConfig


def learning_rate(step: int, inner: InnerConfig) -> float:
    """Learning rate of inner step `step` (from 0), whatever the rounds, syncs and restarts before it."""
    if step < inner.warmup_steps:
        return inner.lr * (step + 1) / inner.warmup_steps
    final = inner.lr * inner.min_lr_ratio
    if inner.schedule == "cosine":
        progress = (step - inner.warmup_steps) / max(1, inner.num_steps - inner.warmup_steps)
        return final + (inner.lr - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay_start = inner.num_steps - inner.decay_steps
    if inner.schedule == "wsd" and step >= decay_start:
        return final + (inner.lr - final) * max(0.0, (inner.num_steps - step) / inner.decay_steps)
    return inner.lr


def build_optimizer(parameters: Iterable[nn.Parameter], inner: InnerConfig, *, on_cpu: bool) -> torch.optim.Optimizer:
    """AdamW or SGD; matrices are decayed, vectors are not. `on_cpu`: optimizer states are offloaded to the host."""
    trained = [p for p in parameters if p.requires_grad]
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]  # ZeRO-3 flattens p itself
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((matrices, inner.weight_decay), (vectors, 0.0))
        if group
    ]
    if inner.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=inner.lr)
    betas = (inner.betas[0], inner.betas[1])
    if on_cpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=inner.lr, betas=betas, eps=inner.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=inner.lr, betas=betas, eps=inner.eps)
