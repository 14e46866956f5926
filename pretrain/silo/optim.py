"""Inner optimizers and their learning rate."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.config.check import ConfigError
from pretrain.config.keys import InnerConfig
from pretrain.outer.learning_rate import scheduled_lr

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
    sums_gradients: bool = False,
) -> torch.optim.Optimizer:
    """AdamW, SGD, or Muon beside AdamW; matrices are decayed, vectors are not.

    Each group's learning rate is the schedule's times the group's `lr_factor`. `on_cpu`: optimizer states are offloaded
    to the host; `sums_gradients`: see MuonAdamW. Raises ConfigError if there is nothing for Muon to train.
    """
    for_muon: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 flattens the parameter itself
        if parameter.requires_grad and inner.optimizer == "muon" and is_muon_matrix(name, shape):
            for_muon.append(parameter)
        elif parameter.requires_grad:
            (matrices if len(shape) >= 2 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": group, "weight_decay": decay, "lr_factor": 1.0, "muon": False}
        for group, decay in ((matrices, inner.weight_decay), (vectors, 0.0))
        if group
    ]
    if inner.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=inner.lr)
    if inner.optimizer == "muon" and not for_muon:
        raise ConfigError(
            "inner.optimizer: 'muon' given; allowed for a model without matrices in numbered layers: adamw, sgd"
        )
    adamw = _adamw(groups, inner, on_cpu)
    if inner.optimizer == "adamw":
        return adamw
    matrix_group = {
        "params": for_muon,
        "muon": True,
        "lr": inner.muon_lr,
        "lr_factor": inner.muon_lr / inner.lr,
        "momentum": inner.muon_momentum,
        "weight_decay": inner.weight_decay,
    }
    return MuonAdamW(matrix_group, adamw, sums_gradients)


def _adamw(groups: list[dict[str, Any]], inner: InnerConfig, on_cpu: bool) -> torch.optim.Optimizer:
    betas = (inner.betas[0], inner.betas[1])
    if on_cpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        from pretrain.silo.extensions import load_extension

        load_extension("CPUAdamBuilder")
        return DeepSpeedCPUAdam(groups, lr=inner.lr, betas=betas, eps=inner.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=inner.lr, betas=betas, eps=inner.eps)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a rank's flat partition holds of a matrix, which may be nothing. Places are counted in elements."""

    shape: torch.Size
    """Of the whole matrix."""
    start: int
    """Where the piece begins in the flattened matrix."""
    offset: int
    """Where it begins in the partition."""
    num_elements: int

    @property
    def in_matrix(self) -> slice:
        """Its elements in the flattened matrix."""
        return slice(self.start, self.start + self.num_elements)

    @property
    def in_partition(self) -> slice:
        """Its elements in the partition."""
        return slice(self.offset, self.offset + self.num_elements)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the group of matrices and AdamW for the rest, as the one optimizer that DeepSpeed takes.

    Muon needs whole matrices, and ZeRO hands its optimizer flat partitions: each matrix in turn is put together from
    all ranks' pieces, every rank runs torch.optim.Muon on it, and keeps its own piece of the change. DeepSpeed's own
    Muon orthogonalizes the gradient before it is clipped, so that `clip_norm` would shrink the change itself.

    With `sums_gradients` a matrix's gradients are summed up, and a `correction` is added to each after that (control
    variates). Whoever takes the sum divides it, has the mean put down as `told`, and sets the correction.
    """

    def __init__(
        self, matrix_group: dict[str, Any], adamw: torch.optim.Optimizer, sums_gradients: bool = False
    ) -> None:
        """`matrix_group`: the parameters for Muon and their settings; `adamw` trains all others."""
        self._sums_gradients = sums_gradients
        self.matrices: list[nn.Parameter] = list(matrix_group["params"])
        self._adamw = adamw
        self._pieces: Mapping[Tensor, Sequence[Piece]] = {}
        self._device: torch.device | None = None
        super().__init__([matrix_group, *adamw.param_groups], {})

    def place(self, pieces: Mapping[Tensor, Sequence[Piece]], device: torch.device) -> None:
        """Say what each flat partition of this rank holds, all matrices in the same order on all ranks.

        Without it a flat partition does not change. `device` is where ranks talk and matrices are computed.
        """
        self._pieces = pieces
        self._device = device

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all groups, all ranks together."""
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self._step_muon(parameter, parameter.grad, group)
        # DeepSpeed steps group by group and, when it loads a checkpoint, replaces groups and state.
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state = self.state
        self._adamw.step()

    def _step_muon(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if self._sums_gradients:
            for part in ("gradient_sum", "told", "correction"):
                state.setdefault(part, torch.zeros_like(parameter))
            state["gradient_sum"].add_(gradient)
            gradient = gradient + state["correction"]
        momentum = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
        momentum.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"])  # Nesterov
        change = _muon_change(direction) if parameter.ndim == 2 else self._change_of_pieces(parameter, direction)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=group["lr"])

    def _change_of_pieces(self, partition: Tensor, direction: Tensor) -> Tensor:
        change = torch.zeros_like(direction)
        for piece in self._pieces.get(partition, ()):
            matrix = torch.zeros(piece.shape.numel(), device=self._device)
            matrix[piece.in_matrix] = direction[piece.in_partition].to(matrix.device)
            dist.all_reduce(matrix)  # the pieces do not overlap, so the sum is exact
            whole = _muon_change(matrix.view(piece.shape))
            change[piece.in_partition] = whole.flatten()[piece.in_matrix].to(change.device)
        return change


def _muon_change(direction: Tensor) -> Tensor:
    """What torch.optim.Muon adds to a matrix at learning rate 1, the momentum being in `direction` already."""
    matrix = nn.Parameter(torch.zeros_like(direction))
    matrix.grad = direction
    torch.optim.Muon([matrix], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    return matrix.detach()
