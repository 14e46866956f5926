"""What became of a run, version by version, from its store alone: who was in which commit, with what, and when."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any, TypeVar

from launch.show.held_out import BEYOND, HeldOut, read_held_out
from launch.show.opened import ROLLBACK, TERM, WORD, Json, Opened
from pretrain.config.allowed import METRICS
from pretrain.config.keys import OPERATOR
from pretrain.exchange.rollback import Rollback
from pretrain.exchange.store import delivery_path
from pretrain.exchange.words import Holder, Membership
from pretrain.host.foreign import shown
from pretrain.trust.ledger import Commit, Contributor, Manifest, sha256_bytes

MOST_EVENTS = 200  # of one party: whoever writes to a store may write any number
N = TypeVar("N", int, float)


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a silo gave to a version; None is what is not published, or not known."""

    is_late: bool
    """It was delivered for an earlier version."""
    counts: bool
    """It has a weight."""
    num_bytes: int | None
    """Of its payload."""
    tokens: int | None = None
    """Behind it."""
    epochs: float | None = None
    """How often the silo had read its own text by then."""
    loss: float | None = None
    """Of the silo's last inner step, on its own text, in nats."""
    norm: float | None = None
    """Of its pseudo-gradient."""
    waited_seconds: float | None = None
    """From its delivery to the commit, by the store's clock."""

    @property
    def state(self) -> str:
        """How it counts: in, late, no weight."""
        return "no weight" if not self.counts else "late" if self.is_late else "in"


@dataclass(frozen=True, kw_only=True)
class Version:
    """One commit."""

    number: int
    unix_seconds: float | None
    """When it was written, by the store's clock; None where that tells no times."""
    parts: dict[str, Part]
    """By silo."""
    num_bytes: int
    """What each silo has received of it."""
    update_norm: float | None
    cosine_mean: float | None

    @property
    def loss(self) -> float | None:
        """Mean over those of its silos that tell theirs."""
        return fmean(told) if (told := [part.loss for part in self.parts.values() if part.loss is not None]) else None


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happened beside the commits."""

    version: int
    """The newest when it happened; of a rollback, the one that was gone back to."""
    unix_seconds: float | None
    who: str
    """A silo, or aggregator."""
    what: str
    """joined, came back, left, took the lease, rolled back."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class History:
    """A run's versions, in order, and what happened beside them."""

    name: str
    num_fragments: int
    """Versions of one round."""
    silos: list[str]
    versions: list[Version]
    """From version 0 on, without those that cannot be read."""
    events: list[Event]
    taken_back: list[tuple[int, int]]
    """Of each rollback from which version to which."""
    kept: list[str]
    """Numbers of silos that are left out, as the contract keeps them among the members."""
    held_out: HeldOut
    """What silos have published of held-out losses."""

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Mean loss by version."""
        return [(version.number, version.loss) for version in self.versions if version.loss is not None]

    @property
    def tokens(self) -> dict[int, int]:
        """Behind all commits up to each version, of all silos; empty where it is not told."""
        if "tokens" in self.kept:
            return {}
        each = [sum(part.tokens or 0 for part in one.parts.values()) for one in self.versions]
        return dict(zip([one.number for one in self.versions], accumulate(each), strict=True))

    def of_silo(self, silo: str, what: str) -> list[tuple[Version, Any]]:
        """A number of a silo's parts, with their versions; without those that are not known."""
        found = ((one, getattr(one.parts[silo], what)) for one in self.versions if silo in one.parts)
        return [(version, number) for version, number in found if number is not None]


def kept_back(contract: Json, *, for_members: bool) -> list[str]:
    """What of silos must not be shown: what the contract keeps with its member, and, but `for_members`, what it keeps
    in the consortium.
    """
    trust = contract.get("trust")
    tiers = trust.get("metrics") if isinstance(trust, dict) else None
    allowed = ("public", "consortium") if for_members else ("public",)
    return [name for name in METRICS if isinstance(tiers, dict) and tiers.get(name, "public") not in allowed]


def read_history(opened: Opened, silos: Iterable[str], *, for_members: bool) -> History:
    """A run's history, with what may be shown; reads JSON alone, each manifest once (see `Opened`)."""
    silos, reader = list(silos), _Reader(opened, kept_back(opened.contract, for_members=for_members))
    versions = [reader.version(commit) for commit in opened.commits.values()]
    taken_back, rollbacks = _rollbacks(opened)
    events = [*rollbacks, *_leases(opened, versions), *(event for silo in silos for event in _words(opened, silo))]
    return History(
        name=shown(opened.contract.get("name") or "run", limit=100),
        num_fragments=opened.terms.outer.num_fragments,
        silos=silos,
        versions=versions,
        events=sorted(events, key=lambda event: (event.unix_seconds or 0.0, event.version)),
        taken_back=taken_back,
        kept=reader.kept,
        held_out=HeldOut() if "held_out" in reader.kept else read_held_out(opened, silos),
    )


class _Reader:
    """Puts commits together with the manifests that they name."""

    def __init__(self, opened: Opened, kept: list[str]) -> None:
        self._opened, self.kept = opened, kept
        paths = {_path(one) for commit in opened.commits.values() for one in commit.contributors}
        there = sorted(path for path in paths if path in opened.store.times)
        found = opened.parsed(there, lambda data: (sha256_bytes(data), Manifest.from_bytes(data)), for_ever=True)
        # By their hash: what lies in the place of one that a commit names is another.
        self._manifests = dict(found.values())

    def version(self, commit: Commit) -> Version:
        when = self._opened.store.times[self._opened.chain[commit.version]]
        given: defaultdict[str, list[Contributor]] = defaultdict(list)
        for contributor in commit.contributors:
            given[contributor.silo].append(contributor)
        return Version(
            number=commit.version,
            unix_seconds=when,
            parts={silo: self._part(found, commit.version, when) for silo, found in given.items()},
            num_bytes=sum(payload.num_bytes for payload in commit.payloads),
            update_norm=_sane(commit.metrics.get("update_norm")),
            cosine_mean=_sane(commit.metrics.get("cosine_mean")),
        )

    def _part(self, given: list[Contributor], version: int, when: float | None) -> Part:
        """Of what a silo gave to a commit: one delivery, or also one that came too late for an earlier version."""
        newest = max(given, key=lambda one: one.version)
        of_newest = self._manifests.get(newest.manifest_sha256)
        told = of_newest.metrics if of_newest else {}
        manifests = [found for one in given if (found := self._manifests.get(one.manifest_sha256))]
        delivered = self._opened.store.times.get(_path(newest)) if newest.version == version else None
        waited = None if when is None or delivered is None else max(0.0, when - delivered)
        return Part(
            is_late=newest.version != version,
            counts=any(one.weight for one in given),
            num_bytes=sum(payload.num_bytes for one in manifests for payload in one.payloads) if manifests else None,
            tokens=self._published("tokens", sum(one.tokens for one in given)),
            epochs=self._published("epochs", _sane(told.get("epochs"))),
            loss=self._published("loss", _sane(told.get("loss"))),
            norm=self._published("pseudo_gradient_norm", _sane(told.get("pseudo_gradient_norm"))),
            waited_seconds=self._published("seconds_per_step", waited),  # when a silo delivers tells how fast it is
        )

    def _published(self, name: str, number: N | None) -> N | None:
        return None if name in self.kept else number


def _sane(number: float | None) -> float | None:
    return None if number is None or abs(number) > BEYOND else number


def _path(contributor: Contributor) -> str:
    return f"{delivery_path(contributor.silo, contributor.version)}/manifest.json"


def _rollbacks(opened: Opened) -> tuple[list[tuple[int, int]], list[Event]]:
    paths = list(opened.store.numbered(ROLLBACK).values())[-MOST_EVENTS:]
    records = opened.parsed(paths, Rollback.from_bytes, for_ever=True)
    events = [
        Event(
            version=one.to_version,
            unix_seconds=opened.store.times[path],
            who=OPERATOR,
            what="rolled back",
            note=f"from version {one.from_version}{': ' if one.reason else ''}{shown(one.reason)}",
        )
        for path, one in records.items()
    ]
    return [(one.from_version, one.to_version) for one in records.values()], events


def _leases(opened: Opened, versions: list[Version]) -> list[Event]:
    """When somebody took the store's lease: the aggregator, or who rolled back."""
    paths = list(opened.store.numbered(TERM).values())[-MOST_EVENTS:]
    holders = opened.parsed(paths, Holder.from_bytes, for_ever=True)
    events = []
    for path, holder in holders.items():
        at = opened.store.times[path]
        before = [one.number for one in versions if at and one.unix_seconds and one.unix_seconds <= at]
        note = shown(holder.holder)
        events.append(
            Event(version=max(before, default=0), unix_seconds=at, who=OPERATOR, what="took the lease", note=note)
        )
    return events


def _words(opened: Opened, silo: str) -> list[Event]:
    """What a silo has said of taking part: once, and after each start, where the run has a quorum."""
    paths = list(opened.store.numbered(WORD.format(silo)).values())[-MOST_EVENTS:]
    events: list[Event] = []
    for path, word in opened.parsed(paths, Membership.from_bytes, for_ever=True).items():
        what = "left" if word.left else "came back" if events else "joined"
        events.append(Event(version=word.version, unix_seconds=opened.store.times[path], who=silo, what=what))
    return events
