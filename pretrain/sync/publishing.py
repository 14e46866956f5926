"""Leaving word in the store of what a silo has found a held-out loss to be, beside training."""

from collections.abc import Callable

from pretrain.config.errors import ConfigError
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.words import Evaluation
from pretrain.trust.ledger import RefusedError


def tell(store: StoreExchange, silo: str, evaluation: Evaluation, wrong: Callable[[], str]) -> None:
    """Once `wrong` says that nothing is wrong with the text. What the store does not take is said, and no more."""
    if wrong():
        return  # the loop says what
    try:
        store.tell_evaluation(silo, evaluation)
    except (RefusedError, ConfigError) as error:
        print(f"version {evaluation.version}: its held-out loss is not published: {error}", flush=True)
