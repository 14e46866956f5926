"""The gate of a run, as its store shows it: which version is the current one, candidates, results and decisions."""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from launch.show.opened import Opened
from pretrain.config.errors import named
from pretrain.config.gate import GateConfig
from pretrain.config.keys import OPERATOR
from pretrain.exchange.words import Decision, Evaluation
from pretrain.host.foreign import shown

DECISION = "global/#/gate.json"
JUDGED_BY = "silos/{}/{:06d}/judged.json"
JUDGED = "global/{:06d}/judged.json"
NEWEST = 5  # candidates that are told, each with its results


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A version that is judged."""

    version: int
    losses: dict[str, float]
    """By who has judged, the mean over the splits."""
    is_decided: bool
    decision: str
    """What became of it; before, what it waits for."""
    reasons: str = ""
    """Why it did not become the current one; they tell losses."""

    @property
    def words(self) -> str:
        """All of it in a line."""
        told = ", ".join(f"{judge} {loss:.4f}" for judge, loss in self.losses.items()) or "nobody"
        why = f"did not, {self.decision}: {self.reasons}" if self.reasons else self.decision
        return f"gate: version {self.version} {why}; judged by {told}"

    def row(self, *, with_losses: bool) -> dict[str, Any]:
        """The same as the report of a run has it (`gate.html.j2`)."""
        why = f": {self.reasons}" if self.reasons and with_losses else ""
        losses = {judge: f"{loss:.4f}" for judge, loss in self.losses.items()} if with_losses else {}
        return {"version": self.version, "losses": losses, "decision": f"{self.decision}{why}"}


@dataclass(frozen=True, kw_only=True)
class GateStatus:
    """Where a gate stands."""

    current: int | None
    """The current version; None before there is one."""
    candidates: list[Candidate]
    """The newest."""

    @property
    def current_words(self) -> str:
        """Which is the current version."""
        which = "no version is the current one yet"
        return which if self.current is None else f"version {self.current} is the current one"

    @property
    def words(self) -> list[str]:
        """A line for the current version, and one for each candidate."""
        return [f"gate: {self.current_words}", *(one.words for one in self.candidates)]

    @property
    def is_waiting(self) -> bool:
        """Whether a candidate is not decided yet."""
        return not all(one.is_decided for one in self.candidates)

    @property
    def decisions(self) -> list[str]:
        """A line for each candidate that is decided."""
        return [one.words for one in self.candidates if one.is_decided]


def read_gate(opened: Opened, gate: GateConfig, version: int | None) -> GateStatus | None:
    """Where the gate of a run stands; None without one."""
    if not gate.is_on or version is None:
        return None
    paths = opened.store.numbered(DECISION)
    newest = [paths[number] for number in sorted(paths)[-NEWEST:]]
    decided = {one.version: one for one in opened.parsed(newest, Decision.from_bytes).values() if _is_of(opened, one)}
    last = decided[max(decided)] if decided else None
    return GateStatus(
        current=last.current if last else None,
        candidates=[
            _candidate(opened, gate, number, decided.get(number))
            for number in range(0, version + 1, gate.every_versions)[-NEWEST:]
            if number in decided or last is None or number > last.version
        ],
    )


def _is_of(opened: Opened, word: Decision | Evaluation) -> bool:
    """Whether a word is about the parameters that its version has."""
    commit = opened.commits.get(-1 if word.version is None else word.version)
    return commit is not None and commit.parameters_digest == word.parameters_digest


def _candidate(opened: Opened, gate: GateConfig, version: int, decision: Decision | None) -> Candidate:
    losses = _losses(opened, gate, version)
    if decision is None:
        missing = [silo for silo in gate.silos if silo not in losses]
        waits = f"waits for the results of {named(missing)}" if missing else "waits for the aggregator"
        return Candidate(version=version, losses=losses, is_decided=False, decision=waits)
    if decision.is_current:
        return Candidate(version=version, losses=losses, is_decided=True, decision="became the current one")
    reasons = "; ".join(shown(reason, limit=200) for reason in decision.reasons)
    stays = f"version {decision.compared_with} stays"
    return Candidate(version=version, losses=losses, is_decided=True, decision=stays, reasons=reasons)


def _losses(opened: Opened, gate: GateConfig, version: int) -> dict[str, float]:
    """By who judged, the mean over the splits; what is there."""
    paths = {silo: JUDGED_BY.format(silo, version) for silo in gate.silos} | {OPERATOR: JUDGED.format(version)}
    there = {judge: path for judge, path in paths.items() if path in opened.store.times}
    found = opened.parsed(there.values(), Evaluation.from_bytes)
    words = {judge: found[path] for judge, path in there.items() if path in found}
    return {shown(judge): fmean(word.losses.values()) for judge, word in words.items() if _is_of(opened, word)}
