"""The store exchange: where everything lies under one URL, and the few verbs of silo and aggregator.

    contract.json                            what all silos agreed to
    global/000017/commit.json                written last: the version is there when this is
    global/000017/change-001.safetensors     how commit 17 changed fragment 1, coded; or, where the codec is fp32,
    global/000017/parameter-001.safetensors its new values, which are there in a snapshot otherwise
    snapshots/000017.json                    there is a snapshot of version 17 (history.py); written after
    global/000017/velocity-001.safetensors   the outer optimizer's state of the fragment, and target-001, what the
                                             downlink's codec has not sent yet
    silos/NAME/identity.json                 which run directory holds this name
    silos/NAME/000017/000017.safetensors     the coded fragment of the pseudo-gradient for version 17
    silos/NAME/000017/manifest.json          written last: the delivery is there when this is
    silos/NAME/000017/refused-0.json         why the aggregator did not take it; the silo delivers again, unless final
    silos/NAME/evaluations/000003.json       what the silo has found a model's held-out loss to be
    silos/NAME/000008/judged.json            and of a candidate of the gate; global/000008/gate.json (gated.py)
    silos/NAME/membership/000003.json        the silo has joined or left, and which version was the newest then
    waiting/000017.json                      whom the aggregator waits for, and how long at most; gone when it commits
    silos/NAME/beats/000017                  the silo's newest sign of life; gone when it ends (beats.py)
    damaged/000016/NAME                      the silo cannot use version 16; gone when the aggregator has looked
    silos/NAME/resumable/000016              the silo has a checkpoint that holds version 16
    rollbacks/, rolled-back/                 versions that were taken back (rollback.py)
    revocations/                             who has signed what without a member (revocation.py)
    aggregator/000003.json                   who is the store's one aggregator (lease.py)
    amendments/                              changes of the contract, and who has signed them (amended.py)
    keys/NAME.json, keys/000003/NAME.json    what silo NAME opens versions with, where payloads are sealed (sealed.py)

Version 17 is what outer step 17 made of one fragment (outer/schedule.py); with one fragment, versions are rounds.
"""

import hashlib
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

from blake3 import blake3

from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR
from pretrain.exchange.signed import SignedStore
from pretrain.exchange.words import Damaged, Evaluation, Identity, Membership, Refusal, Resumable, Waiting, number
from pretrain.host.foreign import shown
from pretrain.outer.threads import in_threads
from pretrain.trust.ledger import Commit, Contributor, Manifest, Payload, RefusedError, sha256_bytes

SNAPSHOTS, ROLLBACKS = "snapshots", "rollbacks"
REFUSED = re.compile(r"refused-(0|[1-9][0-9]{0,3})\.json")
REQUESTS_AT_ONCE = 16  # that wait for a store side by side


def version_path(version: int) -> str:
    """The folder of a version of the global parameters."""
    return f"global/{version:06d}"


def delivery_path(silo: str, version: int) -> str:
    """The folder of a silo's delivery for a version."""
    return f"silos/{silo}/{version:06d}"


def snapshot_path(version: int) -> str:
    """The record of a version's snapshot."""
    return f"{SNAPSHOTS}/{version:06d}.json"


def identity_path(silo: str) -> str:
    """Which run directory holds a silo's name."""
    return f"silos/{silo}/identity.json"


def evaluations_path(silo: str) -> str:
    """The folder of what a silo has found held-out losses to be."""
    return f"silos/{silo}/evaluations"


def _version_of(evaluation: Evaluation) -> dict[str, float]:
    return {} if evaluation.version is None else {"version": evaluation.version}


def _damaged_path(version: int) -> str:
    return f"damaged/{version:06d}"


def file_payload(file: Path, fragment: int) -> Payload:
    """Describe a file that is about to travel."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, blake3).hexdigest()  # type: ignore[arg-type]  # asks for a `name`
    return Payload(fragment=fragment, file=file.name, blake3=digest, num_bytes=file.stat().st_size)


def _manifest_of(contributor: Contributor) -> str:
    return f"{delivery_path(contributor.silo, contributor.version)}/manifest.json"


class StoreExchange(SignedStore):
    """Silos and aggregator meet only in the store; each may be killed and started again at any instant."""

    num_rollbacks = 0
    """How often the run was taken back, when that was looked for (rollback.py)."""

    # ---- both

    def has_commit(self, version: int) -> bool:
        """Whether a version is committed; a commit that the aggregator has not signed is none, and said."""
        name = f"{version_path(version)}/commit.json"
        if not self.members.keys:
            return self.objects.exists(name)
        if (data := self.found(name)) is None:
            return False
        try:
            commit = Commit.from_bytes(data)
            self.check(OPERATOR, commit, version=version)
            self._check_place(commit, version)
        except RefusedError as error:
            self.pass_over(name, error)
            return False
        return True

    def is_nobodys(self, version: int) -> bool:
        """Whether something lies in the place of a commit that the aggregator has not signed, where all is signed."""
        there = self.members.keys and self.objects.exists(f"{version_path(version)}/commit.json")
        return bool(there) and not self.has_commit(version)

    def _check_place(self, record: Commit | Manifest, version: int, silo: str | None = None) -> None:
        """Raise RefusedError for a record that was signed for another place than this."""
        author = record.silo if isinstance(record, Manifest) else None
        if (record.contract_sha256, record.version, author) != (self.terms_sha256(version), version, silo):
            of = f"{'silo ' + author + ', ' if author else ''}version {record.version}"
            raise RefusedError(f"it is of {of} of contract {shown(record.contract_sha256, limit=12)}, put here")

    def newest_version(self, start: int = -1) -> int:
        """The newest committed version, looked for from `start` upwards; -1 if there is none.

        One by one, also after a listing: that may not have the newest yet.
        """
        if start < 0:
            listed = set(self.numbers("global"))
            whole = next(n for n in count() if n not in listed)  # what lies above a gap follows nothing
            for beyond in sorted(n for n in listed if n > whole)[:1]:
                self.pass_over(version_path(beyond), f"there is no version {whole}, which it would need")
            commits = (n for n in reversed(range(whole)) if self.has_commit(n))
            start = next(commits, -1)
        while self.has_commit(start + 1):
            start += 1
        return start

    def read_commit(self, version: int) -> Commit:
        """Read a commit and check that it follows its predecessor. Raises RefusedError."""
        return self.read_commits(version, version)[0]

    def read_commits(self, first: int, last: int) -> list[Commit]:
        """Read the commits of versions in a row, and check that each follows its predecessor. Raises RefusedError."""
        before = [first - 1] if first else []
        data = dict(zip(versions := [*before, *range(first, last + 1)], self._commits_bytes(versions), strict=True))
        self.follow_amendments()  # what was accepted before these commits is there
        found = []
        for version in versions[len(before) :]:
            commit = Commit.from_bytes(data[version])
            self.check_link(commit, version, data.get(version - 1))
            self.members.check(OPERATOR, commit)
            if data[version] != commit.to_bytes():
                raise RefusedError(f"commit {version} is not in the one form that a commit has")
            found.append(commit)
        return found

    def peek_commits(self, versions: Sequence[int]) -> list[Commit]:
        """Commits as they lie there, read side by side, whatever they follow. Raises RefusedError."""
        commits = [Commit.from_bytes(data) for data in self._commits_bytes(versions)]
        for version, commit in zip(versions, commits, strict=True):
            self.check(OPERATOR, commit, version=version)
        return commits

    def _commits_bytes(self, versions: Sequence[int]) -> list[bytes]:
        """Of several commits, read side by side. Raises RefusedError."""

        def read(version: int) -> bytes:
            try:
                return self.commit_bytes(version)
            except FileNotFoundError as error:
                raise RefusedError(f"commit {version} is missing: {error}") from None

        return in_threads(read, versions, REQUESTS_AT_ONCE)

    def tokens_total(self, silo: str, newest: int, *, above: int = 0) -> int:
        """Tokens a silo had trained on at its newest delivery in the commits after `above`, up to `newest`, or 0.

        Looked for from the newest on. One that came too late may stand in a newer commit than a later one in time.
        Raises RefusedError.
        """
        most = 0
        for last in range(newest, above, -REQUESTS_AT_ONCE):
            versions = range(last, max(last - REQUESTS_AT_ONCE, above), -1)
            ours = [
                (commit.version, c)
                for commit in self.peek_commits(versions)
                for c in commit.contributors
                if c.silo == silo
            ]
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
            digest, num_bytes = self.objects.download(f"{folder}/{payload.file}", file, limit_bytes=payload.num_bytes)
        except (FileNotFoundError, IsADirectoryError):
            raise RefusedError(f"{folder}/{payload.file} is missing") from None
        if num_bytes != payload.num_bytes:
            what = "truncated" if num_bytes < payload.num_bytes else "too long"
            raise RefusedError(f"{folder}/{payload.file} is {what}: it has not the {payload.num_bytes} bytes announced")
        if digest != payload.blake3:
            raise RefusedError(f"{folder}/{payload.file} has not the blake3 {payload.blake3[:12]}: corrupted")
        return num_bytes

    # ---- the silo's verbs

    def claim_name(self, silo: str, identity: str) -> None:
        """Take the silo's name for the run directory that knows `identity`. Raises ConfigError if another has it."""
        name = identity_path(silo)
        self.claim(silo, self.signed(name, Identity(identity=identity)))

    def claim(self, silo: str, word: bytes) -> None:
        """The same, by the word for it as the silo has signed it."""
        try:
            self.put(Identity, identity_path(silo), word, silo)
        except FileExistsError:
            if not self.has_name(silo, Identity.from_bytes(word).identity):
                raise self._taken(identity_path(silo)) from None

    def has_name(self, silo: str, identity: str) -> bool:
        """Whether the run directory that knows `identity` has taken the name. Raises ConfigError if another has."""
        name = identity_path(silo)
        if not self.objects.exists(name) or (self.members.keys and not self.heard(Identity, name, silo)):
            return False
        try:
            holder = self.holder(silo)
        except RefusedError as error:
            raise ConfigError(
                f"silos: {silo!r} given; {name} in {self.objects.url}, which says whose name this is, cannot be read: "
                f"{error}; delete it there if the name is ours"
            ) from None
        if holder != identity:
            raise ConfigError(
                f"silos: {silo!r} given; another run directory takes part under this name in {self.objects.url}; "
                f"choose another name, or delete {name} there if that run directory is lost"
            )
        return True

    def holder(self, silo: str) -> str:
        """Identity of the run directory that has the name. Raises FileNotFoundError, RefusedError."""
        return self.checked(Identity, identity_path(silo), silo).identity

    def deliver(self, manifest: Manifest, files: Iterable[tuple[Payload, Path]]) -> bytes:
        """Write the payloads, then the manifest; returns the manifest's bytes that stand.

        A manifest that is there already stands, whatever its bytes, if the silo has signed it: a delivery is used at
        most once. Payloads without manifest are leftovers of an interrupted or refused delivery of this silo and are
        replaced.
        """
        folder = delivery_path(manifest.silo, manifest.version)
        name = f"{folder}/manifest.json"
        stands = self.found(name)
        if stands is not None and self._is_by(manifest.silo, manifest.version, stands):
            return stands
        of = {key: getattr(manifest, key) for key in ("version", "base_version", "tokens", "steps")}
        try:
            for payload, file in files:
                self.upload_over(file, f"{folder}/{payload.file}", digest=payload.blake3, of=of)
            there = partial(self.is_delivered, manifest.silo, manifest.version)
            self.write_over(name, manifest.to_bytes(), there, of=of)
        except FileExistsError as error:
            raise ConfigError(
                f"exchange.url: {self.objects.url} given; somebody else writes as silo {manifest.silo}: {error}"
            ) from None
        return manifest.to_bytes()

    def refusals(self, silo: str, version: int) -> list[Refusal]:
        """The aggregator's reasons for refusing deliveries for this version, oldest first."""
        folder = delivery_path(silo, version)
        numbers = sorted(int(match[1]) for name in self.objects.names(folder) if (match := REFUSED.fullmatch(name)))
        words = [self.heard(Refusal, f"{folder}/refused-{number}.json", OPERATOR) for number in numbers]
        return [word for word in words if word]

    def announce(self, silo: str, *, left: bool, version: int) -> None:
        """Say that a silo joins or leaves, where `version` is the newest that it has seen."""
        folder = f"silos/{silo}/membership"
        said = self.numbers(folder, after=".json")
        if self.members.keys:
            said = [n for n in said if self.heard(Membership, f"{folder}/{n:06d}.json", silo)]
        name = f"{folder}/{max(said, default=-1) + 1:06d}.json"
        try:
            self.say(name, Membership(left=left, version=version), silo)
        except FileExistsError:
            raise self._taken(name) from None

    def mark_resumable(self, silo: str, version: int) -> None:
        """Say that this silo has a checkpoint holding `version`, so that older versions may be pruned."""
        folder = f"silos/{silo}/resumable"
        old = self.objects.names(folder)
        with suppress(FileExistsError):
            name = f"{folder}/{version:06d}"
            if self.members.keys or f"{version:06d}" not in old:
                self.say(name, Resumable(num_rollbacks=self.num_rollbacks), silo)
        for name in old:
            if (marked := number(name)) is not None and marked < version:
                self.objects.delete(f"{folder}/{name}")

    def tell_evaluation(self, silo: str, evaluation: Evaluation) -> str:
        """Leave word of a held-out loss, under the first number that is free; returns the name.

        Raises RefusedError for what no reader would take.
        """
        Evaluation.from_bytes(evaluation.to_bytes())
        folder = evaluations_path(silo)
        taken = set(self.objects.names(folder))
        for name in (f"{n:06d}.json" for n in count()):
            if name not in taken:
                path = f"{folder}/{name}"
                with suppress(FileExistsError):  # by another process of ours, just now
                    self.objects.write(path, self.signed(path, evaluation), of=_version_of(evaluation))
                    return path
        raise AssertionError("numbers do not end")

    def say_damaged(self, silo: str, version: int, reason: str) -> None:
        """Leave word that the newest version cannot be used as it lies here."""
        with suppress(FileExistsError):
            word = Damaged(reason=shown(reason, limit=1000), nonce=uuid.uuid4().hex)
            self.say(f"{_damaged_path(version)}/{silo}", word, silo)

    # ---- the aggregator's verbs

    def delivery(self, silo: str, version: int) -> bytes | None:
        """The manifest's bytes of a delivery, or None while there is none. Raises RefusedError as `found`."""
        return self.found(f"{delivery_path(silo, version)}/manifest.json")

    def delivered(self, silo: str, version: int) -> bytes | None:
        """The same of a delivery that the silo has signed; one that it has not counts as none, and is said."""
        data = self.delivery(silo, version)
        return data if data and self._is_by(silo, version, data) else None

    def contributed(self, contributor: Contributor) -> tuple[Manifest, bytes]:
        """The manifest, and its bytes, that a commit names as a silo's part in it. Raises RefusedError."""
        data = self.delivery(contributor.silo, contributor.version)
        if data is None:
            raise RefusedError(f"{_manifest_of(contributor)} is missing")
        if sha256_bytes(data) != contributor.manifest_sha256:
            raise RefusedError(f"{_manifest_of(contributor)} is not the one that was merged")
        return Manifest.from_bytes(data), data

    def adopted_by(self, contributor: Contributor) -> Manifest | None:
        """What a silo signed when it had its part in a commit, and so what it had adopted; None if that is gone.

        What somebody has put in its place is passed over, and said. Raises RefusedError for what was merged unsigned.
        """
        silo, version, name = contributor.silo, contributor.version, _manifest_of(contributor)
        if (data := self.delivery(silo, version)) is None:
            return None
        if sha256_bytes(data) == contributor.manifest_sha256:
            manifest = Manifest.from_bytes(data)
            self.members.check(silo, manifest)
            return manifest
        if not self._is_by(silo, version, data):
            return None
        self.pass_over(name, "it is signed, but not the one that was merged; atoll verify tells more")
        return Manifest.from_bytes(data)

    def is_delivered(self, silo: str, version: int) -> bool:
        """Whether there is a manifest of the silo's."""
        name = f"{delivery_path(silo, version)}/manifest.json"
        return self.delivered(silo, version) is not None if self.members.keys else self.objects.exists(name)

    def _is_by(self, silo: str, version: int, data: bytes) -> bool:
        """Whether a silo has signed a manifest, as one for this version of this run; what it has not is said."""
        if not self.members.keys:
            return True
        try:
            manifest = Manifest.from_bytes(data)
            self.check(silo, manifest, version=version)
            self._check_place(manifest, version, silo)
        except RefusedError as error:
            self.pass_over(f"{delivery_path(silo, version)}/manifest.json", error)
            return False
        return True

    def refuse(self, silo: str, version: int, manifest: bytes, reason: str, *, final: bool = False) -> None:
        """Remove a delivery's manifest so that the silo delivers again, unless this is final, and record the reason.

        In this order: whoever is killed in between loses a reason, but every refusal that stands is counted once, and
        a silo that delivers the same bytes again and again comes to the end of its tries.
        """
        folder = delivery_path(silo, version)
        names = set(self.objects.names(folder))
        free = next(n for n in count() if f"refused-{n}.json" not in names)
        word = Refusal(reason=shown(reason, limit=1000), final=final, manifest_sha256=sha256_bytes(manifest))
        self.objects.delete(f"{folder}/manifest.json")
        name = f"{folder}/refused-{free}.json"
        with suppress(FileExistsError):  # whoever writes refusals in our place has said no
            self.say(name, word, OPERATOR)

    def put_manifest(self, silo: str, version: int, data: bytes) -> None:
        """Put a silo's manifest in the place of whatever is there."""
        with suppress(FileExistsError):  # a folder, or somebody who writes faster
            self.write_over(f"{delivery_path(silo, version)}/manifest.json", data, lambda: False)

    def membership(self, silo: str) -> Membership | None:
        """Whether a silo has joined or left, by its last word that is one; None if it never said one."""
        folder = f"silos/{silo}/membership"
        said = self.numbers(folder, after=".json")
        if self._said.get(silo, ([], None))[0] != said:  # no word of its author's is ever overwritten
            words = ((n, self.heard(Membership, f"{folder}/{n:06d}.json", silo)) for n in reversed(said))
            last, word = next(((n, word) for n, word in words if word), (-1, None))
            may_change = self.members.keys and said and last != said[-1]
            self._said[silo] = [] if may_change else said, word
        return self._said[silo][1] if said else None

    def say_waiting(self, version: int, silos: list[str], *, deadline_seconds: float | None) -> None:
        """Leave word of whom a version waits for; the store's own clock tells since when."""
        name = f"waiting/{version:06d}.json"
        word = Waiting(silos=silos, deadline_seconds=deadline_seconds)
        if self.members.keys or not self.objects.exists(name):
            with suppress(FileExistsError):  # whatever else lies there
                self.say(name, word, OPERATOR)

    def resumable(self, silo: str) -> int | None:
        """The version of a silo's newest checkpoint, by its marks since the last rollback; None if there is none."""
        marks = self.numbers(folder := f"silos/{silo}/resumable")
        if not self.members.keys:
            return max(marks, default=None)
        for marked in reversed(marks):
            word = self.heard(Resumable, f"{folder}/{marked:06d}", silo)
            if word and word.num_rollbacks == self.num_rollbacks:
                return marked
        return None

    def publish(
        self,
        commit: Commit,
        files: Iterable[tuple[Payload, Path]],
        *,
        check: Callable[[], None] = lambda: None,
        give: bool = False,
    ) -> None:
        """Write the payloads of a version, then its commit. Raises FileExistsError if the version was committed.

        With `give` the files are given away, and gone then; else they can be published again.
        `check` is called before every write, and raises if this process may not write any more. Raises RefusedError,
        before anything is written, for a commit that no reader would take: it could never be taken back.
        """
        Commit.from_bytes(commit.to_bytes())
        folder = version_path(commit.version)
        if self.has_commit(commit.version):
            raise FileExistsError(f"{folder}/commit.json exists already; another aggregator works on this store")
        for payload, file in files:
            check()
            # one died before its commit, perhaps
            self.upload_over(file, f"{folder}/{payload.file}", digest=payload.blake3, give=give)
        check()
        self.write_over(f"{folder}/commit.json", commit.to_bytes(), lambda: self.has_commit(commit.version))
        self.objects.delete(f"waiting/{commit.version:06d}.json")

    def hear_damaged(self, roster: list[str], version: int) -> list[str]:
        """Silos that said that they cannot use a version, each once."""
        there = sorted({*roster} & {*self.objects.names(_damaged_path(version))})
        said = [silo for silo in there if not self.members.keys or self._is_new_damage(silo, version)]
        for silo in there:
            self.objects.delete(f"{_damaged_path(version)}/{silo}")
        return said

    def _is_new_damage(self, silo: str, version: int) -> bool:
        """Whether a silo has said so itself, and not in words that were heard before."""
        word = self.heard(Damaged, f"{_damaged_path(version)}/{silo}", silo)
        is_new = word is not None and word.nonce not in self._heard
        self._heard |= {word.nonce} if word else set()
        return is_new

    def tensors(self, folder: str) -> list[str]:
        """Names of the payloads in a folder."""
        return [name for name in self.objects.names(folder) if name.endswith(".safetensors")]
