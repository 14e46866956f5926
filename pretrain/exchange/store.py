"""The store exchange: where everything lies under one URL, and the few verbs of silo and aggregator.

    contract.json                            what all silos agreed to
    global/000017/commit.json                written last: the version is there when this is
    global/000017/change-001.safetensors     how commit 17 changed fragment 1, coded; or, where the codec is fp32,
    global/000017/parameter-001.safetensors its new values, which are there for the aggregator's restart otherwise
    global/000017/velocity-001.safetensors   the outer optimizer's state of the fragment, and target-001 what the
                                             downlink's codec has not sent yet, for the aggregator's own restart
    silos/NAME/identity.json                 which run directory holds this name
    silos/NAME/000017/000017.safetensors     the coded fragment of the pseudo-gradient for version 17
    silos/NAME/000017/manifest.json          written last: the delivery is there when this is
    silos/NAME/000017/refused-0.json         why the aggregator did not take it; the silo delivers again, unless final
    silos/NAME/membership/000003.json        the silo has joined or left, and which version was the newest then
    waiting/000017.json                      whom the aggregator waits for, and how long at most; gone when it commits
    silos/NAME/beats/000017                  the silo's newest sign of life; gone when it ends (beats.py)
    silos/NAME/resumable/000016              the silo has a checkpoint that holds version 16
    rollbacks/, rolled-back/                 versions that were taken back (rollback.py)
    aggregator/000003.json                   who is the store's one aggregator (lease.py)

Version 17 is what outer step 17 made of one fragment (outer/schedule.py); with one fragment, versions are rounds.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config.check import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.exchange.objects import Objects
from pretrain.exchange.options import store_options
from pretrain.trust.ledger import Commit, Manifest, Payload, RefusedError, check_link, sha256_bytes

CONTRACT = "contract.json"
COMMITS_AT_ONCE = 16  # that are read side by side


def version_path(version: int) -> str:
    """The folder of a version of the global parameters."""
    return f"global/{version:06d}"


def delivery_path(silo: str, version: int) -> str:
    """The folder of a silo's delivery for a version."""
    return f"silos/{silo}/{version:06d}"


def _identity_path(silo: str) -> str:
    return f"silos/{silo}/identity.json"


def file_payload(file: Path, fragment: int) -> Payload:
    """Describe a file that is about to travel."""
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    return Payload(fragment=fragment, file=file.name, sha256=sha256, num_bytes=file.stat().st_size)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a delivery was not taken, and whether another one for the same version would not be either."""

    reason: str
    final: bool


@dataclass(frozen=True, kw_only=True)
class Membership:
    """A silo's last word on whether it takes part, and the newest version when it said it."""

    left: bool
    version: int


class StoreExchange:
    """Silos and aggregator meet only in the store; each may be killed and started again at any instant."""

    def __init__(
        self,
        url: str,
        *,
        options: Mapping[str, Any] | None = None,
        retry_seconds: float = 0.0,
        closing: threading.Event | None = None,
    ) -> None:
        """Raises ConfigError for a URL that fsspec cannot serve; see Objects for the rest."""
        self.objects = Objects(url, options=options, anchor=CONTRACT, retry_seconds=retry_seconds, closing=closing)
        self.contract_sha256 = ""

    @classmethod
    def of_run(cls, config: RunConfig, *, closing: threading.Event | None = None) -> "StoreExchange":
        """The store that a configuration names, reached and tried again as it says. Raises ConfigError."""
        url, exchange = config.store_url, config.exchange
        options = store_options(exchange, url)
        return cls(url, options=options, retry_seconds=exchange.retry_seconds, closing=closing)

    # ---- both

    def read_contract(self) -> bytes | None:
        """The contract's bytes, or None while there is none. Sets `contract_sha256`, which reading checks against."""
        if not self.objects.exists(CONTRACT):
            return None
        data = self.objects.read(CONTRACT)
        self.contract_sha256 = sha256_bytes(data)
        return data

    def newest_version(self, start: int = -1) -> int:
        """The newest committed version, looked for from `start` upwards; -1 if there is none.

        One by one, also after a listing: that may not have the newest yet.
        """
        if start < 0:
            numbers = sorted((int(name) for name in self.objects.names("global") if name.isdigit()), reverse=True)
            start = next((n for n in numbers if self.objects.exists(f"{version_path(n)}/commit.json")), -1)
        while self.objects.exists(f"{version_path(start + 1)}/commit.json"):
            start += 1
        return start

    def read_commit(self, version: int) -> Commit:
        """Read a commit and check that it follows its predecessor. Raises RefusedError."""
        try:
            commit = Commit.from_bytes(self.commit_bytes(version))
            previous = self.commit_bytes(version - 1) if version else None
        except FileNotFoundError as error:
            raise RefusedError(f"commit {version} or its predecessor is missing: {error}") from None
        check_link(commit, version, previous, self.contract_sha256)
        return commit

    def tokens_total(self, silo: str, newest: int, *, above: int = 0) -> int:
        """Tokens a silo had trained on at its newest delivery in the commits after `above`, up to `newest`, or 0.

        Looked for from the newest on. One that came too late may stand in a newer commit than a later one in time.
        Raises RefusedError.
        """
        most = 0
        for last in range(newest, above, -COMMITS_AT_ONCE):
            versions = range(last, max(last - COMMITS_AT_ONCE, above), -1)
            try:
                with ThreadPoolExecutor(COMMITS_AT_ONCE) as readers:
                    commits = [Commit.from_bytes(data) for data in readers.map(self.commit_bytes, versions)]
            except FileNotFoundError as error:
                raise RefusedError(f"a commit before it is missing: {error}") from None
            ours = [(commit.version, c) for commit in commits for c in commit.contributors if c.silo == silo]
            most = max([most, *(contributor.tokens_total for _, contributor in ours)])
            if any(contributor.version == version for version, contributor in ours):
                break
        return most

    def commit_bytes(self, version: int) -> bytes:
        """The bytes of a commit."""
        return self.objects.read(f"{version_path(version)}/commit.json")

    def fetch(self, folder: str, payload: Payload, file: Path) -> int:
        """Download one payload and check it before anybody decodes a byte; returns its size. Raises RefusedError."""
        try:
            sha256, num_bytes = self.objects.download(f"{folder}/{payload.file}", file, limit_bytes=payload.num_bytes)
        except (FileNotFoundError, IsADirectoryError):
            raise RefusedError(f"{folder}/{payload.file} is missing") from None
        if num_bytes != payload.num_bytes:
            what = "truncated" if num_bytes < payload.num_bytes else "too long"
            raise RefusedError(f"{folder}/{payload.file} is {what}: {num_bytes} bytes read, not {payload.num_bytes}")
        if sha256 != payload.sha256:
            raise RefusedError(
                f"{folder}/{payload.file} has sha256 {sha256[:12]}, not {payload.sha256[:12]}: corrupted"
            )
        return num_bytes

    # ---- the silo's verbs

    def claim_name(self, silo: str, identity: str) -> None:
        """Take the silo's name for the run directory that knows `identity`. Raises ConfigError if another has it."""
        try:
            self.objects.write(_identity_path(silo), json.dumps({"identity": identity}).encode())
        except FileExistsError:
            self.has_name(silo, identity)

    def has_name(self, silo: str, identity: str) -> bool:
        """Whether the run directory that knows `identity` has taken the name. Raises ConfigError if another has."""
        name = _identity_path(silo)
        if not self.objects.exists(name):
            return False
        if json.loads(self.objects.read(name)).get("identity") != identity:
            raise ConfigError(
                f"silos: {silo!r} given; another run directory takes part under this name in {self.objects.url}; "
                f"choose another name, or delete {name} there if that run directory is lost"
            )
        return True

    def deliver(self, manifest: Manifest, files: Iterable[tuple[Payload, Path]]) -> bytes:
        """Write the payloads, then the manifest; returns the manifest's bytes that stand.

        A manifest that is there already stands, whatever its bytes: a delivery is used at most once. Payloads without
        manifest are leftovers of an interrupted or refused delivery of this silo and are replaced.
        """
        folder = delivery_path(manifest.silo, manifest.version)
        if self.objects.exists(f"{folder}/manifest.json"):
            return self.objects.read(f"{folder}/manifest.json")
        for payload, file in files:
            self.objects.delete(f"{folder}/{payload.file}")
            self.objects.upload(file, f"{folder}/{payload.file}")
        self.objects.write(f"{folder}/manifest.json", manifest.to_bytes())
        return manifest.to_bytes()

    def refusals(self, silo: str, version: int) -> list[Refusal]:
        """The aggregator's reasons for refusing deliveries for this version, oldest first."""
        folder = delivery_path(silo, version)
        names = [name for name in self.objects.names(folder) if name.startswith("refused-")]
        records = [json.loads(self.objects.read(f"{folder}/{name}")) for name in names]
        return [Refusal(reason=record["reason"], final=record["final"]) for record in records]

    def announce(self, silo: str, *, left: bool, version: int) -> None:
        """Say that a silo joins or leaves, where `version` is the newest that it has seen."""
        folder = f"silos/{silo}/membership"
        number = max((int(name[:6]) for name in self.objects.names(folder)), default=-1) + 1
        record = {"left": left, "version": version}
        self.objects.write(f"{folder}/{number:06d}.json", (json.dumps(record) + "\n").encode())

    def whole(self, version: int, fragment: int) -> Payload:
        """The payload that holds a fragment's tensors themselves as `version` made them. Raises RefusedError."""
        commit = self.read_commit(version)
        for payload in commit.payloads + commit.state_payloads:
            if payload.fragment == fragment and payload.file.startswith("parameter-"):
                return payload
        raise RefusedError(f"version {version} does not hold fragment {fragment}")

    def has_whole(self, version: int, num_fragments: int) -> bool:
        """Whether the tensors of all fragments are there as `version` holds them itself. Raises RefusedError."""
        files = [self.whole(version, fragment).file for fragment in range(num_fragments)]
        return all(self.objects.exists(f"{version_path(version)}/{file}") for file in files)

    def changes(self, versions: Iterable[int], fragment: int, *, below_bytes: int) -> list[tuple[int, Payload, str]]:
        """A fragment's coded changes of several versions, oldest first: version, payload and codec.

        Empty if one is no change but a whole value, is not there any more, or all are not below a size.
        """
        found: list[tuple[int, Payload, str]] = []
        for version in versions:
            commit = self.read_commit(version)
            payload = next((payload for payload in commit.payloads if payload.fragment == fragment), None)
            if commit.codec == "fp32" or not payload:
                return []
            found.append((version, payload, commit.codec))
            if sum(payload.num_bytes for _, payload, _ in found) >= below_bytes:
                return []
            if not self.objects.exists(f"{version_path(version)}/{payload.file}"):
                return []
        return found

    def mark_resumable(self, silo: str, version: int) -> None:
        """Say that this silo has a checkpoint holding `version`, so that older versions may be pruned."""
        folder = f"silos/{silo}/resumable"
        old = self.objects.names(folder)
        if f"{version:06d}" not in old:
            self.objects.write(f"{folder}/{version:06d}", b"{}\n")
        for name in old:
            if int(name) < version:
                self.objects.delete(f"{folder}/{name}")

    # ---- the aggregator's verbs

    def write_contract(self, data: bytes) -> None:
        """Write the contract. Raises FileExistsError if one is there."""
        self.objects.write(CONTRACT, data)
        self.contract_sha256 = sha256_bytes(data)

    def delivery(self, silo: str, version: int) -> bytes | None:
        """The manifest's bytes of a delivery, or None while there is none."""
        name = f"{delivery_path(silo, version)}/manifest.json"
        return self.objects.read(name) if self.objects.exists(name) else None

    def refuse(self, silo: str, version: int, manifest: bytes, reason: str, *, final: bool = False) -> None:
        """Remove a delivery's manifest so that the silo delivers again, unless this is final, and record the reason.

        In this order: whoever is killed in between loses a reason, but every refusal that stands is counted once, and
        a silo that delivers the same bytes again and again comes to the end of its tries.
        """
        folder = delivery_path(silo, version)
        refused = [name for name in self.objects.names(folder) if name.startswith("refused-")]
        record = {"reason": reason, "final": final, "manifest_sha256": sha256_bytes(manifest)}
        self.objects.delete(f"{folder}/manifest.json")
        self.objects.write(f"{folder}/refused-{len(refused)}.json", json.dumps(record).encode())

    def membership(self, silo: str) -> Membership | None:
        """Whether a silo has joined or left, by its last word; None if it never said one."""
        folder = f"silos/{silo}/membership"
        names = self.objects.names(folder)
        if not names:
            return None
        record = json.loads(self.objects.read(f"{folder}/{names[-1]}"))
        return Membership(left=bool(record["left"]), version=int(record["version"]))

    def say_waiting(self, version: int, silos: list[str], *, deadline_seconds: float | None) -> None:
        """Leave word of whom a version waits for; the store's own clock tells since when."""
        name = f"waiting/{version:06d}.json"
        record = json.dumps({"silos": silos, "deadline_seconds": deadline_seconds}).encode()
        if not self.objects.exists(name):
            self.objects.write(name, record)

    def publish(
        self, commit: Commit, files: Iterable[tuple[Payload, Path]], *, check: Callable[[], None] = lambda: None
    ) -> None:
        """Write the payloads of a version, then its commit. Raises FileExistsError if the version was committed.

        `check` is called before every write, and raises if this process may not write any more.
        """
        folder = version_path(commit.version)
        if self.objects.exists(f"{folder}/commit.json"):
            raise FileExistsError(f"{folder}/commit.json exists already; another aggregator works on this store")
        for payload, file in files:
            check()
            self.objects.delete(f"{folder}/{payload.file}")  # left by an aggregator that died before its commit
            self.objects.upload(file, f"{folder}/{payload.file}")
        check()
        self.objects.write(f"{folder}/commit.json", commit.to_bytes())
        self.objects.delete(f"waiting/{commit.version:06d}.json")

    def newest_state(self, newest: int, num_fragments: int) -> Iterator[tuple[int, Payload]]:
        """What version `newest` is made of: each fragment's last change. Yields the payloads that hold whole tensors.

        Raises RefusedError.
        """
        for version in range(max(0, newest - num_fragments + 1), newest + 1):
            commit = self.read_commit(version)
            # Version 0 has every fragment; which of them have changed since?
            changed = set() if version else {later % num_fragments for later in range(1, newest + 1)}
            whole = commit.state_payloads + (commit.payloads if commit.codec == "fp32" else [])
            yield from ((version, payload) for payload in whole if payload.fragment not in changed)

    def prune(self, roster: list[str], newest: int, keep_versions: int, num_fragments: int = 1) -> list[int]:
        """Delete tensors that nobody can need again; commits and manifests stay. Returns the pruned versions.

        Kept are the newest `keep_versions`, all from which a silo's newest checkpoint would go on, and of each
        fragment what these are made of.
        """
        resumable = [
            max((int(name) for name in self.objects.names(f"silos/{silo}/resumable") if name.isdigit()), default=0)
            for silo in roster
        ]
        first_kept = max(0, min([newest - keep_versions + 1, *resumable]) - num_fragments + 1)
        pruned: list[int] = []
        while (version := first_kept - 1 - len(pruned)) >= 0 and self._tensors(version_path(version)):
            pruned.append(version)
        for version in reversed(pruned):  # oldest first: whoever is killed here leaves no gap behind
            # A delivery is needed until its commit is there; then only its manifest stays. The version's own folder
            # comes last: while it holds tensors, the next pruning sees that this one was not finished.
            for folder in [*(delivery_path(silo, version) for silo in roster), version_path(version)]:
                for name in self._tensors(folder):
                    self.objects.delete(f"{folder}/{name}")
        return pruned

    def _tensors(self, folder: str) -> list[str]:
        return [name for name in self.objects.names(folder) if name.endswith(".safetensors")]

    # ---- taking versions back

    def is_kept(self, version: int, num_fragments: int) -> bool:
        """Whether all is there that a version is made of: its commits, as they should be, and their tensors."""
        try:
            state = list(self.newest_state(version, num_fragments))
        except RefusedError:
            return False
        return all(self.objects.exists(f"{version_path(made)}/{payload.file}") for made, payload in state)

    def versions_above(self, version: int) -> list[int]:
        """All newer versions, committed or not, of which anything is there; the newest first."""
        silos = self.objects.names("silos")
        places = ["global", "waiting", *(f"silos/{silo}{inner}" for silo in silos for inner in ("", "/resumable"))]
        stems = {name.removesuffix(".json") for place in places for name in self.objects.names(place)}
        return sorted((int(stem) for stem in stems if stem.isdigit() and int(stem) > version), reverse=True)

    def take_back(self, version: int, folder: str) -> None:
        """Remove all there is of a version, its commit first; what is no tensor is copied below `folder` before."""
        silos = self.objects.names("silos")
        for place in (version_path(version), *(delivery_path(silo, version) for silo in silos)):
            tensors = self._tensors(place)
            for name in (name for name in self.objects.names(place) if name not in tensors):
                with suppress(FileExistsError):  # copied before an interruption
                    self.objects.write(f"{folder}/{place}/{name}", self.objects.read(f"{place}/{name}"))
                self.objects.delete(f"{place}/{name}")
            for name in tensors:
                self.objects.delete(f"{place}/{name}")
        for silo in silos:
            self.objects.delete(f"silos/{silo}/resumable/{version:06d}")
        self.objects.delete(f"waiting/{version:06d}.json")
