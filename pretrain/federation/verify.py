"""What a store says happened, checked by somebody who trusts nobody: from the store alone, without a silo's text.

Every signature, hash, link and digest, the weights by the contract's rules, and every version whose deliveries are
still there once more, from these to its bytes; of a silo's ledger of a collective, which has none, all but the last. It
writes nothing into the store.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.agreement import agreement_path, not_signed
from pretrain.exchange.amended import FOLDER
from pretrain.exchange.gated import Gated, decision_path
from pretrain.exchange.payload import save_tensors
from pretrain.exchange.sealed import seal_payload
from pretrain.exchange.store import StoreExchange, delivery_path, snapshot_path, version_path
from pretrain.exchange.sums import Sums, survivors_path
from pretrain.federation.collective import SignedBySilos, is_collective
from pretrain.federation.join import read_terms
from pretrain.federation.objects import ObjectsVerifier
from pretrain.merge.collect import Delivery
from pretrain.merge.merger import Merged, Merger
from pretrain.merge.snapshots import Snapshots
from pretrain.merge.terms import contributor
from pretrain.outer.placing import InMemory
from pretrain.outer.state import OuterState
from pretrain.trust.amendment import Governed
from pretrain.trust.ledger import Commit, Payload, RefusedError, check_cosigned, sha256_bytes
from pretrain.trust.members import operator_sealer
from pretrain.trust.quality import check_floor, check_metrics, check_told, floor_at


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is not as it should be."""

    version: int | None
    """None: of the contract."""
    name: str
    """The object in the store, or what it is about."""
    what: str
    of_chain: bool = True
    """False: it lies beside the chain, and whoever passes it over, as a run does, has all that happened."""


@dataclass(kw_only=True)
class Verified:
    """What was looked at, and found."""

    url: str
    is_signed: bool = False
    num_versions: int = 0
    """Commits, version 0 among them."""
    num_manifests: int = 0
    num_payloads: int = 0
    """Compared with their hashes."""
    num_pruned: int = 0
    """Payloads that are not there any more: hashes of them are all that is left."""
    num_amendments: int = 0
    """Of the contract, that hold."""
    num_words: int = 0
    """Small words of silos and operator, each by its author where things are signed, ..."""
    num_past_words: int = 0
    """... of them by a key that was replaced or taken away since."""
    num_decisions: int = 0
    """About candidates of the contract's gate, each as it follows from the results that it names, ..."""
    current: int | None = None
    """... and the version that is the current one by the last; None where there is none."""
    is_sealed: bool = False
    """Deliveries are sealed, and there is no key here to open them: no version was merged again."""
    is_collective: bool = False
    """It is a silo's own ledger of a collective, which keeps no deliveries: no version can be merged again."""
    merged: list[int] = field(default_factory=list)
    """Versions that were merged again from their deliveries."""
    compared: list[int] = field(default_factory=list)
    """Of a collective: versions whose parameters are there, and are those that all silos have signed."""
    findings: list[Finding] = field(default_factory=list)


class StoreVerifier:
    """Goes through one store."""

    def __init__(
        self,
        exchange: StoreExchange,
        scratch: Path,
        *,
        tell: Callable[[str], object] = print,
        key: Path | None = None,
    ) -> None:
        """`scratch` is an empty folder for what is read; `tell` gets a line of progress now and then; `key` is the
        operator's private key, which opens sealed deliveries.

        Raises ConfigError for what is no store of a run, and for another key.
        """
        url, contract = exchange.objects.url, exchange.read_contract(follow=False)
        if contract is None:
            raise ConfigError(f"store: {url!r} given; there is no run in it (no contract.json)")
        self._governed, self._contract = Governed(read_terms(contract, url, of_collective=True)[-1]), contract
        self._config: RunConfig = self._governed.config
        self._exchange, self._scratch, self._tell = exchange, scratch, tell
        self._commits: dict[int, Commit] = {}
        self._sha256: dict[int, str] = {}  # of their bytes
        if self._config.trust.seal and key:
            exchange.members.sealer = operator_sealer(exchange.members, key, self._config)
        is_sealed = self._config.trust.seal and not key
        self._silos = SignedBySilos(self._config, exchange, scratch) if is_collective(exchange, self._config) else None
        self.members = self._silos.members if self._silos else exchange.members
        """By whose keys all of it was checked."""
        self._found = Verified(
            url=url,
            is_signed=bool(self.members.keys),
            is_sealed=is_sealed,
            is_collective=bool(self._silos),
        )

    def verify(self) -> Verified:
        """All of it. Raises StoreTroubleError."""
        if self._silos:
            return self._verify_collective(self._silos)
        for member in not_signed(self._exchange):
            self._note(None, agreement_path(member), f"{member} has not signed the contract")
        with self._noting(None, f"{FOLDER}/"):
            self._exchange.follow_amendments()
        self._found.num_amendments = len(self._exchange.members.later)
        self._read_chain()
        for commit in self._commits.values():
            self._check_payloads(version_path(commit.version), commit.version, commit.payloads)
            self._check_deliveries(commit)
        self._merge_again()
        self._check_kept()
        self._check_gate()
        self._check_others()
        return self._found

    def _verify_collective(self, silos: SignedBySilos) -> Verified:
        for silo in silos.not_signed():
            self._note(None, agreement_path(silo), f"{silo} has not signed the contract")
        self._read_chain()
        for commit in self._commits.values():
            folder = version_path(commit.version)
            self._check_payloads(folder, commit.version, commit.payloads)
            with self._noting(commit.version, folder):
                self._found.num_manifests += silos.check(commit)
            with self._noting(commit.version, folder):
                if silos.has_its_parameters(commit):
                    self._found.compared.append(commit.version)
        return self._found

    def _note(self, version: int | None, name: str, what: object) -> None:
        self._found.findings.append(Finding(version=version, name=name, what=str(what)))

    @contextmanager
    def _noting(self, version: int | None, name: str) -> Iterator[None]:
        try:
            yield
        except (RefusedError, FileNotFoundError) as error:
            self._note(version, name, error)

    # ---- the chain

    def _read_chain(self) -> None:
        """All commits up to the newest that lies there, each with its link to the one before."""
        exchange, previous = self._exchange, None
        newest = max((n for n in exchange.numbers("global") if self._has_commit(n)), default=-1)
        for version in range(newest + 1):
            name = f"{version_path(version)}/commit.json"
            data = exchange.objects.read_if_there(name)
            with self._noting(version, name):
                if data is None:
                    raise RefusedError("it is missing")
                self._sha256[version] = sha256_bytes(data)
                commit = Commit.from_bytes(data)
                self._found.num_versions += 1
                exchange.check_link(commit, version, previous)
                if data != commit.to_bytes():
                    raise RefusedError("it is not in the one form that a commit has")
                exchange.members.check(OPERATOR, commit)
                if commit.divisor != sum(one.weight for one in commit.contributors):
                    raise RefusedError(f"its divisor is {commit.divisor}, not the sum of its weights")
                self._commits[version] = commit
                check_floor(commit, floor_at(self._config, exchange.members, version))
            previous = data

    def _has_commit(self, version: int) -> bool:
        return self._exchange.objects.exists(f"{version_path(version)}/commit.json")

    # ---- what the commits name

    def _check_payloads(self, folder: str, version: int, payloads: list[Payload]) -> None:
        """Compare those that are there with their hash."""
        for payload in payloads:
            name = f"{folder}/{payload.file}"
            if not self._exchange.objects.exists(name):
                self._found.num_pruned += 1
                continue
            self._found.num_payloads += 1
            with self._noting(version, name):
                self._exchange.fetch(folder, payload, Path(os.devnull))

    def _check_deliveries(self, commit: Commit) -> None:
        if self._config.outer.secure_sum and commit.version:
            with self._noting(commit.version, survivors_path(commit.version)):
                merged = [(one.silo, one.manifest_sha256) for one in commit.contributors]
                asked = Sums(self._config, self._exchange).survivors(commit.version)
                if asked is None or merged != list(zip(asked.silos, asked.manifests, strict=True)):
                    raise RefusedError("its silos were not asked about just those deliveries that its commit names")
        for one in commit.contributors:
            folder = delivery_path(one.silo, one.version)
            with self._noting(commit.version, f"{folder}/manifest.json"):
                manifest, data = self._exchange.contributed(one)
                self._found.num_manifests += 1
                self._exchange.members.check(one.silo, manifest)
                if not self._exchange.members.has_key(one.silo, commit.version):
                    raise RefusedError(f"{one.silo} has no key at version {commit.version} any more")
                if contributor(
                    manifest, data, one.weight
                ) != one or manifest.contract_sha256 != self._exchange.terms_sha256(one.version):
                    raise RefusedError("the commit says something else of it")
                adopted = range(self._config.schedule.base(one.version), one.version)
                check_cosigned(manifest, [self._sha256[version] for version in adopted if version in self._sha256])
                check_metrics(manifest, self._config.trust.metrics)
                if floor_at(self._config, self._exchange.members, commit.version) is not None:
                    check_told(commit, manifest)
                self._check_payloads(folder, commit.version, manifest.payloads)

    # ---- every version once more

    def _merge_again(self) -> None:
        """From the oldest versions of which all is there, on to the newest."""
        newest = max(self._commits, default=-1)
        merger = Merger(self._config, self._exchange, self._scratch, InMemory())
        snapshots = Snapshots(
            self._config, self._exchange, self._scratch, check_lease=lambda: None, let_go=merger.let_go
        )
        written = [version for version in snapshots.history.snapshots() if version in self._commits]
        for version in written:
            with self._noting(version, snapshot_path(version)):
                record = snapshots.history.read_snapshot(version)
                self._check_payloads(version_path(version), version, record.payloads)
        if not self._config.full_roster or newest < 1 or len(self._commits) <= newest:
            return  # nothing was merged, or the chain is broken, which was said
        if self._found.is_sealed:
            return
        start = self._oldest_start(snapshots, written, newest)
        if start is None:
            return
        first = max(start)
        with self._noting(first, version_path(first)):
            state = merger.load(snapshots, start, self._commits)
            for version in range(min(start) + 1, newest + 1):
                if version > start[self._config.schedule.fragment(version)]:
                    self._merge_version(merger, state, self._commits[version], is_whole=version >= first)

    def _check_kept(self) -> None:
        """Whether as many of the newest versions could be merged again as the contract says."""
        newest, keep = max(self._commits, default=0), self._config.trust.keep_deliveries
        gone = [
            version for version in range(max(1, newest - keep + 1), newest + 1) if version not in self._found.merged
        ]
        if gone and not self._found.findings and not self._found.is_sealed:
            what = f"cannot be merged again, but trust.keep_deliveries in the contract is {keep}"
            self._note(gone[-1], "deliveries", f"version {gone[0]}{f' to {gone[-1]}' if len(gone) > 1 else ''} {what}")

    def _check_gate(self) -> None:
        """Whether each decision of the contract's gate follows from the results that it names, and the one before."""
        if not self._config.gate.is_on:
            return
        gated, before = Gated(self._exchange, self._config.gate), None
        for version in range(0, max(self._commits, default=-1) + 1, self._config.gate.every_versions):
            with self._noting(version, decision_path(version)):
                if decision := gated.decision(version):
                    gated.check(decision, before)
                    self._found.num_decisions += 1
                    self._found.current = decision.current
                    before = decision

    def _check_others(self) -> None:
        """All objects that the chain does not name; what was found already is not said again."""
        merged = {(one.silo, one.version) for commit in self._commits.values() for one in commit.contributors}
        commits = {version: sha256 if version in self._commits else None for version, sha256 in self._sha256.items()}
        digests = {version: commit.parameters_digest for version, commit in self._commits.items()}
        others = ObjectsVerifier(
            self._exchange, self._config, self._contract, commits=commits, digests=digests, merged=merged
        )
        known = {finding.name for finding in self._found.findings}
        for name, what in others.verify():
            if name not in known:
                self._found.findings.append(Finding(version=None, name=name, what=what, of_chain=False))
        self._found.num_words, self._found.num_past_words = len(others.words), len(others.past_words)

    def _oldest_start(self, snapshots: Snapshots, written: list[int], newest: int) -> list[int] | None:
        """Of each fragment the oldest snapshot, or version 0, whose tensors are there; None if there are none."""
        num_fragments, objects = self._config.schedule.num_fragments, self._exchange.objects
        found = []
        for fragment in range(num_fragments):
            of_it = [0, *(v for v in written if self._config.schedule.fragment(v) == fragment and v <= newest)]
            try:
                kept = (
                    version
                    for version in of_it
                    if all(
                        objects.exists(f"{version_path(version)}/{payload.file}")
                        for payload in snapshots.history.whole(version, fragment)
                    )
                )
                found.append(next(kept))
            except (RefusedError, StopIteration):
                return None
        return found

    def _merge_version(self, merger: Merger, state: OuterState, commit: Commit, *, is_whole: bool) -> None:
        """Raise RefusedError unless a version follows from its deliveries as the contract says."""
        version, state.version = commit.version, commit.version - 1
        self._governed.go_to(self._exchange.members.terms_at(version))
        try:
            deliveries = []
            for one in commit.contributors:
                data = self._exchange.contributed(one)[1]
                deliveries.append(merger.verify(one.silo, data, state, one.version))
        except RefusedError as error:
            raise RefusedError(f"version {version} cannot be merged again: {error}") from None
        merged = merger.merge(state, deliveries)
        state.version = version
        self._tell(f"version {version}: merged again")
        said = [one.weight for one in commit.contributors]
        if merged.weights != said:
            raise RefusedError(f"version {version}: its weights are {said}; by the contract they are {merged.weights}")
        if is_whole and state.parameters_digest != commit.parameters_digest:
            raise RefusedError(
                f"version {version}: from its deliveries come other parameters than those of its commit: what was "
                "delivered was not merged as the contract says"
            )
        self._compare_change(commit, merged, deliveries)
        self._found.merged.append(version)

    def _compare_change(self, commit: Commit, merged: Merged, deliveries: list[Delivery]) -> None:
        """Raise RefusedError unless the published file is what comes out."""
        (published,) = commit.payloads
        file = self._scratch / published.file
        made = save_tensors(merged.changes, file, fragment=published.fragment, moments=merged.moments)
        made = seal_payload(self._exchange, OPERATOR, commit.version, made, file)
        file.unlink()
        if made != published:
            raise RefusedError(
                f"version {commit.version}: {published.file} is not what its {len(deliveries)} deliveries come to"
            )
