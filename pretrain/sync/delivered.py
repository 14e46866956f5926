"""Which deliveries a silo has made: whatever else bears its name in the store is somebody else's. No torch."""

import os
import re
import threading
from collections import defaultdict
from pathlib import Path

from pretrain.host.disk import to_disk

LINE = re.compile(r"(from|[0-9]{6,9}) ([0-9a-f]{1,64})")


class Delivered:
    """A line for each manifest, in the silo's run directory, written before the manifest leaves.

    A silo that was restarted may have delivered other bytes before, where kernels are not deterministic; these stand,
    and are here too. Without the file, as in a run directory that is an older copy and from which it was deleted,
    nothing is known of the versions before the one that it then begins with.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._lock = file, threading.Lock()
        self._first, self._known = 0, defaultdict[int, set[str]](set)
        lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
        for match in filter(None, map(LINE.fullmatch, lines)):  # a kill may have left half a line
            if match[1] == "from":
                self._first = int(match[2])
            else:
                self._known[int(match[1])].add(match[2])

    def begin(self, first: int) -> None:
        """Note from which version on all is known, unless a file says so already."""
        if not self.file.is_file():
            self._first = first
            append(self.file, f"from {first}")

    def add(self, version: int, manifest_sha256: str) -> None:
        """A manifest is about to be delivered."""
        with self._lock:
            if manifest_sha256 not in self._known[version]:
                append(self.file, f"{version:06d} {manifest_sha256}")
                self._known[version].add(manifest_sha256)

    def add_only(self, version: int, sha256: str) -> bool:
        """The same of a file that has one line a version: whether it is the only one."""
        if self._known[version] - {sha256}:
            return False
        self.add(version, sha256)
        return True

    def may_be_ours(self, version: int, manifest_sha256: str) -> bool:
        """Whether a manifest in our name is one that we have delivered, as far as is known."""
        return version < self._first or manifest_sha256 in self._known[version]

    def of(self, version: int) -> set[str]:
        """What the file says of a version."""
        return self._known[version]

    @property
    def is_empty(self) -> bool:
        """Whether the file says nothing of any version."""
        return not any(self._known.values())


def append(file: Path, line: str) -> None:
    """Add a line to a file, which is on the disk then; so is the name of one that was not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    is_new = not file.exists() or not file.stat().st_size
    with file.open("a") as opened:
        opened.write(f"\n{line}\n")
        opened.flush()
        os.fsync(opened.fileno())
    for folder in (file.parent, file.parent.parent) if is_new else ():
        to_disk(folder)
