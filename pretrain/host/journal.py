"""What a process tells the outside: metrics records, its status, its last error, and trackers. No torch."""

import errno
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.config.keys import RunConfig
from pretrain.host.tensorboard import EventFiles
from pretrain.host.tracker import Allows, Says, Tracker


class Journal:
    """One process's part of a run directory."""

    def __init__(
        self, config: RunConfig, part: str, *, silo: str | None, allows: Allows | None = None, says: Says | None = None
    ) -> None:
        """`part` is the folder below the run directory: `aggregator`, or `silos/NAME`. See Tracker for the rest."""
        self._silo = silo
        self._metrics = Path(config.directory) / "metrics.jsonl"
        self.directory = Path(config.directory) / part
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "error.txt").unlink(missing_ok=True)
        self._end_broken_line()
        self._event_files = EventFiles(config, part)
        self._tracker = Tracker(config, part, silo=silo, allows=allows, says=says)

    def record(self, kind: str, **values: Any) -> None:
        """Append one line to metrics.jsonl. One write in append mode: lines of several processes do not mix.

        Raises OSError on a full disk; what it still took of the line is ended by the next start.
        """
        head: dict[str, Any] = {"kind": kind, "time": time.time()}
        if self._silo:
            head["silo"] = self._silo
        self._append((json.dumps(head | values) + "\n").encode())
        self._event_files.log(kind, values)
        self._tracker.log(kind, values)

    def newest(self, kind: str, version: int) -> dict[str, Any]:
        """The newest of this silo's records of a kind that is of a version up to `version`; empty if there is none."""
        found: dict[str, Any] = {}
        with suppress(FileNotFoundError), self._metrics.open("rb") as file:
            for line in file:
                with suppress(ValueError):  # a part of a line, which a full disk has left
                    record = json.loads(line)
                    is_own = record.get("kind") == kind and record.get("silo") == self._silo
                    found = record if is_own and record["version"] <= version else found
        return found

    def _append(self, line: bytes) -> None:
        descriptor = os.open(self._metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._metrics))
        finally:
            os.close(descriptor)

    def _end_broken_line(self) -> None:
        """A disk that was full, or a machine that lost power, can have left a part of one, which readers pass over."""
        with suppress(OSError), self._metrics.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                self._append(b"\n")

    def status(self, phase: str, *, step: int = 0, round: int = 0, waiting_for: str | None = None) -> None:
        """Replace status.json: what this process does, and since when."""
        values = {"phase": phase, "waiting_for": waiting_for, "since": time.time(), "step": step, "round": round}
        temporary = self.directory / "status.json.tmp"
        temporary.write_text(json.dumps(values))
        temporary.replace(self.directory / "status.json")

    def error(self, message: str) -> None:
        """Leave the one line that a launcher shows for this process."""
        (self.directory / "error.txt").write_text(message + "\n")

    def close(self) -> None:
        """Finish what trackers were told, if there are any."""
        self._event_files.close()
        self._tracker.close()
