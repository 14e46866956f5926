"""A port at which members come and strangers are dropped, without anybody who is there already noticing. No torch."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from pretrain.exchange.channel import HANDSHAKE_SECONDS, BrokenError, Channel, Credentials

MOST_HALF_OPEN = 64  # strangers at a time; when another comes, the one that has waited longest goes
MOST_OF_ONE = 8  # connections of one process of a member
MOST_SAID = 20  # addresses of strangers that a line is said of
LOOK_SECONDS = 1.0


class Listener:
    """Gives every member that comes to `serve`, in a thread of its own, which may take as long as it likes."""

    def __init__(
        self, credentials: Credentials, host: str, port: int, serve: Callable[[Channel], None], *, what: str
    ) -> None:
        """An empty `host` is all interfaces; port 0 is a free one. `what` is said of the port. Raises OSError."""
        self._credentials, self._serve, self._what = credentials, serve, what
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._half_open: dict[Channel, float] = {}  # since when, the oldest first
        self._served: Counter[tuple[str, int]] = Counter()
        self._channels: set[Channel] = set()
        self._said: set[str] = set()
        self._socket = _bound(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, daemon=True, name="listener")
        self._accepting.start()

    def close(self, *, everything: bool = True) -> None:
        """Take nobody more; and with `everything`, end whom it serves."""
        self._closing.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes who accepts
        self._accepting.join()
        with self._lock:
            ending = [*self._half_open, *(self._channels if everything else ())]
        for channel in ending:
            channel.cut()

    def _accept(self) -> None:
        with self._socket:
            while not self._closing.is_set():
                try:
                    connection, address = self._socket.accept()
                except TimeoutError:
                    pass
                except OSError:  # no file left, or who came is gone
                    self._closing.wait(0.1)
                else:
                    self._begin(connection, address[0])
                self._drop_the_slow()

    def _begin(self, connection: socket.socket, address: str) -> None:
        try:
            channel = self._credentials.accepted(connection)
        except (OSError, ValueError):  # it is gone already
            connection.close()
            return
        with self._lock:
            self._half_open[channel] = time.monotonic()
        try:
            threading.Thread(target=self._talk, args=(channel, address), daemon=True, name="member").start()
        except RuntimeError:  # no thread left
            with self._lock:
                del self._half_open[channel]
            channel.close()

    def _drop_the_slow(self) -> None:
        with self._lock:
            waiting = list(self._half_open.items())
        late = time.monotonic() - HANDSHAKE_SECONDS
        for place, (channel, since) in enumerate(waiting):
            if since < late or len(waiting) - place > MOST_HALF_OPEN:
                channel.cut()

    def _talk(self, channel: Channel, address: str) -> None:
        try:
            self._credentials.admit(channel)
            who = (channel.silo, channel.lane)
            with self._lock:
                del self._half_open[channel]
                if self._served[who] >= MOST_OF_ONE:
                    raise BrokenError(f"{channel.silo} has {MOST_OF_ONE} connections already")
                self._served[who] += 1
                self._channels.add(channel)
            try:
                self._serve(channel)
            finally:
                with self._lock:
                    self._served[who] -= 1
                    self._channels.discard(channel)
        except BrokenError as error:
            self._say(channel.silo or address, error)
            channel.close()
        finally:
            with self._lock:
                self._half_open.pop(channel, None)

    def _say(self, who: str, why: BrokenError) -> None:
        """Once of each, and of a few only: strangers may come in any number."""
        with self._lock:
            if self._closing.is_set() or who in self._said or len(self._said) >= MOST_SAID:
                return
            self._said.add(who)
        print(f"{self._what}: a connection from {who} was dropped: {why}", flush=True)


def _bound(host: str, port: int) -> socket.socket:
    if host:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.create_server((host, port), family=family, backlog=128)
    else:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        made = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=128)
    with suppress(OSError):
        made.settimeout(LOOK_SECONDS)
    return made
