"""The gate of a run, as its store shows it: which version is the current one, candidates, results and decisions."""

from statistics import fmean

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


def gate_words(opened: Opened, gate: GateConfig, version: int | None) -> list[str]:
    """A line for the current version, and one for each of the newest candidates; none without a gate."""
    if not gate.is_on or version is None:
        return []
    candidates = range(0, version + 1, gate.every_versions)
    paths = opened.store.numbered(DECISION)
    newest = [paths[number] for number in sorted(paths)[-NEWEST:]]
    decided = {one.version: one for one in opened.parsed(newest, Decision.from_bytes).values() if _is_of(opened, one)}
    last = decided[max(decided)] if decided else None
    lines = [f"gate: version {last.current} is the current one" if last else "gate: no version is the current one yet"]
    return lines + [
        f"gate: version {number} {_words(opened, gate, number, decided.get(number))}"
        for number in candidates[-NEWEST:]
        if number in decided or last is None or number > last.version
    ]


def _is_of(opened: Opened, word: Decision | Evaluation) -> bool:
    """Whether a word is about the parameters that its version has."""
    commit = opened.commits.get(-1 if word.version is None else word.version)
    return commit is not None and commit.parameters_digest == word.parameters_digest


def _words(opened: Opened, gate: GateConfig, version: int, decision: Decision | None) -> str:
    losses = _losses(opened, gate, version)
    told = ", ".join(f"{shown(judge)} {loss:.4f}" for judge, loss in losses.items()) or "nobody"
    if decision is None:
        missing = [silo for silo in gate.silos if silo not in losses]
        waits = f"waits for the results of {named(missing)}" if missing else "waits for the aggregator"
        return f"{waits}; judged by {told}"
    if decision.is_current:
        return f"became the current one; judged by {told}"
    why = "; ".join(shown(reason, limit=200) for reason in decision.reasons)
    return f"did not, version {decision.compared_with} stays: {why}; judged by {told}"


def _losses(opened: Opened, gate: GateConfig, version: int) -> dict[str, float]:
    """By who judged, the mean over the splits; what is there."""
    paths = {silo: JUDGED_BY.format(silo, version) for silo in gate.silos} | {OPERATOR: JUDGED.format(version)}
    there = {judge: path for judge, path in paths.items() if path in opened.store.times}
    found = opened.parsed(there.values(), Evaluation.from_bytes)
    words = {judge: found[path] for judge, path in there.items() if path in found}
    return {judge: fmean(word.losses.values()) for judge, word in words.items() if _is_of(opened, word)}
