"""What whoever takes outer steps keeps of each tensor, and the whole step on one tensor."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.outer.codec import apply_change, encode
from pretrain.outer.digest import digest_tensors
from pretrain.outer.optimizer import MOMENTS, OuterOptimizer
from pretrain.outer.quantize import Parts

TARGET = "target"


@dataclass(kw_only=True)
class OuterTensors:
    """Parameters and what is kept of each besides, fp32, in host memory: 4 to 16 bytes a parameter."""

    parameters: dict[str, Tensor]
    """As published: what every silo holds, to the last bit."""
    kept: dict[str, dict[str, Tensor]]
    """By kind and name: the outer optimizer's moments, and the target if the downlink's codec leaves anything out."""

    @property
    def target(self) -> dict[str, Tensor]:
        """Where the outer steps have led."""
        return self.kept.get(TARGET, self.parameters)

    @property
    def kept_digest(self) -> str:
        """Digest of `kept`."""
        return digest_tensors((f"{kind}/{name}", t) for kind, values in self.kept.items() for name, t in values.items())

    def step(
        self, name: str, merged: Tensor, optimizer: OuterOptimizer, *, lr: float, count: int, codec: str
    ) -> tuple[Parts, float]:
        """Take the outer step of one tensor in place; `merged` is its pseudo-gradient, float64.

        Returns the change of the published tensor in the downlink's codec, and the squared norm of the update. What the
        codec leaves out stays in the target. Raises ValueError if the step leaves the range of fp32.
        """
        published, target = self.parameters[name], self.target[name]
        before = {kind: self.kept[kind][name] for kind in MOMENTS[optimizer.name]}
        new, moments = optimizer.step(target, merged, before, lr=lr, count=count)
        update = new - target  # not finite where the new one is not
        if not all(value.isfinite().all() for value in (update, new - published, *moments.values())):
            raise ValueError("the outer step leaves the range of fp32")
        change = encode(codec, published, new)
        apply_change(codec, published, change)
        if target is not published:
            target.copy_(new)
        for kind, value in moments.items():
            before[kind].copy_(value)
        return change, torch.linalg.vector_norm(update, dtype=torch.float64).item() ** 2


def kept_kinds(optimizer: str, downlink_codec: str) -> tuple[str, ...]:
    """The kinds of `OuterTensors.kept` with these settings."""
    return MOMENTS[optimizer] + ((TARGET,) if downlink_codec != "fp32" else ())


def kept_at_start(parameters: dict[str, Tensor], optimizer: str, downlink_codec: str) -> dict[str, dict[str, Tensor]]:
    """Moments of zero, and the parameters themselves as the target."""
    return {
        kind: {name: p.clone() if kind == TARGET else torch.zeros_like(p) for name, p in parameters.items()}
        for kind in kept_kinds(optimizer, downlink_codec)
    }
