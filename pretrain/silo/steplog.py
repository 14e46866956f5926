"""What a silo says of its inner steps: one fixed-width line and one metrics record each, and the totals at the end."""

import math
import resource
import time

from deepspeed.accelerator import get_accelerator

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.host.journal import Journal
from pretrain.silo.checkpoint import SECONDS, Progress
from pretrain.silo.data import Mixture
from pretrain.silo.engine import Engine
from pretrain.silo.ranks import Ranks

PACE = 0.2  # share of the newest step in the running mean of a step's seconds


def go_on_without_checkpoint(config: RunConfig, journal: Journal, progress: Progress) -> None:
    """A silo takes over a later version than 0: say so, and count its seconds from what that version had taken."""
    count_seconds(journal, progress)
    tokens = progress.position * config.sequence_tokens
    print(
        f"no checkpoint here: starts from version {progress.version}, step {progress.step}, with a fresh inner "
        f"optimizer; {tokens:,} tokens of this silo are in it by the ledger",
        flush=True,
    )


def count_seconds(journal: Journal, progress: Progress) -> None:
    """Count at least the seconds that the silo had recorded when it adopted the version that it goes on from."""
    before = journal.newest("sync", progress.version)
    for name in SECONDS:
        setattr(progress, name, max(getattr(progress, name), before.get(name, 0.0)))


class StepLog:
    """Keeps the clock of training; only the leader, who has a journal, writes."""

    def __init__(
        self,
        config: RunConfig,
        name: str,
        journal: Journal | None,
        progress: Progress,
        peak_tokens_per_second: float | None = None,
    ) -> None:
        """`peak_tokens_per_second`: what a share of the cards' peak (MFU) is said of; None: none is."""
        self._config, self._name, self._journal, self._progress = config, name, journal, progress
        self._peak = peak_tokens_per_second
        self._interval_steps = config.silos[name].log_interval_steps
        self._tokens_logged = progress.position * config.sequence_tokens
        self._trained_logged = progress.trained_tokens or 0
        self._since = self._logged = time.monotonic()
        self._step = progress.step
        self.of_pairs: list[float] = []
        """Since the ranks last talked: number of preference pairs, the sum of their margins, and of right ones."""

    def start(self) -> None:
        """Record where the silo starts: what it recorded of later steps before is done again, or was discarded."""
        progress = self._progress
        if self._journal:
            tokens = progress.position * self._config.sequence_tokens
            place = {"step": progress.step, "round": progress.round, "version": progress.version}
            self._journal.record("start", **place, tokens=tokens, **progress.seconds)

    def resume_training(self) -> None:
        """The clock of training starts here again; what went before was syncing, evaluating or saving."""
        self._since = self._logged = time.monotonic()
        self._tokens_logged, self._step = self._progress.position * self._config.sequence_tokens, self._progress.step
        self._trained_logged = self._progress.trained_tokens or 0
        if self._journal:
            self._journal.status(
                "training", step=self._progress.step, round=self._config.round_at(self._progress.step + 1)
            )

    def step(self, lr: float, grad_norm: float) -> None:
        """Account for one inner step."""
        progress, now = self._progress, time.monotonic()
        seconds, before = now - self._since, self._step
        progress.seconds_training += seconds
        progress.seconds_per_step += (seconds - progress.seconds_per_step) * (PACE if progress.seconds_per_step else 1)
        self._since, self._step = now, progress.step
        if not self._journal or before // self._interval_steps == progress.step // self._interval_steps:
            return
        tokens, round = progress.position * self._config.sequence_tokens, self._config.round_at(progress.step)
        num_new, trained = tokens - self._tokens_logged, progress.trained_tokens
        tokens_per_second = num_new / max(now - self._logged, 1e-9)
        share = None if trained is None else (trained - self._trained_logged) / max(1, num_new)
        self._tokens_logged, self._trained_logged, self._logged = tokens, trained or 0, now
        number, *sums = self.of_pairs or [0.0]
        pairs = dict(zip(("reward_margin", "reward_right"), (one / max(1, number) for one in sums), strict=False))
        mfu = tokens_per_second / self._peak if self._peak else None
        print(
            f"step {progress.step:7d}/{self._config.inner.num_steps}  round {round:5d}  loss {progress.loss:8.4f}  "
            f"lr {lr:.3e}  grad {grad_norm:8.3f}  {tokens_per_second:9.0f} tok/s  {tokens / 1e6:9.3f} Mtok"
            + ("" if not pairs else f"  margin {pairs['reward_margin']:7.3f}  {pairs['reward_right']:4.0%} right")
            + ("" if share is None else f"  {share:4.0%} trained")
            + ("" if mfu is None else f"  {mfu:6.1%} MFU")
            + (f"  epsilon {progress.epsilon:.3f}" if progress.spent else ""),
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
            **pairs,
            **({} if trained is None else {"trained_tokens": trained}),
            **({} if mfu is None else {"mfu": mfu}),
            **progress.spent,
        )

    def check_finite(self, num_skipped_steps: int, last_good: object) -> None:
        """Raise ConfigError with step, silo and last good checkpoint if the loss or a gradient was not finite."""
        progress = self._progress
        if math.isfinite(progress.loss) and not num_skipped_steps:
            return
        what = "the gradient is not finite" if math.isfinite(progress.loss) else f"loss is {progress.loss}"
        raise ConfigError(
            f"silo {self._name}: {what} at step {progress.step}; last good checkpoint: {last_good or 'none'}; "
            "nothing of this round was delivered; lower inner.lr or inner.clip_norm in a new run"
        )

    def summary(self, engine: Engine, ranks: Ranks, mixture: Mixture) -> None:
        """The last record: totals, tokens read of each corpus, and peak memory summed over the silo's ranks."""
        host_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        on_device = get_accelerator().device_name() != "cpu"
        device_bytes = get_accelerator().max_memory_allocated() if on_device else 0
        host_total, device_total = ranks.sum([host_bytes, device_bytes])
        if self._journal:
            self._journal.record(
                "summary",
                tokens_by_corpus=[
                    draws * self._config.sequence_tokens for draws in mixture.read(self._progress.position)
                ],
                parameters=sum(shape.numel() for shape in engine.shapes.values()),
                **self._progress.seconds,
                peak_memory_bytes=int(host_total),
                peak_device_memory_bytes=int(device_total),
            )
