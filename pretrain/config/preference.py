"""What cannot be with a loss of preference pairs. Imports no torch."""

from pretrain.config.adapter import PROMPT
from pretrain.config.allowed import DPO
from pretrain.config.errors import require
from pretrain.config.keys import InnerConfig, RunConfig


def check_preference(config: RunConfig) -> None:
    """Refuse keys that would do nothing, and what pairs are not trained with. Raises ConfigError."""
    inner, key = config.inner, f"inner.loss={DPO}"
    if inner.loss != DPO:
        default = InnerConfig().dpo_beta
        require(inner.dpo_beta == default, "inner.dpo_beta", inner.dpo_beta, f"{default} with inner.loss={inner.loss}")
        return
    base = config.model.checkpoint
    allowed = f"a transformers directory with {key}, which pairs are compared with"
    require(bool(base), "model.checkpoint", base, allowed)
    allowed = f"the template that the pairs were prepared with, with {key}"
    require(bool(config.chat_template), "chat_template", config.chat_template, allowed)
    kind = config.model.adapter.kind
    require(kind != PROMPT, "model.adapter.kind", kind, f"none, lora with {key}: its base knows no prompt")
    for name, silo in config.silos.items():
        epsilon = silo.private.epsilon
        require(epsilon is None, f"silos.{name}.private.epsilon", epsilon, f"null with {key}")
