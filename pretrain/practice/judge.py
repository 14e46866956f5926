"""The process that has a verifier imported, and forks for every trajectory: `python -m pretrain.practice.judge`.

It reads one JSON line a trajectory on stdin and writes one JSON line for it to the pipe whose number it is told; before
the first it says what the kernel here has agreed to. For each it forks a watcher, which forks the first process of a
namespace, which forks the one that runs the verifier; the watcher has the time limit, and ends all that was started.
No package but Python's own.
"""

import importlib
import inspect
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from pretrain.practice import confine

Record = dict[str, Any]
Verify = Callable[[Record, list[Record]], object]

RIGHT, WRONG, HUNG, RAISED, DIED, NO_TRUTH = "right", "wrong", "hung", "raised", "died", "no truth value"
OUTPUT = "output"
SCRATCH_BYTES, FILE_BYTES = 64 << 20, 1 << 20
MOST_REPLY_BYTES, MOST_WORDS = 1 << 16, 300
GRACE_SECONDS = 10.0  # that a watcher has for ending all, after the time limit


def find(name: str) -> Verify:
    """The verifier of `package.module:function`. Raises ValueError, in one line, for what cannot be one."""
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError("allowed: package.module:function")
    try:
        found: Any = importlib.import_module(module_name)
    except BaseException as error:  # a module can raise anything, and call sys.exit
        raise ValueError(f"it cannot be imported: {_words(error)}") from None
    for part in function_name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module_name} has no {function_name}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"it is {type(found).__name__}; allowed: a function verify(task, messages) -> bool")
    try:
        inspect.signature(found).bind({}, [])
    except TypeError:
        given = inspect.signature(found)
        raise ValueError(f"its signature is {given}; allowed: verify(task, messages) -> bool") from None
    except ValueError:
        pass  # a builtin, which has none that can be asked for
    if inspect.iscoroutinefunction(found):
        raise ValueError("it is a coroutine (async def); allowed: a function verify(task, messages) -> bool")
    return found  # type: ignore[no-any-return]


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:MOST_WORDS]


class Judge:
    """What is the same for all trajectories."""

    def __init__(self, verify: Verify, limits: Record, *, has_own_users: bool) -> None:
        self._verify, self._limits, self._has_own_users = verify, limits, has_own_users
        confine.collect_orphans()

    def verdict(self, item: Record) -> Record:
        """What became of one trajectory: `kind`, `why` in words, and what of its process `held`."""
        scratch = tempfile.mkdtemp(prefix="atoll-verify-")
        read, write = os.pipe()
        watcher = os.fork()
        if watcher == 0:
            try:
                os.close(read)
                _say(write, self._watch(item, scratch))
            finally:
                os._exit(0)
        os.close(write)
        said = _line(read, self._limits["seconds"] + GRACE_SECONDS)
        os.close(read)
        _end_all(watcher)
        shutil.rmtree(scratch, ignore_errors=True)
        return said or {"kind": DIED, "why": "its watcher was killed"}

    def _watch(self, item: Record, scratch: str) -> Record:
        """In the watcher: run the verifier in a process of its own, and end all that it has started."""
        confine.collect_orphans()
        held = {"scratch": confine.own_scratch(scratch, SCRATCH_BYTES)}
        held["processes"] = confine.unshare(confine.NEW_PROCESSES)
        confine.unshare(confine.NEW_IPC)
        read, write = os.pipe()
        first = os.fork()
        if first == 0:
            self._be_first(item, scratch, write)
        os.close(write)
        said = _line(read, self._limits["seconds"])
        _end_all(first)
        said = said or {"kind": HUNG, "why": f"not done after {self._limits['seconds']:g} seconds"}
        return said | {"held": held | said.get("held", {})}

    def _be_first(self, item: Record, scratch: str, write: int) -> NoReturn:
        """In the first process of the namespace, with which all others end, and which no signal of theirs reaches."""
        try:
            confine.dies_with_parent(signal.SIGKILL)
            runner = os.fork()
            if runner == 0:
                self._run(item, scratch, write)
            ended, status = 0, 0
            while ended != runner:
                ended, status = os.waitpid(-1, 0)
            code = os.waitstatus_to_exitcode(status)
            ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            _say(write, {"kind": DIED, "why": f"it ended with {ending} and no verdict"})
        except BaseException as error:  # nothing must go on as if it were the watcher
            _say(write, {"kind": DIED, "why": _words(error)})
        finally:
            os._exit(0)

    def _run(self, item: Record, scratch: str, write: int) -> NoReturn:
        """In the last process: give up what it must not do, and ask the verifier."""
        confine.dies_with_parent(signal.SIGKILL)
        os.setsid()
        os.chdir(scratch)
        _only_output(write)
        os.environ |= {"HOME": scratch, "TMPDIR": scratch}
        tempfile.tempdir = None
        limits = self._limits
        confine.drop_privileges()
        landlock = confine.only_writes_to(scratch, network=limits["network"])
        confine.limit(
            seconds=int(limits["seconds"]) + 2,
            memory_bytes=limits["memory_bytes"],
            file_bytes=FILE_BYTES,
            has_own_users=self._has_own_users,
        )
        own, said = os.getpid(), {}
        try:
            answer = self._verify(item["task"], item["messages"])
            if answer is True or answer is False:
                said = {"kind": RIGHT if answer else WRONG, "why": ""}
            else:
                said = {"kind": NO_TRUTH, "why": f"it returned {type(answer).__name__}, and not True or False"}
        except BaseException as error:  # SystemExit and KeyboardInterrupt are no verdicts either
            said = {"kind": RAISED, "why": _words(error)}
        if os.getpid() == own:  # a verifier that forks returns twice
            _say(write, said | {"held": {"landlock": landlock}})
        os._exit(0)


def _only_output(kept: int) -> None:
    """Close all files but one, and have what is printed in a file of the scratch directory, whose size is limited."""
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    os.closerange(3, kept)
    os.closerange(kept + 1, min(most, 1 << 16))


def _say(pipe: int, said: Record) -> None:
    os.write(pipe, (json.dumps(said) + "\n").encode())


def _line(pipe: int, seconds: float) -> Record | None:
    """The line of JSON that comes first through a pipe, within so many seconds."""
    found, deadline = b"", time.monotonic() + seconds
    while b"\n" not in found and len(found) < MOST_REPLY_BYTES:
        if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            break
        piece = os.read(pipe, MOST_REPLY_BYTES)
        if not piece:
            break
        found += piece
    try:
        said = json.loads(found.partition(b"\n")[0])
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def _end_all(first: int) -> None:
    """Kill a child, and whatever of its own has become ours, until there is none."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(first, signal.SIGKILL)
    deadline = time.monotonic() + GRACE_SECONDS / 2
    while time.monotonic() < deadline:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if ended == 0:
            for child in _children():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.001)


def _children() -> list[int]:
    found, own = [], os.getpid()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            if int(file.read().rpartition(b")")[2].split()[1]) == own:
                found.append(int(name))
    return found


def main(name: str, pipe: int, limits: Record) -> None:
    """Say what holds here, then judge what comes."""
    has_own_users = confine.own_users()
    own_network = not limits["network"] and confine.unshare(confine.NEW_NETWORK)
    try:
        verify = find(name)
    except ValueError as error:
        _say(pipe, {"error": str(error)})
        return
    except BaseException:
        _say(pipe, {"error": traceback.format_exc(limit=0)})
        return
    trial = Judge(lambda task, messages: True, limits | {"seconds": 60}, has_own_users=has_own_users).verdict(
        {"task": {}, "messages": []}
    )
    _say(pipe, {"held": trial.get("held", {}) | {"network": own_network}, "trial": trial["kind"], "why": trial["why"]})
    judge = Judge(verify, limits, has_own_users=has_own_users)
    for line in sys.stdin:
        _say(pipe, judge.verdict(json.loads(line)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
