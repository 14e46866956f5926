"""Waiting for what another process or thread does."""

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE_SECONDS = 120.0  # for what comes at once on a machine that does nothing else

Found = TypeVar("Found")


def wait_for(
    condition: Callable[[], Found],
    *,
    seconds: float = PATIENCE_SECONDS,
    poll_seconds: float = 0.05,
    meanwhile: Callable[[], object] = lambda: True,
    tells: Callable[[], object] = lambda: "",
) -> Found:
    """Ask until the answer is true, and return it; AssertionError after so many seconds, or once `meanwhile` is not.

    `tells` is asked only then: what it says ends the message.
    """
    end = time.monotonic() + seconds
    while not (found := condition()):
        if not meanwhile():
            raise AssertionError(f"what was waited for can come no more: {tells()}")
        if time.monotonic() > end:
            raise AssertionError(f"waited for {seconds:g} s in vain: {tells()}")
        time.sleep(poll_seconds)
    return found
