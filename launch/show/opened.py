"""A store as it was at one moment: the terms of its contract, its commits, and whatever else is asked of it.

All that lies there is of other parties: what does not read as what it should be, or, where the contract names keys, is
not signed by who should have said it, is passed over and named.
"""

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from itertools import takewhile
from typing import Any, TypeVar, get_args, get_origin

from launch.show.listed import LIMIT_BYTES, Listed, cannot_be_read
from launch.show.voices import Voices
from pretrain.config.check import check_config
from pretrain.config.errors import ConfigError
from pretrain.config.gate import GateConfig
from pretrain.config.keys import (
    InnerConfig,
    MembershipConfig,
    ModelConfig,
    OuterConfig,
    RunConfig,
    SiloConfig,
)
from pretrain.config.trust import TrustConfig
from pretrain.exchange.signed import SignedStore
from pretrain.host.foreign import loads, shown
from pretrain.trust.contract import GATE
from pretrain.trust.ledger import Commit, RefusedError, sha256_bytes

# The layout is in pretrain/exchange/store.py; # is the number that tells objects of a kind apart.
CONTRACT = "contract.json"
COMMIT = "global/{:06d}/commit.json"
MANIFEST = "silos/{}/#/manifest.json"
WORD = "silos/{}/membership/#.json"
EVALUATION = "silos/{}/evaluations/#.json"
TERM = "aggregator/#.json"
ROLLBACK = "rollbacks/#.json"
AMENDED = "amendments/#.accepted"
TRIES = 20  # how many numbers back from the last one something is looked for that its author has signed
LIMIT_SECONDS = 1e9  # of a time that another party states: 30 years
MAX_SILOS = 4096

Json = dict[str, Any]
T = TypeVar("T")


class Opened:
    """What the names of a store's objects, their times and the small ones among them say."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None, *, before: "Opened | None" = None) -> None:
        """`options` go to fsspec; what `before` has read of what never changes is not read again.

        Raises ConfigError when there is no store, it cannot be reached, or its contract is unreadable.
        """
        try:
            self.store = Listed(url, options)
            content = self.store.read([CONTRACT]).get(CONTRACT)
        except ConfigError:
            raise
        except Exception as error:
            raise cannot_be_read(url, error) from None
        if CONTRACT not in self.store.times:
            raise ConfigError(f"store: {url!r} given; there is no run in it (no contract.json)")
        self.contract, self.terms = _terms(content, url)
        self.contract_sha256 = sha256_bytes(content or b"")
        self.voices = Voices(content or b"")
        if self.store.numbered(AMENDED):
            self.voices.follow_amendments(SignedStore(url, options=options))
            self.terms.trust.keys = {name: key.text for name, key in self.voices.members.keys.items()}
        self.unreadable: list[str] = []
        """Objects that are not what their names say."""
        self.unsigned: list[str] = []
        """Objects that are not signed by who should have written them."""
        self._last_signed: dict[str, str] = {}  # pattern to path
        # A rollback writes other commits in the place of those that it takes back, an amendment changes who signs.
        self._holds = content, *(tuple(self.store.numbered(kind)) for kind in (ROLLBACK, AMENDED))
        self._kept: dict[str, tuple[object, Any]] = before._kept if before and before._holds == self._holds else {}
        self.commits: dict[int, Commit] = {}
        """By version; of the chain those that can be read."""
        self.chain = self._read_chain()
        """Their paths, from version 0 on: commits stay for ever, and one beyond a gap belongs to no chain."""

    def _read_chain(self) -> list[str]:
        names = (COMMIT.format(version) for version in range(self.terms.schedule.num_versions + 1))
        chain = list(takewhile(self.store.times.__contains__, names))
        committed = self.parsed(chain, Commit.from_bytes, for_ever=True)
        while self.voices.members.keys and chain and chain[-1] not in committed:
            chain.pop()
        self.commits = {version: committed[path] for version, path in enumerate(chain) if path in committed}
        return chain

    def parsed(self, paths: Iterable[str], parse: Callable[[bytes], T], *, for_ever: bool = False) -> dict[str, T]:
        """Objects by path, without those that are not what they should be: these are named.

        What is there `for_ever` is read once, and not by those that come after this one.
        """
        wanted = {path: self.store.stamp(path) for path in paths}
        kept = self._kept if for_ever else {}
        parsed: dict[str, T] = {
            path: kept[path][1] for path, stamp in wanted.items() if kept.get(path, ())[:1] == (stamp,)
        }
        contents = self.store.read(path for path in wanted if path not in parsed)
        for path, stamp in wanted.items():
            if path in parsed:
                continue
            try:
                found = parse(contents[path])
            except KeyError:  # too large, or gone meanwhile as the newest sign of life often is
                self.unreadable += [path] if self.store.is_too_large(path) else []
            except (ValueError, RefusedError):
                self.unreadable.append(path)
            else:
                if self.voices.is_by_author(path, contents[path]):
                    parsed[path] = found
                    if for_ever:
                        kept[path] = stamp, found
                else:
                    self.unsigned.append(path)
        return parsed

    def last_of(self, patterns: list[str], parse: Callable[[bytes], T]) -> dict[str, T]:
        """Of each pattern the object with the last number; where all is signed, the last that its author has signed."""
        if not self.voices.members.keys:
            return self.parsed([path for pattern in patterns for path in self.store.last(pattern)], parse)
        found: dict[str, T] = {}
        left = {pattern: list(self.store.numbered(pattern).values()) for pattern in patterns}
        for _ in range(TRIES):
            asked = {pattern: paths.pop() for pattern, paths in left.items() if paths}
            found |= (new := self.parsed(asked.values(), parse))
            self._last_signed |= {pattern: path for pattern, path in asked.items() if path in new}
            left = {pattern: left[pattern] for pattern, path in asked.items() if path not in new}
        return found

    def last_path(self, pattern: str) -> list[str]:
        """The path of what `last_of` has found, if there is one."""
        if not self.voices.members.keys:
            return self.store.last(pattern)
        return [self._last_signed[pattern]] if pattern in self._last_signed else []


def json_object(data: bytes) -> Json:
    """JSON of another party that is an object; raises ValueError."""
    found = loads(data, limit_bytes=LIMIT_BYTES)
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def number_in(record: Json, key: str) -> float:
    """A number of versions or seconds in another party's record; 0 if there is none that can be meant."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    return value if 0 <= value <= LIMIT_SECONDS else 0


def _terms(stored: bytes | None, url: str) -> tuple[Json, RunConfig]:
    """What the contract says of roster, membership, schedule and what silos tell; silos are as by default."""
    try:
        if stored is None:
            raise ValueError(f"it has more than {LIMIT_BYTES:,} bytes")
        contract = json_object(stored)
        inner, outer = _section(InnerConfig, contract, "inner"), _section(OuterConfig, contract, "outer")
        membership = _section(MembershipConfig, contract, "membership")
        roster: list[str] = contract.get("roster", [])
        if not _fits(roster, list[str]) or len(roster) > MAX_SILOS:
            raise ValueError(f"roster: {shown(str(roster)[:60])} given; allowed: up to {MAX_SILOS} names")
        terms = RunConfig(
            inner=inner,
            outer=outer,
            membership=membership,
            gate=_section(GateConfig, contract, GATE) if GATE in contract else GateConfig(),
            model=ModelConfig(config={"model_type": "any"}),
            silos={name: SiloConfig() for name in roster},
            roster=roster,
            trust=TrustConfig(metrics=_tiers(contract)),
        )
        check_config(terms)
    except ValueError as error:
        what = shown(error, limit=400)
        raise ConfigError(f"store: {url!r} given; its contract.json is not of this version of atoll: {what}") from None
    return contract, terms


def _tiers(contract: Json) -> dict[str, str]:
    """Who may see what silos tell: as by default where the contract does not say. Raises ValueError."""
    trust = contract.get("trust")
    found: Any = trust.get("metrics", {}) if isinstance(trust, dict) else {}
    if not _fits(found, dict[str, str]):
        raise ValueError(f"trust.metrics: {shown(found, limit=60)} given")
    return TrustConfig().metrics | found


def _section(kind: type[T], contract: Json, key: str) -> T:
    """One section of a contract; raises ValueError for what is no key of it, or of another type."""
    given, allowed = contract.get(key), {f.name: f.type for f in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(given, dict):
        raise ValueError(f"it has no {key}")
    found: Json = {}
    for name, value in given.items():
        inner = allowed.get(name)
        if isinstance(inner, type) and is_dataclass(inner):
            found[name] = _section(inner, given, name)
            continue
        if name not in allowed or not _fits(value, allowed[name]):
            raise ValueError(f"{key}.{shown(name, limit=60)}: {shown(value, limit=60)} given")
        found[name] = value
    return kind(**found)


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value of JSON is of the type of a configuration's key."""
    origin = get_origin(wanted)
    if origin is types.UnionType:
        return any(_fits(value, one) for one in get_args(wanted))
    if origin is dict:
        of_key, of_value = get_args(wanted)
        return isinstance(value, dict) and all(_fits(k, of_key) and _fits(v, of_value) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(_fits(one, get_args(wanted)[0]) for one in value)
    return type(value) in (int, float) if wanted is float else type(value) is wanted
