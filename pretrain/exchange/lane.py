"""Bytes from silo to silo: a lane connects one process of each silo with one of every other, straight, both ways.

Between two of them there are two channels, and each is used in one direction, by the one who has called: so both can
send at once, each in a thread of its own, and neither has to wait for the other to read.
"""

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from urllib.parse import urlsplit

import torch
from torch import Tensor

from pretrain.exchange.board import Board
from pretrain.exchange.channel import PIECE_BYTES, BrokenError, Channel, Credentials
from pretrain.exchange.listener import Listener
from pretrain.host.foreign import shown

HEADER_BYTES = 8
ASK_SECONDS = 0.02
BYTES = "bytes"  # what these channels are for


class PeerLostError(Exception):
    """Another silo has died, hangs, or has left; the message names it."""


class Lane:
    """Passes bytes between the processes that carry the same lane, one in each silo.

    Made by all of them at once; raises PeerLostError.
    """

    def __init__(
        self, board: Board, credentials: Credentials, url: str, roster: Sequence[str], *, dead_seconds: float
    ) -> None:
        """The credentials say which lane it is. Each says on the board where it listens."""
        self._roster, self._seconds = list(roster), dead_seconds
        self._credentials, self._lane = credentials, credentials.passport.lane
        self._silo = credentials.passport.silo
        self._me = self._roster.index(self._silo)
        self._peers = [peer for peer in range(len(roster)) if peer != self._me]
        self._out: dict[int, Channel] = {}
        self._into: dict[int, Channel] = {}
        self._came = threading.Condition()
        self._pool = ThreadPoolExecutor(max(1, 2 * len(self._peers)), thread_name_prefix="lane")
        host = own_address(url)
        what = f"lane {self._lane} of silo {self._silo}"
        listener = Listener(credentials, host, 0, self._take, what=what)
        try:
            self._meet(board, f"{host} {listener.port}")
        except BaseException:
            self.close()
            raise
        finally:
            listener.close(everything=False)  # nobody else is to come

    def _meet(self, board: Board, own_place: str) -> None:
        over = time.monotonic() + self._seconds
        try:
            board.set(self._place(self._silo), own_place)
            for peer in self._peers:
                self._out[peer] = self._call(board, peer, over)
        except BrokenError as error:
            raise self._unconnected(self._roster[0], error) from None
        with self._came:
            self._came.wait_for(lambda: len(self._into) == len(self._peers), max(0.0, over - time.monotonic()))
            if missing := [self._roster[peer] for peer in self._peers if peer not in self._into]:
                raise self._unconnected(missing[0], "it did not come")

    def _place(self, silo: str) -> str:
        return f"lane/{self._lane}/{silo}"

    def _unconnected(self, silo: str, why: object) -> PeerLostError:
        return PeerLostError(f"silo {silo} is lost: lane {self._lane} of {self._silo} cannot be connected: {why}")

    def _call(self, board: Board, peer: int, over: float) -> Channel:
        """Our channel to another silo, once it listens."""
        silo, why = self._roster[peer], "it does not listen"
        while time.monotonic() < over:
            if place := board.get(self._place(silo)):
                host, _, port = place.partition(" ")
                try:
                    return self._credentials.dial(host, int(port), silo, lane=self._lane, purpose=BYTES)
                except (OSError, BrokenError, ValueError, OverflowError) as error:
                    why = f"{shown(place)}: {error}"
            time.sleep(ASK_SECONDS)
        raise self._unconnected(silo, why)

    def _take(self, channel: Channel) -> None:
        """Another silo's channel to us; the first one stands."""
        if channel.silo not in self._roster or (channel.lane, channel.purpose) != (self._lane, BYTES):
            raise BrokenError(f"it came for {channel.purpose} on lane {channel.lane}")
        peer = self._roster.index(channel.silo)
        with self._came:
            if self._into.setdefault(peer, channel) is not channel:
                raise BrokenError("it came twice")
            self._came.notify_all()

    def close(self) -> None:
        """Let go of all others."""
        for channel in (*self._out.values(), *self._into.values()):
            channel.cut()
        self._pool.shutdown(wait=True)
        for channel in (*self._out.values(), *self._into.values()):
            channel.close()

    def swap(self, out: Sequence[Sequence[Tensor]], into: Sequence[Tensor]) -> None:
        """Send each silo its bytes, `out`, and fill `into` with theirs, both in the roster's order; ours are left out.

        What is sent may lie in several places, one behind the other for whoever receives it. Raises PeerLostError.
        """
        work: dict[Future[None], int] = {}
        for peer in self._peers:
            work[self._pool.submit(self._receive, peer, into[peer])] = peer
            work[self._pool.submit(self._send, peer, out[peer])] = peer
        done, passing = wait(work, return_when=FIRST_EXCEPTION)
        broken = [(work[future], error) for future in done if (error := future.exception())]
        if broken:  # nobody waits for the rest
            for channel in (*self._out.values(), *self._into.values()):
                channel.cut()
            wait(passing)
        for peer, error in broken:
            if not isinstance(error, BrokenError):
                raise error
            raise PeerLostError(f"silo {self._roster[peer]} is lost: {error}")

    def _send(self, peer: int, parts: Sequence[Tensor]) -> None:
        """The only place at which bytes of a silo's parameters leave it."""
        channel = self._out[peer]
        channel.send(sum(map(len, parts)).to_bytes(HEADER_BYTES), self._seconds)
        for message in messages(parts):
            channel.send(message.numpy().data, self._seconds)

    def _receive(self, peer: int, into: Tensor) -> None:
        channel, header = self._into[peer], bytearray(HEADER_BYTES)
        channel.receive(memoryview(header), self._seconds)
        if (num_bytes := int.from_bytes(header)) != len(into):
            raise BrokenError(f"it sends {num_bytes} bytes where {len(into)} were agreed on")
        channel.receive(into.numpy().data, self._seconds)


def messages(parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """Bytes that lie in several places, cut after every PIECE_BYTES; copied where a cut has more than one place."""
    waiting: list[Tensor] = []
    num_bytes = 0
    for part in parts:
        done = 0
        while done < len(part):
            waiting.append(part[done : done + PIECE_BYTES - num_bytes])
            done, num_bytes = done + len(waiting[-1]), num_bytes + len(waiting[-1])
            if num_bytes == PIECE_BYTES:
                yield _joined(waiting)
                waiting, num_bytes = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def own_address(url: str) -> str:
    """Our address on the way to `url`: the one at which the others reach us. Sends nothing."""
    parts = urlsplit(url)
    family, _, _, _, address = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
