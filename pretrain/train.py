"""The silo's loop; what `launch/start/workers.py` starts, or torchrun on several nodes.

python -m pretrain.train --config run.yaml --silo law [key=value ...]
"""

import argparse
import os
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pretrain.config.check import accumulation_steps
from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import RunConfig, SiloConfig
from pretrain.config.load import load_config
from pretrain.exchange.base import Exchange
from pretrain.exchange.objects import StoreTroubleError
from pretrain.federation.preflight import check_model, check_policy, check_silo
from pretrain.federation.room import check_silo_disk
from pretrain.host.caches import keep_compiled, use_writable_caches
from pretrain.host.disk import full_disk
from pretrain.host.journal import Journal
from pretrain.host.lock import lock_directory
from pretrain.host.stopping import STOPPED, StopRequested, note_signals
from pretrain.outer.blocks import slower
from pretrain.outer.rounds import next_step, passes
from pretrain.silo.account import BudgetSpentError
from pretrain.silo.batch import Batch
from pretrain.silo.cards import check_precision
from pretrain.silo.checkpoint import Checkpoints, Progress, save_parameters
from pretrain.silo.data import BadTokenError, Batches, Mixture, PackedTokens, Prefetch
from pretrain.silo.engine import Engine
from pretrain.silo.evaluate import held_out_means, losses_in_words, sequences_evaluated
from pretrain.silo.flops import peak_tokens_per_second
from pretrain.silo.model import initial_parameters
from pretrain.silo.optim import learning_rate
from pretrain.silo.private import Private, open_private
from pretrain.silo.profile import RoundProfile
from pretrain.silo.ranks import Ranks
from pretrain.silo.shards import Manifest
from pretrain.silo.steplog import StepLog, go_on_without_checkpoint
from pretrain.silo.texts import open_data
from pretrain.silo.verify import verify_in_background
from pretrain.sync.among_silos import AmongSilos
from pretrain.sync.elastic import ElasticSync
from pretrain.sync.practice import Practice
from pretrain.sync.through_store import ThroughStore
from pretrain.trust.egress import tracked
from pretrain.trust.ledger import RefusedError
from pretrain.trust.policy import Policy


@dataclass(kw_only=True)
class Silo:
    """Everything that the loop works with."""

    config: RunConfig
    name: str
    ranks: Ranks
    journal: Journal | None  # the leader's
    engine: Engine
    batches: Prefetch
    mixture: Mixture
    private: Private | None  # None: trains without differential privacy
    held_out: dict[str, PackedTokens]
    checkpoints: Checkpoints
    sync: ElasticSync | None  # None: trains alone
    asked_to_stop: Callable[[], bool]
    progress: Progress = field(default_factory=Progress)
    profile: RoundProfile
    reading: Future[str]  # what is wrong with the shards' bytes; the leader's
    data_checked: bool = False

    def check_data(self) -> None:
        """Wait until every byte of the shards was read once; nothing leaves the silo and nothing is saved before.

        Raises ConfigError on all ranks alike when a shard is not what its manifest says.
        """
        if self.data_checked:
            return
        if self.journal and not self.reading.done():
            step, what = self.progress.step, "the shards' sha256"
            self.journal.status("waiting", step=step, round=self.config.round_at(step), waiting_for=what)
        wrong = self.ranks.from_leader(self.reading.result() if self.ranks.is_leader else None)
        if wrong:
            raise ConfigError(wrong)
        self.data_checked = True

    def evaluate(self) -> None:
        """Held-out loss of the global model, and with an adapter of our own; of a silo that trains alone, its own."""
        began, progress, settings = time.monotonic(), self.progress, self.config.silos[self.name]
        personal = self.engine.personal
        if self.journal:
            self.journal.status("evaluating", step=progress.step, round=progress.round)
        self.engine.evaluating(True)
        with self.sync.global_model(self.engine) if self.sync else nullcontext():
            with personal.away():
                losses, of_pairs = self.losses_of(self.held_out, settings.eval_sequences)
            own = self.losses_of(self.held_out, settings.eval_sequences)[0] if personal.names else None
        self.engine.evaluating(False)
        progress.seconds_evaluating += time.monotonic() - began
        if self.journal:
            sequences = sequences_evaluated(self.held_out, settings.eval_sequences)
            if self.sync:
                self.sync.evaluated(progress.version, losses, sequences, self.reading.result)
            self.journal.record(
                "eval",
                step=progress.step,
                round=progress.round,
                version=progress.version,
                tokens=progress.position * self.config.sequence_tokens,
                val_loss=losses,
                sequences=sequences,
                **of_pairs,
                **({} if own is None else {"personal_loss": own}),  # which no tracker is told
            )
            print(f"round {progress.round:5d}  held-out {losses_in_words(losses, sequences, of_pairs)}", flush=True)
            if own is not None:
                print(f"round {progress.round:5d}  with its own adapter {losses_in_words(own, sequences)}", flush=True)

    def losses_of(
        self, corpora: dict[str, PackedTokens], num_sequences: int
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """What the engine, as it is, comes to on so many sequences of each corpus, as `held_out_means` has it."""
        return held_out_means(
            self.engine.values,
            corpora,
            num_sequences=num_sequences,
            micro_batch_sequences=self.config.silos[self.name].micro_batch_sequences,
            ranks=self.ranks,
        )

    def judge(self) -> None:
        """Tell the contract's gate the held-out loss of the newest version, where that is a candidate."""
        gate, progress, sync, began = self.config.gate, self.progress, self.sync, time.monotonic()
        if not (sync and sync.must_judge(progress.version)):
            return
        self.check_data()
        corpora = {corpus: self.held_out[corpus] for corpus in gate.silos[self.name]}
        self.engine.evaluating(True)
        has_trained = progress.step != (self.config.schedule.adopted(progress.version) if progress.version else 0)
        with sync.global_model(self.engine, has_trained=has_trained), self.engine.personal.away():
            losses, _ = self.losses_of(corpora, gate.eval_sequences)
        self.engine.evaluating(False)
        progress.seconds_evaluating += time.monotonic() - began
        sequences = sequences_evaluated(corpora, gate.eval_sequences)
        sync.judged(progress.version, losses, sequences)
        if self.journal:
            print(f"judged version {progress.version}: {losses_in_words(losses, sequences)}", flush=True)

    def end_round(self) -> None:
        """A round, or several that went on without us, has ended: evaluate if it is time."""
        progress, interval = self.progress, self.config.silos[self.name].eval_interval_rounds
        progress.round = progress.step // self.config.outer.sync_interval_steps
        if self.sync:
            self.sync.set_pace(progress)
        if progress.step == self.config.inner.num_steps or (interval and progress.round % interval == 0):
            self.evaluate()

    def read_from_position(self) -> None:
        """Go on reading where the progress says, if that is not where we are: no text is read twice."""
        if self.batches.state() != self.progress.position:
            self.batches.restore(self.progress.position)

    def agreement_due(self, before: int) -> bool:
        """Whether the ranks talk after this step: when it is logged, and before anything is delivered or saved.

        `before` is the step before this one: a silo that makes fewer steps than others passes several at a time.
        """
        progress, settings = self.progress, self.config.silos[self.name]
        return (
            passes(before, progress.step, settings.log_interval_steps)
            or passes(before, progress.step, self.config.outer.sync_interval_steps)
            or self.config.schedule.is_due(progress.step)
            or passes(before, progress.step, settings.checkpoint_interval_steps)
            or progress.step == self.config.inner.num_steps
        )

    def warmed_up(self) -> float:
        """What the learning rate is multiplied by after the silo has come back to a run that went on without it."""
        progress, warmup_steps = self.progress, self.config.membership.rejoin_warmup_steps
        if not progress.joined_step or not warmup_steps:
            return 1.0
        return min(1.0, (progress.step - progress.joined_step + 1) / warmup_steps)

    def save(self) -> None:
        """Write a checkpoint, and tell the store which version it holds."""
        self.check_data()
        if self.sync:
            self.sync.settle(self.progress)
        self.checkpoints.save(self.progress, self.engine, self.ranks, self.sync.host_tensors if self.sync else {})
        if self.sync:
            self.sync.checkpointed(self.progress)

    def leave(self, error: BudgetSpentError) -> None:
        """Save, and say that the silo takes part no more; raises the error where the others cannot go on without it."""
        self.save()
        if not (self.sync and self.config.membership.is_elastic):
            raise error
        self.sync.leave(self.progress, str(error))


def train(silo: Silo) -> None:
    """Train to the end of the run. Raises StopRequested on all ranks alike; ConfigError when the loss is not finite."""
    config, progress, engine, sync = silo.config, silo.progress, silo.engine, silo.sync
    schedule, interval_steps = config.schedule, config.silos[silo.name].checkpoint_interval_steps
    profile, peak = silo.profile, peak_tokens_per_second(engine.module, config.sequence_tokens, silo.ranks)
    log = StepLog(config, silo.name, silo.journal, progress, peak)
    practice = Practice(config, silo.name, silo.ranks, silo.journal, mixture=silo.mixture, progress=progress)
    if sync:
        sync.catch_up(engine, progress)
        silo.judge()
        silo.read_from_position()
    log.start()
    log.resume_training()
    saved_step = progress.step

    while True:
        if sync and schedule.is_due(progress.step):
            for what, version in schedule.due(progress.step, sent=progress.sent, adopted=progress.version):
                silo.check_data()
                if what == "deliver":
                    with profile.part("sync"):
                        sync.deliver(engine, progress, version)  # global minus local parameters, coded, checksummed
                else:
                    with profile.part("waiting"):
                        sync.wait(progress, version)  # for the aggregator's commit
                    with profile.part("sync"):
                        sync.adopt(engine, progress, version)  # what was merged, checked against the commit's digest
                    silo.judge()  # if the contract's gate asks for it
            sync.catch_up(engine, progress)  # if others have gone on without us
            silo.judge()
            silo.read_from_position()
            log.resume_training()
        if progress.step // schedule.sync_interval_steps > progress.round:
            profile.end_round()
            silo.end_round()
            log.resume_training()
        finished = progress.step == config.inner.num_steps
        if progress.step != saved_step and (finished or passes(saved_step, progress.step, interval_steps)):
            silo.save()
            saved_step = progress.step
            log.resume_training()
        if finished:
            break
        if practice.practise(engine, progress, silo.batches, sync, silo.asked_to_stop):
            log.resume_training()
        inner_step(silo, log)

    log.summary(engine, silo.ranks, silo.mixture)


def inner_step(silo: Silo, log: StepLog) -> None:
    """One inner step. Where it is due, the ranks share their losses and stop requests; raises as `train` does."""
    config, progress, engine, sync = silo.config, silo.progress, silo.engine, silo.sync
    interval, before, stop = config.outer.sync_interval_steps, progress.step, 0.0
    lr = learning_rate(progress.step, config.inner) * silo.warmed_up()
    engine.turns.now = config.schedule.turn(before)  # of an adapter's factors
    num_batches, num_trained = config.silos[silo.name].accumulation_steps, None
    after = next_step(before, interval, progress.round_steps or interval)

    def batch() -> Batch:
        nonlocal num_trained
        with silo.profile.part("data"):
            found = next(silo.batches)
        num_trained = found.num_trained
        return found

    with silo.profile.step(config.round_at(after), after, is_last=passes(before, after, interval)):
        batches = (batch() for _ in range(num_batches))
        if silo.private:
            loss, grad_norm = silo.private.step(engine, batches, lr, progress, silo.profile.part)
        else:
            loss, grad_norm = engine.step(batches, lr, silo.profile.part)
    progress.step = after
    progress.position = silo.batches.state()
    if num_trained is not None and not silo.private:  # a private silo's count of them would tell of its text
        progress.trained_tokens = (progress.trained_tokens or 0) + num_trained
    if num_trained == 0:
        loss = progress.loss  # there is none: the one before stands
    if silo.agreement_due(before):
        told = [loss / silo.ranks.num_ranks, float((sync or silo).asked_to_stop()), *engine.objective.take()]
        progress.loss, stop, *log.of_pairs = silo.ranks.sum(told)
        if not (sync and sync.went_back(engine, progress)):
            log.check_finite(engine.num_skipped_steps, silo.checkpoints.newest)
    log.step(lr, grad_norm)
    if stop:
        raise StopRequested


def prepare(
    config: RunConfig,
    name: str,
    ranks: Ranks,
    journal: Journal | None,
    sync: ElasticSync | None = None,
    *,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Silo:
    """Check the data, join the federation, build the engine; resume from the newest checkpoint, or start anew."""
    settings = config.silos[name]
    settings.accumulation_steps = accumulation_steps(name, settings, ranks.num_ranks)
    _check(config, name, ranks)
    mixture, held_out = open_data(config, name)
    reading = verify_in_background(name, settings) if ranks.is_leader else Future[str]()
    contract_sha256 = sync.join(mixture.epoch_tokens) if sync else ""
    torch.manual_seed(zlib.crc32(f"{config.model.seed}/{name}/{ranks.rank}".encode()))  # dropout
    silo = Silo(
        config=config,
        name=name,
        ranks=ranks,
        journal=journal,
        engine=_engine(config, name, ranks, mixture.corpora[0].manifests[0], is_federated=sync is not None),
        batches=_batches(settings, mixture, ranks),
        mixture=mixture,
        private=open_private(config, name, ranks, mixture),
        held_out=held_out,
        checkpoints=Checkpoints(
            config.silo_directory(name) / "checkpoints",
            keep=settings.keep_checkpoints,
            contract_sha256=contract_sha256,
            kind=config.exchange.kind,
            data=mixture.terms,
            accept_other_data=settings.accept_other_data,
        ),
        sync=sync,
        asked_to_stop=asked_to_stop,
        profile=RoundProfile(config.silo_directory(name), journal, settings.profile_rounds),
        reading=reading,
    )
    if sync and ranks.is_leader:
        silo.checkpoints.keep_only(sync.is_ours)
    resumed = silo.checkpoints.load(silo.engine, ranks, sync.host_tensors if sync else {})
    if resumed:
        silo.progress = resumed
        if sync:
            sync.resume(silo.engine, resumed)
    elif sync:
        sync.start(silo.engine, silo.progress)
        if journal and silo.progress.version:
            go_on_without_checkpoint(config, journal, silo.progress)
    else:
        silo.engine.write(iter(initial_parameters(config).items()) if ranks.is_leader else None)
        silo.progress.version = 0
    silo.read_from_position()
    silo.engine.check_sight()
    if not resumed:
        silo.evaluate()
    return silo


def _check(config: RunConfig, name: str, ranks: Ranks) -> None:
    """Text, model, a card that computes in its precision, and room for checkpoints. Raises ConfigError."""
    check_silo(config, name)
    check_model(config)
    check_precision(name, config.silos[name].precision, ranks)
    if ranks.is_leader:
        check_silo_disk(config, name)


def _engine(config: RunConfig, name: str, ranks: Ranks, packed: Manifest, *, is_federated: bool) -> Engine:
    return Engine(
        config.model,
        config.silos[name],
        config.inner,
        vocab_size=packed.vocab_size,
        ranks=ranks,
        mask_at=packed.end_of_text_id if config.document_masking else None,
        sums_gradients=is_federated and config.outer.control_variates > 0,
    )


def _exchange(config: RunConfig, name: str, ranks: Ranks) -> Exchange | None:
    kind, num_lanes = config.exchange.kind, config.exchange.num_lanes
    if kind == "collective":
        return AmongSilos(config, name, ranks.group(num_lanes) if num_lanes > 1 else None)
    return ThroughStore(config, name) if kind == "store" else None


def _batches(settings: SiloConfig, mixture: Mixture, ranks: Ranks) -> Prefetch:
    batches = Batches(
        mixture,
        micro_batch_sequences=settings.micro_batch_sequences,
        accumulation_steps=settings.accumulation_steps,
        rank=ranks.rank,
        num_ranks=ranks.num_ranks,
    )
    return Prefetch(batches, num_batches=settings.prefetch_batches, device=ranks.device)


def run(config: RunConfig, name: str, journal: Journal | None) -> int:
    """Prepare and train; returns 0 when done, STOPPED when stopped with everything saved."""
    ranks = Ranks(lambda what: journal.status("waiting", waiting_for=what) if journal else None)
    if journal:
        journal.status("starting")
    asked_to_stop = note_signals()
    exchange = _exchange(config, name, ranks)
    sync = ElasticSync(config, name, ranks, journal, exchange, asked_to_stop=asked_to_stop) if exchange else None
    silo, ended = None, "has failed"
    try:
        silo = prepare(config, name, ranks, journal, sync, asked_to_stop=asked_to_stop)
        train(silo)
        ended = ""
    except StopRequested:
        ended = "was stopped"
        if silo:
            silo.save()
            if journal:
                why = (sync and sync.lost) or "on request"
                print(f"stopped after step {silo.progress.step}: {why}; all is saved, start again to go on", flush=True)
        return STOPPED
    except BudgetSpentError as error:
        ended = "has spent its privacy budget"
        assert silo
        silo.leave(error)
        return 0
    finally:
        if silo:
            silo.profile.close()
            silo.batches.close()
        if sync:
            sync.close(ended)
    if sync and (lost := ranks.from_leader(sync.lost)):
        if journal:
            print(f"all steps are done, but {lost}: start again, so that it gets what it lacks", flush=True)
        ranks.close()
        return STOPPED
    if not sync:
        silo.check_data()
        save_parameters(config.final_parameters(name), silo.engine, ranks)
    ranks.close()
    return 0


def _journal(config: RunConfig, name: str, policy: Policy) -> Journal:
    return Journal(config, f"silos/{name}", silo=name, allows=policy.shows, says=tracked(config, name, policy))


def main() -> int:
    """Command line; returns the exit code: 0 done, 2 a user's mistake, 75 stopped, or a store in trouble."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", required=True, help="YAML file; may be given several times")
    parser.add_argument("--silo", required=True, help="which of the configuration's silos this is")
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_args()
    is_leader = os.environ.get("RANK", "0") == "0"
    journal: Journal | None = None
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.silo not in config.silos:
            raise ConfigError(f"--silo: {arguments.silo!r} given; allowed: {named(sorted(config.silos))}")
        policy = check_policy(config)
        caches = use_writable_caches(Path(config.directory))
        keep_compiled()
        if is_leader:
            for line in filter(None, (caches, slower)):
                print(line, flush=True)
            lock_directory(config.silo_directory(arguments.silo), f"silo {arguments.silo}")
            journal = _journal(config, arguments.silo, policy)
            journal.status("starting")
        code = run(config, arguments.silo, journal)
    except Exception as error:
        code, message = STOPPED if isinstance(error, StoreTroubleError) else 2, str(error)
        if not isinstance(error, ConfigError | RefusedError) and not (message := full_disk(error, config.directory)):
            raise
        only_ours = isinstance(error, BadTokenError) or not isinstance(error, ConfigError)
        if is_leader or only_ours:
            print(f"atoll: {message}", file=sys.stderr, flush=True)
        with suppress(OSError):  # the disk may be full
            if journal:
                journal.error(message)
            elif only_ours:  # the leader does not know what ended this rank
                (config.silo_directory(arguments.silo) / "error.txt").write_text(f"{message}\n")
    if journal:
        with suppress(OSError):
            journal.status({0: "finished", STOPPED: "stopped"}.get(code, "failed"))
        journal.close()
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is closed; the interpreter's own end can abort in a thread of gloo that is still ending
