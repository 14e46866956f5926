"""What the versions in a store are made of, and which of it nobody can need again. No torch.

A version holds the coded change of the parameters; where the codec is fp32 that is whole. Its outer state follows from
the last snapshot and the deliveries that the commits since then name. A snapshot holds the outer state of the fragment
that a version changed, and its parameters whole; it is written after the version, while silos train on. Version 0 is
whole, of all fragments, and its outer state follows from its parameters.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from heapq import heapify, heapreplace
from pathlib import Path

from pretrain.config.keys import OPERATOR
from pretrain.exchange.store import (
    REQUESTS_AT_ONCE,
    SNAPSHOTS,
    StoreExchange,
    delivery_path,
    snapshot_path,
    version_path,
)
from pretrain.outer.threads import in_threads
from pretrain.trust.ledger import Payload, RefusedError, Snapshot, sha256_bytes

Made = tuple[int, Payload, str]
"""Version, payload and codec of what a fragment's parameters are made of; the codec of what is whole is empty."""


class History:
    """The versions of one store, whose fragments take turns."""

    def __init__(self, exchange: StoreExchange, num_fragments: int, *, all_whole: bool = False) -> None:
        """With `all_whole` every version counts as a snapshot: its outer state lies elsewhere."""
        self._exchange, self._num_fragments, self._all_whole = exchange, num_fragments, all_whole
        self._resumable: dict[str, int] = {}  # silo: the version of its newest checkpoint, when it was asked for last
        self._signed_snapshots: set[int] = set()

    def _back(self, version: int, fragment: int) -> Iterator[int]:
        """The versions up to `version` that changed a fragment, the newest first; the last one is 0."""
        yield from range(version - (version - fragment) % self._num_fragments, 0, -self._num_fragments)
        yield 0

    # ---- what a version is made of

    def parameters(self, version: int, fragment: int, *, since: int = -1) -> list[Made]:
        """What a fragment's parameters at `version` are made of, oldest first: whole ones, and the changes since.

        Who has those of version `since` is told the changes since then alone, where these are there and fewer bytes.
        Raises RefusedError.
        """
        changes: list[Made] = []  # the newest first
        whole: list[Made] = []
        snapshots: Sequence[int] | None = None
        for made in self._back(version, fragment):
            if made <= since:
                break
            commit = self._exchange.read_commit(made)
            payload = _of(commit.payloads, fragment)
            found = payload if commit.codec == "fp32" else None
            if not found and not whole and (since < 0 or changes):  # who follows from version to version asks for none
                snapshots = self.snapshots() if snapshots is None else snapshots
                found = self._whole_parameters(made, fragment) if made in snapshots else None
            if found and not whole:
                whole = [(made, found, ""), *reversed(changes)]
            if whole and (since < 0 or commit.codec == "fp32"):
                return whole
            if not payload:
                raise RefusedError(f"version {made} does not hold fragment {fragment}")
            changes.append((made, payload, commit.codec))
            if whole and (_num_bytes(changes) >= _num_bytes(whole) or not self._is_there(made, payload)):
                return whole
        return changes[::-1]

    def has_parameters(self, version: int) -> bool:
        """Whether the parameters of a version are there, or what they are made of. Raises RefusedError."""
        found = [made for fragment in range(self._num_fragments) for made in self.parameters(version, fragment)]
        return all(self._is_there(made, payload) for made, payload, _ in found)

    def _is_there(self, version: int, payload: Payload) -> bool:
        return self._exchange.objects.exists(f"{version_path(version)}/{payload.file}")

    # ---- snapshots

    def snapshots(self) -> Sequence[int]:
        """The versions that have a snapshot, sorted; not 0, which needs none. What nobody has signed is none."""
        if self._all_whole:
            return range(1, 1 << 53)
        listed = self._exchange.numbers(SNAPSHOTS, after=".json")
        return [version for version in listed if self._is_signed(version)] if self._exchange.members.keys else listed

    def _is_signed(self, version: int) -> bool:
        """Whether the operator has signed a snapshot's record; what it has not is said."""
        if version in self._signed_snapshots:
            return True
        try:
            snapshot = Snapshot.from_bytes(self._exchange.objects.read(snapshot_path(version)))
            self._exchange.check(OPERATOR, snapshot)
            if (snapshot.version, snapshot.contract_sha256) != (version, self._exchange.terms_sha256(version)):
                raise RefusedError(f"it is of version {snapshot.version}, or of another run")
        except FileNotFoundError:
            return False
        except RefusedError as error:
            self._exchange.pass_over(snapshot_path(version), error)
            return False
        self._signed_snapshots.add(version)
        return True

    def last_snapshots(self, version: int) -> list[int]:
        """Of each fragment the last one at or before `version`, or 0."""
        snapshots = self.snapshots()
        return [self._last(snapshots, version, fragment) for fragment in range(self._num_fragments)]

    def _last(self, snapshots: Sequence[int], version: int, fragment: int) -> int:
        return next(made for made in self._back(version, fragment) if made in snapshots or not made)

    def read_snapshot(self, version: int) -> Snapshot:
        """What a snapshot consists of. Raises RefusedError."""
        name = snapshot_path(version)
        try:
            snapshot = Snapshot.from_bytes(self._exchange.objects.read(name))
            commit_sha256 = sha256_bytes(self._exchange.commit_bytes(version))
        except FileNotFoundError as error:
            raise RefusedError(f"the snapshot of version {version} is missing: {error}") from None
        if (snapshot.version, snapshot.commit_sha256) != (version, commit_sha256):
            raise RefusedError(f"{name} is not of commit {version} as it lies here")
        self._exchange.check(OPERATOR, snapshot)
        return snapshot

    def write_snapshot(
        self, snapshot: Snapshot, files: Iterable[tuple[Payload, Path]], *, check: Callable[[], None] = lambda: None
    ) -> None:
        """Write the payloads of a snapshot, then its record.

        `check` is called before every write, and raises if this process may not write any more.
        """
        folder = version_path(snapshot.version)
        for payload, file in files:
            check()
            # one died before its record, perhaps
            self._exchange.upload_over(file, f"{folder}/{payload.file}", digest=payload.blake3)
        check()
        name = snapshot_path(snapshot.version)
        self._exchange.write_over(name, snapshot.to_bytes(), lambda: self._is_signed(snapshot.version))

    def _whole_parameters(self, version: int, fragment: int) -> Payload | None:
        payloads = self.read_snapshot(version).payloads
        return _of([payload for payload in payloads if payload.file.startswith("parameter-")], fragment)

    def whole(self, version: int, fragment: int) -> list[Payload]:
        """The payloads from which a snapshot, or version 0, is loaded again. Raises RefusedError."""
        payloads = self.read_snapshot(version).payloads if version else []
        commit = self._exchange.read_commit(version)
        payloads = payloads + (commit.payloads if commit.codec == "fp32" else [])
        return [payload for payload in payloads if payload.fragment == fragment]

    def since(self, snapshot: int, version: int, fragment: int) -> list[int]:
        """The versions of a fragment after its snapshot, up to `version`, the oldest first."""
        return [made for made in self._back(version, fragment) if made > snapshot][::-1]

    def made_of(self, version: int) -> list[tuple[str, Payload]]:
        """All payloads from which aggregator and silos can go on with `version`, and their folders.

        Raises RefusedError if a commit or manifest among them is not as it should be.
        """
        found: dict[tuple[str, str], Payload] = {}
        for fragment, snapshot in enumerate(self.last_snapshots(version)):
            made = self.parameters(snapshot, fragment) + self.parameters(version, fragment)
            for payload in self.whole(snapshot, fragment):
                found[version_path(snapshot), payload.file] = payload
            for later in self.since(snapshot, version, fragment):
                for contributor in self._exchange.read_commit(later).contributors:
                    folder = delivery_path(contributor.silo, contributor.version)
                    for payload in self._exchange.contributed(contributor)[0].payloads:
                        found[folder, payload.file] = payload
                    if contributor.version < later:
                        made += self.parameters(contributor.version - self._num_fragments, fragment)
            found |= {(version_path(of), payload.file): payload for of, payload, _ in made}
        return [(folder, payload) for (folder, _), payload in found.items()]

    def is_kept(self, version: int) -> bool:
        """Whether all is there that a version is made of: its commits, as they should be, and their tensors."""
        try:
            found = self.made_of(version)
        except RefusedError:
            return False
        return all(self._exchange.objects.exists(f"{folder}/{payload.file}") for folder, payload in found)

    # ---- what nobody can need again

    def first_needed(self, version: int, *, late: bool = False) -> int:
        """The oldest version of which tensors are needed to go on with `version`. Raises RefusedError.

        Deliveries that may have come too late (`late`) build on the version before a fragment's snapshot.
        """
        snapshots = self.snapshots()
        return min(self._first_needed(version, f, snapshots, late=late) for f in range(self._num_fragments))

    def _first_needed(self, version: int, fragment: int, snapshots: Sequence[int], *, late: bool) -> int:
        snapshot = self._last(snapshots, version, fragment)
        if not late or not snapshot:
            return snapshot
        before = next(self._back(snapshot - self._num_fragments, fragment))
        if self._exchange.peek_commits([before])[0].codec == "fp32":
            return before
        return self._last(snapshots, before, fragment)

    def prune(
        self,
        roster: Sequence[str],
        newest: int,
        keep_versions: int,
        *,
        late: bool = False,
        keep: Callable[[int, Sequence[str]], Collection[str]] = lambda version, names: names,
    ) -> list[int]:
        """Delete tensors that nobody can need again; commits and manifests stay. Returns the pruned versions.

        Kept are the newest `keep_versions`, all from which a silo's newest checkpoint would go on, and what these are
        made of. `keep` is told what of a version is about to be deleted, and says what may. Raises RefusedError.
        """
        exchange = self._exchange
        oldest = max(0, self._oldest_resumable(roster, newest - keep_versions + 1))
        first_kept = self.first_needed(oldest, late=late)
        pruned: list[int] = []
        while (version := first_kept - 1 - len(pruned)) >= 0 and exchange.tensors(version_path(version)):
            pruned.append(version)
        silos, snapshots = (exchange.objects.names("silos"), self.snapshots()) if pruned else ([], [])  # also who left
        for version in reversed(pruned):  # oldest first: whoever is killed here leaves no gap behind
            # What a silo delivered has the one name that silos give it: to look costs more than to delete.
            delivered = [f"{delivery_path(silo, version)}/{version:06d}.safetensors" for silo in silos]
            rest = [snapshot_path(version)] if version in snapshots else []
            # The version's own folder comes last: while it holds tensors, the next pruning sees that this one was not
            # finished.
            rest += [f"{version_path(version)}/{name}" for name in exchange.tensors(version_path(version))]
            goes = keep(version, [*delivered, *rest])
            in_threads(exchange.objects.delete, [name for name in delivered if name in goes], REQUESTS_AT_ONCE)
            for name in (name for name in rest if name in goes):
                exchange.objects.delete(name)
        return pruned

    def _oldest_resumable(self, roster: Sequence[str], limit: int) -> int:
        """The oldest of the silos' newest checkpoints, or `limit` if that is older.

        Checkpoints only get newer, so only who is behind all others is asked again.
        """
        behind = [(self._resumable.get(silo, 0), silo) for silo in roster]
        heapify(behind)
        while behind and behind[0][0] < limit:
            known, silo = behind[0]
            now = self._exchange.resumable(silo) or 0
            self._resumable[silo] = now
            if now <= known:
                return now
            heapreplace(behind, (now, silo))
        return limit


def _of(payloads: Sequence[Payload], fragment: int) -> Payload | None:
    return next((payload for payload in payloads if payload.fragment == fragment), None)


def _num_bytes(made: Sequence[Made]) -> int:
    return sum(payload.num_bytes for _, payload, _ in made)
