"""The collective exchange: silos that find each other at one address and pass bytes among themselves, no aggregator.

Words (who is there, what was agreed, who has left) go through a TCPStore that the first silo of the roster serves;
bytes go straight from silo to silo over one gloo process group a lane. Lane l connects the ranks l of all silos, so
that more than one process, and node, of a silo can carry its bytes. For one allocation or one trusted network: nothing
here is encrypted, and whoever reaches the port can take part. What arrives is bytes of known length and JSON.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config.check import ConfigError
from pretrain.exchange.objects import StopWaitingError
from pretrain.host.foreign import shown

MESSAGE_BYTES = 4 << 20  # a peer that passes less than one in `dead_seconds` counts as dead
CONNECT_SECONDS = 5.0
ASK_SECONDS = 0.02
FIRST_ASK_SECONDS = 0.001  # twice as long each time: words that come at once are not waited for


class PeerLostError(Exception):
    """Another silo has died, hangs, or has left; the message names it."""


class Lane:
    """Passes bytes between the processes that carry the same lane, one in each silo.

    Made by all of them at once; raises PeerLostError.
    """

    def __init__(
        self, store: dist.Store, url: str, roster: Sequence[str], silo: str, *, lane: int, dead_seconds: float
    ) -> None:
        self._roster, self._me, self._timeout = list(roster), list(roster).index(silo), timedelta(seconds=dead_seconds)
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = self._timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=_own_address(url))]
        prefixed = dist.PrefixStore(f"lane/{lane}", store)
        try:
            self._group = dist.ProcessGroupGloo(prefixed, self._me, len(roster), options)
        except RuntimeError as error:
            raise PeerLostError(f"silo {silo} cannot connect lane {lane} with all others: {error}") from None

    def swap(self, out: Sequence[Sequence[Tensor]], into: Sequence[Tensor]) -> None:
        """Send each silo its bytes, `out`, and fill `into` with theirs, both in the roster's order; ours are left out.

        What is sent may lie in several places, one behind the other for whoever receives it. Raises PeerLostError.
        """
        work: list[tuple[int, dist.Work]] = []
        group: Any = self._group  # torch's types leave send and recv out
        for peer in (peer for peer in range(len(self._roster)) if peer != self._me):
            with self._naming(peer):  # of a peer that is known to be gone, nothing more is taken
                for pass_on, data in ((group.recv, into[peer : peer + 1]), (group.send, out[peer])):
                    for tag, message in enumerate(messages(data)):
                        work.append((peer, pass_on([message], peer, tag)))
        for peer, passing in work:
            with self._naming(peer):
                passing.wait(self._timeout)

    @contextmanager
    def _naming(self, peer: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).split("] ")[-1].split(". ")[0]
            raise PeerLostError(f"silo {self._roster[peer]} is lost: {reason}") from None


def messages(parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """Bytes that lie in several places, cut after every MESSAGE_BYTES; copied where a cut has more than one place."""
    waiting: list[Tensor] = []
    num_bytes = 0
    for part in parts:
        done = 0
        while done < len(part):
            waiting.append(part[done : done + MESSAGE_BYTES - num_bytes])
            done, num_bytes = done + len(waiting[-1]), num_bytes + len(waiting[-1])
            if num_bytes == MESSAGE_BYTES:
                yield _joined(waiting)
                waiting, num_bytes = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class Collective:
    """One silo's place among all. `share` and `swap` are called by one thread, in the same order in every silo."""

    def __init__(self, url: str, roster: Sequence[str], silo: str, *, dead_seconds: float, hung_seconds: float) -> None:
        self.url, self.roster, self.silo = url, sorted(roster), silo
        self.lost = ""
        """Why all have to stop, once that is so."""
        self.missing: list[str] = []
        """The silos that we wait for."""
        self.leaves: Callable[[str, str, bytes | int], None] = lambda peer, what, data: None
        """Is told whom words go to, on what, and their bytes, before they do."""
        self._dead_seconds, self._hung_seconds = dead_seconds, hung_seconds
        self._is_host = silo == self.roster[0]
        self._moves = 0
        self._closing = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True, name="watch")

    # ---- coming and going

    def join(self, identity: str) -> None:
        """Wait until all silos are here. `identity` tells us from another run directory of the same name.

        Raises ConfigError if another has our name or our port; StopWaitingError.
        """
        while not self._take_place(identity):
            self._pause(ASK_SECONDS * 10)
        self._watching.start()
        self.share("here", "")

    def _take_place(self, identity: str) -> bool:
        """Whether we are in; not if nobody serves the address yet, or an earlier start of ours is not over there."""
        try:
            self._store = connect(self.url, is_host=self._is_host)
            taken = self._store.compare_set(f"member/{self.silo}", "", identity).decode()
            if taken == identity:
                return True
            if taken.split("/")[0] != identity.split("/", maxsplit=1)[0]:
                raise ConfigError(
                    f"silos: {self.silo!r} given; another run directory takes part under this name at {self.url}; "
                    "choose another name"
                )
            self._store.set(f"left/{self.silo}", f"silo {self.silo} was started again")
        except dist.DistNetworkError:
            pass
        return False

    def close(self, reason: str = "") -> None:
        """Leave. Without a reason all is done, and whoever serves the address waits until all others are, too; with
        one, the others stop, and give it as theirs.
        """
        if not self._watching.is_alive():
            self._closing.set()
            return
        with suppress(dist.DistError):
            self._store.set(f"left/{self.silo}" if reason else f"done/{self.silo}", reason or "done")
            while self._is_host and not reason and not self.lost and not self._all_done():
                time.sleep(ASK_SECONDS)
        self._closing.set()
        self._watching.join()

    def _all_done(self) -> bool:
        return self._store.check([f"done/{silo}" for silo in self.roster])

    # ---- words and bytes

    def moved(self) -> None:
        """The silo's main loop goes on; without this for `hung_seconds`, the others take it for hung."""
        self._moves += 1

    def share(self, what: str, words: str) -> dict[str, bytes]:
        """Every silo's words on `what`, which nobody said before; returns when all have spoken.

        Raises PeerLostError, StopWaitingError.
        """
        keys = {silo: f"said/{what}/{silo}" for silo in self.roster}
        for silo in (silo for silo in self.roster if silo != self.silo):
            self.leaves(silo, what, words.encode())
        try:
            self._store.set(keys[self.silo], words)
            seconds = FIRST_ASK_SECONDS
            while missing := [silo for silo, key in keys.items() if not self._store.check([key])]:
                self.missing = missing
                self._pause(seconds)
                seconds = min(2 * seconds, ASK_SECONDS)
            self.missing = []
            return {silo: self._store.get(key) for silo, key in keys.items()}
        except dist.DistError:
            raise PeerLostError(self._host_is_gone()) from None

    def forget(self, what: str) -> None:
        """Remove our words on `what`, when all must have heard them."""
        with suppress(dist.DistError):
            self._store.delete_key(f"said/{what}/{self.silo}")

    def first_lane(self) -> Lane:
        """The leader's end of lane 0; returns when all silos have theirs."""
        return Lane(self._store, self.url, self.roster, self.silo, lane=0, dead_seconds=self._dead_seconds)

    def _pause(self, seconds: float) -> None:
        if self._closing.wait(seconds):
            raise StopWaitingError
        if self.lost:
            raise PeerLostError(self.lost)

    def _host_is_gone(self) -> str:
        return f"silo {self.roster[0]} is lost: nobody serves {self.url} any more"

    # ---- liveness

    def _watch(self) -> None:
        """Say again and again that we live, and notice who does not."""
        try:
            store = connect(self.url, is_host=False)
            heard = {silo: ("", time.monotonic()) for silo in self.roster}  # last beat, and since when it is the same
            moved = dict(heard)
            for beat in count():
                store.set(f"beat/{self.silo}", f"{beat} {self._moves}")
                for silo in self.roster:
                    if silo == self.silo or store.check([f"done/{silo}"]):
                        continue
                    if store.check([f"left/{silo}"]):
                        raise PeerLostError(shown(store.get(f"left/{silo}").decode(errors="replace")))
                    if store.check([f"beat/{silo}"]):  # it has come
                        beats, _, moves = store.get(f"beat/{silo}").decode(errors="replace").partition(" ")
                        self._check_beat(silo, beats, heard, self._dead_seconds, "nothing was heard of it")
                        self._check_beat(silo, moves, moved, self._hung_seconds, "its training did not go on")
                if self._closing.wait(min(1.0, self._dead_seconds / 5)):
                    return
        except PeerLostError as error:
            self.lost = str(error)
        except dist.DistError:
            self.lost = self._host_is_gone()

    @staticmethod
    def _check_beat(silo: str, number: str, last: dict[str, tuple[str, float]], seconds: float, what: str) -> None:
        before, since = last[silo]
        if number != before:
            last[silo] = (number, time.monotonic())
        elif time.monotonic() - since > seconds:
            raise PeerLostError(f"silo {silo} is lost: {what} for {seconds:g} s")


def connect(url: str, *, is_host: bool) -> dist.TCPStore:
    """A connection to the words of a collective. Raises DistNetworkError if nobody serves the address."""
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    try:
        return dist.TCPStore(
            parts.hostname, parts.port, None, is_host, timedelta(seconds=CONNECT_SECONDS), wait_for_workers=False
        )
    except dist.DistNetworkError as error:
        if is_host:
            raise ConfigError(f"exchange.url: {url!r} given; this silo cannot serve it: {error}") from None
        raise


def _own_address(url: str) -> str:
    """Our address on the way to `url`: the one at which the others reach us. Sends nothing."""
    parts = urlsplit(url)
    family, _, _, _, address = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0]
