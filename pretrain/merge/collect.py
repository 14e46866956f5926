"""What the aggregator waits for: who is expected, how long, whose delivery counts. Where a quorum is enough, a silo may
be late, refused or away, and the version is committed without it.
"""

import json
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pretrain.config.errors import named
from pretrain.config.keys import RunConfig
from pretrain.exchange.objects import StopWaitingError, StoreSlowError
from pretrain.exchange.payload import Tensors
from pretrain.exchange.store import REQUESTS_AT_ONCE, StoreExchange
from pretrain.exchange.words import Membership
from pretrain.host.foreign import loads, shown
from pretrain.host.journal import Journal
from pretrain.merge.looks import Looks
from pretrain.merge.past import Past
from pretrain.outer.rounds import deadline_seconds
from pretrain.outer.threads import in_threads
from pretrain.trust.ledger import Manifest, RefusedError

ARRIVALS = 64  # how many of the newest ones the deadline follows from
SAYS_AFTER_SECONDS = 5.0
POLLS_PER_LOOK = 20  # while it waits, it looks so seldom at what hardly ever changes
LOOK_SECONDS = 5.0  # a look that takes longer goes on while there are others, and all else that is done meanwhile
ABSURDLY_FASTER = 10_000.0  # than the median of the others: no pair of machines differs as much


@dataclass(kw_only=True)
class Delivery:
    """One silo's verified delivery: its manifest, its payload on disk, and the norm of its pseudo-gradient."""

    manifest: Manifest
    manifest_bytes: bytes
    tensors: Tensors
    norm: float
    base: Mapping[str, Tensor] | None = None
    """The parameters that it was coded against, if these are not the newest: it is late, or another history's."""


Verify = Callable[[str, bytes, int, threading.Event], Delivery]
"""Reads a silo's manifest for a version, and its payload, unless an event is set meanwhile; raises RefusedError."""


class Collector:
    """Waits for the deliveries of one version after another."""

    def __init__(self, config: RunConfig, exchange: StoreExchange, journal: Journal) -> None:
        self._config, self._exchange, self._journal = config, exchange, journal
        self._rules, self._schedule = config.membership, config.schedule
        self._stall_seconds = config.exchange.stall_seconds
        self._file = Path(config.directory) / "aggregator" / "arrivals.json"
        self._arrivals: deque[float] = deque(maxlen=ARRIVALS)
        if self._rules.is_elastic and self._file.is_file():
            self._arrivals.extend(_read_arrivals(self._file))
        self.past = Past(config, exchange.members)
        """What is known of the commits so far."""
        self.merged: list[tuple[Manifest, bytes]] = []
        """The manifests of the newest one's deliveries, and their bytes, if it was made since the start."""
        self._version = 0
        self._events: dict[str, Membership | None] = {}  # what each silo said last of taking part, when it was asked
        self._ask_again, self._was_enough = 0.0, False  # seconds into a version; whether enough were in at the last

    def collect(
        self, version: int, verify: Verify, look: Callable[[], None] = lambda: None, *, chosen: Sequence[str] = ()
    ) -> list[Delivery]:
        """Wait for a version's deliveries; verify each as it comes; refuse what is not as it should be. `look` is
        called again and again meanwhile. Once it is decided whose they are, `chosen`, it takes all of these.

        One that is on its way when there are enough has `exchange.stall_seconds` more. Returns them sorted by silo,
        those that came too late for the commit before after all others.
        """
        rules, began, self._version = self._rules, time.monotonic(), version
        needed = len(chosen) or rules.quorum or len(self.past.drawn(version))
        chosen = [*chosen] or self.past.drawn(version)
        deadline = deadline_seconds(
            self._arrivals,
            mads=rules.deadline_mads,
            floor=rules.deadline_floor_seconds,
            ceiling=rules.deadline_ceiling_seconds,
        )
        arrived: dict[str, Delivery] = {}
        refused: set[str] = set()
        announced, enough_since, has_said = "", math.inf, False
        self._ask_again, self._was_enough = POLLS_PER_LOOK * self._config.exchange.poll_seconds, False
        with self._looks(version, verify) as looks:
            while True:
                pending = [silo for silo in chosen if silo not in arrived and silo not in refused]
                for silo, found in looks.at(pending, LOOK_SECONDS).items():
                    arrived[silo] = found
                    self._arrivals.append(time.monotonic() - began)
                pending = [silo for silo in pending if silo not in arrived]
                waited = time.monotonic() - began
                missing = self._missing(pending, waited, is_enough=len(arrived) >= needed)
                if len(arrived) >= needed and (not missing or (rules.is_elastic and waited >= deadline)):
                    enough_since = min(enough_since, waited)
                    until = enough_since + self._stall_seconds
                    words = self._words_of_slow(version, looks.under_way, until)
                    if not looks.under_way or waited >= until:
                        if self._without_absurd(version, arrived, refused, chosen, needed):
                            break
                        enough_since = math.inf
                        continue
                else:
                    words, enough_since = self._words(version, missing, len(arrived), deadline), math.inf
                if words != announced:
                    announced = words
                    self._journal.status("waiting", round=self._config.round_of(version), waiting_for=words)
                    print(f"version {version}: waiting for {words}", flush=True)
                if waited > SAYS_AFTER_SECONDS and not has_said:
                    has_said = True
                    by = deadline if rules.is_elastic else None
                    self._exchange.say_waiting(version, missing, deadline_seconds=by)
                look()
                time.sleep(self._config.exchange.poll_seconds)
        if rules.is_elastic:
            self._file.write_text(json.dumps(list(self._arrivals)))
        return [arrived[silo] for silo in sorted(arrived)] + self._late(version, verify, deadline)

    # ---- who is expected

    def members(self) -> list[str]:
        """The silos for whose resuming the store keeps what they need: those of the roster that are not away.

        Who was there is not asked again: of a silo that has just left, a little more is kept for a while.
        """
        roster = self._config.full_roster
        if not self._rules.is_elastic:
            return roster
        self._ask([silo for silo in roster if silo not in self._events or not self._is_there(silo)])
        return [silo for silo in roster if self._is_there(silo)]

    def _missing(self, pending: list[str], waited: float, *, is_enough: bool) -> list[str]:
        """Of those whose delivery is not here, whose is waited for: with a quorum, of who has joined and is not away.

        Who has joined or left is asked once there are enough, where it may be the end of waiting, and now and then,
        ever less often.
        """
        if not self._rules.is_elastic:
            return pending
        self._ask([silo for silo in pending if silo not in self._events])
        missing = [silo for silo in pending if self._is_there(silo)]
        if waited >= self._ask_again or (is_enough and (not missing or not self._was_enough)):
            self._ask(pending)
            self._ask_again, self._was_enough = max(self._ask_again, 1.25 * waited), is_enough
            missing = [silo for silo in pending if self._is_there(silo)]
        return missing

    def _ask(self, silos: list[str]) -> None:
        self._events.update(zip(silos, in_threads(self._exchange.membership, silos, REQUESTS_AT_ONCE), strict=True))

    def _is_there(self, silo: str) -> bool:
        event = self._events[silo]
        if event is None or event.left or not self._exchange.members.has_key(silo, self._version):
            return False
        return not self.past.is_away(silo, since=event.version)

    def _words(self, version: int, missing: list[str], num_arrived: int, deadline: float) -> str:
        """What is waited for, and until when."""
        quorum = self._rules.quorum
        what = f"silo {named(missing)}: delivery for version {version}"
        if quorum is None:
            return what
        if not missing:
            return f"{quorum - num_arrived} more silos to join: {num_arrived} of {quorum} have delivered"
        return f"{what}; {quorum} are enough {deadline:.0f} s after the commit before"

    @staticmethod
    def _words_of_slow(version: int, silos: list[str], until: float) -> str:
        return (
            f"silo {named(silos)}: delivery for version {version}, which is on its way; the others are enough "
            f"{until:.0f} s after the commit before"
        )

    # ---- whose delivery counts

    def _looks(self, version: int, verify: Verify) -> Looks[Delivery]:
        return Looks(
            lambda silo, over: self._look(silo, version, verify, over),
            at_once=REQUESTS_AT_ONCE,
            most=len(self._config.full_roster),
            patience_seconds=self._stall_seconds,
        )

    def _look(self, silo: str, version: int, verify: Verify, over: threading.Event) -> Delivery | None:
        """A delivery that is there and as it should be; what comes too slowly is not there yet."""
        manifest: bytes | None = b""
        try:
            if (manifest := self._exchange.until(over).delivered(silo, version)) is None:
                return None
            delivery = verify(silo, manifest, version, over)
            self.past.check_cosigned(delivery.manifest)
            return delivery
        except RefusedError as error:
            self._refuse(silo, version, manifest or b"", str(error))
        except StopWaitingError:
            print(f"version {version}: the delivery of silo {silo} was not there in time", flush=True)
        except StoreSlowError as error:
            print(f"version {version}: the delivery of silo {silo} counts as not there: {error}", flush=True)
        return None

    def _refuse(self, silo: str, version: int, manifest: bytes, reason: str, *, final: bool = False) -> None:
        print(f"version {version}: refused the delivery of silo {silo}: {shown(reason, limit=1000)}", flush=True)
        self._exchange.refuse(silo, version, manifest, reason, final=final)

    def put_back(self, *, check: Callable[[], None]) -> None:
        """What silos have put in the place of their merged manifests is refused, and these lie there again.

        For silos that look at what others have signed. `check` is called before a write.
        """
        for manifest, data in self.merged:
            silo, version = manifest.silo, manifest.version
            if (there := self._exchange.delivered(silo, version)) == data:
                continue
            check()
            if there:
                self._refuse(silo, version, there, "it has signed another one for this version, which was merged")
            self._exchange.put_manifest(silo, version, data)

    def _late(self, version: int, verify: Verify, seconds: float) -> list[Delivery]:
        """Deliveries for this fragment's version before that came after its commit, and are here in so many seconds."""
        late = self._schedule.base(version)
        if not self._rules.stale_weight or late < 1:
            return []
        merged = self.past.in_time(late)
        with self._looks(late, verify) as looks:
            silos = [silo for silo in self._config.full_roster if self._exchange.members.has_key(silo, version)]
            found = looks.at([silo for silo in silos if silo not in merged], max(seconds, self._stall_seconds))
        return list(found.values())

    def _without_absurd(
        self, version: int, arrived: dict[str, Delivery], refused: set[str], chosen: list[str], needed: int
    ) -> bool:
        """Whether none of what has arrived is absurd; what is goes to the refused ones.

        Raises RefusedError if the others are too few then, whoever may come.
        """
        absurd = self._absurd(version, arrived)
        for silo, reason in absurd.items():
            self._refuse(silo, version, arrived.pop(silo).manifest_bytes, reason, final=True)
            refused.add(silo)
        if absurd and len(chosen) - len(refused) < needed:
            raise RefusedError(
                f"version {version}: it needs the deliveries of {needed} silos, and that of "
                f"{named([f'{silo} is refused for good: {reason}' for silo, reason in absurd.items()])}"
            )
        return not absurd

    def _absurd(self, version: int, arrived: dict[str, Delivery]) -> dict[str, str]:
        """Silos whose pseudo-gradient is far longer than those of the others and than their own before, and why; or
        who say that they are far faster than all others.
        """
        ratio, found = self._rules.max_norm_ratio, self._absurdly_fast(arrived)
        if ratio is None:
            return found
        of_others, fragment = _medians_of_others({s: one.norm for s, one in arrived.items()}), self._schedule.fragment
        for silo, delivery in arrived.items():
            own = self.past.norms(silo, fragment(version))
            usual = [*([of_others[silo]] if of_others else []), *([statistics.median(own)] if own else [])]
            if usual and delivery.norm > ratio * max(usual):
                found[silo] = f"its norm is {delivery.norm:.4g}, more than {ratio:g} times what is usual in this round"
        return found

    def _absurdly_fast(self, arrived: dict[str, Delivery]) -> dict[str, str]:
        if self._rules.steps != "speed" or len(arrived) < 2:
            return {}
        told = {silo: delivery.manifest.metrics["seconds_per_step"] for silo, delivery in arrived.items()}
        found, of_others = {}, _medians_of_others(told)
        for silo, seconds in told.items():
            usual = of_others[silo]
            if seconds < usual / ABSURDLY_FASTER:
                found[silo] = f"its seconds_per_step is {seconds:.4g}, where that of the others is {usual:.4g}"
        return found


def _medians_of_others(values: Mapping[str, float]) -> dict[str, float]:
    """For each of several silos, the median of all others' values, sorted once."""
    ranked = sorted(values.items(), key=lambda one: one[1])
    middle, found = len(ranked) - 1, {}
    for place, (silo, _) in enumerate(ranked if middle else ()):
        low, high = (middle - 1) // 2, middle // 2
        found[silo] = sum(ranked[rank + (rank >= place)][1] for rank in (low, high)) / 2
    return found


def _read_arrivals(file: Path) -> list[float]:
    """What an earlier start has seen; nothing, and a line, if its file is damaged: the deadline then is the ceiling."""
    try:
        found = loads(file.read_bytes())
        if not isinstance(found, list) or not all(type(seconds) in (int, float) for seconds in found):
            raise ValueError("a list of seconds was expected")
    except ValueError as error:
        print(f"{file} is damaged, and when deliveries arrived is forgotten: {error}", flush=True)
        return []
    return found
