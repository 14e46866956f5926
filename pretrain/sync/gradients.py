"""What a silo tells the others of its gradients at a sync, and what it makes of what all have told: moments.py."""

from collections.abc import Sequence

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.exchange.base import Received
from pretrain.merge.terms import delivered_moments, shared_moments
from pretrain.outer.moments import SecondMoment
from pretrain.outer.quantize import Parts
from pretrain.silo.engine import Engine


def read_moments(
    config: RunConfig, silo: str, engine: Engine, names: Sequence[str], num_steps: int, *, is_leader: bool
) -> dict[str, Parts]:
    """What the others are told of our gradients in the last steps, in the leader's host memory; else empty.

    All ranks take part.
    """
    found = {}
    for name, moment in shared_moments(config, names, engine.shapes).items():
        is_second = isinstance(moment, SecondMoment)
        value = engine.read_second_moment(name) if is_second else engine.take_mean_gradient(name, num_steps)
        try:
            coded = moment.encode(value) if is_leader else {}
        except ValueError as error:
            raise ConfigError(f"silo {silo}: mean gradient of {name}: {error}; nothing was sent") from None
        if is_leader:
            found[name] = {part: tensor.cpu() for part, tensor in coded.items()}
        del value  # before the next one is gathered
    return found


def adopt_moments(config: RunConfig, engine: Engine, names: Sequence[str], received: Received | None) -> None:
    """Take over what was merged of the silos' gradients; `received` on the leader. All ranks take part.

    What is subtracted from all silos' mean gradient is our own as it was sent, rounding and all: so the corrections of
    all silos add up to zero (but for the rounding of the mean), and a silo alone is not corrected at all. Nor is one
    that told nothing.
    """
    told, share = delivered_moments(config, names, engine.shapes), config.outer.control_variates
    for name, moment in shared_moments(config, names, engine.shapes).items():
        merged = moment.decode(received.moments[name]) if received else None
        if isinstance(moment, SecondMoment):
            engine.write_second_moment(name, merged)
            continue
        correction = None
        if received and merged is not None:
            own = told[name].decode(received.told[name]) if name in received.told else merged
            correction = (merged - own) * share
        engine.correct_gradients(name, correction)
