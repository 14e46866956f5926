"""What the versions in a store are made of, and which of it nobody can need again. No torch.

A snapshot is a version that holds the outer state of the fragment that it changes, and its parameters whole; version 0
is one, of all fragments. Later versions hold the coded change of the parameters alone: their outer state follows from
the snapshot before and the deliveries that the commits since then name. Where the codec is fp32 a change is whole.
"""

from collections.abc import Iterator, Sequence
from heapq import heapify, heapreplace

from pretrain.exchange.store import REQUESTS_AT_ONCE, StoreExchange, delivery_path, version_path
from pretrain.trust.ledger import Commit, Payload, RefusedError

Made = tuple[int, Payload, str]
"""Version, payload and codec of what a fragment's parameters are made of; the codec of what is whole is empty."""


class History:
    """The versions of one store, whose fragments take turns."""

    def __init__(self, exchange: StoreExchange, num_fragments: int) -> None:
        self._exchange, self._num_fragments = exchange, num_fragments
        self._known: dict[int, tuple[bool, bool]] = {}  # version: is a snapshot, has parameters whole
        self._resumable: dict[str, int] = {}  # silo: the version of its newest checkpoint, when it was asked for last

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
        for made in self._back(version, fragment):
            if made <= since:
                break
            commit = self._exchange.read_commit(made)
            payload = _of(commit.payloads, fragment)
            if not whole and (found := payload if commit.codec == "fp32" else _of_kind(commit, fragment, "parameter")):
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

    def snapshot(self, version: int, fragment: int) -> int:
        """The last snapshot of a fragment at or before `version`. Raises RefusedError."""
        return next(made for made in self._back(version, fragment) if self._kind(made)[0])

    def since(self, snapshot: int, version: int, fragment: int) -> list[int]:
        """The versions of a fragment after its snapshot, up to `version`, the oldest first."""
        return [made for made in self._back(version, fragment) if made > snapshot][::-1]

    def made_of(self, version: int) -> list[tuple[str, Payload]]:
        """All payloads from which aggregator and silos can go on with `version`, and their folders.

        Raises RefusedError if a commit or manifest among them is not as it should be.
        """
        found: dict[tuple[str, str], Payload] = {}
        for fragment in range(self._num_fragments):
            snapshot = self.snapshot(version, fragment)
            made = self.parameters(snapshot, fragment) + self.parameters(version, fragment)
            for payload in whole_of(self._exchange.read_commit(snapshot), fragment):
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
        return min(self._first_needed(version, fragment, late=late) for fragment in range(self._num_fragments))

    def _first_needed(self, version: int, fragment: int, *, late: bool) -> int:
        snapshot = self.snapshot(version, fragment)
        if not late or not snapshot:
            return snapshot
        return next(made for made in self._back(snapshot - self._num_fragments, fragment) if self._kind(made)[1])

    def _kind(self, version: int) -> tuple[bool, bool]:
        """Whether a version is a snapshot, and has parameters whole; what was read is remembered."""
        if version not in self._known:
            nearby = range(max(0, version - REQUESTS_AT_ONCE + 1), version + 1)
            unknown = [one for one in nearby if one not in self._known]
            try:
                commits = self._exchange.peek_commits(unknown)
            except RefusedError:  # of one that may not matter
                unknown = [version]
                commits = self._exchange.peek_commits(unknown)
            for one, commit in zip(unknown, commits, strict=True):
                self._known[one] = commit.is_snapshot, commit.is_snapshot or commit.codec == "fp32"
        return self._known[version]

    def prune(self, roster: Sequence[str], newest: int, keep_versions: int, *, late: bool = False) -> list[int]:
        """Delete tensors that nobody can need again; commits and manifests stay. Returns the pruned versions.

        Kept are the newest `keep_versions`, all from which a silo's newest checkpoint would go on, and what these are
        made of. Raises RefusedError.
        """
        exchange = self._exchange
        oldest = max(0, self._oldest_resumable(roster, newest - keep_versions + 1))
        first_kept = self.first_needed(oldest, late=late)
        pruned: list[int] = []
        while (version := first_kept - 1 - len(pruned)) >= 0 and exchange.tensors(version_path(version)):
            pruned.append(version)
        silos = exchange.objects.names("silos") if pruned else []  # also of those that have left
        for version in reversed(pruned):  # oldest first: whoever is killed here leaves no gap behind
            # The version's own folder comes last: while it holds tensors, the next pruning sees that this one was not
            # finished.
            for folder in [*(delivery_path(silo, version) for silo in silos), version_path(version)]:
                for name in exchange.tensors(folder):
                    exchange.objects.delete(f"{folder}/{name}")
        return pruned

    def _oldest_resumable(self, roster: Sequence[str], limit: int) -> int:
        """The oldest of the silos' newest checkpoints, or `limit` if that is older.

        Checkpoints only get newer, so only who is behind all others is asked again.
        """
        behind = [(self._resumable.get(silo, 0), silo) for silo in roster]
        heapify(behind)
        while behind and behind[0][0] < limit:
            known, silo = behind[0]
            now = max(self._exchange.numbers(f"silos/{silo}/resumable"), default=0)
            self._resumable[silo] = now
            if now <= known:
                return now
            heapreplace(behind, (now, silo))
        return limit


def whole_of(commit: Commit, fragment: int) -> list[Payload]:
    """The payloads of a snapshot that hold a fragment's tensors themselves: parameters and outer state."""
    payloads = commit.state_payloads + (commit.payloads if commit.codec == "fp32" else [])
    return [payload for payload in payloads if payload.fragment == fragment]


def _of(payloads: Sequence[Payload], fragment: int) -> Payload | None:
    return next((payload for payload in payloads if payload.fragment == fragment), None)


def _of_kind(commit: Commit, fragment: int, kind: str) -> Payload | None:
    return _of([payload for payload in commit.state_payloads if payload.file.startswith(f"{kind}-")], fragment)


def _num_bytes(made: Sequence[Made]) -> int:
    return sum(payload.num_bytes for _, payload, _ in made)
