"""A silo's verifier, asked from outside of the process that runs it: whatever it does costs one trajectory.

`verify(task, messages) -> bool` is told the task as its file has it and the conversation with the model's answer.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pretrain.config.errors import ConfigError
from pretrain.host.foreign import shown
from pretrain.practice.judge import DIED, GRACE_SECONDS, RIGHT

# The rest of the environment may hold secrets, as of a store.
KEPT_VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "VIRTUAL_ENV", "TMPDIR", "TZ")
IMPORT_SECONDS = 120.0
MOST_LINE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a verifier may take for one trajectory."""

    seconds: float = 10.0
    """Until it is killed with all that it has started."""
    memory_bytes: int = 2 << 30
    """Of address space of each process."""
    network: bool = False
    """Whether it may reach one."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one trajectory."""

    kind: str
    """right, wrong, hung, raised, died, or no truth value."""
    why: str = ""
    """In words, where it is neither right nor wrong."""

    @property
    def is_right(self) -> bool:
        """Whether the trajectory is one to learn from."""
        return self.kind == RIGHT


class Verifier:
    """Runs until `close`; a process that is lost is started again."""

    def __init__(self, name: str, limits: Limits | None = None, *, key: str = "--verifier") -> None:
        """`name` is package.module:function, `key` what named it. Raises ConfigError for what is no verifier."""
        self._name, self._limits, self._key = name, limits or Limits(), key
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe, self._rest = -1, b""
        self.held: dict[str, Any] = {}
        self._start()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def verdict(self, task: dict[str, Any], messages: list[dict[str, Any]]) -> Verdict:
        """Whether a conversation is right, by the verifier. Raises ConfigError where it can be started no more."""
        if self._process is None:
            self._start()
        assert self._process
        assert self._process.stdin
        line = json.dumps({"task": task, "messages": messages}) + "\n"
        said = None
        with suppress(OSError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
            said = self._line(self._limits.seconds + 3 * GRACE_SECONDS)
        if said is None:
            self.close()
            return Verdict(kind=DIED, why="it took the process with it that had imported it")
        return Verdict(kind=str(said["kind"]), why=shown(said["why"]))

    def words(self) -> list[str]:
        """What holds a verifier here, and what does not, a line each."""
        held, limits = self.held, self._limits
        landlock = held.get("landlock", 0)
        if limits.network:
            network = "allowed, as asked for"
        elif held.get("network"):
            network = "none: a namespace of its own"
        elif landlock >= 4:
            network = "no TCP (Landlock); the kernel refuses a namespace, so UDP is NOT held"
        else:
            network = "NOT held: the kernel refuses a namespace (unshare), and has no Landlock for TCP"
        writes = "only into a temporary directory (Landlock)" if landlock else "NOT held: no Landlock in this kernel"
        if not held.get("scratch"):
            writes += "; in all as many bytes as the disk has"
        processes = "a namespace of its own" if held.get("processes") else "its group, and orphans as they come"
        megabytes = limits.memory_bytes >> 20
        return [
            f"network: {network}",
            f"writes: {writes}",
            f"processes: killed at the end, {processes}",
            f"limits: {limits.seconds:g} s, {megabytes:,} MiB of memory, 1 MiB a file and of what it prints",
        ]

    def _start(self) -> None:
        read, write = os.pipe()
        limits = {
            "seconds": self._limits.seconds,
            "memory_bytes": self._limits.memory_bytes,
            "network": self._limits.network,
        }
        own = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        own |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pretrain.practice.judge", self._name, str(write), json.dumps(limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[write],
            env=own,
            start_new_session=True,
        )
        os.close(write)
        self._pipe, self._rest = read, b""
        said = self._line(IMPORT_SECONDS)
        if said is None or "error" in said or said["trial"] != RIGHT:
            why = (
                "its import does not end" if said is None else said.get("error") or f"no process for it: {said['why']}"
            )
            self.close()
            raise ConfigError(f"{self._key}: {self._name!r} given; {shown(why, limit=400)}")
        self.held = said["held"]

    def _line(self, seconds: float) -> dict[str, Any] | None:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest and len(self._rest) < MOST_LINE_BYTES:
            if not select.select([self._pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            if not (piece := os.read(self._pipe, MOST_LINE_BYTES)):
                return None
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            said = json.loads(line)
        except ValueError:
            return None
        return said if isinstance(said, dict) else None

    def close(self) -> None:
        """End the process, and what it runs."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin:
            with suppress(OSError):
                process.stdin.close()
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(self._pipe)
