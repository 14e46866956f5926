"""The collective exchange: silos that find each other at one address and pass bytes among themselves, no aggregator.

Words (who is there, what was agreed, who has left) go through a board that the first silo of the roster keeps at that
address (board.py); bytes go straight from silo to silo on lanes (lane.py). With the keys of the roster all of it is
between members alone (channel.py). Without, nothing is encrypted, and whoever reaches the ports can take part.
"""

import errno
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from ipaddress import ip_address
from itertools import count
from urllib.parse import urlsplit

from pretrain.config.errors import ConfigError
from pretrain.exchange.board import Board, FarBoard, Words
from pretrain.exchange.channel import BrokenError, Credentials
from pretrain.exchange.lane import ASK_SECONDS, Lane, PeerLostError
from pretrain.exchange.listener import Listener
from pretrain.exchange.objects import StopWaitingError
from pretrain.host.foreign import shown

FIRST_ASK_SECONDS = 0.001  # twice as long each time: words that come at once are not waited for
REASON_CHARACTERS = 1000
WORDS, WATCH = "words", "watch"  # what channels to the board are for


class Collective:
    """One silo's place among all. `share` and `swap` are called by one thread, in the same order in every silo."""

    def __init__(
        self,
        url: str,
        roster: Sequence[str],
        silo: str,
        credentials: Callable[[], Credentials],
        *,
        dead_seconds: float,
        hung_seconds: float,
    ) -> None:
        """`credentials` makes those of this process, once, when all begins."""
        self.url, self.roster, self.silo = url, sorted(roster), silo
        self.lost = ""
        """Why all have to stop, once that is so."""
        self.missing: list[str] = []
        """The silos that we wait for."""
        self.leaves: Callable[[str, str, bytes | int], None] = lambda peer, what, data: None
        """Is told whom words go to, on what, and their bytes, before they do."""
        self._dead_seconds, self._hung_seconds = dead_seconds, hung_seconds
        self._is_host, self._make_credentials = silo == self.roster[0], credentials
        self._credentials: Credentials | None = None
        self._board: Board | None = None
        self._words = Words(self.roster)  # the first silo's
        self._listener: Listener | None = None
        self._said = ""
        self._moves = 0
        self._closing = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True, name="watch")

    # ---- coming and going

    def join(self, identity: str) -> None:
        """Wait until all silos are here. `identity` tells us from another run directory of the same name.

        Raises ConfigError if another has our name or our port; StopWaitingError.
        """
        self._credentials = self._make_credentials()
        if self._is_host:
            self._listener = self._listen(self._credentials)
        while not self._take_place(self._credentials, identity):
            self._pause(ASK_SECONDS * 10)
        self._watching.start()
        self.share("here", "")

    def _listen(self, credentials: Credentials) -> Listener:
        host, port = _where(self.url)
        serve = lambda channel: self._words.serve(channel, seconds=self._dead_seconds)  # noqa: E731
        try:
            try:
                return Listener(credentials, _interface(host), port, serve, what=self.url)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                return Listener(credentials, "", port, serve, what=self.url)  # it is forwarded to us
        except OSError as error:
            raise ConfigError(f"exchange.url: {self.url!r} given; this silo cannot serve it: {error}") from None

    def _take_place(self, credentials: Credentials, identity: str) -> bool:
        """Whether we are in; not if nobody serves the address yet, or an earlier start of ours is not over there."""
        try:
            board = self._board = self._reach(credentials, WORDS)
        except OSError:
            return False  # nobody is there yet
        except BrokenError as error:
            if self._said != str(error):
                self._said = str(error)
                print(
                    f"waiting for silo {self.roster[0]}: {self.url} does not take us: {error}; trust.keys, name and "
                    "run_id have to be the same in all silos",
                    flush=True,
                )
            return False
        try:
            taken = board.claim(f"member/{self.silo}", identity)
            if taken == identity:
                return True
            if taken.split("/")[0] != identity.split("/", maxsplit=1)[0]:
                raise ConfigError(
                    f"silos: {self.silo!r} given; another run directory takes part under this name at {self.url}; "
                    "choose another name"
                )
            board.set(f"left/{self.silo}", f"silo {self.silo} was started again")
        except BrokenError:
            pass  # that meeting is over now
        if isinstance(board, FarBoard):
            board.close()
        return False

    def _reach(self, credentials: Credentials, purpose: str) -> Board:
        """The board, for one thread more or less. Raises OSError if nobody is there, BrokenError."""
        if self._is_host:
            return self._words.of(self.silo)
        return reach_board(credentials, self.url, self.roster[0], purpose, seconds=self._dead_seconds)

    def give_up(self) -> None:
        """Wait for nobody any more: whoever does so meets a StopWaitingError."""
        self._closing.set()

    def close(self, reason: str = "") -> None:
        """Leave. Without a reason all is done, and whoever serves the address waits until all others are, too; with
        one, the others stop, and give it as theirs.
        """
        if self._closing.is_set() or not self._watching.is_alive():
            self._closing.set()
            return
        assert self._board
        with suppress(BrokenError):
            self._board.set(f"{'left' if reason else 'done'}/{self.silo}", reason[:REASON_CHARACTERS] or "done")
            while self._is_host and not reason and not self.lost and not self._all_done():
                time.sleep(ASK_SECONDS)
        self._closing.set()
        self._watching.join()
        if isinstance(self._board, FarBoard):
            self._board.close()
        if self._listener and not reason:  # else the others can read why, as long as this process is there
            self._listener.close()

    def _all_done(self) -> bool:
        assert self._board
        return all(self._board.have([f"done/{silo}" for silo in self.roster]))

    # ---- words and bytes

    def moved(self) -> None:
        """The silo's main loop goes on; without this for `hung_seconds`, the others take it for hung."""
        self._moves += 1

    def share(self, what: str, words: str) -> dict[str, bytes]:
        """Every silo's words on `what`, which nobody said before; returns when all have spoken.

        Raises PeerLostError, StopWaitingError.
        """
        keys = {silo: f"said/{what}/{silo}" for silo in self.roster}
        assert self._board
        for silo in (silo for silo in self.roster if silo != self.silo):
            self.leaves(silo, what, words.encode())
        try:
            self._board.set(keys[self.silo], words)
            seconds = FIRST_ASK_SECONDS
            while missing := self._silent(self._board, keys):
                self.missing = missing
                self._pause(seconds)
                seconds = min(2 * seconds, ASK_SECONDS)
            self.missing = []
            others = {silo: (self._board.get(key) or "").encode() for silo, key in keys.items() if silo != self.silo}
            return {silo: others.get(silo, words.encode()) for silo in self.roster}
        except BrokenError as error:
            raise PeerLostError(self._host_is_gone(error)) from None

    @staticmethod
    def _silent(board: Board, keys: dict[str, str]) -> list[str]:
        return [silo for silo, there in zip(keys, board.have(list(keys.values())), strict=True) if not there]

    def forget(self, what: str) -> None:
        """Remove our words on `what`, when all must have heard them."""
        assert self._board
        with suppress(BrokenError):
            self._board.delete(f"said/{what}/{self.silo}")

    def first_lane(self) -> Lane:
        """The leader's end of lane 0; returns when all silos have theirs."""
        assert self._board
        assert self._credentials
        return Lane(self._board, self._credentials, self.url, self.roster, dead_seconds=self._dead_seconds)

    def _pause(self, seconds: float) -> None:
        if self._closing.wait(seconds):
            raise StopWaitingError
        if self.lost:
            raise PeerLostError(self.lost)

    def _host_is_gone(self, why: object) -> str:
        return f"silo {self.roster[0]} is lost: nobody serves {self.url} any more: {why}"

    # ---- liveness

    def _watch(self) -> None:
        """Say again and again that we live, and notice who does not."""
        others = [silo for silo in self.roster if silo != self.silo]
        heard = {silo: ("", time.monotonic()) for silo in others}  # last beat, and since when it is the same
        moved = dict(heard)
        board: Board | None = None
        try:
            assert self._credentials
            board = self._reach(self._credentials, WATCH)
            for beat in count():
                board.set(f"beat/{self.silo}", f"{beat} {self._moves}")
                there = iter(board.have([f"{kind}/{silo}" for silo in others for kind in ("done", "left", "beat")]))
                for silo, is_done, has_left, has_come in zip(others, there, there, there, strict=True):
                    if is_done:
                        continue
                    if has_left:
                        raise PeerLostError(shown(board.get(f"left/{silo}") or f"silo {silo} has left"))
                    if has_come:
                        beats, _, moves = (board.get(f"beat/{silo}") or "").partition(" ")
                        self._check_beat(silo, beats, heard, self._dead_seconds, "nothing was heard of it")
                        self._check_beat(silo, moves, moved, self._hung_seconds, "its training did not go on")
                if self._closing.wait(min(1.0, self._dead_seconds / 5)):
                    return
        except PeerLostError as error:
            self.lost = str(error)
        except (OSError, BrokenError) as error:
            self.lost = self._host_is_gone(error)
        finally:
            if isinstance(board, FarBoard):
                board.close()

    @staticmethod
    def _check_beat(silo: str, number: str, last: dict[str, tuple[str, float]], seconds: float, what: str) -> None:
        before, since = last[silo]
        if number != before:
            last[silo] = (number, time.monotonic())
        elif time.monotonic() - since > seconds:
            raise PeerLostError(f"silo {silo} is lost: {what} for {seconds:g} s")


def reach_board(credentials: Credentials, url: str, keeper: str, purpose: str, *, seconds: float) -> FarBoard:
    """The board of a collective, from any process. Raises OSError if nobody serves the address, BrokenError."""
    host, port = _where(url)
    return FarBoard(credentials.dial(host, port, keeper, purpose=purpose), seconds=seconds)


def _where(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


def _interface(host: str) -> str:
    """Where the first silo listens: at an address that is given as such, else on all interfaces, as a name may mean
    something else here than to the others.
    """
    try:
        return str(ip_address(host))
    except ValueError:
        return "localhost" if host == "localhost" else ""
