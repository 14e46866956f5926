"""Verifiers that tests run: one that is right, and all the ways in which one can be wrong."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def says(task: Record, messages: list[Record]) -> bool:
    """Whether the answer has what the task wants."""
    return bool(task["wanted"] in messages[-1]["content"])


def behaves_as_told(task: Record, messages: list[Record]) -> Any:  # noqa: PLR0911, PLR0912
    """What the task says, by name."""
    match task["does"]:
        case "right":
            return True
        case "wrong":
            return False
        case "number":
            return 1
        case "hang":
            time.sleep(3600)
        case "raise":
            raise RuntimeError("two\nlines")
        case "exit":
            sys.exit(3)
        case "crash":
            os.abort()
        case "fork":
            return forks(Path(task["file"]))
        case "write":
            Path(task["file"]).write_text("elsewhere")
            return True
        case "scratch":
            Path("here").write_text("x")
            Path(os.environ["HOME"], "there").write_text("x")
            return True
        case "print":
            while True:
                print("x" * (1 << 20))
        case "large":
            Path("here").write_bytes(bytes(2 << 20))
        case "memory":
            return bool(bytearray(8 << 30))
        case "connect":
            socket.create_connection(("127.0.0.1", task["port"]), timeout=2).close()
            return True
        case "signal":
            os.kill(task["pid"], 0)
            return True
        case "secret":
            return "ATOLL_SECRET" in os.environ
    return None


def forks(file: Path) -> bool:
    """Leave processes behind: a fork that returns, one in its own session, one that started its own."""
    script = "import os, time; os.setsid(); os.fork(); time.sleep(3600)"
    started = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(3600)
        return True
    time.sleep(0.5)
    return len(started) == 3 and not file.exists()


def without_messages(task: Record) -> bool:
    """No verifier: it is not told the conversation."""
    return bool(task)


not_callable = 3


def never(task: Record, messages: list[Record]) -> bool:
    """Nothing is right."""
    return False
