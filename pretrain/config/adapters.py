"""What cannot be with an adapter. Imports no torch."""

from pretrain.config.adapter import ALL_LINEAR, PROMPT, AdapterConfig
from pretrain.config.errors import ConfigError, require
from pretrain.config.keys import RunConfig
from pretrain.config.personal import PersonalConfig

MAKES_ROWS = "a network makes its rows, of which no mean is the mean of the rows; prompt trains the rows themselves"
IN_CACHE = (
    "it is in a cache of keys and values, which training has none of and where nothing keeps documents of a sequence "
    "apart; prompt stands before each document"
)
READS_BASE = "it begins with factors of the base's weights, of which ZeRO-3 has no whole one, and changes the base"
REFUSED = {
    "dora": "it takes a norm of the whole matrix at every step, which ZeRO-3 does not have, and no mean of it is exact",
    "qlora": "a base of 4 bits is not sharded by ZeRO-3 before it is loaded, and its adapters are saved empty",
    **dict.fromkeys(("prefix", "prefix_tuning"), IN_CACHE),
    **dict.fromkeys(("p_tuning", "p-tuning", "ptuning"), MAKES_ROWS),
    **dict.fromkeys(("pissa", "olora", "loftq", "corda", "eva", "orthogonal", "lora_ga"), READS_BASE),
}


def check_kind(adapter: AdapterConfig) -> None:
    """Refuse kinds that others have, with the reason. Raises ConfigError."""
    if why := REFUSED.get(adapter.kind):
        raise ConfigError(
            f"model.adapter.kind: {adapter.kind!r} given; allowed: none, lora, prompt, and not this: {why}"
        )


def check_adapter(config: RunConfig) -> None:
    """Refuse keys that would do nothing, and what an adapter is not trained with. Raises ConfigError."""
    adapter, key = config.model.adapter, "model.adapter"
    for name, default in vars(AdapterConfig()).items():
        given, fits = getattr(adapter, name), not adapter.is_of_another_kind(name)
        require(fits or given == default, f"{key}.{name}", given, f"{default} with {key}.kind={adapter.kind}")
    if not adapter.is_on:
        return
    base = config.model.checkpoint
    require(bool(base), "model.checkpoint", base, f"a transformers directory with {key}.kind={adapter.kind}")
    optimizer = config.inner.optimizer
    what = "prompt" if adapter.kind == PROMPT else "factor"
    allowed = f"adamw, sgd with {key}.kind={adapter.kind}: the rows of a {what} are not to be made orthogonal"
    require(optimizer != "muon", "inner.optimizer", optimizer, allowed)
    if adapter.kind == PROMPT:
        _check_prompt(config)
        return
    _check_targets(adapter.targets, key)
    if adapter.takes_turns:
        _check_turns(config)


def _check_prompt(config: RunConfig) -> None:
    """A prompt has something to begin as, and room."""
    adapter, key = config.model.adapter, "model.adapter"
    require(bool(adapter.text), f"{key}.text", adapter.text, f"what it begins as, with {key}.kind={PROMPT}")
    most = config.sequence_tokens - 2
    allowed = f"1 to {most}, so that two tokens are left of sequence_tokens={config.sequence_tokens}"
    require(adapter.tokens <= most, f"{key}.tokens", adapter.tokens, allowed)
    num_fragments = config.outer.num_fragments
    require(num_fragments == 1, "outer.num_fragments", num_fragments, f"1 with {key}.kind={PROMPT}: it is one matrix")


def _check_targets(targets: list[str], key: str) -> None:
    fits = bool(targets) and all(targets) and (ALL_LINEAR not in targets or targets == [ALL_LINEAR])
    require(fits, f"{key}.targets", targets, f"[{ALL_LINEAR}], or names of layers")


def _check_turns(config: RunConfig) -> None:
    """While one factor is due, the other has to be the same in all silos, to the last bit, and all means linear."""
    outer, key = config.outer, "model.adapter.merge=alternate"
    apart = "a factor is merged before the other goes on from it"
    linear = "a mean of products is one of factors only if all elements weigh alike"
    for name, given, wanted, why in (
        ("outer.num_fragments", outer.num_fragments, 2, "the factors A and B"),
        ("outer.overlap_steps", outer.overlap_steps, 0, apart),
        ("outer.mixing", outer.mixing, 0.0, apart),
        ("membership.stale_weight", config.membership.stale_weight, 0.0, "a late factor was trained beside another"),
        ("outer.merge", outer.merge, "mean", linear),
        ("outer.second_moments", outer.second_moments, "local", "a factor at rest has no gradient"),
    ):
        require(given == wanted, name, given, f"{wanted} with {key}: {why}")
    for name, silo in config.silos.items():
        epsilon = silo.private.epsilon
        require(epsilon is None, f"silos.{name}.private.epsilon", epsilon, f"null with {key}: noise would move both")


def check_personal(config: RunConfig) -> None:
    """Refuse what a silo's own adapter cannot be with, and keys that would do nothing. Raises ConfigError."""
    every = {f"silos.{name}.personal_adapter": silo.personal_adapter for name, silo in config.silos.items()}
    for key, own in every.items() if not any(own.is_on for own in every.values()) else ():
        for name, default in vars(PersonalConfig()).items():
            given = getattr(own, name)
            require(given == default, f"{key}.{name}", given, f"{default} with {key}.rank=0")
    for name, silo in config.silos.items():
        own, key = silo.personal_adapter, f"silos.{name}.personal_adapter"
        if not own.is_on:
            continue
        _check_targets(own.targets, key)
        kind = config.exchange.kind
        allowed = "0 with exchange.kind=none: there is no shared model for it to be beside"
        require(kind != "none", f"{key}.rank", own.rank, allowed)
        unnoised = "gradients that leave would follow from what it has learned without noise"
        for other, given, wanted, why in (
            ("model.adapter.kind", config.model.adapter.kind, "lora", "it is trained beside the shared adapter"),
            (f"silos.{name}.private.epsilon", silo.private.epsilon, None, unnoised),
            ("membership.max_loss_rise", config.membership.max_loss_rise, None, "no version has it to go back to"),
        ):
            allowed = f"{'null' if wanted is None else wanted} with {key}.rank={own.rank}: {why}"
            require(given == wanted, other, given, allowed)
