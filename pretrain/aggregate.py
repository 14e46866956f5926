"""The aggregator's loop: wait for the silos' fragments, verify, merge, take the outer step, commit. CPU only.

    python -m pretrain.aggregate --config run.yaml [key=value ...]

All its state is in the store: killed at any point, it goes on with the same version and comes to the same commit.
"""

import argparse
import gc
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.config.load import load_config
from pretrain.exchange.agreement import accept_amendments, agree
from pretrain.exchange.archive import Archive
from pretrain.exchange.lease import Lease
from pretrain.exchange.objects import StoreTroubleError
from pretrain.exchange.payload import PARAMETER, save_tensors
from pretrain.exchange.rollback import check_held, explain, finish_rollbacks, foreign, roll_back, rollback_records
from pretrain.exchange.sealed import give_group_key, seal_payload
from pretrain.exchange.store import StoreExchange, version_path
from pretrain.federation.preflight import check_model, check_public
from pretrain.federation.room import check_aggregator_room
from pretrain.host.disk import full_disk
from pretrain.host.foreign import loads
from pretrain.host.journal import Journal
from pretrain.host.lock import lock_directory
from pretrain.host.stopping import STOPPED, StopRequested, raise_at_signals
from pretrain.merge.collect import POLLS_PER_LOOK, Collector, Delivery
from pretrain.merge.gatekeeper import Gatekeeper
from pretrain.merge.merger import Merged, Merger
from pretrain.merge.snapshots import Snapshots
from pretrain.merge.terms import commit_record, contributor
from pretrain.outer.blocks import slower
from pretrain.outer.codec import encode
from pretrain.outer.digest import tensor_rows
from pretrain.outer.placing import InMemory, OnDisk
from pretrain.outer.quantize import Parts
from pretrain.outer.state import OuterState, kept_at_start
from pretrain.trust.amendment import Governed
from pretrain.trust.contract import build_contract, check_same_contract, first_contract
from pretrain.trust.egress import tracked
from pretrain.trust.ledger import Commit, Contributor, Payload, RefusedError, sha256_bytes
from pretrain.trust.member import check_budget
from pretrain.trust.policy import Policy
from pretrain.trust.quality import losses, say_not_counted

MOST_REPAIRS = 3  # a version: whoever says that it is damaged has all of it read again


class Aggregator:
    """Merges the silos of one store. Memory: the outer state and a few single tensors, however many silos there are."""

    def __init__(
        self, config: RunConfig, journal: Journal, *, take_lease: Callable[[StoreExchange], Lease] | None = None
    ) -> None:
        """`take_lease` makes sure that no other aggregator works on the store, once the contract is known."""
        self._own, self._governed = config, Governed(config)
        config = self._governed.config
        self._config, self._journal, self._schedule = config, journal, config.schedule
        self._take_lease = take_lease
        self._lease: Lease | None = None
        self._exchange = StoreExchange.of_run(config)
        self._exchange.speak_as(config, OPERATOR)
        self._scratch = Path(config.directory) / "aggregator"
        self._archive = Archive.of_run(config, self._exchange, self._scratch, check_lease=self._check_lease)
        self._place = OnDisk(self._scratch / "state") if config.outer.state == "disk" else InMemory()
        self._merger = Merger(config, self._exchange, self._scratch, self._place, go_to=self._go_to)
        self._newest_file = self._scratch / "newest.json"
        self._newest: Commit | None = None
        self._next_look, self._num_repairs = time.monotonic(), 0
        self.snapshots = Snapshots(
            config, self._exchange, self._scratch, check_lease=self._check_lease, let_go=self._merger.let_go
        )
        self._collector = Collector(config, self._exchange, journal)
        self._gatekeeper: Gatekeeper | None = None
        if config.gate.is_on:
            self._gatekeeper = Gatekeeper(config, self._exchange, journal, check_lease=self._check_lease)

    # ---- start

    def start(self) -> OuterState:
        """Write or compare the contract, take the lease; load the newest version, or write version 0."""
        ours = build_contract(self._own)
        check_budget(self._own)
        stored = self._exchange.read_contract()
        known = self._check_history()
        if self._archive:
            self._archive.check()
        check_model(self._config)
        check_public(self._own)
        newest = self._exchange.newest_version()
        check_aggregator_room(self._config, is_new=newest < 0)
        initial: dict[str, Tensor] = {}
        if stored is None:
            if newest >= 0:
                raise ConfigError(f"exchange.url: {self._config.store_url} given; it has versions but no contract.json")
            initial = self._initial()  # a mistake in the model must not leave a contract behind
            self._exchange.write_contract(first_contract(ours))
        else:
            check_same_contract(ours, stored, self._config.store_url)
        # Only now are the keys known that a lease is signed with. All that was written is the contract, once.
        self._lease = self._take_lease(self._exchange) if self._take_lease else None
        self._agree()
        if stored is not None:
            finish_rollbacks(self._exchange)
            for record in rollback_records(self._exchange, self._config):
                self._journal.record("rollback", **record)
        newest = self._exchange.newest_version()
        if newest < known:
            raise ConfigError(
                f"exchange.url: {self._config.store_url} given; version {newest + 1} is missing there, and the newest "
                f"that this aggregator has made is {known}; restore {version_path(newest + 1)}/commit.json"
            )
        if newest < 0:
            return self._create(initial or self._initial())
        if self._gatekeeper:
            self._gatekeeper.start(newest)
        return self._load(newest)

    def _go_to(self, version: int) -> None:
        """From here on the configuration says what holds at a version that is made, or made again."""
        self._governed.go_to(self._exchange.members.terms_at(version))

    def _check_lease(self) -> None:
        """Raise ConfigError if another aggregator works on this store by now."""
        if self._lease:
            self._lease.check()

    def stop(self) -> None:
        """Write no more, and let another aggregator begin."""
        self.snapshots.stop()
        if self._archive:
            self._archive.stop()
        if self._lease:
            self._lease.release()
        self._exchange.objects.close_egress()

    def _agree(self) -> None:
        def say(words: str) -> None:
            self._journal.status("waiting", round=0, waiting_for=words)

        agree(self._exchange, self._own, OPERATOR, lambda: time.sleep(self._config.exchange.poll_seconds), say=say)
        give_group_key(self._exchange)

    def _initial(self) -> dict[str, Tensor]:
        from pretrain.silo.model import initial_parameters

        return initial_parameters(self._config, self._place.copy if self._config.outer.state == "disk" else None)

    def _check_history(self) -> int:
        """The newest version that was made from this run directory, and was not rolled back; -1 if there is none.

        Raises ConfigError if the store lacks its commit.
        """
        if not self._newest_file.is_file():
            return -1
        try:
            known = loads(self._newest_file.read_bytes())
            version, commit_sha256 = int(known["version"]), str(known["commit_sha256"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"run directory: {str(self._newest_file)!r} is damaged, which says what was committed last; "
                "delete it if nobody has put an older copy of the store there"
            ) from None
        origin = explain(self._exchange, version, commit_sha256)
        if origin == "foreign":
            raise ConfigError(foreign("this aggregator", version, commit_sha256, self._exchange))
        return version if origin == "same" else -1

    def _create(self, parameters: dict[str, Tensor]) -> OuterState:
        """Version 0: the contract's initial parameters and an outer state of zeros."""
        outer = self._config.outer
        state = OuterState(
            version=-1,
            parameters=parameters,
            kept=kept_at_start(parameters, outer.optimizer, outer.downlink_codec, self._place),
            rows=tensor_rows(parameters, self._merger.num_threads),
        )
        self._merger.cut(parameters)
        changes = {name: encode("fp32", value, value) for name, value in parameters.items()}
        self._commit(state, range(len(self._merger.fragments)), changes, [], moments={}, divisor=0, metrics={})
        return state

    def _load(self, newest: int) -> OuterState:
        """Restart: load each fragment's last snapshot, and follow the newest version from it and the deliveries since.

        The chain of commits is checked as far back as any of them is used, and the digests of what comes out.
        """
        self._go_to(newest + 1)
        snapshots = self.snapshots.history.last_snapshots(newest)
        first = max(0, min(*snapshots, newest + 1 - self._collector.past.num_needed))
        commits = {commit.version: commit for commit in self._exchange.read_commits(first, newest)}
        for commit in commits.values():
            self._collector.past.committed(commit)
        state = self._merger.load(self.snapshots, snapshots, commits)
        later = [commit for v, commit in commits.items() if v > snapshots[self._schedule.fragment(v)]]
        self._merger.replay(state, later, snapshots)
        self._newest = commits[newest]
        if state.parameters_digest != self._newest.parameters_digest:
            raise RefusedError(f"version {newest}: its parameters do not have the digest of its commit")
        self._merger.let_go(state, list(state.parameters))
        if self._newest.outer_digest and newest not in snapshots:  # killed before it was written
            self.snapshots.begin(state, self._newest, self._merger.fragments[self._schedule.fragment(newest)])
        if newest:  # whoever committed it may have died before it wrote this
            self._journal.record("commit", **commit_record(self._config, self._newest))
        return state

    # ---- one version

    def collect(self, state: OuterState) -> list[Delivery]:
        """Wait until a version's deliveries are there, as many as the contract asks for."""
        next_version, unmasker = state.version + 1, self._merger.unmasker
        self._go_to(next_version)
        deliveries = self._collector.collect(
            next_version,
            lambda silo, data, version, over: self._merger.verify(silo, data, state, version, over),
            self._look,
            chosen=unmasker.chosen(next_version) if unmasker else (),
        )
        if unmasker:
            unmasker.wait(next_version, deliveries, self._journal, check=self._check_lease, look=self._look)
        return deliveries

    def _look(self) -> None:
        """Now and then: whether our newest commit is in the store, and whether a silo says that it is damaged there."""
        if time.monotonic() < self._next_look or not self._newest:
            return
        self._next_look = time.monotonic() + POLLS_PER_LOOK * self._config.exchange.poll_seconds
        self._check_held()
        if self._gatekeeper:
            self._gatekeeper.look(self._newest.version)
        if not self._exchange.hear_damaged(self._config.full_roster, self._newest.version):
            return
        self._collector.put_back(check=self._check_lease)
        if self._num_repairs < MOST_REPAIRS:
            self._num_repairs += 1
            self.snapshots.repair_all(self._newest)

    def _check_held(self) -> str:
        """sha256 of our newest commit; raises ConfigError if the store has another one, or none, in its place.

        What we have not signed gives way to it.
        """
        assert self._newest
        version, commit_sha256 = self._newest.version, sha256_bytes(self._newest.to_bytes())
        if not check_held("this aggregator", version, commit_sha256, self._exchange):
            self._check_lease()
            with suppress(FileExistsError):  # whoever writes faster is met again
                name = f"{version_path(version)}/commit.json"
                self._exchange.write_over(name, self._newest.to_bytes(), lambda: self._exchange.has_commit(version))
                print(f"version {version}: somebody has replaced its commit; it was written again", flush=True)
        return commit_sha256

    # ---- the gate

    def judge(self, state: OuterState, *, is_last: bool = False) -> None:
        """Judge the newest version by the public splits, and decide about candidates, as the contract's gate asks for.

        Raises ConfigError where the run goes back by it; of the last version it waits for all results.
        """
        keeper, config = self._gatekeeper, self._config
        if not keeper:
            return
        if config.gate.public and config.gate.is_candidate(state.version):
            from pretrain.federation.public import judge_public  # whoever judges nothing needs no transformers

            judge_public(config, self._exchange, state)
        keeper.wait(state.version) if is_last else keeper.look(state.version)
        if decision := keeper.goes_back:
            self.finish()
            why = f"gate: version {decision.version} has not become the current one: {'; '.join(decision.reasons)}"
            roll_back(self._exchange, config.outer.num_fragments, to=decision.current, reason=why)
            raise ConfigError(f"{why}; the run was taken back to version {decision.current}; start it again")

    def merge(self, state: OuterState, deliveries: list[Delivery]) -> Merged:
        """Merge and take the outer step in place, as soon as what is done beside training is done."""
        self.finish()
        return self._merger.merge(state, deliveries)

    def finish(self) -> None:
        """Wait until the last version's snapshot is written, and what nobody needs any more archived and pruned."""
        self.snapshots.finish()
        if self._archive:
            self._archive.finish()

    def commit(self, state: OuterState, deliveries: list[Delivery], merged: Merged) -> None:
        """Publish the next version, record it, prune what nobody can need again."""
        contributors = [
            contributor(delivery.manifest, delivery.manifest_bytes, weight)
            for delivery, weight in zip(deliveries, merged.weights, strict=True)
        ]
        divisor, metrics = sum(merged.weights), merged.metrics | self._facts(deliveries, state.version + 1)
        fragment = self._schedule.fragment(state.version + 1)
        commit = self._commit(
            state, [fragment], merged.changes, contributors, moments=merged.moments, divisor=divisor, metrics=metrics
        )
        cosine = f"cosine {metrics['cosine_mean']:+.3f}  " if "cosine_mean" in metrics else ""
        error = f"error of averaging {metrics['aggregation_error']:.3%}  " if "aggregation_error" in metrics else ""
        print(
            f"commit {state.version:5d}/{self._schedule.num_versions}  fragment {fragment}  "
            f"silos {named([c.silo for c in contributors])}  divisor {divisor}  update {metrics['update_norm']:.4f}  "
            f"{cosine}{error}digest {state.parameters_digest[:12]}",
            flush=True,
        )
        say_not_counted(commit)
        self._collector.merged = [(delivery.manifest, delivery.manifest_bytes) for delivery in deliveries]
        self._journal.record("commit", **commit_record(self._config, commit))
        merged_again = self._config.trust.keep_deliveries + 1  # from the version before them
        keep = max(self._config.exchange.keep_versions, merged_again)
        if self._gatekeeper:  # what may be exported, or gone back to
            keep = max(keep, state.version - self._gatekeeper.current + 1)
        late = self._config.membership.stale_weight > 0
        prune = self._archive.begin if self._archive else self.snapshots.history.prune
        prune(self._collector.members(), state.version, keep, late=late)
        if self.snapshots.is_due(state.version):
            self.snapshots.begin(state, commit, self._merger.fragments[fragment])

    def _facts(self, deliveries: list[Delivery], version: int) -> dict[str, float]:
        """What later rounds, or those who check this one, need to know of the silos in it."""
        rules, facts = self._config.membership, {}
        if self._config.outer.quality_floor is not None:
            facts = losses([delivery.manifest for delivery in deliveries], version)
        for delivery in deliveries:
            silo = delivery.manifest.silo
            if rules.max_norm_ratio and not delivery.base:
                facts[f"norm/{silo}"] = delivery.norm
            if rules.steps == "speed":
                facts[f"seconds_per_step/{silo}"] = delivery.manifest.metrics["seconds_per_step"]
        return facts

    def _commit(
        self,
        state: OuterState,
        fragments: Sequence[int],
        changes: dict[str, Parts],
        contributors: list[Contributor],
        *,
        moments: dict[str, Parts],
        divisor: int,
        metrics: dict[str, float],
    ) -> Commit:
        version, outbox = state.version + 1, self._scratch / "outbox"
        codec = self._config.outer.downlink_codec if version else "fp32"
        previous = self._check_held() if version else None
        shutil.rmtree(outbox, ignore_errors=True)
        payloads: list[tuple[Payload, Path]] = []
        for fragment in fragments:
            coded = {name: changes[name] for name in self._merger.fragments[fragment]}
            file = outbox / f"{PARAMETER if codec == 'fp32' else 'change'}-{fragment:03d}.safetensors"
            payload = save_tensors(coded, file, fragment=fragment, moments=moments)
            payloads.append((seal_payload(self._exchange, OPERATOR, version, payload, file), file))
        commit = Commit(
            contract_sha256=self._exchange.terms_sha256(version),
            version=version,
            previous=previous,
            codec=codec,
            payloads=[payload for payload, _ in payloads],
            contributors=contributors,
            divisor=divisor,
            parameters_digest=state.parameters_digest,
            outer_digest=state.kept_digest(changes) if self.snapshots.is_due(version) else "",
            metrics=metrics,
        )
        self._merger.let_go(state, list(changes))
        commit = self._exchange.members.sign(commit)
        if version:
            accept_amendments(self._exchange, self._own, before=version, check=self._check_lease)
        self._publish(commit, payloads)
        state.version = version
        self._collector.past.committed(commit)
        return commit

    def _publish(self, commit: Commit, payloads: list[tuple[Payload, Path]]) -> None:
        """Write a version, and note it here. Raises ConfigError if it is there already."""
        try:
            self._exchange.publish(commit, payloads, check=self._check_lease)
        except FileExistsError:
            raise ConfigError(
                f"exchange.url: {self._config.store_url} given; version {commit.version} is there already, and this "
                "aggregator has not made it: somebody else writes to this store; find out who, take "
                f"{version_path(commit.version)} away and start again"
            ) from None
        self._newest, self._num_repairs = commit, 0
        known = {"version": commit.version, "commit_sha256": sha256_bytes(commit.to_bytes())}
        temporary = self._newest_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(known))
        temporary.replace(self._newest_file)


def aggregate(config: RunConfig, journal: Journal) -> None:
    """Commit one version after another until the last."""
    exchange = config.exchange
    if exchange.kind != "store":
        raise ConfigError(f"exchange.kind: {exchange.kind!r} given; an aggregator serves only 'store'")
    aggregator = Aggregator(config, journal, take_lease=partial(Lease, seconds=exchange.lease_seconds))
    try:
        state = aggregator.start()
        aggregator.judge(state)
        gc.collect()
        gc.freeze()  # what was loaded to start stays: no later collection has to go through it
        while state.version < config.schedule.num_versions:
            deliveries = aggregator.collect(state)
            aggregator.judge(state)
            journal.status("merging", round=config.round_of(state.version + 1))
            merged = aggregator.merge(state, deliveries)
            aggregator.commit(state, deliveries, merged)
            aggregator.judge(state)
            del deliveries, merged  # before the next ones come
        aggregator.judge(state, is_last=True)
        aggregator.finish()
    finally:
        aggregator.stop()


def main() -> int:
    """Command line; returns the exit code: 0 done, 2 a user's mistake, 75 stopped, or a store in trouble."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", required=True, help="YAML file; may be given several times")
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_args()
    journal: Journal | None = None
    try:
        config = load_config(arguments.config, arguments.overrides)
        lock_directory(Path(config.directory) / "aggregator", "an aggregator")
        policy = Policy(tiers=config.trust.metrics)
        says = tracked(config, OPERATOR, policy)
        journal = Journal(config, "aggregator", silo=None, allows=policy.shows, says=says)
        journal.status("starting")
        torch.set_num_threads(1)
        print(slower, flush=True) if slower else None
        raise_at_signals()
        aggregate(config, journal)
    except StopRequested:
        assert journal
        journal.status("stopped")
        journal.close()
        return STOPPED
    except Exception as error:
        message = str(error)
        if not isinstance(error, ConfigError | RefusedError) and not (message := full_disk(error, config.directory)):
            raise
        print(f"atoll: {message}", file=sys.stderr, flush=True)
        may_pass = isinstance(error, StoreTroubleError)
        with suppress(OSError):  # the disk may be full
            if journal:
                journal.error(message)
                journal.status("stopped" if may_pass else "failed")
        return STOPPED if may_pass else 2
    peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    journal.record("aggregator", peak_memory_bytes=peak_memory_bytes)
    journal.status("finished", round=config.num_rounds)
    journal.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
