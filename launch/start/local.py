"""`atoll launch local`: the aggregator and every silo of the roster on this machine, watched until they end."""

import dataclasses
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console

from launch.show.display import AGGREGATOR, LiveDisplay, PlainDisplay, make_display
from launch.show.metrics import MetricsReader, ProcessStatus, read_status
from launch.start.gpus import gpus_here, share_gpus
from launch.start.processes import POLL_SECONDS, STOP_SIGNALS, Child, ChildCommand, Children
from launch.start.workers import SAVE_SECONDS, silo_command
from pretrain.config.adapter import PROMPT
from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config
from pretrain.host.caches import use_writable_caches
from pretrain.host.lock import lock_directory, lock_holder
from pretrain.host.stopping import STOPPED
from pretrain.trust.members import with_keys

# Longer than what starts several processes (workers.py) gives them between SIGTERM and SIGKILL: it is to end them.
GRACE_SECONDS = SAVE_SECONDS + 10
DISPLAY_SECONDS = 0.5
LOG_TAIL_LINES = 20
WHOLE = "whole.run"
"""In place of a silo's name: all of a run, as one job of a cluster; no silo can have it."""
SAID = "atoll: "
"""How a line begins with which a process tells of a user's mistake."""
CommandBuilder = Callable[[RunConfig, Path], list[ChildCommand]]


def launch_local(
    config: RunConfig,
    *,
    max_restarts: int = 0,
    build_commands: CommandBuilder | None = None,
    console: Console | None = None,
) -> int:
    """Run aggregator and silos on this machine until all have finished, one has failed, or a signal came.

    A finished run gets its `summary.json` and `report.html`.

    `max_restarts` is how often each child is started again after a crash; a user's mistake is never tried again.
    `build_commands` makes the commands from the configuration and the path of its resolved copy. Each silo's processes
    see GPUs of their own, if there are any.

    Returns the exit status: 0 finished, 1 a child crashed, 2 a user's mistake or a stop with a name, 128 + n stopped by
    signal n (130 for Ctrl-C). Raises ConfigError for what cannot run on one machine, too few GPUs, and when the run
    directory is in use. Call it from the main thread.
    """
    console = console or Console()
    check_one_machine(config)
    gpus = share_gpus(config, gpus_here())
    directory = Path(config.directory)
    with hold_directory(directory) as lock_file:
        config_path, config = directory / "config.yaml", with_keys(config, make=True)
        save_config(config, config_path)
        commands = (build_commands or local_commands)(config, config_path)
        for command in commands:
            command.environment |= gpus.get(command.name, {})
        log_directory = new_attempt(directory)
        attempt = Attempt(config=config, log_directory=log_directory, max_restarts=max_restarts, console=console)
        attempt.run(commands, inherited_files=(lock_file,))
    return attempt.report()


def check_one_machine(config: RunConfig) -> None:
    """No silo needs several nodes. Raises ConfigError."""
    for name, silo in config.silos.items():
        if silo.num_nodes != 1:
            raise ConfigError(f"silos.{name}.num_nodes: {silo.num_nodes} given; allowed: 1 with a local launch")


def local_commands(config: RunConfig, config_path: Path) -> list[ChildCommand]:
    """The aggregator's command, if there is one, and one for each silo."""
    commands = []
    if config.exchange.kind == "store":
        commands.append(
            ChildCommand(
                name=AGGREGATOR,
                argv=[sys.executable, "-m", "pretrain.aggregate", "--config", str(config_path)],
                error_path=process_directory(config, AGGREGATOR) / "error.txt",
            )
        )
    return [*commands, *(silo_child(config, name, config_path) for name in config.silos)]


def silo_child(config: RunConfig, silo: str, config_path: Path) -> ChildCommand:
    """What runs a silo on this machine."""
    argv, environment = silo_command(config, silo, config_path)
    error_path = process_directory(config, silo) / "error.txt"
    return ChildCommand(name=silo, argv=argv, environment=environment, error_path=error_path)


def launch_silo(config: RunConfig, silo: str, *, console: Console | None = None) -> int:
    """Run one silo on this machine, watched as by `launch_local`; aggregator and other silos run elsewhere.

    Returns the exit status as that does, but 0 if the silo was stopped by others than us, with everything saved. Raises
    ConfigError if it runs already, or its directory cannot be written. Call it from the main thread.
    """
    directory = Path(config.directory)
    for folder, what in ((directory, "a launch"), (config.silo_directory(silo), f"silo {silo}")):
        with suppress(NotADirectoryError):
            if holder := lock_holder(folder):
                raise ConfigError(
                    f"directory: {config.directory!r} given; {what} runs there already (process {holder.process}); "
                    "stop it, or name another directory"
                )
    path = write_resolved(config)
    attempt = Attempt(
        config=dataclasses.replace(config, silos={silo: config.silos[silo]}, roster=config.agreed_roster),
        log_directory=new_attempt(directory),
        max_restarts=0,
        console=console or Console(),
        is_alone=True,
    )
    attempt.run([silo_child(config, silo, path)])
    return attempt.report(write=False)


def write_resolved(config: RunConfig) -> Path:
    """The resolved configuration, written to the run directory before anything starts. Raises ConfigError."""
    path = Path(config.directory) / "config.yaml"
    try:
        save_config(config, path)
    except OSError as error:
        raise ConfigError(f"directory: {config.directory!r} given; it cannot be written: {error}") from None
    return path


def process_directory(config: RunConfig, name: str) -> Path:
    """Where a process keeps its `status.json` and `error.txt`; of a whole run, the run directory."""
    if name == WHOLE:
        return Path(config.directory)
    return Path(config.directory) / AGGREGATOR if name == AGGREGATOR else config.silo_directory(name)


@contextmanager
def hold_directory(directory: Path) -> Iterator[int]:
    """Keep other launchers out of the run directory; yields the lock's descriptor for the children to keep open too.

    So the lock outlives a launcher that was killed for as long as its children are still saving. Raises ConfigError
    when the directory is in use or cannot be written to.
    """
    try:
        lock = lock_directory(directory, "a launch")
    except OSError as error:
        raise ConfigError(
            f"directory: {str(directory)!r} given; {error.strerror}; allowed: a writable folder"
        ) from None
    try:
        yield lock
    finally:
        os.close(lock)


def new_attempt(directory: Path) -> Path:
    """Make `logs/attempt-NNN`, the next number, and point `logs/latest` to it."""
    attempt = make_attempt(directory)
    point_latest(attempt)
    return attempt


def make_attempt(directory: Path) -> Path:
    """Make `logs/attempt-NNN`, the next number."""
    (directory / "logs").mkdir(exist_ok=True)
    while True:
        attempt = next_attempt(directory)
        with suppress(FileExistsError):  # silos that share a directory may be started at the same moment
            attempt.mkdir()
            return attempt


def next_attempt(directory: Path) -> Path:
    """`logs/attempt-NNN`, the next number, which is not there yet."""
    names = [path.name for path in (directory / "logs").glob("attempt-*")]
    numbers = [int(found[1]) for name in names if (found := re.fullmatch(r"attempt-(\d+)", name))]
    return directory / "logs" / f"attempt-{max(numbers, default=0) + 1:03}"


def point_latest(attempt: Path) -> None:
    """Point `logs/latest` to an attempt."""
    link = attempt.parent / "latest.new"
    link.unlink(missing_ok=True)
    link.symlink_to(attempt.name)
    link.replace(attempt.parent / "latest")


class StopSignals:
    """Counts Ctrl-C, SIGTERM, SIGHUP and SIGUSR1, a batch system's, instead of being interrupted at any line."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.count = 0

    def __enter__(self) -> "StopSignals":
        # Left ignored if it was (nohup); only the main thread may have handlers.
        main = threading.current_thread() is threading.main_thread()
        wanted = [s for s in (*STOP_SIGNALS, signal.SIGUSR1) if main and signal.getsignal(s) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._count) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _count(self, number: int, _frame: FrameType | None) -> None:
        self.first = self.first or signal.Signals(number)
        self.count += 1
        if number == signal.SIGHUP:
            leave_closed_terminal()


def leave_closed_terminal() -> None:
    """Say what is still said to nobody, if our terminal was closed: else it would be an error, in place of a save."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            nobody = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nobody, descriptor)
            os.close(nobody)


@dataclass(kw_only=True)
class Attempt:
    """One start of all processes of a run, and how it ended."""

    config: RunConfig
    log_directory: Path
    max_restarts: int
    console: Console
    grace_seconds: float = GRACE_SECONDS
    """How long a stop waits for what is being saved."""
    on_second_signal: str = "ends them at once, without saving"
    """What Ctrl-C does while it waits."""
    is_alone: bool = False
    """One silo, for which nothing else here waits: that it was stopped is no failure."""
    stopped: str = ""
    """What such a silo said when it was stopped."""
    failure: "Failure | None" = None
    """What went wrong, if something did."""
    signals: StopSignals = field(default_factory=StopSignals)
    _phases: dict[str, tuple[tuple[str, float], float]] = field(default_factory=dict)
    """Of each process its phase and since when, by its own clock; and when that was first seen, by ours."""

    def run(self, commands: list[ChildCommand], inherited_files: tuple[int, ...] = ()) -> None:
        """Start all, watch them, and return when none is left."""
        directory = Path(self.config.directory)
        if caches := use_writable_caches(directory):
            self.console.print(caches, soft_wrap=True, markup=False, highlight=False)
        self._metrics = MetricsReader(directory / "metrics.jsonl")
        history = self._metrics.read_new()
        plan = f"{self._silos()}, {self.config.inner.num_steps:,} steps"
        if self.config.exchange.kind != "none":
            plan += f", a sync every {self.config.outer.sync_interval_steps:,}"
        self.console.print(
            f"run {self.config.name}: {plan}; logs in {self.log_directory}", soft_wrap=True, highlight=False
        )
        with (
            self.signals,
            Children(grace_seconds=self.grace_seconds, inherited_files=inherited_files) as children,
        ):
            display = make_display(self.config, self.console)
            try:
                display.take_history(history)
                for command in commands:
                    children.start(command, self.log_directory / f"{command.name}.log")
                self._watch(children, display)
                self._stop(children, display)
            finally:
                display.close()

    def _silos(self) -> str:
        names = list(self.config.silos)
        return f"silo {names[0]}" if len(names) == 1 else f"{len(names)} silos"

    def _watch(self, children: Children, display: LiveDisplay | PlainDisplay) -> None:
        """Return when every child has finished, one has failed for good, or a signal came."""
        next_display = 0.0
        while self.signals.first is None:
            failed = [child for child in children.all if has_failed(child, self.config)]
            if self.is_alone and failed and has_stopped(failed[0], self.config):
                self.stopped = log_tail(failed[0].log_path)[-1]
                return
            # The one that says why it stopped is the cause; the others may have failed because of it.
            failed.sort(key=lambda child: child.error_line() is None)
            for child in failed:
                failure = Failure.of(child)
                if failure.is_users or child.num_starts > self.max_restarts:
                    self.failure = failure
                    return
                display.say(
                    f"{child.name} crashed (exit {child.returncode}); start {child.num_starts + 1} of "
                    f"{self.max_restarts + 1}; log: {child.log_path}"
                )
                child.kill()
                child.start()
            if all(child.returncode == 0 for child in children.all):
                return
            if time.monotonic() >= next_display:
                self._update(children, display)
                next_display = time.monotonic() + DISPLAY_SECONDS
            time.sleep(POLL_SECONDS)

    def _stop(self, children: Children, display: LiveDisplay | PlainDisplay) -> None:
        running = [child.name for child in children.all if child.returncode is None]
        if running and self.failure is not None:
            display.say(f"{self.failure.name} failed; stopping {named(running)}", style="bold red")
        elif running and self.signals.first is not None:
            again = f"; Ctrl-C again {self.on_second_signal}" if self.signals.first == signal.SIGINT else ""
            display.say(f"stopping: each silo finishes its step and saves a checkpoint{again}", style="bold yellow")
        count_before, next_display = self.signals.count, 0.0

        def hurry() -> bool:
            nonlocal next_display
            if time.monotonic() >= next_display:
                self._update(children, display)
                next_display = time.monotonic() + DISPLAY_SECONDS
            return self.signals.count > count_before

        children.stop(hurry)
        self._update(children, display)

    def _update(self, children: Children, display: LiveDisplay | PlainDisplay) -> None:
        statuses = {}
        for child in children.all:
            status = child_status(child, self.config)
            if status.phase == "failed" and (self.failure.name != child.name if self.failure else self.signals.first):
                status.phase = "stopped"  # by us
            name = child.command.process or child.name
            phase, now = (status.phase, status.since_unix_seconds), time.monotonic()
            if name not in self._phases or self._phases[name][0] != phase:
                self._phases[name] = phase, now
            status.waited_seconds = now - self._phases[name][1]
            statuses[name] = status
        display.update(self._metrics.read_new(), statuses)

    def report(self, *, write: bool = True) -> int:
        """Say how it ended and where things are, and write the run's report; returns the exit status."""
        directory = Path(self.config.directory)
        if self.failure is not None:
            self.console.print(self.failure.text, soft_wrap=True, markup=False, highlight=False)
            return 2 if self.failure.is_users else 1
        if self.signals.first is not None:
            self.console.print(
                f"stopped; the same command goes on from the last checkpoints in {directory}",
                soft_wrap=True,
                highlight=False,
            )
            return 128 + self.signals.first
        if self.stopped:
            self.console.print(f"{self._silos()} {self.stopped}", soft_wrap=True, markup=False, highlight=False)
            return 0
        places = {"metrics": directory / "metrics.jsonl", "logs": self.log_directory, "silos": directory / "silos"}
        if write and places["metrics"].is_file():
            # Here and not above: what draws it takes a second to import, and a failed start should say so at once.
            from launch.show.report import write_report

            places = {"report": write_report(self.config), "summary": directory / "summary.json", **places}
        silos = f"each of {self._silos()}" if len(self.config.silos) > 1 else self._silos()
        lines = [f"finished: {self.config.inner.num_steps:,} steps in {silos}"]
        lines += [f"  {what:<8} {path}" for what, path in places.items()]
        if self.config.exchange.kind != "none":
            adapter = self.config.model.adapter
            form = " --adapter" if adapter.kind == PROMPT else " --merged" if adapter.is_on else ""
            lines += [f"  model    atoll export {shlex.quote(str(directory))} --output model{form}"]
        self.console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)
        return 0


def child_status(child: Child, config: RunConfig) -> ProcessStatus:
    """What the child says it is doing, corrected by what its exit status tells."""
    directory = process_directory(config, child.command.process or child.name)
    status = read_status(directory / "status.json", child.status_before)
    if child.returncode is not None and status.phase not in ("finished", "stopped"):
        status.phase = "finished" if child.returncode == 0 else "failed"
    return status


def has_failed(child: Child, config: RunConfig) -> bool:
    """Whether the child ended before its work was done.

    So has one that was asked to stop from outside; the others would wait for it for ever.
    """
    return bool(child.returncode) or has_stopped(child, config)


def has_stopped(child: Child, config: RunConfig) -> bool:
    """Whether the child was asked to stop, and has saved everything."""
    ended_well = child.returncode in (0, STOPPED) and child.error_line() is None
    return ended_well and child_status(child, config).phase == "stopped"


@dataclass(kw_only=True)
class Failure:
    """Why a child failed, for the user."""

    name: str
    """The child's name."""
    is_users: bool
    """A user's mistake or a stop with a name, said in one line."""
    text: str
    """What to print."""

    @classmethod
    def of(cls, child: Child) -> "Failure":
        """Read the reason from what the child left behind."""
        tail = log_tail(child.log_path)
        line = child.error_line()
        if line is None and child.returncode == 2:  # a mistake found before it had the folder for a note of it
            line = next((line.removeprefix(SAID) for line in reversed(tail) if line.startswith(SAID)), None)
        if line is not None:
            return cls(name=child.name, is_users=True, text=f"error: {child.name}: {line}")
        how = f"failed with exit status {child.returncode}"
        if child.returncode in (0, STOPPED):
            how = "stopped before the end"
        if child.returncode is not None and child.returncode < 0:
            how = f"was ended by {signal.Signals(-child.returncode).name}"
        shown = "\n".join(f"  | {line}" for line in tail)
        text = f"error: {child.name} {how}; the end of its log:\n{shown}\nthe whole log: {child.log_path}"
        return cls(name=child.name, is_users=False, text=text)


def log_tail(path: Path) -> list[str]:
    """The last lines of a log that tell of a failure.

    torchrun adds some forty lines of its own behind the worker's traceback; they are cut off after the line that names
    the worker.
    """
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - 100_000))
        lines = log.read().decode(errors="replace").rstrip().splitlines()
    worker_ends = [
        n for n, line in enumerate(lines) if re.search(r"torch/distributed/elastic/.*failed \(exitcode", line)
    ]
    if worker_ends:
        lines = lines[: worker_ends[-1] + 1]
    return lines[-LOG_TAIL_LINES:]
