"""One aggregator for each store: a lease in write-once objects, without comparing any two clocks. No torch.

    aggregator/000003.json          who holds term 3; whoever writes it first has it
    aggregator/000003.beat-000017   the holder's newest sign of life
    aggregator/000003.ended         the holder has ended: the next one takes term 4 at once

A starter watches the beats of the newest term by its own monotonic clock. The holder of a term looks for the next one
before it writes, so one that was paused and taken over commits nothing.
"""

import json
import os
import re
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.config.check import ConfigError
from pretrain.exchange.beats import Beats
from pretrain.exchange.objects import Objects
from pretrain.host.foreign import shown

FOLDER = "aggregator"
LOOKS_PER_LEASE = 20
NAME = re.compile(r"(\d{6})\.(json|ended|beat-\d+)")


class Lease:
    """The right to commit to a store, from its making to `release`."""

    def __init__(self, objects: Objects, *, seconds: float) -> None:
        """Take the next term, once the holder of the newest has ended or was silent for `seconds`.

        Raises ConfigError if that is at work.
        """
        self._objects, self._seconds = objects, seconds
        self._term = self._take()
        self._clear()
        self._beats = Beats(
            objects,
            f"{_prefix(self._term)}.beat-",
            lease_seconds=seconds,
            is_over=lambda at_once: at_once.exists(_record(self._term + 1)),
        )

    def check(self) -> None:
        """Raise ConfigError if another aggregator has taken over: it took us for dead."""
        if self._objects.exists(_record(self._term + 1)):
            who = _who(self._holder(self._newest_term()))
            raise ConfigError(f"exchange.url: {self._objects.url} given; {who} has taken over here")

    def release(self) -> None:
        """Let the next one start at once, unless the store is in trouble: then it has to watch us for a while."""
        self._beats.stop()
        with suppress(ConfigError, FileExistsError):
            self._objects.at_once().write(f"{_prefix(self._term)}.ended", b"{}\n")

    # ---- the newest term

    def _take(self) -> int:
        while True:
            newest = self._newest_term()
            if newest and not self._has_ended(newest):
                continue  # there is a newer one by now
            with suppress(FileExistsError):  # somebody was faster: look who
                self._objects.write(_record(newest + 1), self._about_us())
                return newest + 1

    def _newest_term(self) -> int:
        """The newest term; 0 if there is none. No `.json` is ever deleted, so a listing that lags does no harm."""
        newest = max((term for term, _ in self._listed()), default=0)
        while self._objects.exists(_record(newest + 1)):
            newest += 1
        return newest

    def _holder(self, term: int) -> dict[str, Any]:
        return dict(json.loads(self._objects.read(_record(term))))

    def _has_ended(self, term: int) -> bool:
        """Whether the term's holder has ended; False if there is a newer term. Raises ConfigError if it lives."""
        ended = f"{_prefix(term)}.ended"
        if self._objects.exists(ended):
            return True
        holder = self._holder(term)
        if _is_dead(holder):
            return True
        who, seconds = _who(holder), max(self._seconds, holder.get("lease_seconds", 0))
        print(f"{who} holds this store: waiting {seconds:g} s for a sign of life", flush=True)
        began, seen = time.monotonic(), self._newest_beat(term)
        while time.monotonic() - began < seconds:
            time.sleep(seconds / LOOKS_PER_LEASE)
            if self._objects.exists(ended):
                return True
            if self._objects.exists(_record(term + 1)):
                return False
            if self._newest_beat(term) != seen:
                raise ConfigError(
                    f"exchange.url: {self._objects.url} given; {who} works on this store; stop it first, or name "
                    "another store"
                )
        print(f"{who} has been silent for {seconds:g} s: taking over", flush=True)
        return True

    def _newest_beat(self, term: int) -> str:
        beats = (what for listed, what in self._listed() if listed == term and what.startswith("beat-"))
        return max(beats, default="")

    def _listed(self) -> list[tuple[int, str]]:
        """Term and rest of the name of what lies there."""
        found = (NAME.fullmatch(name) for name in self._objects.names(FOLDER))
        return [(int(match[1]), match[2]) for match in found if match]

    # ---- our term

    def _about_us(self) -> bytes:
        record = {
            "holder": f"{socket.gethostname()}, process {os.getpid()}",
            "machine": _machine(),
            "pid": os.getpid(),
            "lease_seconds": self._seconds,
            "nonce": uuid.uuid4().hex,  # no two starters write the same
        }
        return (json.dumps(record) + "\n").encode()

    def _clear(self) -> None:
        """Delete what terms before the last two left, but for who held them."""
        for term, what in self._listed():
            if term < self._term - 1 and what != "json":
                self._objects.delete(f"{_prefix(term)}.{what}")


def _prefix(term: int) -> str:
    return f"{FOLDER}/{term:06d}"


def _record(term: int) -> str:
    return f"{_prefix(term)}.json"


def _who(holder: dict[str, Any]) -> str:
    return f"the aggregator at {shown(holder['holder'])}"


def _machine() -> str:
    """What two processes have in common that see each other's numbers: machine, its start, process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""  # unknown here: the beats will tell


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether a holder was a process of this machine, and is no more; our own number was given out again, then."""
    if not holder["machine"] or holder["machine"] != _machine():
        return False
    if holder["pid"] == os.getpid():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
