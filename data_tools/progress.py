"""How far the work is, how fast, and how long it still takes: a bar in a terminal, a line a minute in a log file."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 60.0


class Speed:
    """Shows the work on a list of parts, each of so many bytes (0: unknown, and then there is no time left to show)."""

    def __init__(self, console: Console, description: str, part_bytes: list[int]) -> None:
        self._console, self._description, self._part_bytes = console, description, part_bytes
        self._total_bytes = sum(part_bytes) if all(part_bytes) else None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(description, total=self._total_bytes, speed="")
        self._first: tuple[float, int, int] | None = None
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def update(self, part: int, part_bytes_read: int, num_tokens: int | None = None) -> None:
        """So many bytes of this part are read, and those before it whole; so many tokens are written in all, if any are
        to be."""
        now, done = time.monotonic(), sum(self._part_bytes[:part]) + part_bytes_read
        if self._first is None:  # what an earlier attempt did says nothing of the speed of this one
            self._first = (now, done, num_tokens or 0)
        seconds = max(now - self._first[0], 1e-9)
        bytes_per_second = (done - self._first[1]) / seconds
        speed = f"{bytes_per_second / 1e6:.1f} MB/s"
        if num_tokens is not None:
            speed += f"  {(num_tokens - self._first[2]) / seconds / 1e6:.2f} Mtok/s"
        self._progress.update(self._task, completed=done, speed=speed)
        if self._progress.disable and now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            left = ""
            if self._total_bytes is not None and bytes_per_second > 0:
                left = (
                    f" of {self._total_bytes / 1e6:.0f} MB, {(self._total_bytes - done) / bytes_per_second:.0f} s left"
                )
            self._console.print(f"{self._description}  {done / 1e6:.0f} MB{left}  {speed}", highlight=False)
