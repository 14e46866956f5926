"""Child processes that never outlive their launcher.

Three ways out, all leading to nothing left behind:

- `Children.stop` (also on leaving the `with` block): SIGTERM to each child's leader, which lets it pass it on to
  its workers and a silo save a checkpoint; SIGKILL to whatever is left when the grace is over. An ssh gets the end of
  its input instead, which reaches the far end.
- The launcher is killed with SIGKILL: the kernel sends each leader SIGTERM (PR_SET_PDEATHSIG), so the same happens.
- A leader is killed: its workers are orphans in sessions of their own (each rank of several has one), out of reach
  of a process-group kill. They are found by an environment variable that only our children inherit.
"""

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

MARK = "ATOLL_CHILD"
"""Environment variable that every descendant of a child inherits; its value tells whose descendant it is."""

POLL_SECONDS = 0.1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(kw_only=True)
class ChildCommand:
    """What to start, before it is started."""

    name: str
    """Name shown to the user and stem of the log file: a silo's name, or `aggregator`."""
    argv: list[str]
    """Program and arguments."""
    environment: dict[str, str] = field(default_factory=dict)
    """Added to the launcher's own environment."""
    error_path: Path | None = None
    """File in which the child says in one line why it stopped, before it exits with code 2, beside its status.json."""
    process: str = ""
    """The silo whose status.json tells of it, if not the one of its name."""
    stops_at_end_of_input: bool = False
    """It has an open standard input, and closing that asks it to stop, instead of SIGTERM."""


class Child:
    """One started process, in a session of its own so that Ctrl-C in the terminal does not reach it."""

    def __init__(self, command: ChildCommand, log_path: Path, inherited_files: tuple[int, ...] = ()) -> None:
        self.command = command
        self.log_path = log_path
        self.inherited_files = inherited_files
        self.num_starts = 0
        self.start()

    def start(self) -> None:
        """Start the process, or start it again after its end. Its output goes to the end of the log.

        Call it from the main thread: the kernel's death signal follows the thread that forked, not the process.
        """
        if self.command.error_path is not None:
            self.command.error_path.unlink(missing_ok=True)
        self.mark = f"{self.command.name}-{secrets.token_hex(8)}"
        self.num_starts += 1
        self.status_before = self._status()
        """Its status.json as an earlier start left it."""
        self.began = time.monotonic()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **self.command.environment, MARK: self.mark}
        with self.log_path.open("ab") as log:
            if self.num_starts > 1:
                log.write(f"\n--- start {self.num_starts} of {self.command.name} ---\n".encode())
                log.flush()
            self.process = subprocess.Popen(
                self.command.argv,
                env=environment,
                stdin=subprocess.PIPE if self.command.stops_at_end_of_input else subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=self.inherited_files,
                preexec_fn=die_with(os.getpid()),  # noqa: PLW1509 - the launcher has one thread
            )

    @property
    def name(self) -> str:
        return self.command.name

    @property
    def returncode(self) -> int | None:
        """Exit status of the leader, None while it runs, minus the signal's number if a signal ended it."""
        return self.process.poll()

    def error_line(self) -> str | None:
        """The line a child leaves behind for a user's mistake or a stop with a name, else None."""
        path = self.command.error_path
        if path is None or not path.is_file():
            return None
        return " ".join(path.read_text().split()) or None

    def _status(self) -> bytes:
        path = self.command.error_path
        with contextlib.suppress(OSError):
            return path.with_name("status.json").read_bytes() if path else b""
        return b""

    def ask_to_stop(self) -> None:
        """SIGTERM to the leader, or the end of its input."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        else:
            self.process.terminate()

    def members(self) -> list[int]:
        """Pids of every living process that this child's start brought about, the leader included."""
        pids = [pid for pid, mark in _marked_processes() if mark == self.mark]
        if self.returncode is None and self.process.pid not in pids:
            pids.append(self.process.pid)
        return pids

    def kill(self) -> None:
        """End the leader, its process group and its descendants in other sessions, at once."""
        # A process may start another between the listing and its kill, so look again until none is found; what the
        # kernel cannot end (stuck in a device driver) must not hold the launcher for ever.
        deadline = time.monotonic() + 5
        while pids := self.members():
            if self.returncode is None:
                # Only while we have not reaped the leader is its pid, and so its group's number, surely ours.
                _send(os.killpg, self.process.pid, signal.SIGKILL)
            for pid in pids:
                _send(os.kill, pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)


class Children:
    """The children of one attempt. Leaving the `with` block stops all of them, whatever the reason."""

    def __init__(self, *, grace_seconds: float, inherited_files: tuple[int, ...] = ()) -> None:
        """`grace_seconds` lie between SIGTERM and SIGKILL; `inherited_files` are descriptors the children keep open."""
        self.all: list[Child] = []
        self.grace_seconds = grace_seconds
        self.inherited_files = inherited_files
        self._stop_deadline: float | None = None

    def __enter__(self) -> "Children":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, command: ChildCommand, log_path: Path) -> Child:
        """Start one child; OSError when its program cannot be started."""
        child = Child(command, log_path, self.inherited_files)
        self.all.append(child)
        return child

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Ask each leader to stop, wait, then SIGKILL to everything that is left.

        `hurry` is called while waiting and ends the grace by returning True. A second call goes on with the grace of
        the first.
        """
        if self._stop_deadline is None:
            self._stop_deadline = time.monotonic() + self.grace_seconds
            for child in self.all:
                if child.returncode is None:
                    child.ask_to_stop()
        while any(child.returncode is None for child in self.all):
            if time.monotonic() >= self._stop_deadline or hurry():
                break
            time.sleep(POLL_SECONDS)
        for child in self.all:
            child.kill()


def run_here(argv: list[str], environment: dict[str, str]) -> int:
    """Run a program to its end, and hand on to it what asks us to stop, once; returns its exit status.

    Call it from the main thread.
    """
    variables = os.environ | environment
    prepare = die_with(os.getpid())
    with subprocess.Popen(argv, env=variables, start_new_session=True, preexec_fn=prepare) as child:  # noqa: PLW1509
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, lambda number, _: child.send_signal(number))
        return child.wait()


def die_with(launcher_pid: int) -> Callable[[], None]:
    """What a fork of the launcher does before it becomes the child: ask for SIGTERM when the launcher dies."""

    def prepare() -> None:
        if _libc is not None:
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != launcher_pid:  # it died before we could ask
                os._exit(1)

    return prepare


def _marked_processes() -> Iterator[tuple[int, str]]:
    """(pid, mark) of every living process that carries our mark; nothing where there is no /proc."""
    prefix = f"{MARK}=".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # gone since, or another user's
            continue
        for variable in variables:
            if variable.startswith(prefix):
                yield int(folder.name), variable[len(prefix) :].decode(errors="replace")


def _send(send: Callable[[int, int], None], target: int, number: int) -> None:
    # It may have gone by itself; macOS answers EPERM for a group of zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        send(target, number)
