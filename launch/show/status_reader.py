"""Where a run stands, read from its store alone, on any machine that can read the store.

All ages are differences between times of the store's own clock: now is when its newest object was written, a moment ago
while anybody leaves signs of life there.
"""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from typing import Any

import fsspec

from launch.show.display import format_seconds
from pretrain.config.check import ConfigError
from pretrain.config.keys import ExchangeConfig, InnerConfig, MembershipConfig, OuterConfig, RunConfig
from pretrain.outer.rounds import participants

# The layout is in pretrain/exchange/store.py; # is the number that tells objects of a kind apart.
TERM = "aggregator/#.json"
ROLLBACK = "rollbacks/#.json"
IDENTITY = "silos/{}/identity.json"
BEAT = "silos/{}/beats/#"
WORD = "silos/{}/membership/#.json"
MANIFEST = "silos/{}/#/manifest.json"
REFUSAL = "silos/{}/{}/refused-#.json"
LAST_NUMBER = re.compile(r"(.*?)(\d+)(\D*)")

Json = dict[str, Any]
Numbered = dict[int, str]
"""Number to path, of objects of one kind."""


@dataclass(frozen=True, kw_only=True)
class Life:
    """Whether a process is alive, by the signs that it leaves in the store."""

    is_alive: bool
    words: str
    """alive, silent 3:05 min, ended, never seen; unknown where the store tells no times."""


@dataclass(kw_only=True)
class SiloStatus:
    """One silo, as the store shows it."""

    life: Life
    part: str
    """Whether it takes part in the version in progress: yes, not joined, left, away or not drawn."""
    tokens_total: int | None
    """Tokens it had trained on at its newest delivery; None when there is none."""
    num_commits: int
    """Commits it contributed to, ..."""
    newest_commit: int | None
    """... and the newest of these."""
    tokens_contributed: int
    """Tokens behind its contributions to all commits."""
    has_delivered: bool
    """Whether its pseudo-gradient for the version in progress is there."""
    refusals: list[str]
    """Why deliveries for the version in progress were refused, oldest first."""
    is_awaited: bool = False
    """Whether the version in progress waits for its delivery."""


@dataclass(kw_only=True)
class StoreStatus:
    """A run, as its store shows it."""

    url: str
    """The store."""
    version: int | None
    """The newest version of the global parameters; None before version 0 is there."""
    num_versions: int
    """Versions of the whole run."""
    silos: dict[str, SiloStatus]
    """The roster."""
    aggregator: Life
    """Who holds the store's lease."""
    quorum: int | None
    """Deliveries that are enough for a version after its deadline; None if there is no deadline."""
    waited_seconds: float | None
    """Since the newest commit, or since the contract; None where the store tells no times."""
    deadline_unix_seconds: float | None
    """When the quorum is enough for the version in progress, by the store's clock; None if it is not known yet."""
    now_unix_seconds: float | None
    """When the store last changed, by its own clock; None where it tells no times."""
    rollbacks: list[str]
    """What was taken back, oldest first, each in words."""
    version_seconds: float | None = None
    """Median time from one commit to the next; None before there are two, or where the store tells no times."""

    @property
    def is_finished(self) -> bool:
        """Whether the last outer step is taken."""
        return self.version is not None and self.version >= self.num_versions

    @property
    def num_delivered(self) -> int:
        """Deliveries for the version in progress."""
        return sum(silo.has_delivered for silo in self.silos.values())

    @property
    def waits_for_silos(self) -> bool:
        """Whether silos have to deliver before the aggregator can go on."""
        if self.is_finished or self.version is None:
            return False
        too_few = self.quorum is not None and self.num_delivered < self.quorum
        return too_few or any(silo.is_awaited for silo in self.silos.values())

    @property
    def waiting_for(self) -> str | None:
        """What has to happen next, in words; None when the run is finished."""
        if self.is_finished:
            return None
        if self.version is None:
            return "version 0 from the aggregator"
        if not self.waits_for_silos:
            return f"commit {self.version + 1} from the aggregator"
        awaited = [name for name, silo in self.silos.items() if silo.is_awaited]
        if not awaited:
            return f"more silos to join, for version {self.version + 1}"
        return f"delivery for version {self.version + 1} from {', '.join(awaited)}"


def store_status(url: str, options: Mapping[str, Any] | None = None) -> StoreStatus:
    """Read a run's state from the store at an fsspec URL; reads JSON objects only, and writes nothing.

    `options` go to fsspec.

    Raises ConfigError when there is no store, it cannot be reached, or its contract is unreadable.
    """
    try:
        store = Listed(url, options)
    except Exception as error:  # every fsspec backend raises exceptions of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"store: {url!r} given; it cannot be read: {reason}") from None
    if "contract.json" not in store.times:
        raise ConfigError(f"store: {url!r} given; there is no run in it (no contract.json)")
    return Reader(store, _terms(store.read(["contract.json"])["contract.json"], url)).status()


def _terms(contract: Json, url: str) -> RunConfig:
    """What the contract says of roster, membership and schedule."""
    try:
        return RunConfig(
            inner=InnerConfig(**contract["inner"]),
            outer=OuterConfig(**contract["outer"]),
            membership=MembershipConfig(**contract["membership"]),
            roster=[str(name) for name in contract["roster"]],
        )
    except (KeyError, TypeError) as error:
        what = f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"store: {url!r} given; its contract.json is not of this version of atoll: {what}") from None


class Listed:
    """A store's objects as they were when it was listed."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        """Raises whatever the URL's kind of file system raises."""
        self.url = url
        self._filesystem, root = fsspec.core.url_to_fs(url, **(options or {}))
        self._filesystem.invalidate_cache()
        self._prefix = root.rstrip("/") + "/"
        self.times: dict[str, float | None] = {}
        """Every object, to when it was written, in unix seconds of the store's clock if that tells."""
        self._numbered: defaultdict[str, Numbered] = defaultdict(dict)
        for full_path, entry in sorted(self._filesystem.find(root, detail=True).items()):
            if full_path.startswith(self._prefix):
                path = full_path.removeprefix(self._prefix)
                self.times[path] = _modified(entry)
                if match := LAST_NUMBER.fullmatch(path):
                    self._numbered[f"{match[1]}#{match[3]}"][int(match[2])] = path
        self.now = self.newest(self.times)

    def newest(self, paths: Iterable[str]) -> float | None:
        """When the newest of these was written; None if there is none, or the store tells no times."""
        return max((time for path in paths if (time := self.times[path]) is not None), default=None)

    def numbered(self, pattern: str) -> Numbered:
        """Objects whose last number is where # is, in their order."""
        return self._numbered.get(pattern, {})

    def last(self, pattern: str) -> list[str]:
        """That with the largest number, if there is one."""
        return list(self.numbered(pattern).values())[-1:]

    def read(self, paths: Iterable[str]) -> dict[str, Json]:
        """JSON objects by path; empty where one is unreadable or was deleted since the listing."""
        objects: dict[str, Json] = {path: {} for path in paths}
        full = [self._prefix + path for path in objects]
        for full_path, content in (self._filesystem.cat(full, on_error="omit") if full else {}).items():
            with suppress(ValueError):
                if isinstance(read := json.loads(content), dict):
                    objects[full_path.removeprefix(self._prefix)] = read
        return objects


class Reader:
    """What the names of a store's objects, their times and the small ones among them tell."""

    def __init__(self, store: Listed, terms: RunConfig) -> None:
        self._store, self._terms, self._rules = store, terms, terms.membership
        commits = store.numbered("global/#/commit.json")
        self._version = max(commits, default=None)
        self._next = (self._version or 0) + 1
        self._began = store.times["contract.json" if self._version is None else commits[self._version]]
        wanted = [*commits.values(), *store.numbered(ROLLBACK).values(), *store.last(TERM)]
        wanted += [name for name in (self._waiting,) if name in store.times]
        for silo in terms.full_roster:
            kinds = (BEAT, WORD, MANIFEST)
            wanted += [path for kind in kinds for path in store.last(kind.format(silo))]
            wanted += self._refused(silo)
        self._objects = store.read(wanted)
        self._tokens = {version: _tokens(self._objects[path]) for version, path in commits.items()}

    @property
    def _waiting(self) -> str:
        return f"waiting/{self._next:06d}.json"

    def _refused(self, silo: str) -> list[str]:
        return list(self._store.numbered(REFUSAL.format(silo, f"{self._next:06d}")).values())

    def _last(self, pattern: str) -> Json:
        return next((self._objects[path] for path in self._store.last(pattern)), {})

    def status(self) -> StoreStatus:
        """All of it."""
        store, num_versions = self._store, self._terms.schedule.num_versions
        silos = {name: self._silo(name) for name in self._terms.full_roster}
        if self._version is not None and self._next <= num_versions:
            for name in self._expected(silos):
                silos[name].is_awaited = not silos[name].has_delivered and not self._is_out(name)
        return StoreStatus(
            url=store.url,
            version=self._version,
            num_versions=num_versions,
            silos=silos,
            aggregator=self._aggregator(),
            quorum=self._rules.quorum,
            waited_seconds=None if store.now is None or self._began is None else store.now - self._began,
            deadline_unix_seconds=self._deadline(),
            now_unix_seconds=store.now,
            rollbacks=[
                _rollback_words(self._objects[path], path.replace(".json", ".done") in store.times)
                for path in store.numbered(ROLLBACK).values()
            ],
            version_seconds=self._version_seconds(),
        )

    def _version_seconds(self) -> float | None:
        times = [self._store.times[path] for path in self._store.numbered("global/#/commit.json").values()]
        known = [time for time in times if time is not None]
        return statistics.median(b - a for a, b in pairwise(known)) if len(known) > 1 else None

    # ---- who is alive

    def _life(self, signs: Iterable[str], lease_seconds: float) -> Life:
        """By signs of life, each good for `lease_seconds`; 0 if that was not said."""
        seen, now = self._store.newest(signs), self._store.now
        if seen is None or now is None:
            return Life(is_alive=False, words="unknown")
        if now - seen <= (lease_seconds or ExchangeConfig().lease_seconds):
            return Life(is_alive=True, words="alive")
        return Life(is_alive=False, words=f"silent {format_seconds(now - seen)}")

    def _life_of_silo(self, name: str) -> Life:
        beats = self._store.numbered(BEAT.format(name)).values()
        if beats:
            return self._life(beats, _number(self._last(BEAT.format(name)), "lease_seconds"))
        return Life(is_alive=False, words="ended" if IDENTITY.format(name) in self._store.times else "never seen")

    def _aggregator(self) -> Life:
        for path in self._store.last(TERM):
            term, record = path.removesuffix(".json"), self._objects[path]
            if f"{term}.ended" in self._store.times:
                life = Life(is_alive=False, words="ended")
            else:
                signs = [path, *self._store.numbered(f"{term}.beat-#").values()]
                life = self._life(signs, _number(record, "lease_seconds"))
            return replace(life, words=f"{life.words} ({record.get('holder', 'unknown')})")
        return Life(is_alive=False, words="never seen")

    # ---- who takes part

    def _silo(self, name: str) -> SiloStatus:
        manifests = self._store.numbered(MANIFEST.format(name))
        tokens = {version: found[name] for version, found in self._tokens.items() if name in found}
        return SiloStatus(
            life=self._life_of_silo(name),
            part=self._part(name),
            tokens_total=int(_number(self._last(MANIFEST.format(name)), "tokens_total")) if manifests else None,
            num_commits=len(tokens),
            newest_commit=max(tokens, default=None),
            tokens_contributed=sum(tokens.values()),
            has_delivered=self._next in manifests,
            refusals=[str(self._objects[path].get("reason", "no reason given")) for path in self._refused(name)],
        )

    def _part(self, name: str) -> str:
        """Whether the aggregator counts on a silo; `pretrain.merge.collect` has the rules."""
        if self._rules.is_elastic:
            if not self._store.last(WORD.format(name)):
                return "not joined"
            word = self._last(WORD.format(name))
            if word.get("left"):
                return "left"
            since = max([_number(word, "version"), *(v for v, found in self._tokens.items() if name in found)])
            num_missed = sum(v > since and name in self._drawn(v) for v in self._tokens)
            if num_missed >= self._rules.away_after_versions:
                return "away"
        return "yes" if name in self._drawn(self._next) else "not drawn"

    def _drawn(self, version: int) -> list[str]:
        round, rules = self._terms.round_of(version), self._rules
        return participants(self._terms.full_roster, round, sample=rules.sample, seed=rules.sample_seed)

    # ---- what is waited for

    def _expected(self, silos: Mapping[str, SiloStatus]) -> list[str]:
        """Whom the aggregator waits for, by its word if it has left one."""
        told = self._objects.get(self._waiting, {}).get("silos")
        if isinstance(told, list):
            return [name for name in silos if name in told]
        return [name for name, silo in silos.items() if silo.part == "yes"]

    def _is_out(self, name: str) -> bool:
        """Whether this version goes on without a silo whose delivery was refused for good."""
        return self._rules.is_elastic and any(self._objects[path].get("final") for path in self._refused(name))

    def _deadline(self) -> float | None:
        """The aggregator counts from the commit before, or from its own start if that was later."""
        seconds = self._objects.get(self._waiting, {}).get("deadline_seconds")
        began = [time for time in (self._began, self._store.newest(self._store.last(TERM))) if time is not None]
        return max(began) + seconds if began and isinstance(seconds, int | float) else None


def _number(record: Json, key: str) -> float:
    """A number in another party's record; 0 if there is none."""
    value = record.get(key)
    return value if isinstance(value, int | float) else 0


def _tokens(commit: Json) -> dict[str, int]:
    """Silo to the tokens behind its contributions to a commit; two, if one of them came late."""
    found: defaultdict[str, int] = defaultdict(int)
    for contributor in commit.get("contributors") or []:
        found[str(contributor.get("silo"))] += int(_number(contributor, "tokens"))
    return found


def _rollback_words(record: Json, is_done: bool) -> str:
    reason = f": {record['reason']}" if record.get("reason") else ""
    unfinished = "" if is_done else " (interrupted; the aggregator completes it when it starts)"
    return f"rolled back from {record.get('from_version')} to {record.get('to_version')}{reason}{unfinished}"


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
