"""One version after another from its deliveries: verify, merge, take the outer step; or take past ones again."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.exchange.payload import PARAMETER
from pretrain.exchange.store import REQUESTS_AT_ONCE, StoreExchange
from pretrain.merge.collect import Delivery
from pretrain.merge.snapshots import Snapshots
from pretrain.merge.step import Step, factors_of, shares
from pretrain.merge.unmask import Unmasker
from pretrain.merge.verify import Verifier, base_of, pseudo_gradient
from pretrain.outer.digest import tensor_rows
from pretrain.outer.factors import aggregation_error, pairs
from pretrain.outer.merge import mean_cosine
from pretrain.outer.pieces import Piece
from pretrain.outer.placing import InMemory
from pretrain.outer.quantize import Parts
from pretrain.outer.state import OuterState, kept_at_start, kept_kinds
from pretrain.outer.threads import in_threads
from pretrain.trust.ledger import Commit, Contributor, RefusedError
from pretrain.trust.member import member_budget

Tensors = dict[str, Tensor]


@dataclass(kw_only=True)
class Merged:
    """What came of the merge and the outer step of a version."""

    changes: dict[str, Parts]
    """Of the published parameters, coded."""
    moments: dict[str, Parts]
    """What all silos are told of each other's gradients."""
    weights: list[int]
    """Of each delivery."""
    metrics: dict[str, float]


class Merger:
    """Of one store; writes nothing into it. Memory: the outer state, and a few single tensors, however many silos."""

    def __init__(
        self,
        config: RunConfig,
        exchange: StoreExchange,
        scratch: Path,
        place: InMemory,
        *,
        go_to: Callable[[int], None] = lambda version: None,
    ) -> None:
        """`scratch` is a folder for what comes and goes, `place` says where the outer state lies; `go_to` makes
        `config` say what holds at a version that is merged again.
        """
        self._go_to = go_to
        self._config, self._exchange, self._place, self._schedule = config, exchange, place, config.schedule
        self.num_threads = len(os.sched_getaffinity(0))
        self.fragments: list[list[str]] = []
        """Names of the tensors of each."""
        self._verifier = Verifier(config, exchange, scratch / "inbox", self.num_threads)
        self.unmasker = Unmasker(config, exchange, place, self.num_threads) if config.outer.secure_sum else None

    def cut(self, parameters: Mapping[str, Tensor]) -> None:
        try:
            sizes = {name: value.numel() for name, value in parameters.items()}
            self.fragments = self._config.cut(sizes)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    # ---- past versions

    def load(self, snapshots: Snapshots, versions: Sequence[int], commits: Mapping[int, Commit]) -> OuterState:
        """Each fragment as its snapshot of one of these versions has it, or version 0; compared with their digests.

        Raises RefusedError.
        """
        parameters, kept = self._load(snapshots, versions)
        self.cut(parameters)
        rows = tensor_rows(parameters, self.num_threads)
        state = OuterState(version=max(versions), parameters=parameters, kept=kept, rows=rows)
        for fragment, version in enumerate(versions):
            if version and state.kept_digest(self.fragments[fragment]) != commits[version].outer_digest:
                raise RefusedError(f"version {version}: its outer state does not have the digest of its commit")
        return state

    def _load(self, snapshots: Snapshots, versions: Sequence[int]) -> tuple[Tensors, dict[str, Tensors]]:
        """Parameters, and what is kept of them; of version 0 they are as at the start."""
        outer, copy = self._config.outer, self._place.copy
        parameters: dict[str, Tensor] = {}
        kept: dict[str, dict[str, Tensor]] = {kind: {} for kind in kept_kinds(outer.optimizer, outer.downlink_codec)}
        for fragment, version in enumerate(versions):
            whole: dict[str, Tensor] = {}
            for kind, found in snapshots.load(version, fragment):
                values = {name: copy(value) for name, value in found.items()}
                if kind == PARAMETER:
                    whole = values
                else:
                    kept[kind] |= values
            parameters |= whole
            if not version:
                for kind, values in kept_at_start(whole, outer.optimizer, outer.downlink_codec, self._place).items():
                    kept[kind] |= values
        if any(of.keys() != parameters.keys() for of in kept.values()):
            raise RefusedError(f"the snapshots {[*versions]} do not have all of the outer state")
        return parameters, kept

    def replay(self, state: OuterState, commits: Sequence[Commit], snapshots: Sequence[int]) -> None:
        """Take the outer steps of these versions again, in their order, each with the deliveries that it names.

        `state` has each fragment as its snapshot has it. Raises RefusedError for what does not have its digest then.
        """
        if commits:
            num_deliveries = sum(len(commit.contributors) for commit in commits)
            versions = _span("version", [commit.version for commit in commits])
            since = _span("snapshot", snapshots)
            print(f"replaying {versions} from {since} and {num_deliveries} deliveries", flush=True)
        in_step = max(snapshots)
        for commit in commits:
            version, state.version = commit.version, commit.version - 1
            self._go_to(version)
            read = partial(self._contributed, state, version)
            deliveries = in_threads(read, commit.contributors, REQUESTS_AT_ONCE)
            factors = factors_of(self._config.outer, [delivery.norm for delivery in deliveries])
            self._take_step(state, deliveries, [one.weight for one in commit.contributors], factors)
            # Before, the fragments that have a later snapshot are ahead.
            if version >= in_step and state.parameters_digest != commit.parameters_digest:
                raise RefusedError(f"version {version}, replayed, does not have the digest of its commit")
        state.version = max([in_step, *(commit.version for commit in commits)])

    def _contributed(self, state: OuterState, version: int, contributor: Contributor) -> Delivery:
        """A delivery that was merged before, checked as then. Raises RefusedError, which says what can be done."""
        silo, its_version = contributor.silo, contributor.version
        try:
            _, data = self._exchange.contributed(contributor)
            return self.verify(silo, data, state, its_version)
        except RefusedError as error:
            raise RefusedError(
                f"version {version} cannot be replayed: the delivery of silo {silo} for version {its_version}: {error}"
                f"; restore it, or go back: atoll rollback {self._exchange.objects.url} --to {version - 1}"
            ) from None

    # ---- the next version

    def verify(
        self, silo: str, data: bytes, state: OuterState, version: int, over: threading.Event | None = None
    ) -> Delivery:
        """Raises RefusedError for a delivery that is not as agreed, StopWaitingError soon after `over` is set."""
        names = self.fragments[self._schedule.fragment(version)]
        return self._verifier.verify(silo, data, state, names, version, over=over)

    def merge(self, state: OuterState, deliveries: list[Delivery]) -> Merged:
        """Merge and take the next version's outer step in place, block by block. Raises RefusedError."""
        names = self.fragments[self._schedule.fragment(state.version + 1)]
        stale = self._config.membership.stale_weight
        weights, factors = shares(
            self._config.outer,
            [delivery.manifest for delivery in deliveries],
            norms=[delivery.norm for delivery in deliveries],
            staleness=[stale if delivery.manifest.version <= state.version else 1.0 for delivery in deliveries],
            pseudo_gradients=([pseudo_gradient(d, name, state, self._config) for d in deliveries] for name in names),
        )
        errors = self._factor_errors(state, deliveries, weights)
        step, changes = self._take_step(state, deliveries, weights, factors)
        metrics = {"update_norm": step.update_squared**0.5} | errors
        if not self.unmasker:
            metrics["cosine_mean"] = mean_cosine(step.units_squared, len(deliveries))
        if budget := member_budget(self._config):
            metrics |= budget.spent(state.version + 1)
        return Merged(changes=changes, moments=step.merged_moments(), weights=weights, metrics=metrics)

    def _factor_errors(
        self, state: OuterState, deliveries: Sequence[Delivery], weights: Sequence[int]
    ) -> dict[str, float]:
        """What averaging factors costs in this version, where both are in it and deliveries can be seen."""
        names = self.fragments[self._schedule.fragment(state.version + 1)]
        both = pairs(names) if self._config.model.adapter.is_on else []
        if not both or self.unmasker or self._config.outer.merge != "mean":
            return {}
        counting = [(one, weight) for one, weight in zip(deliveries, weights, strict=True) if weight]

        def delivered(delivery: Delivery, name: str) -> Tensor:
            return base_of(delivery, name, state).double() - pseudo_gradient(delivery, name, state, self._config)

        factors = ([(delivered(one, a), delivered(one, b)) for one, _ in counting] for a, b in both)
        return {"aggregation_error": aggregation_error(factors, [weight for _, weight in counting])}

    def _take_step(
        self, state: OuterState, deliveries: Sequence[Delivery], weights: Sequence[int], factors: Sequence[float]
    ) -> tuple[Step, dict[str, Parts]]:
        """Take the next version's outer step in place; returns it, and the coded changes. Raises RefusedError."""
        version = state.version + 1
        names = self.fragments[self._schedule.fragment(version)]
        shapes = {name: state.parameters[name].shape for name in names}
        told, norms = [delivery.tensors.moments for delivery in deliveries], [delivery.norm for delivery in deliveries]

        def coded(piece: Piece) -> list[tuple[Parts, Tensor]]:
            return [(d.tensors.parts(piece.name), base_of(d, piece.name, state)) for d in deliveries]

        if self.unmasker:  # one that is the mean of all
            total = self.unmasker.total(version, deliveries, weights, shapes)
            weights, factors, told, norms = [1], [total.factor], [total.moments], []

            def coded(piece: Piece) -> list[tuple[Parts, Tensor]]:
                return [(total.changes[piece.name], state.parameters[piece.name])]

        step = Step(self._config, version, state, weights=weights, told=told, shapes=shapes)
        try:
            pieces = [Piece(name) for name in names]
            changes = step.take(pieces, coded, factors=factors, norms=norms, num_threads=self.num_threads)
        except ValueError as error:
            raise RefusedError(str(error)) from None
        state.rows |= tensor_rows({name: state.parameters[name] for name in names}, self.num_threads)
        self.let_go(state, names)
        return step, changes

    def let_go(self, state: OuterState, names: Sequence[str]) -> None:
        """Tensors that are not used again in this version."""
        self._place.let_go(of[name] for of in (state.parameters, *state.kept.values()) for name in names)


def _span(what: str, versions: Sequence[int]) -> str:
    """Version 7, or versions 7 to 9."""
    first, last = min(versions), max(versions)
    return f"{what} {first}" if first == last else f"{what}s {first} to {last}"
