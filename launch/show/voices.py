"""Whose word each object of a store is, and whether that party has signed it."""

import re

from pretrain.config.keys import OPERATOR
from pretrain.exchange.rollback import Rollback
from pretrain.exchange.signed import SignedStore
from pretrain.exchange.words import (
    Beat,
    Decision,
    Done,
    Evaluation,
    Holder,
    Identity,
    Membership,
    Refusal,
    TermSign,
    Waiting,
    Word,
)
from pretrain.trust.contract import contract_keys
from pretrain.trust.ledger import Agreement, Commit, Manifest, Record, RefusedError, sha256_bytes
from pretrain.trust.members import Members

# The group of a name is its author; without one it is the aggregator's operator.
KINDS: tuple[tuple[str, type[Word] | type[Record]], ...] = (
    (r"aggregator/[0-9]+\.json", Holder),
    (r"aggregator/[0-9]+\.(?:ended|beat-[0-9]+)", TermSign),
    (r"global/[0-9]+/commit\.json", Commit),
    (r"global/[0-9]+/gate\.json", Decision),
    (r"global/[0-9]+/judged\.json", Evaluation),
    (r"rollbacks/[0-9]+\.json", Rollback),
    (r"rollbacks/[0-9]+\.done", Done),
    (r"signatures/([^/]+)\.json", Agreement),
    (r"silos/([^/]+)/beats/[0-9]+", Beat),
    (r"silos/([^/]+)/evaluations/[0-9]+\.json", Evaluation),
    (r"silos/([^/]+)/identity\.json", Identity),
    (r"silos/([^/]+)/membership/[0-9]+\.json", Membership),
    (r"silos/([^/]+)/[0-9]+/judged\.json", Evaluation),
    (r"silos/([^/]+)/[0-9]+/manifest\.json", Manifest),
    (r"silos/[^/]+/[0-9]+/refused-[0-9]+\.json", Refusal),
    (r"waiting/[0-9]+\.json", Waiting),
)


class Voices:
    """By the keys that a contract names."""

    def __init__(self, contract: bytes) -> None:
        """Raises ConfigError for keys that are none."""
        self.members = Members(keys=contract_keys(contract))
        self._contract_sha256 = sha256_bytes(contract)

    def follow_amendments(self, store: SignedStore) -> None:
        """Go by what has changed since the contract was written, too. Raises ConfigError."""
        store.read_contract()
        self.members = store.members

    def is_by_author(self, path: str, data: bytes) -> bool:
        """Whether an object is signed by who alone may write it; all are where the contract names no keys."""
        if not self.members.keys:
            return True
        matches = ((re.fullmatch(name, path), kind) for name, kind in KINDS)
        author, kind = next((m[1] if m.re.groups else OPERATOR, kind) for m, kind in matches if m)
        try:
            said = kind.from_bytes(data)
            if isinstance(said, Record):
                if isinstance(said, Agreement):
                    self.members.check(author, said, version=0)
                    return said.contract_sha256 == self._contract_sha256
                self.members.check(author, said, version=said.from_version if isinstance(said, Rollback) else None)
                return not isinstance(said, Commit | Manifest) or self._is_of(path, said)
            self.members.check_bytes(author, "word", said.to_sign(self._contract_sha256, path), said.signature)
        except RefusedError:
            return False
        return True

    def _is_of(self, path: str, record: Commit | Manifest) -> bool:
        """Whether a record is of this run, and of the version in its path."""
        version = int(path.split("/")[-2])
        terms = self.members.terms_at(version)
        sha256 = terms.sha256 if terms else self._contract_sha256
        return record.contract_sha256 == sha256 and record.version == version
