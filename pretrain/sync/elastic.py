"""A silo's side of the outer step where the others may go on without it, and where silos differ in speed."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from pretrain.exchange.gated import Gated, told_losses
from pretrain.exchange.objects import StopWaitingError
from pretrain.exchange.words import Evaluation
from pretrain.host.stopping import StopRequested
from pretrain.outer.rounds import steps_of_round
from pretrain.silo.checkpoint import Progress
from pretrain.silo.engine import Engine
from pretrain.silo.steplog import count_seconds
from pretrain.sync.flight import done
from pretrain.sync.silo_sync import SiloSync
from pretrain.sync.through_store import ThroughStore

LOSS_DECAY = 0.9  # of the running mean that a loss is compared with


class ElasticSync(SiloSync):
    """Adds to `SiloSync` what the contract's `membership` allows; in a run of a fixed roster nothing of it happens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what SiloSync takes."""
        super().__init__(*args, **kwargs)
        rules = self.config.membership
        self._may_miss = rules.is_elastic or rules.sample is not None
        mine = self._may_miss and self.ranks.is_leader and isinstance(self._exchange, ThroughStore)
        self._store: ThroughStore | None = self._exchange if mine else None  # type: ignore[assignment]
        self._has_started, self._num_skipped = False, 0
        self._judged = -1  # the candidate that we were asked for last

    def start(self, engine: Engine, progress: Progress) -> None:
        """Take over version 0, or the newest, and say that we take part."""
        super().start(engine, progress)
        self.set_pace(progress)
        if self._store:
            self._store.announce(progress.version)

    def must_judge(self, version: int) -> bool:
        """Whether the contract's gate waits for our held-out loss of the newest version; all ranks must call this."""
        gate = self.config.gate
        if version == self._judged or not gate.is_candidate(version) or self.silo not in gate.silos:
            return False
        self._judged = version
        return not self._with_gate(lambda gated: gated.result(self.silo, version, self.digest) is not None)

    def judged(self, version: int, losses: dict[str, float], sequences: dict[str, list[int]]) -> None:
        """Tell it, before anything else: whoever goes on has said it."""
        counts = {corpus: float(found[0]) for corpus, found in sequences.items()}
        self._with_gate(
            lambda gated: gated.tell(
                self.silo,
                Evaluation(
                    version=version, parameters_digest=self.digest, losses=told_losses(losses), sequences=counts
                ),
            )
        )

    def _with_gate(self, ask: Callable[[Gated], bool | None]) -> bool | None:
        """What the leader is told; StopRequested, on all ranks, where the store is away."""
        found, is_away = None, False
        if self.ranks.is_leader:
            assert isinstance(self._exchange, ThroughStore)
            try:
                with self._exchange.gated() as gated:
                    found = ask(gated)
            except StopWaitingError:
                is_away = True
        found, is_away = self.ranks.from_leader([found, is_away])
        if is_away:
            raise StopRequested
        return found

    def leave(self, progress: Progress, why: str) -> None:
        """Say that we take part no more; what was delivered counts."""
        if self._store:
            self._store.announce(progress.version, left=True)
            print(f"{why}; it has left, and the others go on", flush=True)

    def catch_up(self, engine: Engine, progress: Progress) -> None:
        """Take over the newest version and its place in the schedule, if the others have gone on without us.

        What the engine has learned since it was last sent is kept by the error feedback, if there is one, and else
        lost, as it would not fit the parameters that the others have. A silo that is not drawn for a round waits for
        what the others make of it.
        """
        if not self._may_miss:
            return
        while progress.step < self.schedule.num_steps:
            if not self._is_drawn(progress.step):
                version = progress.version + 1
                waited = self._receivers.submit(self._store.wait_for, version) if self._store else None
                self._poll(waited, f"version {version}", progress)
            newest = self.ranks.from_leader(self._store.newest(progress.version) if self._store else None)
            if newest > progress.sent:
                self._jump(engine, progress, newest)
            elif self._is_drawn(progress.step):
                break
        self._has_started = True

    def set_pace(self, progress: Progress) -> None:
        """At the end of a round: how many inner steps this silo makes in the next, so that all arrive together."""
        if self.config.membership.steps != "speed":
            return
        prefix = "seconds_per_step/"
        told = self._last_commit.metrics if self._last_commit else {}
        measured = {key.removeprefix(prefix): value for key, value in told.items() if key.startswith(prefix)}
        interval = self.schedule.sync_interval_steps
        steps = steps_of_round({self.silo: progress.seconds_per_step} | measured, self.silo, interval)
        progress.round_steps = self.ranks.from_leader(steps)

    def went_back(self, engine: Engine, progress: Progress) -> bool:
        """Go back to the last commit, with a fresh inner optimizer, if the loss is not finite or has risen too far."""
        limit, mean = self.config.membership.max_loss_rise, progress.mean_loss
        if limit is None:
            return False
        num_skipped, self._num_skipped = engine.num_skipped_steps - self._num_skipped, engine.num_skipped_steps
        finite = math.isfinite(progress.loss) and not num_skipped
        if finite and (not mean or progress.loss <= mean + limit):
            progress.mean_loss = mean * LOSS_DECAY + progress.loss * (1 - LOSS_DECAY) if mean else progress.loss
            return False
        self._write(engine, list(engine.shapes), self.global_parameters)
        engine.forget_optimizer()
        progress.was_sent(range(self.schedule.num_fragments))
        progress.joined_step = progress.step  # a fresh optimizer warms up, as after joining
        if self.journal:
            print(f"loss {progress.loss:.4f} at step {progress.step}: back to version {progress.version}", flush=True)
            self.journal.record("went_back", step=progress.step, version=progress.version, loss=progress.loss)
        return True

    def _is_drawn(self, step: int) -> bool:
        """Whether we train in a step's round, or are in the middle of it; all ranks must call this."""
        interval = self.schedule.sync_interval_steps
        if self.config.membership.sample is None or step % interval:
            return True
        return bool(self.ranks.from_leader(self._store.is_drawn(step // interval + 1) if self._store else None))

    def _jump(self, engine: Engine, progress: Progress, newest: int) -> None:
        began, missed = time.monotonic(), progress.version
        self.settle(progress)
        if self._decay:
            for name in engine.shapes:
                local = engine.read(name)
                if self.ranks.is_leader:
                    change = self.global_parameters[name] - local.cpu()
                    self.residuals.setdefault(name, torch.zeros_like(change)).add_(change)
                del local
        fetched = self._receivers.submit(self._fetch, progress, newest) if self.ranks.is_leader else None
        self._poll(fetched, f"version {newest}", progress)
        num_bytes, position = fetched.result() if fetched else (0, 0)
        position = self.ranks.from_leader(position)
        is_behind = position > progress.position  # a checkpoint that is older than our newest part in these versions
        progress.position = max(progress.position, position)
        self._write(engine, list(engine.shapes), self.global_parameters)
        self._go_on_from(progress, newest)
        if is_behind and self.journal:
            count_seconds(self.journal, progress)
        for version in range(newest + 1, progress.sent + 1):
            if self.ranks.is_leader and version not in self._flights:
                self._take_off(version, self._names(engine, version), done(None))
        progress.seconds_waiting += time.monotonic() - began
        if self._store and not self._has_started:
            self._store.announce(newest)
        if self.journal:
            print(f"caught up from version {missed} to {newest}, step {progress.step}", flush=True)
            self.journal.record(
                "catch_up", step=progress.step, version=newest, from_version=missed, bytes_received=num_bytes
            )

    def _fetch(self, progress: Progress, newest: int) -> tuple[int, int]:
        """Bring the host copy to version `newest`; returns the bytes received, and our position by the commits missed.

        `progress` is where we were.
        """
        assert self._store
        num_bytes, commit = 0, self._store.commit(newest)
        for received in self._store.changes(progress.version, newest, self.global_parameters):
            self._take_over(received)
            num_bytes += received.bytes_received
        self._check_digest(progress, commit)
        for version in [version for version in self._flights if version <= newest]:
            flight = self._flights.pop(version)
            flight.coded.result()
            self._settle(progress, self._store.commit(version), refused=False)
        return num_bytes, self._position(newest, above=progress.version)
