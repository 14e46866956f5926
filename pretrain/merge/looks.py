"""Looks at the deliveries of several silos side by side, where one that comes slowly holds up none of the others."""

import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Looks(Generic[T]):
    """Looks that go on from one call to the next, until the block ends; then those under way are broken off."""

    def __init__(
        self,
        look: Callable[[str, threading.Event], T | None],
        *,
        at_once: int,
        most: int,
        patience_seconds: float,
    ) -> None:
        """`look` is given a silo and an event that is set when it is to end. `at_once` work side by side, and one that
        takes longer than `patience_seconds` does not count as one of them any more; `most` is how many there can be.
        """
        self._look, self._at_once, self._patience_seconds = look, at_once, patience_seconds
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(max(1, most))
        self._began: dict[Future[T | None], tuple[str, float]] = {}

    def __enter__(self) -> "Looks[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._pool.shutdown(cancel_futures=True)

    @property
    def under_way(self) -> list[str]:
        """Whom a look is under way at."""
        return [silo for silo, _ in self._began.values()]

    def at(self, silos: Collection[str], seconds: float) -> dict[str, T]:
        """Look at every one of the silos, apart from those under way; what was found, in their order.

        Returns when all looks have ended, or when all have begun and `seconds` have passed. Raises what a look raises.
        """
        waiting = [silo for silo in silos if silo not in self.under_way]
        until, found = time.monotonic() + seconds, {}
        while waiting or (self._began and time.monotonic() < until):
            while waiting and self._num_young() < self._at_once:
                silo = waiting.pop(0)
                self._began[self._pool.submit(self._look, silo, self._over)] = silo, time.monotonic()
            left_seconds = self._patience_seconds if waiting else until - time.monotonic()
            for ended in wait(self._began, max(0.0, left_seconds), FIRST_COMPLETED).done:
                silo, _ = self._began.pop(ended)
                if (result := ended.result()) is not None:
                    found[silo] = result
        return {silo: found[silo] for silo in silos if silo in found}

    def _num_young(self) -> int:
        now = time.monotonic()
        return sum(now - began < self._patience_seconds for _, began in self._began.values())
