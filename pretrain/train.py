"""The silo's loop; what torchrun starts.

    torchrun --nproc-per-node 2 -m pretrain.train --config run.yaml --silo law [key=value ...]
"""

import argparse
import math
import os
import resource
import signal
import sys
import time
import zlib
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from pretrain.config import ConfigError, RunConfig, check_batch, load_config
from pretrain.journal import Journal
from pretrain.lock import lock_directory
from pretrain.silo.checkpoint import Checkpoints, Progress
from pretrain.silo.data import Batches, Order, PackedTokens
from pretrain.silo.engine import Engine
from pretrain.silo.evaluate import held_out_loss
from pretrain.silo.model import build_initial
from pretrain.silo.optim import learning_rate
from pretrain.silo.ranks import Ranks
from pretrain.silo.shards import read_manifest, tokenizer_sha256, verify_shards
from pretrain.sync import SiloSync, StopRequested

STOPPED = 75  # EX_TEMPFAIL: stopped on request with a checkpoint; start it again to go on


def train(config: RunConfig, name: str, ranks: Ranks, journal: Journal | None) -> None:
    """Train silo `name` to the end of the run, from its newest checkpoint if there is one."""
    silo, inner, sync_interval = config.silos[name], config.inner, config.outer.sync_interval_steps
    asked_to_stop = _stop_signals()
    check_batch(name, silo, ranks.num_ranks)
    data, held_out, vocab_size = _open_data(config, name, verify=ranks.is_leader)
    sync = SiloSync(config, name, ranks, journal, asked_to_stop) if config.exchange.kind == "store" else None
    contract_sha256 = sync.join() if sync else ""
    torch.manual_seed(zlib.crc32(f"{config.model.seed}/{name}/{ranks.rank}".encode()))  # dropout
    engine = Engine(config.model, silo, inner, vocab_size=vocab_size, ranks=ranks)
    checkpoints = Checkpoints(
        config.silo_directory(name) / "checkpoints", keep=silo.keep_checkpoints, contract_sha256=contract_sha256
    )
    global_parameters = sync.global_parameters if sync else {}
    batches = Batches(
        data,
        # A stated seed gives the same order in every silo that states it; otherwise each silo has its own.
        Order(seed=silo.data_seed or 0, silo=name if silo.data_seed is None else "", num_sequences=data.num_sequences),
        micro_batch_sequences=silo.micro_batch_sequences,
        accumulation_steps=silo.accumulation_steps,
        rank=ranks.rank,
        num_ranks=ranks.num_ranks,
    )

    def evaluate(progress: Progress) -> None:
        began = time.monotonic()
        if journal:
            journal.status("evaluating", step=progress.step, round=progress.version)
        engine.evaluating(True)
        losses = held_out_loss(
            engine.token_losses,
            held_out,
            num_sequences=silo.eval_sequences,
            micro_batch_sequences=silo.micro_batch_sequences,
            ranks=ranks,
        )
        engine.evaluating(False)
        progress.seconds_evaluating += time.monotonic() - began
        if journal:
            journal.record("eval", step=progress.step, round=progress.version, val_loss=losses)
            print(f"round {progress.version:5d}  held-out " + "  ".join(f"{c} {v:.4f}" for c, v in losses.items()), flush=True)

    def save(progress: Progress) -> None:
        checkpoints.save(progress, engine, ranks, global_parameters)
        if sync:
            sync.checkpointed(progress.version)

    progress = checkpoints.load(engine, ranks, global_parameters)
    if progress is None:
        progress = Progress()
        if sync:
            sync.wait(progress)
            sync.adopt(engine, progress)
        else:
            initial = build_initial(config.model, vocab_size).named_parameters() if ranks.is_leader else None
            engine.write(initial)
            progress.version = 0
        evaluate(progress)
    batches.restore(progress.position)
    log = StepLog(config, name, ranks, journal, progress)

    while True:
        # ---- the end of a round: pseudo-gradient out, merged parameters in
        if progress.step // sync_interval > progress.version:
            began = time.monotonic()
            if sync:
                round_tokens = sync_interval * silo.global_batch_sequences * config.sequence_tokens
                sync.deliver(engine, progress, round_tokens=round_tokens, metrics={"loss": progress.loss})
                try:
                    sync.wait(progress)
                except StopRequested:
                    save(progress)
                    raise
                wait_seconds = time.monotonic() - began
                sync.adopt(engine, progress, wait_seconds=wait_seconds)
            else:
                progress.version += 1
            progress.seconds_waiting += time.monotonic() - began
            last = progress.step == inner.num_steps
            if last or (silo.eval_interval_rounds and progress.version % silo.eval_interval_rounds == 0):
                evaluate(progress)
            log.resume_training()
        if progress.step and (progress.step % silo.checkpoint_interval_steps == 0 or progress.step == inner.num_steps):
            save(progress)
            log.resume_training()
        if progress.step == inner.num_steps:
            break

        # ---- one inner step
        lr = learning_rate(progress.step, inner)
        loss, grad_norm = engine.step((next(batches) for _ in range(silo.accumulation_steps)), lr)
        progress.step += 1
        progress.position = batches.state()
        loss, stop = ranks.sum([loss / ranks.num_ranks, float(asked_to_stop())])
        if not math.isfinite(loss) or engine.num_skipped_steps:
            what = f"loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
            raise ConfigError(
                f"silo {name}: {what} at step {progress.step}; last good checkpoint: {checkpoints.newest or 'none'}; "
                "lower inner.lr or inner.clip_norm, then start again from there"
            )
        progress.loss = loss
        log.step(lr, grad_norm)
        if stop:
            save(progress)
            raise StopRequested

    log.summary(engine)


class StepLog:
    """One fixed-width line and one metrics record for each logged inner step."""

    def __init__(self, config: RunConfig, name: str, ranks: Ranks, journal: Journal | None, progress: Progress) -> None:
        self._config, self._silo = config, config.silos[name]
        self._ranks, self._journal, self._progress = ranks, journal, progress
        self._tokens_logged = progress.position * config.sequence_tokens
        self.resume_training()

    def resume_training(self) -> None:
        """The clock of training starts here again; what went before was syncing, evaluating or saving."""
        self._since = time.monotonic()
        self._logged = self._since
        if self._journal:
            self._journal.status("training", step=self._progress.step, round=self._progress.version + 1)

    def step(self, lr: float, grad_norm: float) -> None:
        """Account for one inner step."""
        now, progress = time.monotonic(), self._progress
        progress.seconds_training += now - self._since
        self._since = now
        if not self._journal or progress.step % self._silo.log_interval_steps:
            return
        tokens = progress.position * self._config.sequence_tokens
        tokens_per_second = (tokens - self._tokens_logged) / max(now - self._logged, 1e-9)
        self._tokens_logged, self._logged = tokens, now
        round = progress.version + 1
        print(
            f"step {progress.step:7d}/{self._config.inner.num_steps}  round {round:5d}  loss {progress.loss:8.4f}  lr {lr:.3e}  "
            f"grad {grad_norm:8.3f}  {tokens_per_second:9.0f} tok/s  {tokens / 1e6:9.3f} Mtok",
            flush=True,
        )
        self._journal.record(
            "step",
            step=progress.step,
            round=round,
            loss=progress.loss,
            lr=lr,
            tokens=tokens,
            tokens_per_second=tokens_per_second,
            grad_norm=grad_norm,
        )

    def summary(self, engine: Engine) -> None:
        """The last record: totals and peak memory, summed over the ranks on this silo's hosts."""
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        on_device = get_accelerator().device_name() != "cpu"
        device_bytes = get_accelerator().max_memory_allocated() if on_device else 0
        peak_bytes, device_bytes = self._ranks.sum([peak_bytes, device_bytes])
        if self._journal:
            self._journal.record(
                "summary",
                parameters=sum(shape.numel() for shape in engine.shapes.values()),
                seconds_training=self._progress.seconds_training,
                seconds_waiting=self._progress.seconds_waiting,
                seconds_evaluating=self._progress.seconds_evaluating,
                peak_memory_bytes=int(peak_bytes),
                peak_device_memory_bytes=int(device_bytes),
            )


def _open_data(config: RunConfig, name: str, *, verify: bool) -> tuple[PackedTokens, dict[str, PackedTokens], int]:
    """Training text, held-out text and vocabulary size; the leader reads every byte once to check it."""
    silo, tokenizer = config.silos[name], tokenizer_sha256(config.tokenizer_file)
    if not silo.data:
        raise ConfigError(f"silos.{name}.data: [] given; allowed: at least one directory of packed shards")
    splits = [(f"silos.{name}.data", Path(d)) for d in silo.data]
    splits += [(f"silos.{name}.valid.{corpus}", Path(d)) for corpus, d in silo.valid.items()]
    check = verify_shards if verify else read_manifest
    manifests = [check(directory, key=key, tokenizer_sha256=tokenizer) for key, directory in splits]

    def packed(directories: list[str], key: str) -> PackedTokens:
        return PackedTokens(
            [Path(d) for d in directories], sequence_tokens=config.sequence_tokens, tokenizer_sha256=tokenizer, key=key
        )

    data = packed(silo.data, f"silos.{name}.data")
    held_out = {corpus: packed([d], f"silos.{name}.valid.{corpus}") for corpus, d in silo.valid.items()}
    return data, held_out, manifests[0].vocab_size


def _stop_signals():  # type: ignore[no-untyped-def]
    """Note SIGTERM, SIGINT and SIGUSR1; the loop asks at the end of every step, and the ranks agree."""
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda received, frame: asked.append(received))
    return lambda: bool(asked)


def main() -> int:
    """Command line; returns the exit code: 0 done, 2 a user's mistake, 75 stopped with a checkpoint."""
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
            raise ConfigError(f"--silo: {arguments.silo!r} given; allowed: {', '.join(sorted(config.silos))}")
        if is_leader:
            lock_directory(config.silo_directory(arguments.silo), f"silo {arguments.silo}")
            journal = Journal(config, f"silos/{arguments.silo}", silo=arguments.silo)
            journal.status("starting")
        ranks = Ranks()
        train(config, arguments.silo, ranks, journal)
        phase, code = "finished", 0
    except ConfigError as error:
        if is_leader:
            print(f"atoll: {error}", file=sys.stderr, flush=True)
        if journal:
            journal.error(str(error))
        phase, code = "failed", 2
    except StopRequested:
        phase, code = "stopped", STOPPED
        if is_leader:
            print("stopped on request; everything is saved, start it again to go on", flush=True)
    if journal:
        journal.status(phase)
        journal.close()
    if code == 0:
        ranks.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
