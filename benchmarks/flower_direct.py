"""Flower's app without SuperLink and SuperNodes: its strategy hands its messages to client processes that stay.

flower.py starts it with Flower's own interpreter, so it imports nothing of ours.

    python flower_direct.py PLACE

PLACE has the app and a file of data for each client. What is trained is what SuperLink and SuperNodes come to, to the
bit; no process starts anew in each round, and none is given up because the machine is busy.
"""

import multiprocessing
import os
import sys
import tomllib
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.supercore.task_identity import TaskIdentity  # type: ignore[import-not-found]


def context(place: Path, data: str = "") -> SimpleNamespace:
    """What the app is told; it lies on the way of imports from here on."""
    sys.path.insert(0, str(place / "app"))
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1  # messages have it
    app = tomllib.loads((place / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    return SimpleNamespace(run_config=app["config"], node_config={"data": data})


def serve(pipe: Connection, place: Path, data: str) -> None:
    """One client: answer messages until the server has ended."""
    os.setsid()  # as a silo, and a SuperNode: the kernel shares a busy machine between sessions
    told = context(place, data)
    import flower_peer  # type: ignore[import-not-found]

    while True:
        pipe.send(flower_peer.train(pipe.recv(), told))


class Grid:
    """In Flower's place between server and clients, which are 1, 2, ... in the order of their pipes."""

    def __init__(self, pipes: list[Connection]) -> None:
        self.pipes = pipes

    def get_node_ids(self) -> list[int]:
        """Of all clients."""
        return list(range(1, len(self.pipes) + 1))

    def send_and_receive(self, messages: Iterable[Any], timeout: float | None = None) -> list[Any]:
        """The answers, in the order of the messages."""
        asked = [(self.pipes[message.metadata.dst_node_id - 1], message) for message in messages]
        for pipe, message in asked:
            pipe.send(message)
        return [pipe.recv() for pipe, _ in asked]


def main(place: Path) -> None:
    """Train to the end."""
    start, pipes = multiprocessing.get_context("spawn"), []
    for file in sorted(place.glob("*.json")):
        ours, theirs = start.Pipe()
        start.Process(target=serve, args=(theirs, place, str(file)), daemon=True).start()
        theirs.close()  # so that a client that fails ends the server, too
        pipes.append(ours)
    told = context(place)
    import flower_peer

    flower_peer.main(Grid(pipes), told)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
