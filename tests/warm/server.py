"""The server behind `python` of this folder: `python -m tests.warm.server SOCKET`. Ends with its standard input."""

import fcntl
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

IMPORTED = ("pretrain.train", "pretrain.aggregate", "launch.start.workers", "s3fs")
FIRST_FREE = 200  # numbers of received files, out of the way of those that they shall get


class Forked(Exception):
    """Raised in a fork, to leave the server's loop."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request


class Server:
    """Forks a process for each connection, tells how it ended, and ends it when the connection does."""

    def __init__(self, path: Path) -> None:
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unready = path.with_suffix(".unready")
        self._listener.bind(str(unready))
        self._listener.listen(64)
        unready.rename(path)
        self._selector.register(self._listener, selectors.EVENT_READ, self._fork)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, sys.exit)
        self._running: dict[int, socket.socket] = {}

    def run(self) -> None:
        """Until standard input ends; raises Forked in each fork."""
        try:
            while True:
                for key, _ in self._selector.select():
                    key.data()
        finally:
            if self._running:  # none in a fork
                for pid in self._running:
                    os.kill(pid, signal.SIGKILL)

    def _fork(self) -> None:
        connection, _ = self._listener.accept()
        size, files, *_ = socket.recv_fds(connection, 4, 64)
        data = connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
        request = json.loads(data)
        pid = os.fork()
        if pid == 0:
            self._leave(connection)
            inherited = [fcntl.fcntl(file, fcntl.F_DUPFD, FIRST_FREE) for file in files]
            for file in files:
                os.close(file)
            for file, number in zip(inherited, request["files"], strict=True):
                os.dup2(file, number)
                os.close(file)
            raise Forked(request)
        for file in files:
            os.close(file)
        self._running[pid] = connection
        connection.sendall(f"{pid}\n".encode())
        ended = os.pidfd_open(pid)

        def reap() -> None:
            self._selector.unregister(ended)
            os.close(ended)
            _, status = os.waitpid(pid, 0)
            del self._running[pid]
            if connection.fileno() >= 0:
                self._selector.unregister(connection)
                with suppress(OSError):
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                connection.close()

        def lost() -> None:
            self._selector.unregister(connection)
            connection.close()
            os.kill(pid, signal.SIGKILL)

        self._selector.register(ended, selectors.EVENT_READ, reap)
        self._selector.register(connection, selectors.EVENT_READ, lost)

    def _leave(self, connection: socket.socket) -> None:
        """Close, in a fork, what is the server's."""
        ours = [key.fd for key in self._selector.get_map().values() if isinstance(key.fileobj, int)]
        self._selector.close()
        for file in ours:
            if file != sys.stdin.fileno():
                os.close(file)
        for other in (self._listener, connection, *self._running.values()):
            other.close()
        self._running.clear()


def become(request: dict[str, Any]) -> None:
    """Be `python -m MODULE ARGUMENT ...` from here on."""
    import torch

    os.setsid()
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
    torch.set_num_threads(1)
    module, *arguments = request["argv"]
    sys.path[0] = request["directory"]
    sys.argv = ["-m", *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()
    try:
        Server(Path(sys.argv[1])).run()
    except Forked as fork:
        request = fork.request
    become(request)


if __name__ == "__main__":
    main()
