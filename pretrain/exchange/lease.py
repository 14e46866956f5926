"""One aggregator for each store: a lease in write-once objects, without comparing any two clocks. No torch.

    aggregator/000003.json          who holds term 3; whoever writes it first has it
    aggregator/000003.beat-000017   the holder's newest sign of life
    aggregator/000003.ended         the holder has ended: the next one takes term 4 at once

A starter watches the beats of the newest term by its own monotonic clock. The holder of a term looks for the next one
before it writes, so one that was paused and taken over commits nothing.

Where the contract names keys, the operator signs all of this, and what is not signed is passed over: a term that
somebody else has written is held by nobody, and the next one is the next that is free. Nobody deletes one to take it:
two who did would both have it.
"""

import os
import re
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path

from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR
from pretrain.exchange.beats import Beats
from pretrain.exchange.signed import SignedStore
from pretrain.exchange.words import Holder, TermSign, number
from pretrain.host.foreign import shown
from pretrain.trust.ledger import RefusedError

FOLDER = "aggregator"
LOOKS_PER_LEASE = 20
MOST_LEASES = 10  # a holder says how long to wait for it, up to so many times one's own `seconds`
NAME = re.compile(r"([0-9]{6})\.(json|ended|beat-[0-9]{6,9})")


class Lease:
    """The right to commit to a store, from its making to `release`."""

    def __init__(self, store: SignedStore, *, seconds: float) -> None:
        """Take the next term, once the holder of the newest has ended or was silent for `seconds`; in a store whose
        contract was read.

        Raises ConfigError if that is at work.
        """
        self._store, self._objects, self._seconds, self._term = store, store.objects, seconds, 0
        self._sign = TermSign(nonce=uuid.uuid4().hex)  # no two starters write the same
        self._term = self._take()
        self._clear()
        self._beats = Beats(
            store,
            f"{_prefix(self._term)}.beat-",
            self._sign,
            OPERATOR,
            lease_seconds=seconds,
            is_over=lambda at_once: self._newest_term(at_once)[0] > self._term,
        )

    def check(self) -> None:
        """Raise ConfigError if another aggregator has taken over: it took us for dead."""
        newest, _ = self._newest_term(self._store)
        if newest > self._term:
            who = self._who(newest, self._holder(newest))
            raise ConfigError(f"exchange.url: {self._objects.url} given; {who} has taken over here")

    def release(self) -> None:
        """Let the next one start at once, unless the store is in trouble: then it has to watch us for a while."""
        self._beats.stop()
        with suppress(ConfigError, FileExistsError):
            self._store.at_once().say(f"{_prefix(self._term)}.ended", self._sign, OPERATOR)

    # ---- the newest term

    def _take(self) -> int:
        while True:
            newest, free = self._newest_term(self._store)
            if newest and not self._has_ended(newest):
                continue  # there is a newer one by now
            try:
                self._objects.write(_record(free), self._store.signed(_record(free), self._about_us()))
                return free
            except FileExistsError:  # somebody was faster: look who
                if not self._objects.exists(_record(free)):
                    what = f"{_record(free)} there is no lease; take it away"
                    raise ConfigError(f"exchange.url: {self._objects.url} given; {what}") from None

    def _newest_term(self, store: SignedStore) -> tuple[int, int]:
        """The newest term, 0 if there is none, and the next one that nobody has written.

        No `.json` is ever deleted, so a listing that lags does no harm.
        """

        def is_term(term: int) -> bool:
            return not store.members.keys or store.heard(Holder, _record(term), OPERATOR) is not None

        listed = sorted({term for term, what in _listed(store) if what == "json" and term > self._term})
        newest = next((term for term in reversed(listed) if is_term(term)), self._term)
        free = newest + 1
        while store.objects.exists(_record(free)):
            newest = free if is_term(free) else newest
            free += 1
        return newest, free

    def _holder(self, term: int) -> Holder | None:
        """Who holds a term; None, and a line, if its record is none: then only its beats can tell."""
        try:
            return self._store.checked(Holder, _record(term), OPERATOR)
        except (RefusedError, FileNotFoundError) as error:
            print(f"{self._objects.url}: {_record(term)} does not say who holds this store: {error}", flush=True)
            return None

    @staticmethod
    def _who(term: int, holder: Holder | None) -> str:
        return f"the aggregator at {shown(holder.holder)}" if holder else f"whoever wrote {_record(term)}"

    def _has_ended(self, term: int) -> bool:
        """Whether the term's holder has ended; False if there is a newer term. Raises ConfigError if it lives."""
        holder = self._holder(term)
        if self._has_said_so(term, holder) or (holder and _is_dead(holder)):
            return True
        theirs = min(holder.lease_seconds if holder else 0.0, MOST_LEASES * self._seconds)
        who, seconds = self._who(term, holder), max(self._seconds, theirs)
        print(f"{who} holds this store: waiting {seconds:g} s for a sign of life", flush=True)
        began, seen = time.monotonic(), self._beats_of(term)
        newest = max((n for n in seen if self._is_beat(term, n, holder)), default=-1)
        while time.monotonic() - began < seconds:
            time.sleep(seconds / LOOKS_PER_LEASE)
            if self._has_said_so(term, holder):
                return True
            if self._objects.exists(_record(term + 1)) and self._newest_term(self._store)[0] > term:
                return False
            # A copy of an earlier one is no sign of life. Where nothing is signed, any new one is, whatever its number.
            new = [n for n in self._beats_of(term) - seen if n > newest or not self._store.members.keys]
            if any(self._is_beat(term, n, holder) for n in new):
                raise ConfigError(
                    f"exchange.url: {self._objects.url} given; {who} works on this store; stop it first, or name "
                    "another store"
                )
        print(f"{who} has been silent for {seconds:g} s: taking over", flush=True)
        return True

    def _has_said_so(self, term: int, holder: Holder | None) -> bool:
        """Whether a term's holder says that it has ended."""
        name = f"{_prefix(term)}.ended"
        return self._objects.exists(name) and self._is_by_holder(name, holder)

    def _beats_of(self, term: int) -> set[int]:
        """Numbers of a term's signs of life, whoever has left them."""
        found = (number(what, before="beat-") for listed, what in _listed(self._store) if listed == term)
        return {n for n in found if n is not None}

    def _is_beat(self, term: int, beat: int, holder: Holder | None) -> bool:
        return self._is_by_holder(f"{_prefix(term)}.beat-{beat:06d}", holder)

    def _is_by_holder(self, name: str, holder: Holder | None) -> bool:
        """Whether a sign is a term's holder's."""
        if not self._store.members.keys:
            return True
        sign = self._store.heard(TermSign, name, OPERATOR)
        return bool(sign and holder and sign.nonce == holder.nonce)

    # ---- our term

    def _about_us(self) -> Holder:
        return Holder(
            holder=f"{socket.gethostname()}, process {os.getpid()}",
            machine=_machine(),
            pid=os.getpid(),
            lease_seconds=self._seconds,
            nonce=self._sign.nonce,
        )

    def _clear(self) -> None:
        """Delete what terms before the last two left, but for who held them."""
        for term, what in _listed(self._store):
            if term < self._term - 1 and what != "json":
                self._objects.delete(f"{_prefix(term)}.{what}")


def _prefix(term: int) -> str:
    return f"{FOLDER}/{term:06d}"


def _record(term: int) -> str:
    return f"{_prefix(term)}.json"


def _listed(store: SignedStore) -> list[tuple[int, str]]:
    """Term and rest of the name of what lies there."""
    found = (NAME.fullmatch(name) for name in store.objects.names(FOLDER))
    return [(int(match[1]), match[2]) for match in found if match]


def _machine() -> str:
    """What two processes have in common that see each other's numbers: machine, its start, process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""  # unknown here: the beats will tell


def _is_dead(holder: Holder) -> bool:
    """Whether a holder was a process of this machine, and is no more; our own number was given out again, then."""
    if not holder.machine or holder.machine != _machine() or not holder.pid:
        return False
    if holder.pid == os.getpid():
        return True
    try:
        os.kill(holder.pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False
