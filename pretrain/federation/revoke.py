"""What a run's model would be without one member's contributions: merged again from the deliveries of all others.

Two histories are followed side by side: the run's own, against which every delivery was coded and is checked, and the
one without the member. Coded deliveries stand for the pseudo-gradients that they hold; one of codec fp32, which holds
values, for what these were away from the run's own parameters.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pretrain.config.adapter import PROMPT
from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import RunConfig
from pretrain.exchange.revocation import Revocation
from pretrain.exchange.store import StoreExchange, delivery_path, version_path
from pretrain.exchange.sums import check_no_sum
from pretrain.federation.export import (
    empty_model,
    finished,
    origin,
    write_card,
    write_export,
    writing,
)
from pretrain.federation.held_out import SplitLoss, evaluate_model
from pretrain.merge.collect import Delivery
from pretrain.merge.merger import Merger
from pretrain.merge.snapshots import Snapshots
from pretrain.outer.placing import InMemory
from pretrain.outer.state import OuterState
from pretrain.silo.shards import tokenizer_sha256
from pretrain.trust.amendment import Governed
from pretrain.trust.ledger import Commit, Contributor, RefusedError, sha256_bytes

REVOCATION = "revocation.json"


@dataclass(frozen=True, kw_only=True)
class Without:
    """One version without the member."""

    version: int
    tokens: int
    """Of the member's deliveries in its commit, ..."""
    weight: int
    """... and their weight, ..."""
    divisor: int
    """... of so much, ..."""
    divisor_left: int
    """... of which so much is left, by the contract's rules for those that are left; 0: nobody is."""


@dataclass(kw_only=True)
class Revoked:
    """What came out."""

    record: Revocation
    """Unsigned."""
    versions: list[Without] = field(default_factory=list)
    """Those in which the member had a part."""
    unchanged: list[int] = field(default_factory=list)
    """Versions of which nobody is left: nothing of the parameters is changed by them."""
    distance: float = 0.0
    """Norm of the difference between the model and the run's own, ..."""
    relative: float = 0.0
    """... and of it over the norm of the run's own."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """Without the member, ..."""
    original: dict[str, Tensor] = field(default_factory=dict)
    """... and the run's own."""
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """The outer optimizer's state without the member."""


class Revoker:
    """Of one store; writes nothing into it. Memory: twice the outer state."""

    def __init__(
        self, config: RunConfig, exchange: StoreExchange, scratch: Path, *, tell: Callable[[str], object] = print
    ) -> None:
        """`config` has the contract's terms; the contract was read, and if it seals, there is who opens.

        `scratch` is an empty folder. Raises ConfigError in a run of secure sums.
        """
        why = "nobody has one silo's part of a sum; or a new one without it, from atoll export of an earlier version"
        check_no_sum(config, f"store: {exchange.objects.url!r} given", why)
        self._governed = Governed(config)
        self._config = config = self._governed.config
        self._exchange, self._tell = exchange, tell
        self._schedule, self._whole_from = config.schedule, 0
        self._merger = Merger(config, exchange, scratch, InMemory())
        self._snapshots = Snapshots(config, exchange, scratch, check_lease=lambda: None, let_go=self._merger.let_go)

    def revoke(self, member: str, first: int, last: int | None = None, *, reason: str = "") -> Revoked:
        """Take out what a member contributed to version `first` and all later ones, up to `last` (None: the newest).

        Raises ConfigError for what cannot be, with what can, and RefusedError for a store that is not as it should be.
        """
        newest, silos = self._exchange.newest_version(), self._exchange.members.all_silos(self._config.full_roster)
        last = newest if last is None else last
        if member not in silos:
            raise ConfigError(f"member: {member!r} given; allowed: {named(silos)}")
        if not 1 <= last <= newest:
            raise ConfigError(f"--until: {last} given; allowed: 1 to {newest}")
        if not 1 <= first <= last:
            raise ConfigError(f"--from: {first} given; allowed: 1 to {last}")
        commits = {commit.version: commit for commit in self._exchange.read_commits(0, last)}
        parts = [v for v in range(first, last + 1) if any(c.silo == member for c in commits[v].contributors)]
        if not parts:
            raise ConfigError(f"--from: {first} given; {member} has no part in any version from there to {last}")
        start = self._start(first, last, commits)
        original = self._merger.load(self._snapshots, start, commits)
        self._whole_from = max(start)
        for version in range(min(start) + 1, first):
            if version > start[self._schedule.fragment(version)]:
                self._merge_both(commits[version], original, None, member)
        without = copy.deepcopy(original)
        record = Revocation(
            contract_sha256=self._exchange.contract_sha256,
            member=member,
            from_version=first,
            to_version=last,
            commit_sha256=sha256_bytes(commits[last].to_bytes()),
            parameters_digest="",
            reason=" ".join(reason.split()),
            signer="",
        )
        found = Revoked(record=record, parameters=without.parameters, original=original.parameters, kept=without.kept)
        for version in range(first, last + 1):
            divisor = self._merge_both(commits[version], original, without, member)
            self._note(found, commits[version], member, divisor)
            self._tell(f"version {version}: merged again, as it was and without {member}")
        found.record = dataclasses.replace(record, parameters_digest=without.parameters_digest)
        found.distance = _norm(original.parameters[n].double() - p.double() for n, p in without.parameters.items())
        whole = _norm(p.double() for p in original.parameters.values())
        found.relative = found.distance / whole if whole else 0.0
        return found

    def _note(self, found: Revoked, commit: Commit, member: str, divisor: int) -> None:
        parts = [one for one in commit.contributors if one.silo == member]
        if parts:
            found.versions.append(
                Without(
                    version=commit.version,
                    tokens=sum(one.tokens for one in parts),
                    weight=sum(one.weight for one in parts),
                    divisor=commit.divisor,
                    divisor_left=divisor,
                )
            )
        if not divisor:
            found.unchanged.append(commit.version)

    def _merge_both(self, commit: Commit, original: OuterState, without: OuterState | None, member: str) -> int:
        """Take a version's outer step in both histories; returns the divisor without the member.

        Raises RefusedError.
        """
        version = commit.version
        self._governed.go_to(self._exchange.members.terms_at(version))
        original.version = version - 1
        deliveries = [self._delivery(one, original, version) for one in commit.contributors]
        divisor = 0
        if without:
            without.version = version - 1
            left = [
                # Before the original takes its step: what is in time was coded against these parameters.
                dataclasses.replace(one, base=one.base or original.parameters)
                for one in deliveries
                if one.manifest.silo != member
            ]
            try:
                divisor = sum(self._merger.merge(without, left).weights) if left else 0
            except (ValueError, RefusedError) as error:
                raise ConfigError(
                    f"member: {member!r} given; version {version} cannot be merged without it, as outer.merge="
                    f"{self._config.outer.merge} says: {error}"
                ) from None
            without.version = version
        weights = self._merger.merge(original, deliveries).weights
        original.version = version
        if weights != [one.weight for one in commit.contributors]:
            raise RefusedError(f"version {version}: its weights are not those of the contract; atoll verify says more")
        # Before, the fragments that have a later snapshot are ahead.
        if version >= self._whole_from and original.parameters_digest != commit.parameters_digest:
            raise RefusedError(f"version {version} does not follow from its deliveries; atoll verify says more")
        return divisor

    def _delivery(self, one: Contributor, original: OuterState, version: int) -> Delivery:
        try:
            _, data = self._exchange.contributed(one)
            return self._merger.verify(one.silo, data, original, one.version)
        except RefusedError as error:
            raise RefusedError(f"version {version} cannot be merged again: {error}") from None

    # ---- from where on it is possible

    def _start(self, first: int, last: int, commits: dict[int, Commit]) -> list[int]:
        """Of each fragment the newest whole state before `first` from which all is kept up to `last`, by its version.

        Raises ConfigError that says from which version on there is one.
        """
        written = self._snapshots.history.snapshots()
        found = [[*self._starts(fragment, last, commits, written)] for fragment in range(self._schedule.num_fragments)]
        oldest = max(min(starts, default=last) for starts in found) + 1
        if oldest > first:
            allowed = f"{oldest} to {last}" if oldest <= last else "none"
            raise ConfigError(
                f"--from: {first} given; what versions before {oldest} would be merged again from is pruned; allowed: "
                f"{allowed} (trust.keep_deliveries keeps more)"
            )
        return [max(version for version in starts if version < first) for starts in found]

    def _starts(self, fragment: int, last: int, commits: dict[int, Commit], written: Sequence[int]) -> Iterator[int]:
        """The versions, the newest first, whose state of a fragment is there, with all deliveries after it."""
        step = self._schedule.num_fragments
        for version in range(last - (last - fragment) % step, 0, -step):
            if version in written and self._is_whole(version, fragment):
                yield version
            if not all(self._is_kept(one, version) for one in commits[version].contributors):
                return
        if self._is_whole(0, fragment):
            yield 0

    def _is_whole(self, version: int, fragment: int) -> bool:
        try:
            payloads = self._snapshots.history.whole(version, fragment)
        except RefusedError:
            return False
        return all(self._exchange.objects.exists(f"{version_path(version)}/{one.file}") for one in payloads)

    def _is_kept(self, one: Contributor, version: int) -> bool:
        """Whether a delivery is there, and of a late one what it was coded against."""
        exists = self._exchange.objects.exists
        try:
            manifest, _ = self._exchange.contributed(one)
            made = []
            if one.version < version:
                base = self._schedule.base(one.version)
                made = self._snapshots.history.parameters(base, self._schedule.fragment(version))
        except RefusedError:
            return False
        folder = delivery_path(one.silo, one.version)
        return all(exists(f"{folder}/{payload.file}") for payload in manifest.payloads) and all(
            exists(f"{version_path(of)}/{payload.file}") for of, payload, _ in made
        )


def write_revoked(config: RunConfig, found: Revoked, directory: Path) -> None:
    """Write the model without the member as `atoll export` would, with the record of it, to a new directory."""
    record = found.record
    told: dict[str, Any] = {
        "version": record.to_version,
        "without": {"member": record.member, "from_version": record.from_version},
        "parameters_digest": record.parameters_digest,
        "contract_sha256": record.contract_sha256,
    }
    with writing(directory) as temporary:
        model = _filled(config, found.parameters)
        write_export(model, config, origin(config) | told, temporary)
        write_card(model, config, told, temporary, is_adapter=config.model.adapter.kind == PROMPT)
        (temporary / REVOCATION).write_bytes(record.to_bytes())


def losses(config: RunConfig, found: Revoked, data: dict[str, Path]) -> dict[str, tuple[SplitLoss, SplitLoss]]:
    """Of each packed split by corpus: the loss of the run's own model, and of the one without the member."""
    options = data, origin(config), tokenizer_sha256(config.tokenizer_file)
    original, without = (
        evaluate_model(partial(_filled, config, parameters), *options)
        for parameters in (found.original, found.parameters)
    )
    return {corpus: (original[corpus], without[corpus]) for corpus in data}


def _filled(config: RunConfig, values: Mapping[str, Tensor]) -> nn.Module:
    """The model as others load it."""
    model, parameters = empty_model(config)
    for name, value in values.items():
        parameters[name].copy_(value)
    return finished(model, config)


def _norm(tensors: Iterator[Tensor]) -> float:
    return math.sqrt(math.fsum(tensor.square().sum().item() for tensor in tensors))
