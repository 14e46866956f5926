"""Seconds of a swap of bytes between two processes on loopback: a lane over TLS, a lane without keys, and gloo.

    python -m benchmarks.swap [--megabytes 33 260] [--turns 5]

Each process sends as much as it receives. Printed are the median seconds of the turns, and of one process its seconds
of processor time; each way beside the same of gloo, which does not encrypt, in the same run.
"""

import argparse
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.distributed as dist
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from torch import Tensor

from pretrain.exchange.board import Words
from pretrain.exchange.channel import Credentials
from pretrain.exchange.collective import WORDS, reach_board
from pretrain.exchange.lane import Lane, messages
from pretrain.exchange.listener import Listener
from pretrain.trust.keys import PrivateKey
from pretrain.trust.members import Members

ROSTER = ["alpha", "beta"]
WAYS = ("gloo", "no keys", "TLS")
Swap = Callable[[Tensor, Tensor], None]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[33, 260])
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: dict[tuple[str, int], tuple[float, float]] = {}
    for way in WAYS:
        told: Queue[dict[int, tuple[float, float]]] = context.Queue()
        given = (unused_port(), [(size, arguments.turns) for size in arguments.megabytes], told)
        processes = [context.Process(target=take_part, args=(way, index, *given)) for index in range(2)]
        for process in processes:
            process.start()
        found |= {(way, size): measured for size, measured in told.get().items()}
        for process in processes:
            process.join()
    for size in arguments.megabytes:
        for way in WAYS:
            (seconds, busy), (gloo_seconds, gloo_busy) = found[way, size], found["gloo", size]
            print(
                f"{size:5d} MB each way  {way:8s}  {seconds:.3f} s ({seconds / gloo_seconds:.2f})  "
                f"processor {busy:.3f} s ({busy / gloo_busy:.2f})",
                flush=True,
            )


def take_part(
    way: str, index: int, port: int, sizes: list[tuple[int, int]], told: "Queue[dict[int, tuple[float, float]]]"
) -> None:
    """One of the two; the first says what it measured."""
    torch.set_num_threads(1)
    swap = over_gloo(index, port) if way == "gloo" else over_lane(index, port, encrypted=way == "TLS")
    found = {}
    for size, turns in sizes:
        out = torch.randint(256, (size * 1_000_000,), dtype=torch.uint8)
        into = torch.empty_like(out)
        took = []
        for _ in range(turns + 1):
            began, busy = time.monotonic(), time.process_time()
            swap(out, into)
            took.append((time.monotonic() - began, time.process_time() - busy))
        seconds, busy_seconds = zip(*took[1:], strict=True)  # the first one warms up
        found[size] = statistics.median(seconds), statistics.median(busy_seconds)
    if index == 0:
        told.put(found)
    time.sleep(1)  # nobody ends while the other still reads


def over_gloo(index: int, port: int) -> Swap:
    """A process group of gloo, in messages as large as a lane's."""
    store = dist.TCPStore("127.0.0.1", port, None, index == 0, timedelta(seconds=60), wait_for_workers=False)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    group: Any = dist.ProcessGroupGloo(store, index, 2, options)

    def swap(out: Tensor, into: Tensor) -> None:
        work = [group.recv([part], 1 - index, tag) for tag, part in enumerate(messages([into]))]
        work += [group.send([part], 1 - index, tag) for tag, part in enumerate(messages([out]))]
        for passing in work:
            passing.wait()

    return swap


def over_lane(index: int, port: int, *, encrypted: bool) -> Swap:
    """A lane, with keys or without."""
    keys = [key(silo, number) for number, silo in enumerate(ROSTER, 1)]
    members = Members(keys={one.name: one.public for one in keys}, signer=keys[index]) if encrypted else Members()
    credentials, url = Credentials(members, run="swap", silo=ROSTER[index]), f"tcp://127.0.0.1:{port}"
    words = Words(ROSTER)
    if index == 0:
        Listener(credentials, "127.0.0.1", port, lambda channel: words.serve(channel, seconds=60), what="board")
        lane = Lane(words.of(ROSTER[0]), credentials, url, ROSTER, dead_seconds=60)
    else:
        while True:
            try:
                board = reach_board(credentials, url, ROSTER[0], WORDS, seconds=60)
                break
            except OSError:
                time.sleep(0.1)
        lane = Lane(board, credentials, url, ROSTER, dead_seconds=60)
    nothing = torch.empty(0, dtype=torch.uint8)

    def swap(out: Tensor, into: Tensor) -> None:
        lane.swap(*(([[], [out]], [nothing, into]) if index == 0 else ([[out], []], [into, nothing])))

    return swap


def unused_port() -> int:
    """A port that nobody serves at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def key(name: str, seed: int) -> PrivateKey:
    """The same in both processes."""
    return PrivateKey(
        name=name,
        signing=Ed25519PrivateKey.from_private_bytes(bytes([seed] * 32)),
        agreement=X25519PrivateKey.from_private_bytes(bytes([seed] * 32)),
    )


if __name__ == "__main__":
    main()
