"""A silo's own ledger of a collective, looked at by somebody who trusts nobody: what all its silos have signed.

No delivery is in it, so nothing is merged again; and no operator has signed it. What stands for it is that every silo
has signed what it delivered and, before anybody adopted it, what came out: the digest of all parameters among that.
"""

import copy
import dataclasses
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from pretrain.config.keys import RunConfig
from pretrain.exchange.agreement import not_signed
from pretrain.exchange.history import History
from pretrain.exchange.payload import Tensors, changed_tensors
from pretrain.exchange.store import StoreExchange, snapshot_path, version_path
from pretrain.merge.outcome import Outcome, check_commit, moments_digest, outcome_path, record_paths
from pretrain.outer.digest import digest_tensors
from pretrain.trust.contract import without_operator
from pretrain.trust.ledger import Commit, Payload, RefusedError
from pretrain.trust.members import Members, public_keys


def is_collective(exchange: StoreExchange, config: RunConfig) -> bool:
    """Whether what was reached is a silo's ledger of a collective; `config` is as its contract says.

    By the contract's keys; where it names none, by what lies beside version 1.
    """
    if config.trust.keys:
        return without_operator(config.trust.keys)
    return any(exchange.objects.exists(outcome_path(silo, 1)) for silo in config.full_roster)


class SignedBySilos:
    """Goes through one such ledger, version by version, the oldest first."""

    def __init__(self, config: RunConfig, exchange: StoreExchange, scratch: Path) -> None:
        """`config` is as the contract says; `scratch` a folder for what is read. Raises ConfigError for no keys."""
        self._config, self._exchange, self._scratch = config, exchange, scratch
        self.members = Members(keys=public_keys(config))
        self._history = History(exchange, config.schedule.num_fragments)
        self._values: dict[int, dict[str, Tensor]] = {}  # by fragment: its newest parameters, if they are there
        self._outcomes: list[Outcome] = []  # of the version that was looked at last

    def not_signed(self) -> list[str]:
        """The silos whose signature under the contract is missing."""
        signed = copy.copy(self._exchange)
        signed.members = self.members
        return not_signed(signed)

    def check(self, commit: Commit) -> int:
        """How many manifests a commit has; raises RefusedError unless all of its silos have signed them, and it."""
        self._outcomes = []
        names = record_paths(self._config.full_roster, commit.version)
        found = {name: self._exchange.objects.read_if_there(name) for name in names}
        records = {name: data for name, data in found.items() if data is not None}
        if commit.version:
            self._outcomes = check_commit(commit, records, self._config, self.members)
        return len(commit.contributors)

    def has_its_parameters(self, commit: Commit) -> bool:
        """Whether all parameters of a version are there; raises RefusedError if they are not those that were signed."""
        for payload in commit.payloads:
            before = self._values.pop(payload.fragment, {})
            if self._is_there(commit, payload) and (before or commit.codec == "fp32"):
                self._values[payload.fragment] = self._read(commit, payload, before)
        for payload in self._whole(commit):
            if self._is_there(commit, payload):
                self._values[payload.fragment] = self._read(dataclasses.replace(commit, codec="fp32"), payload, {})
        if len(self._values) < self._config.schedule.num_fragments:
            return False
        digest = digest_tensors(row for values in self._values.values() for row in values.items())
        if digest != commit.parameters_digest:
            raise RefusedError(f"its parameters have digest {digest[:12]}, not {commit.parameters_digest[:12]}")
        return True

    def _is_there(self, commit: Commit, payload: Payload) -> bool:
        return self._exchange.objects.exists(f"{version_path(commit.version)}/{payload.file}")

    def _whole(self, commit: Commit) -> list[Payload]:
        """What a version's snapshot has: the fragment's parameters, which are not its change, but whole."""
        if not self._exchange.objects.exists(snapshot_path(commit.version)):
            return []
        payloads = self._history.read_snapshot(commit.version).payloads
        if [payload.fragment for payload in payloads] != [self._config.schedule.fragment(commit.version)]:
            raise RefusedError(f"{snapshot_path(commit.version)} is not of the fragment that the version changed")
        return payloads

    def _read(self, commit: Commit, payload: Payload, before: dict[str, Tensor]) -> dict[str, Tensor]:
        file = self._scratch / payload.file
        self._exchange.fetch(version_path(commit.version), payload, file)
        try:
            tensors = Tensors(file)
            values = changed_tensors(tensors, commit.codec, before if commit.codec != "fp32" else {})
            is_signed = payload not in commit.payloads or self._have_signed(moments_digest(tensors.moments))
        except (SafetensorError, ValueError) as error:
            raise RefusedError(f"{payload.file}: {error}") from None
        finally:
            file.unlink()
        if not is_signed:
            raise RefusedError(f"{payload.file}: its moments are not those that its silos have signed")
        return values

    def _have_signed(self, moments: str) -> bool:
        return all(outcome.moments_digest == moments for outcome in self._outcomes)
