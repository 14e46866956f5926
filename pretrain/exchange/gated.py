"""What lies in a store of a contract's gate: how candidates were judged, and which has become the current model.

    silos/NAME/000008/judged.json   what silo NAME has found the loss of version 8 to be on its splits of the gate
    global/000008/judged.json       the same of the operator and the public splits
    global/000008/gate.json         whether version 8 is the current one from then on, and by which results

They lie where the version does, so that a rollback takes them back with it. No torch.
"""

from collections.abc import Callable, Mapping
from statistics import fmean

from pretrain.config.errors import ConfigError
from pretrain.config.gate import GateConfig
from pretrain.config.keys import OPERATOR
from pretrain.exchange.store import REQUESTS_AT_ONCE, StoreExchange, delivery_path, version_path
from pretrain.exchange.words import Decision, Evaluation
from pretrain.outer.threads import in_threads
from pretrain.trust.gate import MOST_LOSS, faults
from pretrain.trust.ledger import RefusedError, sha256_bytes

JUDGED = "judged.json"


def judged_path(judge: str, version: int) -> str:
    """Where a silo, or the operator, says how it has judged a version."""
    return f"{version_path(version) if judge == OPERATOR else delivery_path(judge, version)}/{JUDGED}"


def decision_path(version: int) -> str:
    """Where it is said whether a version has become the current one."""
    return f"{version_path(version)}/gate.json"


def told_losses(losses: Mapping[str, float]) -> dict[str, float]:
    """As a result says them: of a model that is broken a number, too, so that nobody waits for one."""
    return {corpus: loss if loss <= MOST_LOSS else MOST_LOSS for corpus, loss in losses.items()}


class Gated:
    """The results and decisions of one store."""

    def __init__(self, exchange: StoreExchange, gate: GateConfig) -> None:
        self._exchange, self._gate = exchange, gate
        self._digests: dict[int, str] = {}  # of candidates that are not decided

    # ---- results

    def judges(self, version: int) -> list[str]:
        """The silos that are asked for a version: those of the gate that may sign then."""
        return [silo for silo in self._gate.silos if self._exchange.members.has_key(silo, version)]

    def _corpora(self, judge: str) -> list[str]:
        return sorted(self._gate.public) if judge == OPERATOR else self._gate.silos.get(judge, [])

    def result(self, judge: str, version: int, digest: str) -> tuple[Evaluation, str] | None:
        """How a version of these parameters was judged, and the sha256 of its bytes; None, and a line, for what is not
        that.
        """
        name = judged_path(judge, version)
        word = self._exchange.heard(Evaluation, name, judge)
        if word is None:
            return None
        if (word.version, word.parameters_digest) != (version, digest):
            self._exchange.pass_over(name, f"it is not of version {version} as it is here")
            return None
        if sorted(word.losses) != self._corpora(judge):
            self._exchange.pass_over(name, "it is not of just the splits that the contract's gate names")
            return None
        return word, sha256_bytes(word.to_bytes())

    def results(self, version: int, digest: str) -> dict[str, tuple[Evaluation, str]]:
        """All that are there, by judge."""
        judges = [*self.judges(version), *([OPERATOR] if self._gate.public else [])]
        found = in_threads(lambda judge: self.result(judge, version, digest), judges, REQUESTS_AT_ONCE)
        return {judge: one for judge, one in zip(judges, found, strict=True) if one}

    def tell(self, judge: str, result: Evaluation) -> None:
        """Leave word of a result; one that is there already stands. Raises RefusedError, ConfigError."""
        Evaluation.from_bytes(result.to_bytes())
        version = result.version
        assert version is not None
        name, digest = judged_path(judge, version), result.parameters_digest

        def stands() -> bool:
            return self.result(judge, version, digest) is not None

        if stands():
            return
        try:
            data = self._exchange.signed(name, result)
            self._exchange.write_over(name, data, stands, of={"version": version})
        except FileExistsError:
            if not stands():
                raise ConfigError(
                    f"exchange.url: {self._exchange.objects.url} given; {name} in it is none of {judge}'s results; "
                    "find out who writes to the store, take it away and start again"
                ) from None

    # ---- decisions

    def decision(self, version: int) -> Decision | None:
        """That about a version as it is here, if there is one."""
        name = decision_path(version)
        word = self._exchange.heard(Decision, name, OPERATOR)
        if word and (word.version, word.parameters_digest) != (version, self.digest(version)):
            self._exchange.pass_over(name, f"it is not about version {version} as it is here")
            return None
        return word

    def digest(self, version: int) -> str:
        """Of a version's parameters, by its commit. Raises RefusedError."""
        if version not in self._digests:
            self._digests[version] = self._exchange.read_commit(version).parameters_digest
        return self._digests[version]

    def newest(self, version: int) -> Decision | None:
        """The newest decision about versions up to one. Raises RefusedError."""
        every = self._gate.every_versions
        candidates = range(version - version % every, -1, -every)
        return next((found for one in candidates if (found := self.decision(one))), None)

    def decisions(self, version: int) -> list[Decision]:
        """All about versions up to one, the oldest first. Raises RefusedError."""
        candidates = range(0, version + 1, self._gate.every_versions)
        return [found for one in candidates if (found := self.decision(one))]

    def decide(self, version: int, results: Mapping[str, tuple[Evaluation, str]], before: Decision | None) -> Decision:
        """What follows from these results and the decision before: anybody comes to the same. Raises RefusedError."""
        reasons = []
        if before:
            reasons = faults(
                self._gate,
                {judge: _mean(word) for judge, (word, _) in results.items()},
                self.losses_of(self.decision(before.current)),
                compared_with=before.current,
                expected=self.judges(version),
            )
        judges = sorted(results)
        return Decision(
            version=version,
            parameters_digest=self.digest(version),
            is_current=not reasons,
            compared_with=before.current if before else version,
            previous=sha256_bytes(before.to_bytes()) if before else None,
            judges=judges,
            results=[results[judge][1] for judge in judges],
            reasons=reasons,
        )

    def losses_of(self, decision: Decision | None) -> dict[str, float]:
        """By judge, by the results that a decision names. Raises RefusedError."""
        found = self.named_results(decision) if decision else {}
        return {judge: _mean(word) for judge, (word, _) in found.items()}

    def named_results(self, decision: Decision) -> dict[str, tuple[Evaluation, str]]:
        """The results that a decision names. Raises RefusedError for those that are gone, or others."""
        found = {}
        for judge, sha256 in zip(decision.judges, decision.results, strict=True):
            one = self.result(judge, decision.version, decision.parameters_digest)
            if one is None or one[1] != sha256:
                name = judged_path(judge, decision.version)
                raise RefusedError(f"{name} is not the result by which version {decision.version} was decided")
            found[judge] = one
        return found

    def check(self, decision: Decision, before: Decision | None) -> None:
        """Raise RefusedError for a decision that does not follow from the results that it names."""
        wanted = self.decide(decision.version, self.named_results(decision), before)
        if decision != wanted:
            said, ours = (_said(one) for one in (decision, wanted))
            raise RefusedError(f"{decision_path(decision.version)} says: {said}; from its results comes: {ours}")

    def write(self, decision: Decision, check: Callable[[], None]) -> Decision:
        """Write a decision, unless one is there; returns that which stands. Raises ConfigError.

        `check` is called before, and raises if this process may not write any more.
        """
        check()
        name = decision_path(decision.version)
        try:
            self._exchange.say(name, decision, OPERATOR)
        except FileExistsError:
            if not (there := self.decision(decision.version)):
                raise ConfigError(
                    f"exchange.url: {self._exchange.objects.url} given; {name} in it is no decision of this run's "
                    "operator; find out who writes to the store, take it away and start again"
                ) from None
            return there
        found = self.decision(decision.version)
        assert found
        return found


def _mean(word: Evaluation) -> float:
    return fmean(word.losses.values())


def _said(decision: Decision) -> str:
    after = f"version {decision.current} is current"
    return "; ".join([after, f"compared with {decision.compared_with}", *decision.reasons])
