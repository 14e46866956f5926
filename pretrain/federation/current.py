"""Which version of a run is the current one, by its contract's gate."""

from typing import Any

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.exchange.gated import Gated
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.words import Decision
from pretrain.trust.ledger import RefusedError
from pretrain.trust.policy import is_public


def current_version(config: RunConfig, exchange: StoreExchange) -> int:
    """The current version of the run in a store, by a decision that follows from the results that it names.

    Raises ConfigError where there is no gate, and before its first decision.
    """
    if not config.gate.is_on:
        raise ConfigError(
            "--current: given, and this run's contract has no gate; allowed: without it, for the newest version"
        )
    try:
        found = _deciding(exchange, Gated(exchange, config.gate))
    except RefusedError as error:
        raise ConfigError(
            f"--current: given; the gate's decision in {config.store_url} cannot be used: {error}"
        ) from None
    if not found:
        raise ConfigError(f"--current: given; nothing is decided yet in {config.store_url}; allowed: without it")
    return found.version


def _deciding(exchange: StoreExchange, gated: Gated) -> Decision | None:
    """The decision by which the current version is that, recomputed; None before there is one. Raises RefusedError."""
    newest = gated.newest(exchange.newest_version())
    decision = gated.decision(newest.current) if newest else None
    if newest and not decision:
        raise RefusedError(f"there is none about version {newest.current}, which is said to be the current one")
    if decision:
        gated.check(decision, gated.newest(decision.version - 1) if decision.version else None)
    return decision


def about_gate(config: RunConfig, exchange: StoreExchange, version: int) -> dict[str, Any]:
    """What an export says of a version's judgement: whether it was the current one when it was exported; empty without
    a gate. Raises RefusedError.
    """
    if not config.gate.is_on:
        return {}
    gated = Gated(exchange, config.gate)
    newest, own = gated.newest(exchange.newest_version()), None
    if config.gate.is_candidate(version):
        own = gated.decision(version)
    found: dict[str, Any] = {"current": newest.current if newest else None, "rule": config.gate.limits}
    if own:
        found |= {"compared_with": own.compared_with, "reasons": own.reasons}
        if is_public(config, "held_out"):
            found["losses"] = gated.losses_of(own)
    return {"gate": found}
