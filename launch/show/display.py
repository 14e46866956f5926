"""What a user sees while a run goes on: a live table on a terminal, plain lines anywhere else."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.show.metrics import ProcessStatus, Record
from pretrain.config.keys import RunConfig, SiloConfig

AGGREGATOR = "aggregator"
WAIT_WORTH_A_LINE_SECONDS = 20.0
WIDTH_WITH_SETUP = 120

PHASE_STYLES = {
    "starting": "dim",
    "training": "green",
    "waiting": "yellow",
    "evaluating": "cyan",
    "practising": "cyan",
    "merging": "cyan",
    "finished": "bold green",
    "stopped": "bold yellow",
    "failed": "bold red",
}


ENDED_PHASES = ("finished", "stopped", "failed")


@dataclass(kw_only=True)
class SiloProgress:
    """The newest of what one silo wrote into `metrics.jsonl`."""

    step: int = 0
    """Inner steps done."""
    loss: float | None = None
    """Training loss of the newest logged step."""
    tokens_per_second: float | None = None
    """Speed of the newest logged step."""
    mfu: float | None = None
    """Share of the cards' peak that this is, where that is known."""
    held_out_loss: float | None = None
    """Mean over corpora of the newest evaluation, ..."""
    held_out_step: int = 0
    """... and the step after which it was."""
    bytes_sent: int = 0
    """Sent in the newest round."""
    wait_seconds: float = 0.0
    """Waited in the newest round."""
    synced_round: int = 0
    """The newest round whose sync was recorded."""


@dataclass(kw_only=True)
class Progress:
    """The state of a run as its metrics tell it; `take` brings it up to date."""

    config: RunConfig
    silos: dict[str, SiloProgress] = field(default_factory=dict)
    commit: Record | None = None
    """The newest commit."""
    start_seconds: float = field(default_factory=time.monotonic)
    """When this attempt began, on the monotonic clock."""
    _baseline: tuple[float, int] | None = None

    def __post_init__(self) -> None:
        self.silos = {name: SiloProgress() for name in self.config.silos}

    def take(self, record: Record) -> None:
        """Bring the state up to date with one record."""
        if record["kind"] == "commit":
            self.commit = record
        silo = self.silos.get(str(record.get("silo")))
        if silo is None:
            return
        if record["kind"] == "start":  # after a rollback, before what was reached then
            silo.step = int(record["step"])
        elif record["kind"] == "step":
            silo.step = int(record["step"])
            silo.loss, silo.tokens_per_second = record.get("loss"), record.get("tokens_per_second")
            silo.mfu = record.get("mfu")
        elif record["kind"] == "sync":
            if record["round"] != silo.synced_round:
                silo.synced_round, silo.bytes_sent, silo.wait_seconds = int(record["round"]), 0, 0.0
            silo.bytes_sent += int(record.get("bytes_sent") or 0)
            silo.wait_seconds += float(record.get("wait_seconds") or 0.0)
        elif record["kind"] == "eval" and record.get("val_loss"):
            silo.held_out_loss = sum(record["val_loss"].values()) / len(record["val_loss"])
            silo.held_out_step = int(record["step"])

    @property
    def steps_done(self) -> int:
        """Inner steps done, over all silos."""
        return sum(silo.step for silo in self.silos.values())

    @property
    def steps_total(self) -> int:
        """Inner steps of the whole run, over all silos."""
        return self.config.inner.num_steps * len(self.silos)

    def seconds_left(self) -> float | None:
        """Estimate from the speed of this attempt, waits and evaluations included; None before there is one."""
        now, done = time.monotonic(), self.steps_done
        if self._baseline is None or done < self._baseline[1]:
            self._baseline = (now, done)
        since, steps_before = self._baseline
        if done == steps_before:
            return None
        return (self.steps_total - done) * (now - since) / (done - steps_before)


class PlainDisplay:
    """One line per round, commit and long wait, for logs and pipes."""

    def __init__(self, config: RunConfig, console: Console) -> None:
        self.config = config
        self.console = console
        self.progress = Progress(config=config)
        self._unprinted_rounds: dict[str, int] = {}
        self._started: set[str] = set()
        self._waits: dict[str, tuple[float, float]] = {}
        self._name_width = max(len(name) for name in (*config.silos, AGGREGATOR))

    def take_history(self, records: Iterable[Record]) -> None:
        """Records of earlier attempts: they count, and are not shown."""
        for record in records:
            self.progress.take(record)

    def update(self, records: Iterable[Record], statuses: dict[str, ProcessStatus]) -> None:
        """Show what is new."""
        for record in records:
            self._take(record)
        for name, status in statuses.items():
            self._say_long_wait(name, status)

    def say(self, line: str, style: str = "") -> None:
        """Show one line for good."""
        self.console.print(Text(line, style=style), soft_wrap=True)

    def close(self) -> None:
        """Show what was held back."""
        for silo in list(self._unprinted_rounds):
            self._say_round(silo)

    def _take(self, record: Record) -> None:
        silo, kind = str(record.get("silo")), record["kind"]
        # A round's line waits for the evaluation that follows its sync, so that it can give the held-out loss.
        if silo in self._unprinted_rounds and kind in ("step", "summary"):
            self._say_round(silo)
        steps_before = self.progress.silos[silo].step if silo in self.progress.silos else 0
        self.progress.take(record)
        if kind == "commit":
            self._say_commit(record)
        elif kind == "sync" and silo in self.progress.silos:
            self._unprinted_rounds[silo] = int(record["round"])
        elif kind == "step" and silo in self.progress.silos:
            self._take_step(silo, int(record["step"]), steps_before)

    def _take_step(self, silo: str, step: int, steps_before: int) -> None:
        if silo not in self._started:
            self._started.add(silo)
            self._line(silo, f"is training at step {step:,} of {self.config.inner.num_steps:,}")
        interval_steps = self.config.outer.sync_interval_steps
        if self.config.exchange.kind == "none" and step // interval_steps > steps_before // interval_steps:
            self._unprinted_rounds[silo] = step // interval_steps

    def _say_round(self, silo: str) -> None:
        number = self._unprinted_rounds.pop(silo)
        done = self.progress.silos[silo]
        parts = [f"round {number:>{len(str(self.config.num_rounds))}}/{self.config.num_rounds}"]
        parts.append(f"step {done.step:>{len(str(self.config.inner.num_steps))}}/{self.config.inner.num_steps}")
        held_out = done.held_out_loss if done.held_out_step == done.step else None  # not every round has an evaluation
        parts.append(f"loss {_number(done.loss)}  held-out {_number(held_out):>6}")
        parts.append(f"{_speed(done.tokens_per_second):>9} tokens/s{_mfu(done.mfu)}")
        if self.config.exchange.kind != "none":
            parts.append(f"sent {format_bytes(done.bytes_sent):>8}  waited {done.wait_seconds:6.1f} s")
        self._line(silo, "  ".join(parts))

    def _say_commit(self, record: Record) -> None:
        last, who = self.config.schedule.num_versions, (len(record.get("silos") or []), len(self.config.silos))
        text = commit_words(record["version"], last, who, record.get("update_norm"), record.get("cosine_mean"))
        self._line(AGGREGATOR if self.config.exchange.kind == "store" else "all", text)

    def _say_long_wait(self, name: str, status: ProcessStatus) -> None:
        if status.phase != "waiting" or not status.waiting_for:
            self._waits.pop(name, None)
            return
        since, next_seconds = self._waits.get(name, (0.0, 0.0))
        if since != status.since_unix_seconds:
            next_seconds = WAIT_WORTH_A_LINE_SECONDS
        if status.waited_seconds >= next_seconds:
            self._line(name, f"has waited {format_seconds(status.waited_seconds)} for {status.waiting_for}")
            next_seconds = 2 * status.waited_seconds  # a long wait must not fill the log
        self._waits[name] = (status.since_unix_seconds, next_seconds)

    def _line(self, name: str, text: str) -> None:
        self.say(f"{time.strftime('%H:%M:%S')}  {name:<{self._name_width}}  {text}")


class LiveDisplay:
    """A table that renews itself in place: one row per silo, one for the aggregator, progress below."""

    def __init__(self, config: RunConfig, console: Console) -> None:
        self.config = config
        self.progress = Progress(config=config)
        self._statuses: dict[str, ProcessStatus] = {}
        # No refresh thread: children are forked from this process, and forking with threads about is unsafe.
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._live.start()

    def take_history(self, records: Iterable[Record]) -> None:
        """Records of earlier attempts."""
        for record in records:
            self.progress.take(record)

    def update(self, records: Iterable[Record], statuses: dict[str, ProcessStatus]) -> None:
        """Draw the table anew."""
        self.take_history(records)
        self._statuses = statuses
        self._live.update(self._draw(), refresh=True)

    def say(self, line: str, style: str = "") -> None:
        """Show one line above the table, for good."""
        self._live.console.print(Text(line, style=style), soft_wrap=True)

    def close(self) -> None:
        """Leave the last table standing."""
        self._live.stop()

    def _draw(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold dim")
        table.add_column("silo", overflow="fold")
        table.add_column("phase", no_wrap=True)
        for heading in ("round", "step", "loss", "held-out", "tokens/s"):
            table.add_column(heading, justify="right", no_wrap=True)
        # On a narrow terminal, what each waits for has lines of its own below the table, and the set-up is left out.
        is_wide = self._live.console.width >= WIDTH_WITH_SETUP
        for heading in ("set-up", "waits for") if is_wide else ():
            table.add_column(heading)
        for name, silo in self.progress.silos.items():
            status = self._statuses.get(name, ProcessStatus())
            step = silo.step or status.step
            table.add_row(
                Text(name),
                Text(status.phase, style=PHASE_STYLES.get(status.phase, "")),
                f"{self._round(step, status)}/{self.config.num_rounds}",
                f"{step:,}/{self.config.inner.num_steps:,}",
                _number(silo.loss),
                _number(silo.held_out_loss),
                f"{_speed(silo.tokens_per_second)}{_mfu(silo.mfu) if is_wide else ''}",
                *([_short(describe_setup(self.config.silos[name]), "dim"), _wait(status)] if is_wide else []),
            )
        if AGGREGATOR in self._statuses:
            table.add_row(*self._aggregator_row(self._statuses[AGGREGATOR], is_wide=is_wide))
        waits = {} if is_wide else {name: _wait(status) for name, status in self._statuses.items()}
        below = [Text.assemble(f"{name} waits ", wait) for name, wait in waits.items() if wait]
        return Group(table, *below, Text(), self._progress_line())

    def _round(self, steps_done: int, status: ProcessStatus) -> int:
        """The round in progress, from 1; a silo that waits for the end of a round is still in it."""
        rounds, steps_over = divmod(steps_done, self.config.outer.sync_interval_steps)
        begun = steps_over > 0 or status.phase == "training"
        return min(self.config.num_rounds, rounds + begun)

    def _aggregator_row(self, status: ProcessStatus, *, is_wide: bool) -> list[RenderableType]:
        commit = self.progress.commit or {}
        version = commit.get("version", status.round)
        note = ""
        if (cosine := commit.get("cosine_mean")) is not None:
            note = f"cosine {cosine:+.2f}"
        phase = Text(status.phase, style=PHASE_STYLES.get(status.phase, ""))
        version_text = f"{version}/{self.config.schedule.num_versions}"
        more = [_short(note, "dim"), _wait(status)] if is_wide else []
        return [AGGREGATOR, phase, version_text, "", "", "", "", *more]

    def _progress_line(self) -> RenderableType:
        done, total = self.progress.steps_done, self.progress.steps_total
        left = self.progress.seconds_left()
        passed = format_seconds(time.monotonic() - self.progress.start_seconds)
        text = f"{done / total:4.0%}   {passed} passed   "
        if not all(status.phase in ENDED_PHASES for status in self._statuses.values()):
            text += f"about {format_seconds(left)} left" if left is not None else "measuring the time left"
        grid, room = Table.grid(padding=(0, 2)), self._live.console.width - len(text) - 4
        grid.add_row(ProgressBar(total=total, completed=done, width=max(4, min(36, room))), text)
        return grid


def make_display(config: RunConfig, console: Console) -> LiveDisplay | PlainDisplay:
    """A live table if the console is a terminal, else plain lines."""
    return LiveDisplay(config, console) if console.is_terminal else PlainDisplay(config, console)


def describe_setup(silo: SiloConfig) -> str:
    """How a silo trains: ranks, ZeRO stage, precision."""
    fewest, most = (num_nodes * silo.processes_per_node for num_nodes in (silo.fewest_nodes, silo.num_nodes))
    ranks = f"{f'{fewest} to ' if fewest < most else ''}{most} rank{'s' if most > 1 else ''}"
    return f"{ranks}, ZeRO-{silo.zero_stage}, {silo.precision}"


def format_seconds(seconds: float) -> str:
    """45 s, 3:05 min, 2:10:00 h."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02} h"


def format_bytes(num_bytes: float) -> str:
    """1.5 MB: decimal units, as network speeds have them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} PB"


def commit_words(
    version: int, last: int, silos: tuple[int, int], update_norm: float | None, cosine: float | None
) -> str:
    """A commit in one line; `silos` are those in it, and all."""
    text = f"commit {version:>{len(str(last))}}/{last}  {silos[0]} of {silos[1]} silos"
    if update_norm is not None:
        text += f"  update norm {update_norm:.4g}"
    if cosine is not None:
        text += f"  cosine between silos {cosine:+.2f}"
    return text


def shortened(name: str, limit: int) -> str:
    """A name with its beginning and its end, which tell those of many silos apart."""
    return name if len(name) <= limit else f"{name[: (limit - 1) // 2]}…{name[-(limit // 2) :]}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _speed(tokens_per_second: float | None) -> str:
    return "-" if tokens_per_second is None else f"{tokens_per_second:,.0f}"


def _mfu(mfu: float | None) -> str:
    return "" if mfu is None else f", {mfu:.0%} MFU"


def _wait(status: ProcessStatus) -> Text:
    if status.phase != "waiting" or not status.waiting_for:
        return Text()
    seconds = status.waited_seconds
    style = "yellow" if seconds >= WAIT_WORTH_A_LINE_SECONDS else ""
    return Text(f"{format_seconds(seconds):>5}  {status.waiting_for}", style=style)


def _short(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
