"""A version on its way: coded, delivered, merged, and come back."""

from concurrent.futures import Future
from dataclasses import dataclass

from pretrain.exchange.base import Outgoing, Received

Coded = Future[Outgoing | None]


@dataclass(kw_only=True)
class Flight:
    """One version between its delivery and its adoption."""

    wait_seconds: float
    """Time that training stood still for it."""
    coded: Coded
    """Our part of it; None if we have none."""
    received: Future[Received]


def done(coded: Outgoing | None) -> Coded:
    """What is coded already, or never will be."""
    future: Coded = Future()
    future.set_result(coded)
    return future
