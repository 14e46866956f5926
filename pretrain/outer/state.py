"""What whoever takes outer steps keeps of each tensor, and the whole step on one tensor."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from pretrain.outer.digest import Row, digest_rows, digest_tensors
from pretrain.outer.optimizer import MOMENTS
from pretrain.outer.placing import InMemory

TARGET = "target"


@dataclass(kw_only=True)
class OuterTensors:
    """Parameters and what is kept of each besides, fp32, on the host: 4 to 16 bytes a parameter."""

    parameters: dict[str, Tensor]
    """As published: what every silo holds, to the last bit."""
    kept: dict[str, dict[str, Tensor]]
    """By kind and name: the outer optimizer's moments, and the target if the downlink's codec leaves anything out."""

    @property
    def target(self) -> dict[str, Tensor]:
        """Where the outer steps have led."""
        return self.kept.get(TARGET, self.parameters)

    def kept_digest(self, names: Iterable[str]) -> str:
        """Digest of what is `kept` of some tensors."""
        wanted = list(names)
        return digest_tensors((f"{kind}/{name}", of[name]) for kind, of in self.kept.items() for name in wanted)


@dataclass(kw_only=True)
class OuterState(OuterTensors):
    """The global parameters and the outer optimizer's state."""

    version: int
    rows: dict[str, Row] = field(default_factory=dict)
    """Of the parameters' digest, one a tensor."""

    @property
    def parameters_digest(self) -> str:
        """Digest of all parameters as published."""
        return digest_rows(self.rows.values())


def kept_kinds(optimizer: str, downlink_codec: str) -> tuple[str, ...]:
    """The kinds of `OuterTensors.kept` with these settings."""
    return MOMENTS[optimizer] + ((TARGET,) if downlink_codec != "fp32" else ())


def kept_at_start(
    parameters: dict[str, Tensor], optimizer: str, downlink_codec: str, place: InMemory | None = None
) -> dict[str, dict[str, Tensor]]:
    """Moments of zero, and the parameters themselves as the target; in memory, or where `place` says."""
    place = place or InMemory()
    return {
        kind: {name: place.copy(p) if kind == TARGET else place.zeros(p.shape) for name, p in parameters.items()}
        for kind in kept_kinds(optimizer, downlink_codec)
    }
