"""Differential privacy for one packed sequence: inner steps whose gradients are clipped, summed and noised.

A step is one Gaussian mechanism. The gradient of each sequence's mean loss, over those of its tokens that are trained,
is clipped to `clip_norm`, all of a global
batch are added up in fp32, over micro batches and ranks, each rank adds noise to its part of the sum, and the public
number of sequences in a batch divides it (DP-SGD, arXiv 1607.00133, in the batches of an epoch's fixed order). All that
follows, DeepSpeed's reduction, clipping by `inner.clip_norm`, AdamW or Muon, moments, merges, sees noised gradients
alone, so nothing more is spent by it.

Noise is drawn with a key that follows from the silo's secret and from all that the step depends on: the place in the
text, the parameters, and the sum of gradients itself. Done again after a kill, a step that comes to the same bits has
the same noise, which tells nothing twice; if a bit differs, the noise is another and the account counts one release
more. So no two sums ever have the same noise (the principle of a synthetic nonce, RFC 6979).
"""

import json
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config.budgets import PrivateConfig
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.silo.account import Account, BudgetSpentError, Plan, plan
from pretrain.silo.batch import Batch
from pretrain.silo.checkpoint import Progress
from pretrain.silo.data import Mixture
from pretrain.silo.engine import Engine
from pretrain.silo.noise import add_noise, derived, secret_key
from pretrain.silo.ranks import Ranks

ACCOUNT, SECRET = "account.txt", "noise.key"
ROUNDING = 1e-5  # of a norm in fp32, by which gradients are made shorter, so that none is longer than it may be


class Private:
    """A private silo's part in its steps; all ranks call everything together."""

    def __init__(
        self,
        settings: PrivateConfig,
        plan: Plan,
        ranks: Ranks,
        *,
        silo: str,
        directory: Path,
        data: dict[str, Any],
    ) -> None:
        """`directory` is the silo's own for its secret and its account; `data`: which text this is, in which order.

        Raises ConfigError, on all ranks alike, for an account that was begun with another text or noise.
        """
        self._settings, self._plan, self._ranks, self._silo = settings, plan, ranks, silo
        self._account: Account | None = None
        said, key = "", ""
        if ranks.is_leader:
            try:
                self._account = Account(directory / ACCOUNT, plan, data)
                key = secret_key(directory / SECRET).hex()
            except (ConfigError, OSError, ValueError) as error:
                said = str(error)
        said, key = ranks.from_leader((said, key))
        if said:
            raise ConfigError(said)
        self._key = bytes.fromhex(key)

    def step(
        self,
        engine: Engine,
        micro_batches: Iterable[Batch],
        lr: float,
        progress: Progress,
        part: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> tuple[float, float]:
        """What `Engine.step` does, with noise; and puts into `progress` what has been spent.

        Raises BudgetSpentError, before there is any noise, for a step that the budget does not have, and ConfigError
        where there is no account of the steps before; both on all ranks alike.
        """
        total, loss = self._clipped_sum(engine, micro_batches, part)
        with part("noise"):
            mean = self._noised_mean(engine, total, progress)
        shapes = [*engine.shapes.values()]
        gradients = mean.split([shape.numel() for shape in shapes])
        with part("optimizer"):
            norm = engine.step_along((g.view(shape) for g, shape in zip(gradients, shapes, strict=True)), lr)
        return loss, norm

    def _clipped_sum(
        self,
        engine: Engine,
        micro_batches: Iterable[Batch],
        part: Callable[[str], AbstractContextManager[object]],
    ) -> tuple[Tensor, float]:
        """Of this rank's sequences, flat, fp32, with room for equal parts of all ranks; a loss as `Engine.step`'s."""
        sizes = [shape.numel() for shape in engine.shapes.values()]
        num_values = math.ceil(sum(sizes) / self._ranks.num_ranks) * self._ranks.num_ranks
        total = torch.zeros(num_values, dtype=torch.float32, device=self._ranks.device)
        sums = [*total[: sum(sizes)].split(sizes)]
        told, num_trained = [torch.zeros((), device=self._ranks.device)], None
        for batch in micro_batches:
            num_trained = batch.num_trained
            with part("backward"):
                for losses, gradients in engine.sequence_gradients(batch):
                    told.append(losses.mean() if num_trained is None else losses.sum())
                    add_clipped(sums, [gradient.flatten() for gradient in gradients], self._settings.clip_norm)
        if num_trained is None:
            return total, torch.stack(told[1:]).mean().item()
        return total, torch.stack(told).sum().item() * self._ranks.num_ranks / max(1, num_trained)

    def _noised_mean(self, engine: Engine, total: Tensor, progress: Progress) -> Tensor:
        """The batch's mean gradient with noise, flat, on all ranks the same."""
        ranks, plan = self._ranks, self._plan
        size = len(total) // ranks.num_ranks
        own = total[ranks.rank * size : (ranks.rank + 1) * size]
        if ranks.num_ranks > 1:
            dist.all_reduce(total)
        found = [derived(self._key, b"gradients", _bytes(own)), self._parameters_digest(engine)]
        place = json.dumps([progress.position, plan.noise_multiplier, self._settings.clip_norm, ranks.num_ranks])
        what = derived(self._key, b"step", place.encode(), *ranks.from_each(b"".join(found)))
        self._release(progress, derived(self._key, b"release", what).hex()[:32])
        noise_key = derived(self._key, b"noise", what, ranks.rank.to_bytes(4, "little"))
        add_noise(own, noise_key, plan.noise_multiplier * self._settings.clip_norm)
        if ranks.num_ranks > 1:
            dist.all_gather_into_tensor(total, own.clone())
        return total.div_(plan.batch_sequences)

    def _parameters_digest(self, engine: Engine) -> bytes:
        """Of this rank's share of the parameters that the module computes with."""
        values = [parameter.detach() for parameter in engine.module.parameters()]
        return derived(self._key, b"parameters", *map(_bytes, values[self._ranks.rank :: self._ranks.num_ranks]))

    def _release(self, progress: Progress, digest: str) -> None:
        """Have the leader account for what is about to get its noise."""
        spent, account = None, self._account
        is_lost = account is not None and account.is_new and progress.position > 0
        if account and not is_lost:
            spent = account.release(progress.position, digest)
        num_epochs, is_lost = self._ranks.from_leader((spent, is_lost))
        if is_lost:
            raise ConfigError(
                f"silos.{self._silo}.private: epsilon given; no account is here of the {progress.position:,} sequences "
                "that it has read in this run; restore its folder `private` from a backup, or start a run of its own"
            )
        if num_epochs is None:
            noise = self._plan.noise_multiplier
            raise BudgetSpentError(
                f"silo {self._silo}: its budget of epsilon {self._settings.epsilon:g}, delta {self._plan.delta:g} is "
                f"spent after step {progress.step}; a larger one goes on with noise_multiplier={noise}"
            )
        progress.epsilon, progress.delta = self._plan.epsilon(num_epochs), self._plan.delta


def open_private(config: RunConfig, name: str, ranks: Ranks, mixture: Mixture) -> Private | None:
    """A private silo's clipping and noise; None for one that is not. Raises ConfigError for one that was until now."""
    settings, directory = config.silos[name], config.silo_directory(name) / "private"
    if settings.is_private:
        return Private(
            settings.private,
            plan(config, name, mixture.corpora[0].manifests),
            ranks,
            silo=name,
            directory=directory,
            data=mixture.terms,
        )
    if (directory / ACCOUNT).is_file():
        raise ConfigError(
            f"silos.{name}.private.epsilon: null given; {directory} has the account of a run that was private until "
            "now; allowed: its budget, or a run of its own"
        )
    return None


def add_clipped(sums: list[Tensor], gradients: list[Tensor], clip_norm: float) -> None:
    """Add one sequence's gradients, flat, in the module's precision, to fp32 sums: at most `clip_norm` long together.

    Gradients that are not finite are left out, so that no sequence can do more than that.
    """
    wide = [gradient.float() for gradient in gradients]
    norm = torch.stack(torch._foreach_norm(wide)).norm().item()
    if math.isfinite(norm):
        torch._foreach_add_(sums, wide, alpha=min(1.0, clip_norm * (1 - ROUNDING) / max(norm, 1e-30)))


def _bytes(values: Tensor) -> bytes:
    """A tensor's own bytes, whatever its type."""
    return values.contiguous().view(torch.uint8).cpu().numpy().tobytes()
