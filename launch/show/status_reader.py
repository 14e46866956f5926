"""Where a run stands, read from its store alone, on any machine that can read the store.

All that lies there is of other parties: what does not read as what it should be, or, where the contract names keys, is
not signed by who should have said it, is passed over and named.

All ages are differences between times of the store's own clock: now is when its newest object was written, a moment ago
while anybody leaves signs of life there.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import Any

from launch.show.display import format_seconds
from launch.show.gate import GateStatus, read_gate
from launch.show.opened import CONTRACT, MANIFEST, ROLLBACK, TERM, WORD, Json, Opened, json_object, number_in
from pretrain.config.allowed import SPENT
from pretrain.config.errors import named
from pretrain.config.keys import ExchangeConfig
from pretrain.exchange.agreement import agreement_path
from pretrain.host.foreign import shown
from pretrain.outer.rounds import participants
from pretrain.trust.amendment import Governed
from pretrain.trust.ledger import Commit, Manifest
from pretrain.trust.quality import not_counted

IDENTITY = "silos/{}/identity.json"
BEAT = "silos/{}/beats/#"
REFUSAL = "silos/{}/{}/refused-#.json"


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
    spent: dict[str, float] = field(default_factory=dict)
    """What it has spent of its privacy budget by its newest delivery, `epsilon` and `delta`; empty where it says none.
    """
    not_counted: list[str] = field(default_factory=list)
    """Commits that have its delivery with weight 0, by the floor of quality, and why, oldest first."""
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
    not_signed: list[str]
    """Before version 0: the members whose signature under the contract is missing."""
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
    unreadable: list[str] = field(default_factory=list)
    """Objects that are not what their names say."""
    unsigned: list[str] = field(default_factory=list)
    """Objects that are not signed by who should have written them."""
    ahead: list[str] = field(default_factory=list)
    """Objects of a time to come, by this machine's clock; no age is counted from them."""
    spent: dict[str, float] = field(default_factory=dict)
    """What the versions so far have spent of the budget of all silos, `epsilon` and `delta`; empty where there is none.
    """
    gate: GateStatus | None = None
    """Which version is the current one by the contract's gate, and its newest candidates; None without one."""
    version_seconds: float | None = None
    """Median time from one commit to the next; None before there are two, or where the store tells no times."""

    @property
    def is_finished(self) -> bool:
        """Whether the last outer step is taken."""
        return self.version is not None and self.version >= self.num_versions

    @property
    def is_over(self) -> bool:
        """Whether it is, and the gate has decided about all that came of it."""
        return self.is_finished and not (self.gate and self.gate.is_waiting)

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
        if self.not_signed:
            return f"the signature of {named(self.not_signed)} under the contract"
        if self.version is None:
            return "version 0 from the aggregator"
        if not self.waits_for_silos:
            return f"commit {self.version + 1} from the aggregator"
        awaited = [name for name, silo in self.silos.items() if silo.is_awaited]
        if not awaited:
            return f"more silos to join, for version {self.version + 1}"
        return f"delivery for version {self.version + 1} from {named(awaited)}"


def store_status(url: str, options: Mapping[str, Any] | None = None) -> StoreStatus:
    """Read a run's state from the store at an fsspec URL; reads JSON objects only, and writes nothing.

    `options` go to fsspec.

    Raises ConfigError when there is no store, it cannot be reached, or its contract is unreadable.
    """
    return Reader(Opened(url, options)).status()


class Reader:
    """What the names of a store's objects, their times and the small ones among them tell."""

    def __init__(self, opened: Opened) -> None:
        self._opened, self._store, self._voices = opened, opened.store, opened.voices
        self._parsed, self._last_of, self._last_path = opened.parsed, opened.last_of, opened.last_path
        self._version = len(opened.chain) - 1 if opened.chain else None
        self._next = (self._version or 0) + 1
        governed = Governed(opened.terms)
        governed.go_to(opened.voices.members.terms_at(self._next))
        terms = self._terms = governed.config
        self._rules, self.roster = terms.membership, terms.full_roster
        self._began = opened.store.times[opened.chain[-1] if opened.chain else CONTRACT]
        silos, is_signed = self.roster, bool(opened.voices.members.keys)
        rollbacks = list(opened.store.numbered(ROLLBACK).values())
        wanted = [*rollbacks, *(name for name in (self._waiting,) if name in self._store.times)]
        wanted += [path for silo in silos for path in self._refused(silo)]
        wanted += [name for silo in silos if is_signed and (name := IDENTITY.format(silo)) in self._store.times]
        self._objects = self._parsed(wanted, json_object)
        said = [TERM, *(kind.format(silo) for silo in silos for kind in (BEAT, WORD))]
        self._objects |= self._last_of(said, json_object)
        # Asked before there is a version alone: nothing begins without them.
        agreements = {agreement_path(name): name for name in self._voices.members.keys if self._version is None}
        self._objects |= self._parsed([path for path in agreements if path in self._store.times], json_object)
        self._not_signed = sorted(name for path, name in agreements.items() if path not in self._objects)
        done = [_done(path) for path in rollbacks if _done(path) in self._store.times]
        self._objects |= self._parsed(done, json_object)
        self._objects |= self._signs_of_term()
        manifests = [MANIFEST.format(silo) for silo in silos]
        self._manifests = self._last_of(manifests, Manifest.from_bytes)
        coming = [path for name in manifests if is_signed and (path := self._store.numbered(name).get(self._next))]
        self._manifests |= self._parsed([path for path in coming if path not in self._manifests], Manifest.from_bytes)
        self._tokens = {v: _tokens(commit) for v, commit in opened.commits.items()}
        self._not_counted = {v: not_counted(commit) for v, commit in opened.commits.items()}
        self._drawn = cache(self._drawn_anew)

    def _signs_of_term(self) -> dict[str, Json]:
        """Where all is signed, what the newest holder of the lease has said of being alive, or of its end."""
        found: dict[str, Json] = {}
        for path in self._last_path(TERM) if self._voices.members.keys else ():
            term, nonce = path.removesuffix(".json"), self._objects[path].get("nonce")
            ended = [name for name in (f"{term}.ended",) if name in self._store.times]
            signs = self._parsed(ended, json_object) | self._last_of([f"{term}.beat-#"], json_object)
            found = {name: sign for name, sign in signs.items() if sign.get("nonce") == nonce}
        return found

    def _is_said(self, path: str) -> bool:
        """Whether something is there, and counts."""
        return path in (self._objects if self._voices.members.keys else self._store.times)

    @property
    def _waiting(self) -> str:
        return f"waiting/{self._next:06d}.json"

    def _refused(self, silo: str) -> list[str]:
        return list(self._store.numbered(REFUSAL.format(silo, f"{self._next:06d}")).values())

    def _refusals(self, silo: str) -> list[Json]:
        return [self._objects.get(path, {}) for path in self._refused(silo) if self._is_said(path)]

    def _last(self, pattern: str) -> Json:
        return next((self._objects.get(path, {}) for path in self._last_path(pattern)), {})

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
            not_signed=self._not_signed,
            silos=silos,
            aggregator=self._aggregator(),
            quorum=self._rules.quorum,
            waited_seconds=self._waited(),
            deadline_unix_seconds=self._deadline(),
            now_unix_seconds=store.now,
            rollbacks=[
                _rollback_words(self._objects[path], self._is_said(_done(path)))
                for path in store.numbered(ROLLBACK).values()
                if path in self._objects
            ],
            gate=read_gate(self._opened, self._terms.gate, self._version),
            unreadable=list(dict.fromkeys(self._opened.unreadable)),
            unsigned=list(dict.fromkeys(self._opened.unsigned)),
            ahead=store.ahead,
            spent=_spent(newest) if (newest := self._opened.commits.get(self._version or 0)) else {},
            version_seconds=self._version_seconds(),
        )

    def _waited(self) -> float | None:
        return None if self._store.now is None or self._began is None else max(0.0, self._store.now - self._began)

    def _version_seconds(self) -> float | None:
        times = [self._store.times[path] for path in self._opened.chain]
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
        if beats := self._signs(BEAT.format(name)):
            return self._life(beats, number_in(self._last(BEAT.format(name)), "lease_seconds"))
        return Life(is_alive=False, words="ended" if self._is_said(IDENTITY.format(name)) else "never seen")

    def _signs(self, pattern: str) -> list[str]:
        """Signs of life; where all is signed the newest alone, as anybody may have put a copy of an older one there."""
        return self._last_path(pattern) if self._voices.members.keys else [*self._store.numbered(pattern).values()]

    def _aggregator(self) -> Life:
        for path in self._last_path(TERM):
            term, record = path.removesuffix(".json"), self._objects.get(path, {})
            if self._is_said(f"{term}.ended"):
                life = Life(is_alive=False, words="ended")
            else:
                signs = [path, *filter(self._is_said, self._signs(f"{term}.beat-#"))]
                life = self._life(signs, number_in(record, "lease_seconds"))
            return replace(life, words=f"{life.words} ({shown(record.get('holder', 'unknown'))})")
        return Life(is_alive=False, words="never seen")

    # ---- who takes part

    def _silo(self, name: str) -> SiloStatus:
        manifests = self._store.numbered(MANIFEST.format(name))
        tokens = {version: found[name] for version, found in self._tokens.items() if name in found}
        newest = next((self._manifests.get(path) for path in self._last_path(MANIFEST.format(name))), None)
        has_delivered = self._next in manifests
        if self._voices.members.keys:
            has_delivered = manifests.get(self._next) in self._manifests
        return SiloStatus(
            life=self._life_of_silo(name),
            part=self._part(name),
            tokens_total=newest.tokens_total if newest else None,
            spent=_spent(newest) if newest else {},
            num_commits=len(tokens),
            newest_commit=max(tokens, default=None),
            tokens_contributed=sum(tokens.values()),
            has_delivered=has_delivered,
            not_counted=[f"version {v}: {found[name]}" for v, found in self._not_counted.items() if name in found],
            refusals=[shown(refusal.get("reason", "no reason given")) for refusal in self._refusals(name)],
        )

    def _part(self, name: str) -> str:
        """Whether the aggregator counts on a silo; `pretrain.merge.collect` has the rules."""
        if self._rules.is_elastic:
            if not self._last_path(WORD.format(name)):
                return "not joined"
            word = self._last(WORD.format(name))
            if word.get("left") is True:
                return "left"
            since = max([number_in(word, "version"), *(v for v, found in self._tokens.items() if name in found)])
            num_missed = sum(v > since and name in self._drawn(v) for v in self._tokens)
            if num_missed >= self._rules.away_after_versions:
                return "away"
        return "yes" if name in self._drawn(self._next) else "not drawn"

    def _drawn_anew(self, version: int) -> frozenset[str]:
        round, rules = self._terms.round_of(version), self._rules
        roster = self._voices.members.roster_at(version, self._terms.agreed_roster)
        return frozenset(participants(roster, round, sample=rules.sample, seed=rules.sample_seed))

    # ---- what is waited for

    def _expected(self, silos: Mapping[str, SiloStatus]) -> list[str]:
        """Whom the aggregator waits for, by its word if it has left one."""
        told = self._objects.get(self._waiting, {}).get("silos")
        if isinstance(told, list):
            awaited = {name for name in told if isinstance(name, str)}
            return [name for name in silos if name in awaited]
        return [name for name, silo in silos.items() if silo.part == "yes"]

    def _is_out(self, name: str) -> bool:
        """Whether this version goes on without a silo whose delivery was refused for good."""
        return self._rules.is_elastic and any(refusal.get("final") is True for refusal in self._refusals(name))

    def _deadline(self) -> float | None:
        """The aggregator counts from the commit before, or from its own start if that was later."""
        record = self._objects.get(self._waiting, {})
        seconds = None if record.get("deadline_seconds") is None else number_in(record, "deadline_seconds")
        began = [time for time in (self._began, self._store.newest(self._last_path(TERM))) if time is not None]
        return max(began) + seconds if began and seconds is not None else None


def _done(rollback: str) -> str:
    return rollback.replace(".json", ".done")


def _spent(record: Commit | Manifest) -> dict[str, float]:
    return {name: record.metrics[name] for name in SPENT if name in record.metrics}


def _tokens(commit: Commit) -> dict[str, int]:
    """Silo to the tokens behind its contributions to a commit, two if one of them came late; 0 if they do not count."""
    found: defaultdict[str, int] = defaultdict(int)
    for contributor in commit.contributors:
        found[contributor.silo] += contributor.tokens if contributor.weight else 0
    return found


def _rollback_words(record: Json, is_done: bool) -> str:
    reason = f": {shown(record['reason'])}" if record.get("reason") else ""
    unfinished = "" if is_done else " (interrupted; the aggregator completes it when it starts)"
    versions = (shown(record.get(key), limit=20) for key in ("from_version", "to_version"))
    return f"rolled back from {' to '.join(versions)}{reason}{unfinished}"
