"""Signs of life in a store: small objects, numbered, of which only the newest is kept. No torch."""

import threading
from collections.abc import Callable
from contextlib import suppress

from pretrain.config.errors import ConfigError
from pretrain.exchange.signed import SignedStore
from pretrain.exchange.words import Word, number

BEATS_PER_LEASE = 5


class Beats:
    """Leaves one sign of life after another, in a thread of its own, from its making to `stop`.

    Nothing waits for one: none is tried again, and in a store that is in trouble the next one may get through.
    """

    def __init__(
        self,
        store: SignedStore,
        prefix: str,
        word: Word,
        author: str,
        *,
        lease_seconds: float,
        is_over: Callable[[SignedStore], bool] = lambda store: False,
    ) -> None:
        """Say `word` under `prefix` and a number, above its author's that lie there, `BEATS_PER_LEASE` times in
        `lease_seconds`.

        Ends by itself once `is_over` says so, which is asked before each one.
        """
        self._store, self._prefix, self._word, self._author = store.at_once(), prefix, word, author
        self._is_over, self._lease_seconds = is_over, lease_seconds
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
                if self._is_over(self._store):
                    return
                if written is None:
                    written, next_one = self._earlier()
                name = f"{self._prefix}{next_one:06d}"
                written = [*(other for other in written if other != name), name]
                next_one += 1
                with suppress(FileExistsError):  # an earlier try of the library's own got through
                    self._store.say(name, self._word, self._author)
                self._delete(written, keep=1)
            if self._stopped.wait(self._lease_seconds / BEATS_PER_LEASE):
                break
        if self._takes_back:
            with suppress(ConfigError):
                self._delete(written or [], keep=0)

    def _earlier(self) -> tuple[list[str], int]:
        """What a process that was killed has left, or somebody else, and the number that follows its author's last."""
        folder, stem = self._prefix.rsplit("/", 1)
        names = self._store.objects.names(folder)
        numbers = sorted(n for name in names if (n := number(name, before=stem)) is not None)
        found = {n: f"{folder}/{stem}{n:06d}" for n in numbers}
        is_signed = bool(self._store.members.keys)
        ours = (
            n
            for n, name in reversed(found.items())
            if not is_signed or self._store.heard(type(self._word), name, self._author)
        )
        return list(found.values()), next(ours, -1) + 1

    def _delete(self, written: list[str], *, keep: int) -> None:
        while len(written) > keep:
            self._store.objects.delete(written[0])
            del written[0]
