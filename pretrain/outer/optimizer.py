"""The outer step (DiLoCo, arXiv 2311.08105): from merged pseudo-gradient to new global parameter, tensor by tensor."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

Moments = dict[str, Tensor]
# What an outer optimizer keeps of each parameter: fp32, of its shape, zero at the start.
MOMENTS: dict[str, tuple[str, ...]] = {"sgd": (), "nesterov": ("velocity",), "adam": ("mean", "variance")}


@dataclass(frozen=True, kw_only=True)
class OuterOptimizer:
    """An outer optimizer's settings; the learning rate comes with each step."""

    name: str
    """sgd, nesterov or adam."""
    momentum: float = 0.0
    """Nesterov's."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: float = 0.1
    """Adam's epsilon."""

    def step(
        self,
        parameter: Tensor,  # fp32, any shape
        pseudo_gradient: Tensor,  # float64, same shape: global minus silo parameters, merged
        moments: Mapping[str, Tensor],  # fp32, same shape: those of MOMENTS[name]
        *,
        lr: float,
        count: int,  # outer steps of this parameter, this one included
    ) -> tuple[Tensor, Moments]:
        """New parameter and new moments, fp32; the inputs are left as they are. Computed in float64, rounded once.

        Nesterov in the convention of torch.optim.SGD(nesterov=True), so that the first step is
        lr * (1 + momentum) * pseudo_gradient; Adam in that of torch.optim.Adam, with bias correction.
        """
        if self.name == "sgd":
            return (parameter.double() - lr * pseudo_gradient).float(), {}
        if self.name == "nesterov":
            velocity = self.momentum * moments["velocity"].double() + pseudo_gradient
            step = pseudo_gradient + self.momentum * velocity
            return (parameter.double() - lr * step).float(), {"velocity": velocity.float()}
        first, second = self.betas
        mean = first * moments["mean"].double() + (1 - first) * pseudo_gradient
        variance = second * moments["variance"].double() + (1 - second) * pseudo_gradient.square()
        step = (mean / (1 - first**count)) / ((variance / (1 - second**count)).sqrt() + self.eps)
        return (parameter.double() - lr * step).float(), {"mean": mean.float(), "variance": variance.float()}
