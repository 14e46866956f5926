"""Where a run stands, read from its store alone: what `atoll status` prints on any machine that can read the store."""

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import fsspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.display import format_seconds
from launch.report import format_count
from pretrain.config import ConfigError


@dataclass(kw_only=True)
class SiloStatus:
    """One silo, as the store shows it."""

    newest_delivery: int | None = None
    """The newest round it delivered; None when there is none, or it was pruned."""
    tokens_total: int | None = None
    """Tokens it had trained on at that delivery."""
    num_commits: int = 0
    """Commits it contributed to."""
    tokens_contributed: int = 0
    """Tokens behind its contributions to all commits."""
    has_delivered: bool = False
    """Whether its pseudo-gradient for the round in progress is there."""
    refusals: list[str] = field(default_factory=list)
    """Why deliveries for the round in progress were refused, oldest first."""


@dataclass(kw_only=True)
class StoreStatus:
    """A run, as its store shows it."""

    url: str
    """The store."""
    version: int | None
    """The newest version of the global parameters; None before version 0 is there."""
    num_versions: int
    """Rounds of the whole run."""
    silos: dict[str, SiloStatus]
    """The roster."""
    newest_object_unix_seconds: float | None
    """When the store last changed, by its own clock; None if it does not tell."""
    rollbacks: list[str] = field(default_factory=list)
    """What was taken back, oldest first, each in words."""

    @property
    def is_finished(self) -> bool:
        """Whether the last outer step is taken."""
        return self.version is not None and self.version >= self.num_versions

    @property
    def waiting_for(self) -> str | None:
        """What has to happen next, in words; None when the run is finished."""
        if self.is_finished:
            return None
        if self.version is None:
            return "version 0 from the aggregator"
        missing = [name for name, silo in self.silos.items() if not silo.has_delivered]
        if missing:
            return f"delivery for version {self.version + 1} from {', '.join(missing)}"
        return f"commit {self.version + 1} from the aggregator"


def store_status(url: str) -> StoreStatus:
    """Read a run's state from the store at an fsspec URL; reads JSON objects only, and writes nothing.

    Raises ConfigError when there is no store, it cannot be reached, or its contract is unreadable.
    """
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
        listing = _list(filesystem, root)
    except Exception as error:  # every fsspec backend raises exceptions of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"store: {url!r} given; it cannot be read: {reason}") from None
    if "contract.json" not in listing:
        raise ConfigError(f"store: {url!r} given; there is no run in it (no contract.json)")
    contract = _read(filesystem, root, ["contract.json"])["contract.json"]
    if not isinstance(contract.get("roster"), list) or not isinstance(contract.get("num_versions"), int):
        raise ConfigError(f"store: {url!r} given; its contract.json has no roster or num_versions")
    commit_paths = {number: path for path, number in _numbered(listing, r"global/(\d+)/commit\.json")}
    version = max(commit_paths, default=None)
    silos = {str(name): _silo_objects(listing, str(name), version) for name in contract["roster"]}
    rollback_paths = sorted(path for path, _ in _numbered(listing, r"rollbacks/(\d+)\.json"))
    wanted = [*commit_paths.values(), *rollback_paths, *(path for _, paths in silos.values() for path in paths)]
    objects = _read(filesystem, root, wanted)
    for name, (silo, paths) in silos.items():
        for path in paths:
            if path.endswith("manifest.json"):
                silo.tokens_total = objects[path].get("tokens_total")
            else:
                silo.refusals.append(str(objects[path].get("reason", "no reason given")))
        _count_contributions(silo, name, (objects[path] for path in commit_paths.values()))
    return StoreStatus(
        url=url,
        version=version,
        num_versions=contract["num_versions"],
        silos={name: silo for name, (silo, _) in silos.items()},
        newest_object_unix_seconds=max((found for found in listing.values() if found is not None), default=None),
        rollbacks=[
            _rollback_words(objects[path], path.replace(".json", ".done") in listing) for path in rollback_paths
        ],
    )


def print_status(url: str, console: Console | None = None) -> None:
    """Print where the run in a store stands; raises ConfigError as `store_status` does."""
    show_status(store_status(url), console or Console())


def show_status(status: StoreStatus, console: Console) -> None:
    """Print a status that was read before."""
    version = "no version yet" if status.version is None else f"version {status.version} of {status.num_versions}"
    console.print(Text(f"{status.url}: {version}"), soft_wrap=True)
    for words in status.rollbacks:
        console.print(Text(words), soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold dim")
    table.add_column("silo", no_wrap=True)
    headings = ["newest delivery", "tokens trained", "commits", "tokens contributed"]
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_column("" if status.is_finished else f"round {(status.version or 0) + 1}")
    for name, silo in status.silos.items():
        if status.is_finished:
            now = Text()
        elif silo.has_delivered:
            now = Text("delivered", style="green")
        else:
            now = (
                Text("refused: " + silo.refusals[-1], style="red") if silo.refusals else Text("awaited", style="yellow")
            )
        table.add_row(
            name,
            "-" if silo.newest_delivery is None else f"round {silo.newest_delivery}",
            "-" if silo.tokens_total is None else format_count(silo.tokens_total),
            str(silo.num_commits),
            format_count(silo.tokens_contributed),
            now,
        )
    console.print(table)
    if status.waiting_for is None:
        console.print(Text("finished", style="bold green"))
    else:
        console.print(Text(f"waiting for {status.waiting_for}{_since(status)}"), soft_wrap=True)


def _since(status: StoreStatus) -> str:
    if status.newest_object_unix_seconds is None:
        return ""
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.newest_object_unix_seconds))
    # The store's clock may be ahead of ours.
    passed = max(0.0, time.time() - status.newest_object_unix_seconds)
    return f", {format_seconds(passed)} since the store last changed ({clock})"


def _silo_objects(listing: Iterable[str], name: str, version: int | None) -> tuple[SiloStatus, list[str]]:
    """What the mere names of a silo's objects tell, and those that have to be read for the rest."""
    folder = f"silos/{re.escape(name)}/"
    deliveries = {number: path for path, number in _numbered(listing, folder + r"(\d+)/manifest\.json")}
    silo = SiloStatus(newest_delivery=max(deliveries, default=None))
    paths = [] if silo.newest_delivery is None else [deliveries[silo.newest_delivery]]
    if version is not None:
        silo.has_delivered = version + 1 in deliveries
        refusals = _numbered(listing, folder + r"(\d+)/refused-\d+\.json")
        paths += sorted(path for path, number in refusals if number == version + 1)
    return silo, paths


def _rollback_words(record: dict[str, Any], is_done: bool) -> str:
    reason = f": {record['reason']}" if record.get("reason") else ""
    unfinished = "" if is_done else " (interrupted; the aggregator completes it when it starts)"
    return f"rolled back from {record.get('from_version')} to {record.get('to_version')}{reason}{unfinished}"


def _count_contributions(silo: SiloStatus, name: str, commits: Iterable[dict[str, Any]]) -> None:
    for commit in commits:
        for contributor in commit.get("contributors") or []:
            if contributor.get("silo") == name:
                silo.num_commits += 1
                silo.tokens_contributed += int(contributor.get("tokens") or 0)


def _list(filesystem: Any, root: str) -> dict[str, float | None]:
    """Every object below the root, relative to it, with the time of its last change in unix seconds."""
    filesystem.invalidate_cache()
    found = filesystem.find(root, detail=True)
    prefix = root.rstrip("/") + "/"
    return {path.removeprefix(prefix): _modified(entry) for path, entry in found.items() if path.startswith(prefix)}


def _modified(entry: dict[str, Any]) -> float | None:
    # Each backend has its own key: directories, S3, GCS, Azure, memory.
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = entry.get(key)
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value.replace("Z", "+00:00"))
            except ValueError:
                continue
        if isinstance(value, datetime):
            return value.timestamp()
    return None


def _numbered(listing: Iterable[str], pattern: str) -> list[tuple[str, int]]:
    """Paths that match the pattern, each with the number in its first group."""
    return [(path, int(match[1])) for path in listing if (match := re.fullmatch(pattern, path))]


def _read(filesystem: Any, root: str, paths: list[str]) -> dict[str, dict[str, Any]]:
    """JSON objects by path; empty where one is unreadable or was pruned since the listing."""
    full = {root.rstrip("/") + "/" + path: path for path in paths}
    found = filesystem.cat(list(full), on_error="omit") if full else {}
    objects: dict[str, dict[str, Any]] = {path: {} for path in paths}
    for path, content in found.items():
        try:
            read = json.loads(content)
        except ValueError:
            continue
        if isinstance(read, dict):
            objects[full[path]] = read
    return objects
