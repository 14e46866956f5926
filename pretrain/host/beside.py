"""One piece of work at a time, done by a thread of its own beside what a process does."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Beside:
    """A thread, and what it has under way, if anything."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._under_way: Future[None] | None = None

    def begin(self, work: Callable[..., None], *arguments: object) -> None:
        """Begin a piece of work; `finish` comes before the next one."""
        self._under_way = self._thread.submit(work, *arguments)

    def finish(self) -> None:
        """Wait for what was begun; raises what went wrong with it."""
        if self._under_way:
            self._under_way.result()
        self._under_way = None

    def stop(self) -> None:
        """Begin nothing more, and wait for what is under way, whatever comes of it."""
        self._thread.shutdown()
