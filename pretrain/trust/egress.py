"""The egress ledger: a line for every object that leaves a process of ours, written before its bytes leave. No torch.

    RUN/egress/NAME.jsonl     of a silo, of `aggregator`, of `relay`

Each line names the sha256 of the line before. A line of what a version stands on (a manifest, a commit) carries the
member's signature, which by that chain covers all before it. Requests that carry no object are counted in lines of
their own.
"""

import errno
import fcntl
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.host.clock import DAY_SECONDS, by_this_machine, utc
from pretrain.trust.keys import Signer
from pretrain.trust.ledger import Record, RefusedError, sha256_bytes
from pretrain.trust.members import own_signer
from pretrain.trust.policy import Policy, read_policy

FOLDER = "egress"
RELAY = "relay"
LINE_BYTES = 64 << 10  # ours have 500
REQUESTS = "requests"  # what a line of counts is
APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
SIGNED = ("manifest", "commit")  # once a version
COLLECTIVE = "collective"
PAYLOAD = "payload"
# Of what kind an object is, by its name; the first that fits.
KINDS = (
    (r"silos/[^/]+/\d+/manifest\.json", "manifest"),
    (r"(silos/[^/]+/\d+|global/\d+)/[^/]+\.safetensors", PAYLOAD),
    (r"global/\d+/commit\.json", "commit"),
    (r"silos/[^/]+/beats/.+|aggregator/.+\.beat-.+", "beat"),
    (r"silos/[^/]+/resumable/.+", "mark"),
    (r"silos/[^/]+/identity\.json", "claim"),
    (r"silos/[^/]+/(evaluations/.+|\d+/judged\.json)", "evaluation"),
    (r"silos/[^/]+/.+\.json|global/\d+/(judged|gate)\.json|waiting/.+|damaged/.+|sums/.+", "word"),
    (r"snapshots/.+", "snapshot"),
    (r"signatures/.+", "agreement"),
    (r"contract\.json", "contract"),
    (r"keys/.+", "groupkey"),
    (r"amendments/.+", "amendment"),
    (r"revocations/.+", "revocation"),
    (r"aggregator/.+", "lease"),
    (r"rollbacks/.+|rolled-back/.+", "rollback"),
    (r"probe-.+", "probe"),
)
KIND_OF = [(re.compile(pattern), kind) for pattern, kind in KINDS]
VERSION = re.compile(r"(?:^|/)(?:global|silos/[^/]+|snapshots|resumable|waiting|damaged|sums)/(\d{6,9})(?:[/.]|$)")
# Which keys of a policy speak of a kind; `hosts` and `bytes_a_day` of all.
RULES = {PAYLOAD: ("codecs", "max_norm", "least_silos", "second_moments", "mean_gradients"), "manifest": ("metrics",)}
RULES |= {"evaluation": ("metrics",), "wandb": ("wandb", "metrics")}


@dataclass(frozen=True, kw_only=True)
class Line(Record):
    """One object that left, or requests without any."""

    time: float
    """Seconds since 1970, by this machine's clock."""
    kind: str
    where: str
    """URL of the store, or the host."""
    name: str
    num_bytes: int
    blake3: str
    """Of the bytes; empty where there are none."""
    of: dict[str, float]
    """What it was derived from: version, base_version, round, tokens, steps; of requests, how many of each kind."""
    rule: str
    """sha256 of the policy and those of its keys that speak of it; or that there is no policy."""
    previous: str | None
    """sha256 of the line before, with its line end; null in the first."""

    def to_bytes(self) -> bytes:
        """Canonical JSON in one line."""
        return (json.dumps(self.__dict__, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n").encode()


def egress_file(directory: str | Path, name: str) -> Path:
    """Where a process of a run directory has its ledger."""
    return Path(directory) / FOLDER / f"{name}.jsonl"


def kind_of(name: str) -> str:
    """Of what kind an object is, by its name in the store."""
    return next((kind for pattern, kind in KIND_OF if pattern.fullmatch(name)), "other")


@dataclass(kw_only=True)
class Egress:
    """Writes one ledger. Several of one file, in threads or processes, follow one another."""

    file: Path
    policy: Policy = field(default_factory=Policy)
    signer: Signer | None = None
    round_of: Callable[[int], int] | None = None
    """The round of a version."""

    def __post_init__(self) -> None:
        """Nothing is written before something leaves."""
        self._lock = threading.Lock()
        self._size, self._head = -1, ""
        self._signed = True  # whether all that is written here is covered by a signature
        self._day, self._bytes_of_day = -1, 0
        self._asked: Counter[str] = Counter()

    @classmethod
    def of_run(cls, config: RunConfig, name: str, signer: Signer | None, policy: Policy) -> "Egress":
        """The ledger of a silo, the aggregator or a relay of a run directory.

        Raises ConfigError where days count and this machine's clock is before what was written.
        """
        made = cls(file=egress_file(config.directory, name), policy=policy, signer=signer, round_of=config.round_of)
        if policy.bytes_a_day is not None:
            made._sent_today(time.time())
        return made

    def asked(self, what: str) -> None:
        """Count a request that carries no object."""
        self._asked[what] += 1  # a lost count between threads is no lost byte

    def leaves(
        self,
        where: str,
        name: str,
        num_bytes: int,
        digest: str,
        *,
        of: Mapping[str, float] | None = None,
        kind: str = "",
        sign: bool = False,
    ) -> float:
        """Say that an object is about to leave, and return 0; or how many seconds it has to wait until it may.

        With `sign` its line is signed, as those of manifests and commits are. Only payloads wait: without the small
        words nobody would know that a silo lives. Raises ConfigError for what never may leave, and where no line can be
        written: then it must not.
        """
        try:
            kind = kind or kind_of(name)
            sign = sign or kind in SIGNED
            return self._leaves(where, name, num_bytes, digest, of=of or {}, kind=kind, sign=sign)
        except OSError as error:
            raise ConfigError(
                f"run directory: {str(self.file)!r} cannot be written: {error.strerror}; {name} was not sent, as "
                "nothing leaves without a line"
            ) from None

    def _leaves(
        self, where: str, name: str, num_bytes: int, digest: str, *, of: Mapping[str, float], kind: str, sign: bool
    ) -> float:
        now = time.time()
        with self._lock, self._open() as descriptor:
            if kind == PAYLOAD and (seconds := self._seconds_to_wait(now, num_bytes)):
                return seconds
            data, previous = b"", self._head
            if sign and self._asked:
                data = self._counts(now, where, previous).to_bytes()
                previous = sha256_bytes(data)
            line = Line(
                time=now,
                kind=kind,
                where=where,
                name=name,
                num_bytes=num_bytes,
                blake3=digest,
                of=self._derived(name, of),
                rule=self.policy.rule("hosts", "bytes_a_day", *RULES.get(kind, ())),
                previous=previous or None,
            )
            self._append(descriptor, data, self._sign(line) if sign else line)
            self._bytes_of_day += num_bytes
        return 0.0

    def close(self, where: str) -> None:
        """Write down the last counts, signed, unless nothing has been written or asked since the last signature."""
        with self._lock:
            if self._size < 0:
                return
            with suppress(OSError, ConfigError), self._open() as descriptor:  # nothing leaves with it
                if self._asked or not self._signed:
                    self._append(descriptor, b"", self._sign(self._counts(time.time(), where, self._head)))

    def _derived(self, name: str, of: Mapping[str, float]) -> dict[str, float]:
        found = dict(of)
        if "version" not in found and (match := VERSION.search(name)):
            found["version"] = int(match[1])
        if "version" in found and self.round_of:
            found["round"] = self.round_of(int(found["version"]))
        return found

    def _counts(self, now: float, where: str, previous: str) -> Line:
        counts, self._asked = dict(self._asked), Counter()
        return Line(
            time=now,
            kind=REQUESTS,
            where=where,
            name="",
            num_bytes=0,
            blake3="",
            of={**counts},
            rule=self.policy.rule("hosts"),
            previous=previous or None,
        )

    def _sign(self, line: Line) -> Line:
        if not self.signer:
            return line
        return Line(**(line.__dict__ | {"signature": self.signer.sign("egress", line.to_bytes())}))

    # ---- the file

    @contextmanager
    def _open(self) -> Iterator[int]:
        """The file, ours alone for the moment, with `_head` and `_size` as they are in it."""
        try:
            descriptor = os.open(self.file, APPEND, 0o644)
        except FileNotFoundError:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.file, APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_size != self._size:
                self._look(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def _append(self, descriptor: int, before: bytes, line: Line) -> None:
        """One write: a process that is killed leaves the line or does not."""
        last = line.to_bytes()
        data = before + last
        if os.write(descriptor, data) < len(data):
            os.ftruncate(descriptor, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.file))
        self._size, self._head = self._size + len(data), sha256_bytes(last)
        self._signed = line.signature is not None or not self.signer

    def _look(self, descriptor: int) -> None:
        """Where another process, or an earlier start, has left off. Raises ConfigError for what is no ledger.

        A part of a line, without its end, was never followed by bytes: it is taken away.
        """
        size = os.fstat(descriptor).st_size
        tail = os.pread(descriptor, min(size, LINE_BYTES), max(0, size - LINE_BYTES))
        whole = tail[: tail.rfind(b"\n") + 1]
        if size > len(tail) and not whole:
            raise self._damaged("its end is no line")
        if len(whole) < len(tail):
            size -= len(tail) - len(whole)
            os.ftruncate(descriptor, size)
        last = whole[whole[:-1].rfind(b"\n") + 1 :]
        self._signed = not self.signer
        if last:
            try:
                self._signed |= Line.from_bytes(last).signature is not None
            except RefusedError as error:
                raise self._damaged(f"its last line is none: {error}") from None
        self._size, self._head = size, sha256_bytes(last) if last else ""
        self._day = -1

    def _damaged(self, what: str) -> ConfigError:
        return ConfigError(
            f"run directory: {str(self.file)!r}, the record of what has left, is damaged: {what}; look at it, and move "
            "it away to begin a new one"
        )

    # ---- bytes a day

    def _seconds_to_wait(self, now: float, num_bytes: int) -> float:
        most = self.policy.bytes_a_day
        if most is None:
            return 0.0
        if num_bytes > most:
            raise ConfigError(
                f"trust.policy: {self.policy.file} given; its bytes_a_day is {most}, and a payload has {num_bytes}: it "
                "was not sent; allow more, or take no part"
            )
        if (day := int(now // DAY_SECONDS)) != self._day:
            self._day, self._bytes_of_day = day, self._sent_today(now)
        if self._bytes_of_day + num_bytes <= most:
            return 0.0
        return (day + 1) * DAY_SECONDS - now

    def _sent_today(self, now: float) -> int:
        """Bytes that left today, by what is in the file. A clock that was put back does not give them once more.

        Raises ConfigError if it was put back by more than a day.
        """
        day, num_bytes, latest = now // DAY_SECONDS, 0, now
        with suppress(FileNotFoundError):
            for line, _ in read_lines(self.file):
                if line and line.time // DAY_SECONDS >= day:
                    num_bytes, latest = num_bytes + line.num_bytes, max(latest, line.time)
        if latest - now > DAY_SECONDS:
            raise ConfigError(
                f"trust.policy: {self.policy.file} given; its bytes_a_day needs the day, and {by_this_machine()}, "
                f"while {str(self.file)!r} has a line of {utc(latest)}; set the clock, or move the file away "
                "to begin a new one if that line's is wrong"
            )
        return num_bytes


def read_lines(file: Path) -> Iterator[tuple[Line | None, bytes]]:
    """Every whole line and its bytes; None for what is no line of a ledger."""
    with file.open("rb") as opened:
        while data := opened.readline(LINE_BYTES):
            if not data.endswith(b"\n") and len(data) < LINE_BYTES:
                return  # cut off: nothing left after it
            line: Line | None = None
            with suppress(RefusedError):
                line = Line.from_bytes(data)
            yield line, data


def blake3_of(data: bytes) -> str:
    """BLAKE3 in hexadecimal."""
    return blake3(data).hexdigest()


class Tells:
    """Tells a ledger of what goes elsewhere than to a store; once a version, and at the end, its line is signed."""

    def __init__(self, config: RunConfig, name: str, kind: str, policy: Callable[[], Policy]) -> None:
        """Of a member `name`. Nothing is read or written before something leaves."""
        self._config, self._name, self._kind, self._policy = config, name, kind, policy
        self._egress: Egress | None = None
        self._where, self._version = "", -1

    def _leaves(self, where: str, what: str, num_bytes: int, digest: str, version: int = -1) -> None:
        if not self._egress:
            signer = own_signer(self._config, self._name)
            self._egress = Egress.of_run(self._config, self._name, signer, self._policy())
        is_new, self._version, self._where = version > self._version, max(version, self._version), where
        of = {"version": self._version} if self._version >= 0 else {}
        self._egress.leaves(where, what, num_bytes, digest, of=of, kind=self._kind, sign=is_new)

    def close(self) -> None:
        """Sign what was said last, if anything was."""
        if self._egress:
            self._egress.close(self._where)


class ToTracker(Tells):
    """Of what is handed to a tracker's library, as JSON of it."""

    def __call__(self, host: str, what: str, values: dict[str, Any]) -> None:
        """Before it is handed over."""
        data = json.dumps(values, sort_keys=True).encode()
        self._leaves(host, what, len(data), blake3_of(data))


class ToPeers(Tells):
    """Of what goes to another silo of a collective: who, what, and the bytes, or just how many.

    Of parts of a payload the hash is in the manifest that went before. The first line of a version is signed, and by
    the chain all before it.
    """

    def __call__(self, peer: str, what: str, data: bytes | int) -> None:
        """Before they go; words on a version are called `17/manifest`."""
        version, slash, _ = what.partition("/")
        number = int(version) if slash and version.isdigit() else -1
        if isinstance(data, int):
            self._leaves(peer, what, data, "", number)
        else:
            self._leaves(peer, what, len(data), blake3_of(data), number)


def tracked(config: RunConfig, name: str, policy: Policy) -> ToTracker:
    """What tells the ledger of what is handed to a tracker."""
    return ToTracker(config, name, "wandb", lambda: policy)


def to_peers(config: RunConfig, silo: str) -> ToPeers:
    """What tells the ledger of what goes to other silos."""
    return ToPeers(config, silo, COLLECTIVE, lambda: read_policy(config))
