"""Taking a run back to an earlier version: recorded for ever, and completed later if it was interrupted. No torch.

    rollbacks/000001.json   from which version to which, why, and the sha256 of every commit that is discarded
    rollbacks/000001.done   nothing of the discarded versions is left in its place
    rolled-back/000001/     the discarded commits, manifests and refusals, each under the name that it had

The record comes first. Then the versions go, the newest first and of each its commit first, so that at any moment a
version that is committed has all it had; their tensors are deleted.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR, ExchangeConfig, RunConfig
from pretrain.exchange import words
from pretrain.exchange.archive import Archived
from pretrain.exchange.history import History
from pretrain.exchange.lease import Lease
from pretrain.exchange.store import ROLLBACKS as FOLDER
from pretrain.exchange.store import SNAPSHOTS, StoreExchange, delivery_path, snapshot_path, version_path
from pretrain.host.foreign import loads, shown
from pretrain.trust.keys import load_signer
from pretrain.trust.ledger import RECORD_BYTES, Commit, Record, RefusedError, sha256_bytes

Origin = Literal["same", "rolled back", "foreign"]
"""A commit that somebody has seen is the run's own; or was, before a rollback; or is of another run."""


@dataclass(frozen=True, kw_only=True)
class Rollback(Record):
    """One rollback; each names the bytes of the one before."""

    format: int = 2
    previous: str | None
    from_version: int
    to_version: int
    commit_sha256: str
    """Of the commit that was gone back to."""
    discarded: list[str]
    """sha256 of every commit after it, oldest first."""
    reason: str


def consequences(exchange: StoreExchange, *, to: int) -> list[str]:
    """What a rollback to version `to` would mean, a line each; nothing to ask about if it only completes one.

    Reads the store and writes nothing. Raises ConfigError if it cannot be done.
    """
    outer, has_quorum = _terms(exchange)
    try:
        pending = [record for record, done in read_rollbacks(exchange) if not done]
    except RefusedError as error:
        raise ConfigError(f"store: {exchange.objects.url!r} given; it cannot be rolled back: {error}") from None
    newest = pending[-1].to_version if pending else exchange.newest_version()
    if pending and newest == to:
        return []
    _check_kept(History(exchange, outer["num_fragments"]), to, newest)
    tokens = sum(_tokens_of(exchange, version) for version in range(to + 1, newest + 1))
    discarded = f"versions {to + 1} to {newest} are" if newest > to + 1 else f"version {newest} is"
    without = f"it goes on from version {to} by the ledger, with a fresh inner optimizer"
    if to and not has_quorum and (outer["num_fragments"] > 1 or outer["overlap_steps"]):
        without = "it cannot go on (fragments in turn or overlap, and no quorum)"
    said = [f"{discarded} discarded for ever, and what {tokens:,} tokens of all silos have taught them"]
    for silo in exchange.objects.names("silos"):
        held = exchange.resumable(silo)
        if held is None or held > to:
            known = "no checkpoint that is known here" if held is None else f"a checkpoint of version {held}"
            said.append(f"silo {shown(silo)} has {known}: if it has none of {to} or older, {without}")
    return said


def _tokens_of(exchange: StoreExchange, version: int) -> int:
    """Tokens behind a commit; 0 where it is damaged, which is a reason to go back."""
    try:
        return sum(c.tokens for c in Commit.from_bytes(exchange.commit_bytes(version)).contributors)
    except (FileNotFoundError, RefusedError):
        return 0


def roll_back_store(exchange: StoreExchange, *, to: int, reason: str = "", key: Path | None = None) -> Rollback:
    """Take the stopped run in a store back to version `to`; raises ConfigError if that cannot be done.

    `key` is the file of the operator's private key, where the run is signed.
    """
    num_fragments = _terms(exchange)[0]["num_fragments"]
    if exchange.members.keys:
        agreed = exchange.members.keys_at(exchange.newest_version())[OPERATOR]
        if not key or (signer := load_signer(key)).public != agreed:
            given = f"{key}, the key {signer.public.fingerprint}," if key else "none"
            raise ConfigError(
                f"--key: {given} given; allowed: the private key of the aggregator's operator, "
                f"{agreed.fingerprint}, as this run is signed"
            )
        exchange.members.signer = signer
    lease = Lease(exchange, seconds=ExchangeConfig().lease_seconds)
    try:
        return roll_back(exchange, num_fragments, to=to, reason=reason)
    except RefusedError as error:
        raise ConfigError(f"store: {exchange.objects.url!r} given; it cannot be rolled back: {error}") from None
    finally:
        lease.release()


def roll_back(exchange: StoreExchange, num_fragments: int, *, to: int, reason: str = "") -> Rollback:
    """Record a rollback and carry it out, where the contract was read and nobody else works on the store.

    Completes one that was interrupted first; if that is the one which is asked for, nothing else happens.
    Raises ConfigError if version `to` is not kept, and RefusedError.
    """
    finished = finish_rollbacks(exchange)
    if finished and finished[-1].to_version == to:
        return finished[-1]
    newest, history = exchange.newest_version(), History(exchange, num_fragments)
    _check_kept(history, to, newest)
    with tempfile.TemporaryDirectory(prefix="atoll-") as scratch:
        archived = exchange.objects if isinstance(exchange.objects, Archived) else None
        file = Path(scratch) / "payload" if archived else Path(os.devnull)
        for folder, payload in history.made_of(to):
            # Before anything newer is thrown away: whether this can still be read and is what its commit says.
            exchange.fetch(folder, payload, file)
            if archived:
                archived.bring_back(f"{folder}/{payload.file}", file, digest=payload.blake3)
        if archived:
            for version in filter(None, history.last_snapshots(to)):
                archived.bring_back_record(snapshot_path(version))
    records = [record for record, _ in read_rollbacks(exchange)]
    record = Rollback(
        previous=sha256_bytes(records[-1].to_bytes()) if records else None,
        from_version=newest,
        to_version=to,
        commit_sha256=sha256_bytes(exchange.commit_bytes(to)),
        discarded=[sha for version in range(to + 1, newest + 1) if (sha := _commit_sha256(exchange, version))],
        reason=" ".join(reason.split()),
    )
    record = exchange.members.sign(record, version=newest)
    name = f"{FOLDER}/{len(records) + 1:06d}.json"
    try:
        exchange.write_over(name, record.to_bytes(), lambda: len(read_rollbacks(exchange)) > len(records))
    except FileExistsError:
        raise _taken(name) from None
    finish_rollbacks(exchange)
    return record


def rollback_records(exchange: StoreExchange, config: RunConfig) -> list[dict[str, Any]]:
    """What metrics.jsonl says of each rollback, oldest first: where the run went back to. Raises RefusedError."""
    return [
        {
            "number": number,
            "from_version": record.from_version,
            "to_version": record.to_version,
            "step": config.schedule.adopted(record.to_version) if record.to_version else 0,
            "round": config.round_of(record.to_version),
            "reason": record.reason,
        }
        for number, (record, _) in enumerate(read_rollbacks(exchange), start=1)
    ]


def finish_rollbacks(exchange: StoreExchange) -> list[Rollback]:
    """Complete what was recorded but interrupted; returns these rollbacks. Raises RefusedError.

    To be called before the newest version is asked for, by whoever alone may write versions.
    """
    finished = []
    for number, (record, done) in enumerate(read_rollbacks(exchange), start=1):
        if done:
            continue
        if _commit_sha256(exchange, record.to_version) != record.commit_sha256:
            raise RefusedError(f"rollback {number} goes to another version {record.to_version} than the one here")
        _check_discarded(exchange, number, record)
        for version in versions_above(exchange, record.to_version):
            take_back(exchange, version, f"rolled-back/{number:06d}")
        name = f"{FOLDER}/{number:06d}.done"
        try:
            exchange.say(name, words.Done(), OPERATOR)
        except FileExistsError:
            raise _taken(name) from None
        finished.append(record)
    return finished


def versions_above(exchange: StoreExchange, version: int) -> list[int]:
    """All newer versions, committed or not, of which anything is there; the newest first."""
    objects = exchange.objects
    silos = objects.names("silos")
    places = [
        "global",
        "waiting",
        SNAPSHOTS,
        *(f"silos/{silo}{inner}" for silo in silos for inner in ("", "/resumable")),
    ]
    stems = {name.removesuffix(".json") for place in places for name in objects.names(place)}
    return sorted((n for stem in stems if (n := words.number(stem)) is not None and n > version), reverse=True)


def take_back(exchange: StoreExchange, version: int, folder: str) -> None:
    """Remove all there is of a version, its commit first; what is no tensor is copied below `folder` before.

    And what is in its archive, before: as long as anything of a version is here, this is done once more.
    """
    objects = exchange.objects
    silos = objects.names("silos")
    places = [version_path(version), *(delivery_path(silo, version) for silo in silos)]
    if isinstance(objects, Archived):
        objects.forget(places, [snapshot_path(version)])
    for place in places:
        tensors = exchange.tensors(place)
        for name in (name for name in objects.names(place) if name not in tensors):
            try:
                objects.write(f"{folder}/{place}/{name}", objects.read(f"{place}/{name}"))
            except FileExistsError:
                pass  # copied before an interruption
            except (FileNotFoundError, IsADirectoryError, RefusedError) as error:
                exchange.pass_over(f"{place}/{name}", error)  # nothing of ours
            objects.delete(f"{place}/{name}")
        for name in tensors:
            objects.delete(f"{place}/{name}")
    for silo in silos:
        objects.delete(f"silos/{silo}/resumable/{version:06d}")
    objects.delete(snapshot_path(version))
    objects.delete(f"waiting/{version:06d}.json")


def _taken(name: str) -> RefusedError:
    return RefusedError(f"{name} is taken by what is no part of a rollback; take it away")


def _check_discarded(exchange: StoreExchange, number: int, record: Rollback) -> None:
    """Raise RefusedError unless every commit that a rollback would delete is one that its record names."""
    newest = exchange.newest_version()
    if not record.to_version < record.from_version or newest > record.from_version:
        raise RefusedError(
            f"{FOLDER}/{number:06d}.json goes from version {record.from_version} to {record.to_version}, and the "
            f"newest here is {newest}; nothing was deleted"
        )
    for version in range(record.to_version + 1, newest + 1):
        if _commit_sha256(exchange, version) not in (None, *record.discarded):
            raise RefusedError(
                f"{FOLDER}/{number:06d}.json would discard version {version} without naming its commit; nothing was "
                "deleted"
            )


def is_done(exchange: StoreExchange, name: str) -> bool:
    """Whether a rollback's `.done` that lies there counts: where the contract names keys, if its operator says so."""
    return not exchange.members.keys or exchange.heard(words.Done, f"{FOLDER}/{name}", OPERATOR) is not None


def is_rolling_back(exchange: StoreExchange) -> bool:
    """Whether a rollback was begun and is not complete: the newest version does not count until it is."""
    return any(not done for _, done in read_rollbacks(exchange))


def explain(exchange: StoreExchange, version: int, commit_sha256: str) -> Origin:
    """What the store knows of a commit that a silo holds: it is its own, it was discarded by a rollback, or neither.

    Neither is another history: an old backup of the store was restored, or this is another run. Raises RefusedError.
    """
    rollbacks = read_rollbacks(exchange)
    if any(commit_sha256 in record.discarded for record, done in rollbacks if not done):
        return "rolled back"
    # A version that was discarded may have come again, with the same bytes.
    if _commit_sha256(exchange, version) == commit_sha256:
        return "same"
    return "rolled back" if any(commit_sha256 in record.discarded for record, _ in rollbacks) else "foreign"


def foreign(who: str, version: int, commit_sha256: str, exchange: StoreExchange) -> str:
    """What to tell the user about a commit that the store explains as foreign."""
    return (
        f"exchange.url: {exchange.objects.url} given, whose newest version is {exchange.newest_version()}; {who} holds "
        f"version {version} with commit {commit_sha256[:12]}, which is not there: an old copy was restored, or it is "
        "another run; restore the newer copy, or name another run directory"
    )


def check_held(who: str, version: int, commit_sha256: str, exchange: StoreExchange) -> bool:
    """Whether the store still has a commit that somebody who is running holds. Raises ConfigError, one line, if not.

    False where its operator has not signed what lies there: that counts as not there, and the true one comes again.
    """
    url, found, held = exchange.objects.url, None, commit_sha256[:12]
    try:
        data = exchange.found(f"{version_path(version)}/commit.json")
        found = sha256_bytes(data) if data is not None else None
        if found == commit_sha256:
            return True
        if exchange.is_nobodys(version):
            return False
        was_rolled_back = explain(exchange, version, commit_sha256) == "rolled back"
    except RefusedError as error:
        raise ConfigError(f"exchange.url: {url} given; {error}") from None
    if was_rolled_back:
        raise ConfigError(f"exchange.url: {url} given; the run was rolled back while {who} was running; start it again")
    if found is None:
        raise ConfigError(foreign(who, version, commit_sha256, exchange))
    raise ConfigError(
        f"exchange.url: {url} given, whose version {version} has commit {found[:12]}; {who} holds that version with "
        f"commit {held}: somebody has changed it, or put another copy there; restore the copy that has {held}"
    )


def read_rollbacks(exchange: StoreExchange) -> list[tuple[Rollback, bool]]:
    """All rollbacks, oldest first, and whether each is complete. Raises RefusedError.

    What the operator has not signed is none, and said: whoever could put it there could as well take a true one away.
    """
    names = exchange.objects.names(FOLDER)
    found: list[tuple[Rollback, bool]] = []
    previous: str | None = None
    for name in (name for name in names if words.number(name, after=".json") is not None):
        try:
            data = exchange.objects.read(f"{FOLDER}/{name}")
            record = Rollback.from_bytes(data)
            exchange.check(OPERATOR, record, version=record.from_version)
        except (RefusedError, FileNotFoundError) as error:
            if exchange.members.keys:
                exchange.pass_over(f"{FOLDER}/{name}", error)
                continue
            raise RefusedError(f"{FOLDER}/{name}: {error}") from None
        stem = f"{len(found) + 1:06d}"
        if name != f"{stem}.json" or record.previous != previous:
            raise RefusedError(f"{FOLDER}/{name} does not follow the rollback before it")
        found.append((record, f"{stem}.done" in names and is_done(exchange, f"{stem}.done")))
        previous = sha256_bytes(data)
    exchange.num_rollbacks = len(found)
    return found


def _commit_sha256(exchange: StoreExchange, version: int) -> str | None:
    try:
        return sha256_bytes(exchange.commit_bytes(version))
    except FileNotFoundError:
        return None


def _check_kept(history: History, to: int, newest: int) -> None:
    if not 0 <= to < newest or not history.is_kept(to):
        raise ConfigError(f"--to: {to} given; allowed: {_kept(history, newest)}")


def _kept(history: History, newest: int) -> str:
    """The newest versions in a row that can be gone back to, in words."""
    last = newest - 1
    while last >= 0 and not history.is_kept(last):
        last -= 1
    if last < 0:
        return f"none, as no version before the newest ({newest}) is kept"
    first = last
    while first > 0 and history.is_kept(first - 1):
        first -= 1
    return f"{first}{f' to {last}' if last > first else ''}, what is kept before the newest version ({newest})"


def _terms(exchange: StoreExchange) -> tuple[dict[str, Any], bool]:
    """Fragments, overlap, and whether there is a quorum, by the contract; ConfigError for what is no store of a run."""
    url, contract = exchange.objects.url, exchange.read_contract()
    # A collective's run directory, or one silo's own ledger in it: that looks like a store without silos.
    is_ledger = contract and not exchange.objects.names("silos") and exchange.newest_version() > 0
    if is_ledger or any(Path(url).glob("silos/*/ledger")):
        raise ConfigError(
            f"exchange.kind: 'collective' given in {url}; only a run whose kind is 'store' can be rolled back"
        )
    if contract is None:
        raise ConfigError(f"store: {url!r} given; there is no run in it (no contract.json)")
    try:
        terms = loads(contract, limit_bytes=RECORD_BYTES)
        outer = {key: int(terms["outer"][key]) for key in ("num_fragments", "overlap_steps")}
        if outer["num_fragments"] < 1:
            raise ValueError
        is_sum = terms["outer"].get("secure_sum") is True
        has_quorum = terms["membership"]["quorum"] is not None
    except (ValueError, KeyError, TypeError, OverflowError):
        raise ConfigError(f"store: {url!r} given; its contract.json has no outer.num_fragments") from None
    if is_sum:
        raise ConfigError(
            f"store: {url!r} given; its contract has outer.secure_sum, and no silo answers twice for a version: of two "
            "sums more could be told; allowed: a new run from what atoll export makes of it"
        )
    return outer, has_quorum
