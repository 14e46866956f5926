"""Reading what running processes write: `metrics.jsonl` and `status.json`."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""One line of `metrics.jsonl`."""


class MetricsReader:
    """Reads a growing `metrics.jsonl` from where it stopped the last time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset_bytes = 0

    def read_new(self) -> list[Record]:
        """Records of the lines completed since the last call; a line that is no JSON object is passed over."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset_bytes)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset_bytes += len(whole)
        return [record for line in whole.splitlines() if (record := _parse(line)) is not None]


def _parse(line: bytes) -> Record | None:
    # A machine that lost power can leave half a line; one bad line must not hide the rest of a run.
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None


# What makes a record the same one again when a resumed process repeats it; the last one counts.
IDENTITY = {
    "step": ("silo", "step"),
    "sync": ("silo", "version", "round", "fragment"),
    "eval": ("silo", "round"),
    "commit": ("version", "fragment"),
    "summary": ("silo",),
    "profile": ("silo", "step"),
    "start": ("silo", "version"),
    "rollback": ("number",),
    "gate": ("version",),
    "tasks": ("task", "task_sha256", "model_sha256", "examples"),
}


def last_of_each(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by kind, without those that a later one repeats or takes back, ordered by round, version or step."""
    kept: dict[str, dict[str, Record]] = {kind: {} for kind in IDENTITY}
    for record in records:
        if (kind := record["kind"]) not in IDENTITY:
            continue
        identity = json.dumps([record.get(key) for key in IDENTITY[kind]])
        if kind == "rollback" and identity in kept[kind]:
            continue  # every process says at its start what was rolled back before
        if kind in ("start", "rollback"):
            for other, found in kept.items():
                kept[other] = {key: one for key, one in found.items() if not _takes_back(record, one)}
        kept[kind][identity] = record
    return {
        kind: sorted(found.values(), key=lambda r: (r.get("version") or r.get("round") or 0, r.get("step") or 0))
        for kind, found in kept.items()
    }


def _takes_back(record: Record, earlier: Record) -> bool:
    """Whether what an earlier record tells of is undone: a silo started before it, or the run was rolled back.

    A silo that starts says at which step and version; what it had done after that, it does again, or it is discarded.
    """
    kind = earlier["kind"]
    if record["kind"] == "rollback":
        return kind in ("commit", "gate") and int(earlier["version"]) > int(record["to_version"])
    if earlier.get("silo") != record.get("silo"):
        return False
    if kind in ("step", "eval", "profile"):
        return int(earlier["step"]) > int(record["step"])
    if kind in ("sync", "start"):
        return int(earlier["version"]) > int(record["version"])
    return kind == "summary"  # it is written again at the end


@dataclass(kw_only=True)
class ProcessStatus:
    """What a process says it is doing."""

    phase: str = "starting"
    """starting, training, waiting, evaluating, merging, finished, stopped or failed."""
    waiting_for: str | None = None
    """What it waits for, in words."""
    since_unix_seconds: float = 0.0
    """Since when it is in this phase, by its own clock."""
    waited_seconds: float = 0.0
    """For how long whoever watches it has seen it in this phase."""
    step: int = 0
    """Inner steps done."""
    round: int = 0
    """The round it is in, or the version of the aggregator."""


def read_status(path: Path, before: bytes = b"") -> ProcessStatus:
    """A process's `status.json`; plain "starting" when there is none, or still `before`, which an earlier start left.

    Times of files and processes are of several clocks, and not compared.
    """
    try:
        data = path.read_bytes()
        found = json.loads(data)
    except (OSError, ValueError):
        return ProcessStatus()
    if before and data == before:
        return ProcessStatus()
    return ProcessStatus(
        phase=str(found.get("phase", "starting")),
        waiting_for=found.get("waiting_for"),
        since_unix_seconds=float(found.get("since") or 0.0),
        step=int(found.get("step") or 0),
        round=int(found.get("round") or 0),
    )
