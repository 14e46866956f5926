"""The outer step (DiLoCo, arXiv 2311.08105): from merged pseudo-gradient to new global parameter, tensor by tensor."""

from torch import Tensor


def outer_step(
    parameter: Tensor,  # fp32, any shape
    pseudo_gradient: Tensor,  # float64, same shape: global minus silo parameters, merged
    velocity: Tensor | None,  # fp32, same shape; None for sgd
    *,
    lr: float,
    momentum: float,
) -> tuple[Tensor, Tensor | None]:
    """New parameter and new velocity, both fp32; the inputs are left as they are.

    SGD without velocity; with it, Nesterov momentum in the convention of torch.optim.SGD(nesterov=True), so that the
    first step is lr * (1 + momentum) * pseudo_gradient. Computed in float64 and rounded once.
    """
    if velocity is None:
        return (parameter.double() - lr * pseudo_gradient).float(), None
    new_velocity = momentum * velocity.double() + pseudo_gradient
    step = pseudo_gradient + momentum * new_velocity
    return (parameter.double() - lr * step).float(), new_velocity.float()
