"""What practice goes with, and what not. Imports no torch."""

from pretrain.config.allowed import DPO
from pretrain.config.errors import require
from pretrain.config.keys import RunConfig


def check_practice(config: RunConfig) -> None:
    """Raise ConfigError for practice without a template, of pairs or a private silo, or that nobody has agreed to."""
    every, after = config.practice.every_rounds, config.practice.after_rounds
    require(bool(every) or not after, "practice.after_rounds", after, "0 with practice.every_rounds=0")
    allowed = f"0 with inner.loss={DPO}: what practice keeps is conversations, no pairs"
    require(not every or config.inner.loss != DPO, "practice.every_rounds", every, allowed)
    for name, silo in config.silos.items():
        key, own = f"silos.{name}.practice", silo.practice
        own.check(key)
        allowed = "empty with practice.every_rounds=0, which the contract says"
        require(bool(every) or not own.is_on, f"{key}.tasks", own.tasks, allowed)
        allowed = f"a chat template with {key}.tasks, as what is tried is a conversation"
        require(bool(config.chat_template) or not own.is_on, "chat_template", config.chat_template, allowed)
        epsilon = silo.private.epsilon
        allowed = f"null with {key}.tasks: what was right would be trained on, and no noise is counted for the tasks"
        require(epsilon is None or not own.is_on, f"silos.{name}.private.epsilon", epsilon, allowed)
