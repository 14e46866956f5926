"""Signs of life in a store: small objects, numbered, of which only the newest is kept. No torch."""

import threading
from collections.abc import Callable
from contextlib import suppress

from pretrain.config.check import ConfigError
from pretrain.exchange.objects import Objects
from pretrain.exchange.words import number

BEATS_PER_LEASE = 5


class Beats:
    """Leaves one sign of life after another, in a thread of its own, from its making to `stop`.

    Nothing waits for one: none is tried again, and in a store that is in trouble the next one may get through.
    """

    def __init__(
        self,
        objects: Objects,
        prefix: str,
        *,
        lease_seconds: float,
        content: bytes = b"{}\n",
        is_over: Callable[[Objects], bool] = lambda objects: False,
    ) -> None:
        """Write `prefix` and a number, above those that lie there, `BEATS_PER_LEASE` times in `lease_seconds`.

        Ends by itself once `is_over` says so, which is asked before each one.
        """
        self._objects, self._prefix, self._content, self._is_over = objects.at_once(), prefix, content, is_over
        self._lease_seconds = lease_seconds
        self._stopped, self._takes_back = threading.Event(), False
        self._thread = threading.Thread(target=self._beat, name="beats", daemon=True)
        self._thread.start()

    def stop(self, *, take_back: bool = False) -> None:
        """Leave no more, and delete the last one if `take_back`; waits for one that is being written, up to a lease."""
        self._takes_back = take_back
        self._stopped.set()
        self._thread.join(self._lease_seconds)

    def _beat(self) -> None:
        written: list[str] | None = None
        next_one = 0
        while True:
            with suppress(ConfigError):
                if self._is_over(self._objects):
                    return
                if written is None:
                    written = self._earlier()
                    next_one = int(written[-1].removeprefix(self._prefix)) + 1 if written else 0
                written.append(f"{self._prefix}{next_one:06d}")
                next_one += 1
                with suppress(FileExistsError):  # an earlier try of the library's own got through
                    self._objects.write(written[-1], self._content)
                self._delete(written, keep=1)
            if self._stopped.wait(self._lease_seconds / BEATS_PER_LEASE):
                break
        if self._takes_back:
            with suppress(ConfigError):
                self._delete(written or [], keep=0)

    def _earlier(self) -> list[str]:
        """What a process that was killed has left."""
        folder, stem = self._prefix.rsplit("/", 1)
        names = self._objects.names(folder)
        numbers = sorted(n for name in names if (n := number(name, before=stem)) is not None)
        return [f"{folder}/{stem}{n:06d}" for n in numbers]

    def _delete(self, written: list[str], *, keep: int) -> None:
        while len(written) > keep:
            self._objects.delete(written[0])
            del written[0]
