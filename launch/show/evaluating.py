"""How far `atoll eval` is: a bar in a terminal, now and then a line in a log file; on stderr, as the result is not."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class Evaluating:
    """Shows the sequences of each split that are done."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        is_log = not self._console.is_terminal
        self._progress = Progress(*columns, console=self._console, transient=True, disable=is_log)
        self._tasks: dict[str, TaskID] = {}
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def tell(self, split: str, num_done: int, num_sequences: int) -> None:
        """So many sequences of this split are done, of so many."""
        if split not in self._tasks:
            self._tasks[split] = self._progress.add_task(split, total=num_sequences)
        self._progress.update(self._tasks[split], completed=num_done)
        if self._progress.disable and time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self._console.print(f"{split}  {num_done} of {num_sequences} sequences", highlight=False, markup=False)
