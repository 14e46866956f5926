"""The exchange through a store, as a silo sees it: deliver objects, wait for the aggregator's commits."""

import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.exchange.agreement import agree
from pretrain.exchange.base import Outgoing, Received
from pretrain.exchange.beats import Beats
from pretrain.exchange.gated import Gated
from pretrain.exchange.history import History
from pretrain.exchange.objects import StopWaitingError, StoreTroubleError
from pretrain.exchange.payload import Tensors, changed_tensors, check_header, read_parameters
from pretrain.exchange.rollback import check_held, explain, foreign, is_rolling_back, rollback_records
from pretrain.exchange.sealed import fetch_version, seal_payload, sealed_copy, take_group_key
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.words import Beat, Evaluation
from pretrain.host.foreign import shown
from pretrain.host.identity import known_identity, own_identity
from pretrain.merge.terms import check_payload_size, shared_moments
from pretrain.outer.digest import tensor_rows
from pretrain.outer.moments import check_moments
from pretrain.outer.pieces import Piece
from pretrain.outer.quantize import Parts
from pretrain.outer.rounds import participants
from pretrain.sync.delivered import Delivered
from pretrain.sync.masked import MaskedSum
from pretrain.sync.publishing import tell
from pretrain.trust.contract import build_contract, check_same_contract, other_software
from pretrain.trust.ledger import Commit, Contributor, Manifest, Payload, RefusedError, check_cosigned, sha256_bytes
from pretrain.trust.policy import in_one_value, read_policy
from pretrain.trust.quality import check_floor, check_metrics, check_told, floor_at

MAX_REFUSALS = 3
POLLS_PER_LOOK = 20  # while it waits, a silo looks whether the store still has the commit that it holds
OTHERS_A_VERSION = 4  # whose manifest a silo compares with its own history
POLLS_FOR_REPAIR = 120  # how long it waits for a version that is damaged to be published again


class ThroughStore:
    """One silo's exchange through the store; see exchange/base.py for the verbs."""

    concurrent = True
    sends_files = True
    waiting_for = "the aggregator"

    def __init__(self, config: RunConfig, silo: str) -> None:
        self._config, self._silo = config, silo
        self._rules, self._policy = config.membership, read_policy(config)
        self._closing = threading.Event()
        self._store = StoreExchange.of_run(config, closing=self._closing)
        self._history = History(self._store, config.outer.num_fragments)
        self._store.speak_as(config, silo)
        self._directory = config.silo_directory(silo)
        self._marking = ThreadPoolExecutor(1, thread_name_prefix="mark")
        self._beats: Beats | None = None
        self.lost = ""
        self._num_refused: dict[int, int] = {}  # of a version's deliveries, before ours of this start
        self._delivered = Delivered(self._directory / "delivered.txt")
        self._sum: MaskedSum | None = None
        if config.outer.secure_sum:
            self._sum = MaskedSum(config, silo, self._store, self._delivered, self._policy)
        self._held: dict[int, tuple[str, str | None]] = {}  # commits that we have seen: sha256, and of the one before
        self._remembering, self._next_look = threading.Lock(), time.monotonic()

    def terms_sha256(self, version: int) -> str:
        """Of the contract, once there is one, or of the amendment that holds."""
        return self._store.terms_sha256(version)

    def join(self) -> None:
        """Wait for the aggregator's contract; from then on the store shows that we are alive."""
        while (stored := self._store.read_contract()) is None:
            self._pause()
        check_same_contract(build_contract(self._config), stored, self._store.objects.url)
        agree(self._store, self._config, self._silo, self._pause)
        with self._readable("the group's key"):
            take_group_key(self._store, pause=self._pause)
        for line in other_software(stored, self._store.objects.url):
            print(line, flush=True)
        with self._readable("the record of a rollback"):
            while is_rolling_back(self._store):
                self._pause()
        is_new = not known_identity(self._directory)
        if self._sum:
            self._sum.check()
        self._store.claim_name(self._silo, own_identity(self._directory))
        if self._sum:
            self._sum.begin()
        self._delivered.begin(0 if is_new else self._store.newest_version() + 1 + self._config.outer.num_fragments)
        seconds = self._config.exchange.lease_seconds
        sign = Beat(lease_seconds=seconds)
        self._beats = Beats(self._store, f"silos/{self._silo}/beats/", sign, self._silo, lease_seconds=seconds)

    def assist(self, rank: int) -> None:
        """The leader does it all."""

    def is_ours(self, version: int, commit_sha256: str) -> bool:
        """Ask the ledger."""
        found = explain(self._store, version, commit_sha256)
        if found == "foreign":
            raise ConfigError(foreign(f"silo {self._silo}'s checkpoint", version, commit_sha256, self._store))
        if found == "same":
            self._held[version] = commit_sha256, None
        return found == "same"

    def initial(self) -> Received:
        """Wait for the aggregator's version 0; take the newest with a quorum, after a rollback, and where 0 is pruned.

        From version 0 a silo of a fixed roster makes all rounds again as they were, if it can.
        """
        enters = max(0, (self._store.members.enters_at(self._silo) or 0) - 1)  # whose deliveries may count from then on
        while (newest := self._store.newest_version()) < enters:
            self._pause()
        if not self._rules.is_elastic and not self.rollbacks():
            with self._readable("version 0"):
                newest = 0 if self._history.has_parameters(0) else newest
        found = list(self.changes(-1, newest, {}))
        return Received(
            commit=found[-1].commit,
            values={name: value for received in found for name, value in received.values.items()},
            rows={name: row for received in found for name, row in received.rows.items()},
            bytes_sent=0,
            bytes_received=sum(received.bytes_received for received in found),
        )

    def tokens_total(self, version: int, *, above: int = 0) -> int:
        """Ask the ledger."""
        if not self._store.numbers(f"silos/{self._silo}"):
            return 0  # we have never delivered: no need to read all commits
        with self._readable(f"version {version}"):
            return self._store.tokens_total(self._silo, version, above=above)

    def rollbacks(self) -> list[dict[str, Any]]:
        """From their records in the store."""
        with self._readable("the record of a rollback"):
            return rollback_records(self._store, self._config)

    @contextmanager
    def _readable(self, what: str) -> Iterator[None]:
        """Raises ConfigError for what is wrong in the store."""
        try:
            yield
        except RefusedError as error:
            raise ConfigError(f"silo {self._silo}: {what} in the store cannot be used: {error}") from None

    def pieces(self, names: Sequence[str], base: Mapping[str, Tensor]) -> list[Piece]:
        """Whole tensors."""
        return [Piece(name) for name in names]

    def masked(
        self,
        version: int,
        base: Mapping[str, Tensor],
        local: Mapping[str, Tensor],
        moments: Mapping[str, Parts],
        tokens: int,
    ) -> tuple[dict[str, Parts], dict[str, Parts]] | None:
        """Our part of a secure sum, where the contract wants one."""
        if not self._sum:
            return None
        pairs = {name: (base[name], value) for name, value in local.items()}
        return self._sum.mask(version, pairs, moments, tokens, torch.get_num_threads())

    def told(self, sent: Outgoing, base: Mapping[str, Tensor]) -> Mapping[str, Parts]:
        """As they are coded, or what lies below the masks."""
        return self._sum.told(sent, base, torch.get_num_threads()) if self._sum else sent.coded.moments

    def sealed(self, payload: Payload, file: Path, version: int) -> Payload:
        """A sealed copy in the outbox, where the contract wants it; and the shares that go with a part of a sum."""
        payload = seal_payload(self._store, self._silo, version, payload, file, keep=True)
        if self._sum:
            self._sum.deal(payload, file, version)
        return payload

    def deliver(self, sent: Outgoing) -> None:
        """Write the payload and its manifest into the store; what comes too late to count is not sent."""
        with self._noticing_the_end():
            manifest, version = self._store.members.sign(self._policy.leaving(sent.manifest)), sent.manifest.version
            if self._rules.is_elastic and not self._rules.stale_weight and self._is_committed(version):
                return
            self._num_refused.setdefault(version, len(self._store.refusals(self._silo, version)))
            if self._sum:
                self._sum.deliver(manifest, sent.file)
            self._delivered.add(version, sha256_bytes(manifest.to_bytes()))
            file = sealed_copy(sent.file) if self._store.is_sealed else sent.file
            stands = self._store.deliver(manifest, [(payload, file) for payload in manifest.payloads])
            if stands != manifest.to_bytes():
                self._check_delivered(version, sha256_bytes(stands))
                print(
                    f"version {version}: this pseudo-gradient differs from the one delivered before the restart "
                    "(kernels that are not deterministic); the delivered one stands",
                    flush=True,
                )

    def receive(self, version: int, sent: Outgoing | None, base: Mapping[str, Tensor]) -> Received:
        """Wait until the commit is there, delivering again what the aggregator refused; then download it.

        Raises ConfigError after MAX_REFUSALS refusals, or one for good, unless the others may go on without us.
        """
        with self._noticing_the_end():
            refused = self._wait_for_commit(version, sent)
            num_bytes = sum(payload.num_bytes for payload in sent.manifest.payloads) if sent else 0
            return dataclasses.replace(self._download(version, base), bytes_sent=num_bytes, refused=refused)

    def recorded(self, commit: Commit) -> Commit:
        """It is in the store."""
        return commit

    @contextmanager
    def _noticing_the_end(self) -> Iterator[None]:
        """When the store stays away for longer than is tried, all ranks have to stop, and can still save."""
        try:
            yield
        except StoreTroubleError as error:
            self.lost = str(error)
            raise StopWaitingError from None

    def _check_delivered(self, version: int, manifest_sha256: str) -> None:
        """Raise ConfigError for a delivery in our name that is not ours."""
        if not self._delivered.may_be_ours(version, manifest_sha256):
            raise ConfigError(
                f"exchange.url: {self._store.objects.url} given; somebody else has delivered for version {version} as "
                f"silo {self._silo}: manifest {manifest_sha256[:12]} is none of ours (see {self._delivered.file}); "
                "find out who writes to the store; if this run directory is an older copy, delete that file and start "
                "again"
            )

    def _remember(self, commit: Commit) -> Commit:
        """Check a commit against the floor of quality, the sum that we have answered for, those that we have seen, and
        what it has of us against what we have sent. Raises RefusedError for the first two, else ConfigError.
        """
        version, sha256 = commit.version, sha256_bytes(commit.to_bytes())
        check_floor(commit, floor_at(self._config, self._store.members, version))
        if self._sum:
            self._sum.check_merged(commit)
        for contributor in commit.contributors:
            if contributor.silo == self._silo:
                self._check_delivered(contributor.version, contributor.manifest_sha256)
                if contributor.weight:
                    counted = {other.silo for other in commit.contributors if other.weight}
                    self._policy.check_merged(version, in_one_value(self._config.outer, len(counted)))
        with self._remembering:
            before, same, after = (self._held.get(version + step) for step in (-1, 0, 1))
            if (
                (before and before[0] != commit.previous)
                or (same and same[0] != sha256)
                or (after and after[1] not in (None, sha256))
            ):
                raise ConfigError(
                    f"exchange.url: {self._store.objects.url} given; its commit {version} does not fit the commits "
                    f"that silo {self._silo} has seen: somebody has changed them, or put another copy there; restore "
                    "the one that was there"
                )
            self._held[version] = sha256, commit.previous
            for old in [held for held in self._held if held < max(self._held) - 64]:
                del self._held[old]
        return commit

    def _look(self) -> None:
        """Now and then: whether the store still has the newest commit that we hold. Raises ConfigError."""
        with self._remembering:
            if time.monotonic() < self._next_look or not self._held:
                return
            self._next_look = time.monotonic() + POLLS_PER_LOOK * self._config.exchange.poll_seconds
            version = max(self._held)
            sha256 = self._held[version][0]
        check_held(f"silo {self._silo}", version, sha256, self._store)

    def _check_others(self, version: int) -> None:
        """Whether a version's contributors, a few in turn, have adopted the commits that we have. Raises ConfigError.

        An operator that shows us another history than them needs their signature under what they have been shown.
        """
        adopted = range(self._config.schedule.base(version), version)
        with self._remembering:
            held = dict(self._held)
        if not self._store.members.keys or version not in held or any(earlier not in held for earlier in adopted):
            return  # we have just come: the next version's are looked at
        sha256s = [held[earlier][0] for earlier in adopted]
        with self._readable(f"version {version}"):
            try:
                commit = self._store.read_commit(version)
            except RefusedError:
                if not self._store.is_nobodys(version):
                    raise
                return  # the aggregator's own comes again; the next version's are looked at
            floor = floor_at(self._config, self._store.members, version)
            others = [c for c in commit.contributors if c.silo != self._silo]
            turns = range(min(len(others), OTHERS_A_VERSION))
            looked_at = [others[(version * OTHERS_A_VERSION + number) % len(others)] for number in turns]
            looked_at += [c for c in commit.contributors if c.silo == self._silo and floor is not None]
            for other in looked_at:
                # Behind a relay there are none but ours; one that somebody has deleted is named by atoll verify.
                if other.version == version and (found := self._adopted_by(other, sha256s)):
                    check_cosigned(found, sha256s)
                    if sha256_bytes(found.to_bytes()) == other.manifest_sha256:
                        self._check_merged(commit, found, has_floor=floor is not None)

    def _adopted_by(self, other: Contributor, sha256s: Collection[str]) -> Manifest | None:
        """What another silo signed when it had its part in a commit; None if that is gone.

        Where it has signed something else there, which names another history, either it has signed two, or the
        operator has made up what was merged. Who has merged it can show it, and is asked to for a while.
        """
        found, polls = self._store.adopted_by(other), 0
        while found and found.cosigned not in sha256s and sha256_bytes(found.to_bytes()) != other.manifest_sha256:
            if polls == POLLS_FOR_REPAIR:
                return found
            if polls % (POLLS_PER_LOOK // 2) == 0:
                what = f"silo {other.silo} has signed another delivery than the one that was merged"
                self._store.say_damaged(self._silo, other.version, what)
            polls += 1
            self._pause()
            found = self._store.adopted_by(other) or found
        if polls:
            print(f"version {other.version}: silo {other.silo} has signed two histories; this one goes on", flush=True)
        return found

    def _check_merged(self, commit: Commit, manifest: Manifest, *, has_floor: bool) -> None:
        """Raise RefusedError unless a manifest in a commit says what it may, and the commit what it says."""
        try:
            check_metrics(manifest, self._config.trust.metrics)
        except RefusedError as error:
            raise RefusedError(f"the delivery of silo {manifest.silo}: {error}") from None
        if has_floor:
            check_told(commit, manifest)

    def _wait_for_commit(self, version: int, sent: Outgoing | None) -> bool:
        """Whether our delivery was refused for good."""
        self._check_others(version - 1)
        refusals = self._store.refusals(self._silo, version)
        num_refused, missed_before = self._num_refused.get(version, len(refusals)), False
        while not self._is_committed(version):
            if self._sum:
                self._sum.answer(version)
            if sent and not self._store.is_delivered(self._silo, version):
                refusals = self._store.refusals(self._silo, version)
                if len(refusals) > num_refused:
                    num_refused = len(refusals)
                    print(
                        f"version {version}: the aggregator refused our delivery: {shown(refusals[-1].reason)}",
                        flush=True,
                    )
                elif not missed_before:  # the reason is written just after the manifest is removed: look once more
                    missed_before = True
                    self._pause()
                    continue
                missed_before = False
                if refusals and (refusals[-1].final or num_refused >= MAX_REFUSALS):
                    if not self._rules.is_elastic:
                        raise ConfigError(
                            f"silo {self._silo}: version {version} was refused {num_refused} times: "
                            f"{shown(refusals[-1].reason)}"
                        )
                    sent = None  # the commit comes without us
                elif not self._is_committed(version):
                    self.deliver(sent)
            self._look()
            self._pause()
        self._num_refused.pop(version, None)
        return any(refusal.final for refusal in refusals)

    def _is_committed(self, version: int) -> bool:
        return self._store.newest_version(version - 1) >= version

    # ---- where the others may go on without us

    def newest(self, version: int) -> int:
        """The newest version that is committed, where `version` is known to be."""
        with self._noticing_the_end():
            return self._store.newest_version(version)

    def commit(self, version: int) -> Commit:
        """The commit of a version that is there. Raises ConfigError."""
        try:
            return self._remember(self._store.read_commit(version))
        except RefusedError as error:
            raise ConfigError(f"silo {self._silo}: version {version} in the store cannot be used: {error}") from None

    def announce(self, version: int, *, left: bool = False) -> None:
        """Say that we take part from `version` on, or no more."""
        with self._noticing_the_end():
            self._store.announce(self._silo, left=left, version=version)

    def is_drawn(self, round: int) -> bool:
        """Whether we train in a round: of whom it is drawn is known once the commit was read that it begins with."""
        roster = self._store.members.roster_at(round, self._config.agreed_roster)  # with a sample, rounds are versions
        return self._silo in participants(roster, round, sample=self._rules.sample, seed=self._rules.sample_seed)

    def wait_for(self, version: int) -> None:
        """Wait for a commit in which we have no part."""
        with self._noticing_the_end():
            self._wait_for_commit(version, None)

    def changes(self, version: int, newest: int, base: Mapping[str, Tensor]) -> Iterator[Received]:
        """What makes version `newest` of `version`, whose tensors are `base`, one fragment after another.

        Each fragment comes as the coded changes that were missed; if these are gone or not smaller, whole as the last
        snapshot had it, and the changes since. The last commit is in all of them. Raises ConfigError.
        """
        last = self.commit(newest)
        for fragment in range(self._config.outer.num_fragments):
            with self._readable(f"version {newest}"):
                if made := self._history.parameters(newest, fragment, since=version):
                    values = read_parameters(self._store, made, self._directory / "inbox", base)
                    rows = tensor_rows(values, torch.get_num_threads())
                    num_bytes = sum(payload.num_bytes for _, payload, _ in made)
                    yield Received(commit=last, values=values, rows=rows, bytes_sent=0, bytes_received=num_bytes)

    def _download(self, version: int, base: Mapping[str, Tensor]) -> Received:
        """Fetch a commit's payloads and check them before a byte is decoded."""
        values: dict[str, Tensor] = {}
        moments: dict[str, Parts] = {}
        num_bytes = 0
        try:
            commit = self._remember(self._store.read_commit(version))
            if commit.codec != self._config.outer.downlink_codec:
                raise RefusedError(f"its codec is {shown(commit.codec)}, not {self._config.outer.downlink_codec}")
            before = {name: value.shape for name, value in base.items()}
            agreed = shared_moments(self._config, before, before)
            for payload in commit.payloads:
                file = self._directory / "inbox" / f"{version:06d}-{payload.fragment:03d}.safetensors"
                header_bytes = check_payload_size(
                    payload, commit.codec, before, agreed, is_sealed=self._store.is_sealed
                )
                num_bytes += self._fetch(version, payload, file)
                check_header(file, limit_bytes=header_bytes)
                payload_tensors = Tensors(file)
                values |= changed_tensors(payload_tensors, commit.codec, base)
                moments |= payload_tensors.moments
                file.unlink()
            shapes = {name: value.shape for name, value in values.items()}
            check_moments(moments, shared_moments(self._config, values, shapes))
        except ConfigError:  # a ValueError, too: what ends us says so itself, and trouble may pass
            raise
        except (RefusedError, SafetensorError, ValueError) as error:
            raise ConfigError(f"silo {self._silo}: version {version} in the store cannot be used: {error}") from None
        rows = tensor_rows(values, torch.get_num_threads())
        return Received(
            commit=commit, values=values, rows=rows, moments=moments, bytes_sent=0, bytes_received=num_bytes
        )

    def _fetch(self, version: int, payload: Payload, file: Path) -> int:
        """Download and check; what is damaged, the aggregator is asked to publish again. Raises RefusedError."""
        seconds = POLLS_FOR_REPAIR * self._config.exchange.poll_seconds
        began, said = time.monotonic(), ""
        while True:
            try:
                return fetch_version(self._store, version, payload, file)
            except RefusedError as error:
                if time.monotonic() - began > seconds:
                    raise
                if not said:
                    said = f"version {version}: {error}; asking the aggregator for {seconds:g} s to repair it"
                    print(said, flush=True)
                self._store.say_damaged(self._silo, version, str(error))
            for _ in range(POLLS_PER_LOOK // 2):
                self._pause()

    def _pause(self) -> None:
        if self._closing.wait(self._config.exchange.poll_seconds):
            raise StopWaitingError

    def checkpointed(self, version: int) -> None:
        """Say so in the store, for its pruning; training goes on meanwhile."""
        self._marking.submit(self._store.mark_resumable, self._silo, version)

    def evaluated(self, evaluation: Evaluation, wrong: Callable[[], str]) -> None:
        """Say so in the store, unless contract or policy keeps it here; training goes on meanwhile."""
        if evaluation.losses and self._policy.allows_metric("held_out"):
            self._marking.submit(tell, self._store, self._silo, evaluation, wrong)

    @contextmanager
    def gated(self) -> Iterator[Gated]:
        """What the store has of the contract's gate."""
        with self._noticing_the_end(), self._readable("the gate's results"):
            yield Gated(self._store, self._config.gate)

    def moved(self) -> None:
        """Nobody waits for us without end: the aggregator does not ask."""

    def close(self, reason: str) -> None:
        """End what waits; when all is done, the last checkpoint's word comes first."""
        self._marking.shutdown(wait=not reason, cancel_futures=bool(reason))
        self._closing.set()
        if self._beats:
            self._beats.stop(take_back=True)
        self._store.objects.close_egress()
