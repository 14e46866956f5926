"""The aggregator's side of a contract's gate: it decides about one candidate after another, as soon as it can."""

import time
from collections.abc import Callable, Mapping

from pretrain.config.errors import named
from pretrain.config.keys import RunConfig
from pretrain.exchange.gated import Gated
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.words import Decision
from pretrain.host.journal import Journal


class Gatekeeper:
    """What it has decided is in the store: started again, it comes to the same, or finds it there."""

    def __init__(
        self, config: RunConfig, exchange: StoreExchange, journal: Journal, *, check_lease: Callable[[], None]
    ) -> None:
        self._config, self._gate, self._journal = config, config.gate, journal
        self._gated, self._check_lease = Gated(exchange, config.gate), check_lease
        self._newest: Decision | None = None
        self._next = 0
        self._since: dict[int, float] = {}  # when a candidate was first seen

    @property
    def current(self) -> int:
        """The current version, of which everything is kept; 0 before there is one."""
        return self._newest.current if self._newest else 0

    @property
    def goes_back(self) -> Decision | None:
        """The decision by which the run goes back, if the contract says so and the newest one is such."""
        newest = self._newest
        return newest if newest and not newest.is_current and self._gate.otherwise == "go_back" else None

    def start(self, version: int) -> None:
        """Find out what was decided about versions up to the newest. Raises RefusedError."""
        if newest := self._gated.newest(version):
            self._take(newest)
            self._record(newest, self._gated.losses_of(newest))  # whoever decided may have died before it wrote this

    def look(self, version: int) -> str:
        """Decide about all candidates up to the newest version that can be decided about; returns what is waited for.

        Raises ConfigError, RefusedError.
        """
        while self._next <= version and not self.goes_back:
            candidate, began = self._next, self._since.setdefault(self._next, time.monotonic())
            if not (decision := self._gated.decision(candidate)):
                digest = self._gated.digest(candidate)
                results, judges = self._gated.results(candidate, digest), self._gated.judges(candidate)
                missing = [silo for silo in judges if silo not in results]
                limit = self._gate.deadline_seconds
                if missing and (limit is None or time.monotonic() - began < limit):
                    until = "" if limit is None else f", until {limit:g} s after its commit"
                    return f"silo {named(missing)}: held-out loss of version {candidate}{until}"
                decision = self._gated.write(self._gated.decide(candidate, results, self._newest), self._check_lease)
            del self._since[candidate]
            self._take(decision)
            losses = self._gated.losses_of(decision)
            self._say(decision, losses)
            self._record(decision, losses)
        return ""

    def wait(self, version: int) -> None:
        """Until all is decided about versions up to the last. Raises as `look` does."""
        said = ""
        while words := self.look(version):
            if words != said:
                said = words
                self._journal.status("waiting", round=self._config.round_of(version), waiting_for=words)
                print(f"gate: waiting for {words}", flush=True)
            time.sleep(self._config.exchange.poll_seconds)

    def _take(self, decision: Decision) -> None:
        self._newest, self._next = decision, decision.version + self._gate.every_versions

    def _say(self, decision: Decision, losses: Mapping[str, float]) -> None:
        judged = ", ".join(f"{judge} {loss:.4f}" for judge, loss in losses.items())
        if decision.is_current:
            said = "is the current one from now on"
        else:
            why = "; ".join(decision.reasons)
            said = f"does not become the current one, which stays version {decision.current}: {why}"
        print(f"gate: version {decision.version} {said}; judged: {judged or 'by nobody'}", flush=True)

    def _record(self, decision: Decision, losses: Mapping[str, float]) -> None:
        self._journal.record(
            "gate",
            version=decision.version,
            is_current=decision.is_current,
            current=decision.current,
            compared_with=decision.compared_with,
            losses=losses,
            reasons=decision.reasons,
        )
