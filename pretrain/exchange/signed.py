"""A store in which everything is signed: reaching it, its contract, and words that count if their author said them."""

import copy
import dataclasses
import threading
from collections.abc import Mapping
from typing import Any, Self, TypeVar

from pretrain.config.check import ConfigError
from pretrain.config.keys import ExchangeConfig, RunConfig
from pretrain.exchange.amended import Amendments
from pretrain.exchange.objects import Objects
from pretrain.exchange.options import store_options
from pretrain.exchange.words import WORD_BYTES, Membership, Word, number
from pretrain.host.foreign import shown
from pretrain.trust.contract import amend_rule, contract_keys, contract_seals
from pretrain.trust.ledger import Commit, Record, RefusedError, check_link, sha256_bytes
from pretrain.trust.members import Members

CONTRACT = "contract.json"
W = TypeVar("W", bound=Word)


class SignedStore:
    """Once the contract was read, `members` are those that it names: what they have not signed is not used."""

    def __init__(
        self,
        url: str,
        *,
        options: Mapping[str, Any] | None = None,
        retry_seconds: float = 0.0,
        stall_seconds: float = ExchangeConfig.stall_seconds,
        closing: threading.Event | None = None,
    ) -> None:
        """Raises ConfigError for a URL that fsspec cannot serve; see Objects for the rest."""
        self.objects = Objects(
            url,
            options=options,
            anchor=CONTRACT,
            retry_seconds=retry_seconds,
            stall_seconds=stall_seconds,
            closing=closing,
        )
        self.contract_sha256, self.members, self.is_sealed = "", Members(), False
        self.amendments = Amendments(self.members, "all", "", self.pass_over)
        self._passed_over: set[str] = set()
        self._said: dict[str, tuple[list[int], Membership | None]] = {}  # words of membership, and the last

    @classmethod
    def of_run(cls, config: RunConfig, *, closing: threading.Event | None = None) -> Self:
        """The store that a configuration names, reached and tried again as it says. Raises ConfigError."""
        url, exchange = config.store_url, config.exchange
        options = store_options(exchange, url)
        return cls(
            url,
            options=options,
            retry_seconds=exchange.retry_seconds,
            stall_seconds=exchange.stall_seconds,
            closing=closing,
        )

    def until(self, over: threading.Event) -> Self:
        """The same store until `over` is set; see Objects."""
        bounded = copy.copy(self)
        bounded.objects = self.objects.until(over)
        return bounded

    def read_contract(self) -> bytes | None:
        """The contract's bytes, or None while there is none; what is read from then on is checked against them."""
        try:
            data = self.objects.read_if_there(CONTRACT)
        except RefusedError as error:
            raise ConfigError(f"exchange.url: {self.objects.url} given; {error}; name another store") from None
        if data is None:
            return None
        self._go_by(data)
        try:
            self.follow_amendments()
        except RefusedError as error:
            raise ConfigError(f"exchange.url: {self.objects.url} given; {error}") from None
        return data

    def _go_by(self, contract: bytes) -> None:
        sha256 = sha256_bytes(contract)
        if sha256 == self.contract_sha256:
            return
        self.members.keys, self.members.later, self.contract_sha256 = contract_keys(contract), [], sha256
        self.is_sealed = contract_seals(contract)
        self.amendments = Amendments(self.members, amend_rule(contract), sha256, self.pass_over)

    # ---- what holds at a version

    def follow_amendments(self) -> bool:
        """Whether amendments were accepted of which we did not know. Raises RefusedError for what cannot be."""
        return self.amendments.follow(self.objects)

    def terms_sha256(self, version: int) -> str:
        """What manifests, commits and snapshots of a version go by: sha256 of the contract, or of the last amendment.

        Exact of a version once the commit on which its deliveries build was read.
        """
        terms = self.members.terms_at(version)
        return terms.sha256 if terms else self.contract_sha256

    def check(self, author: str, record: Record, *, version: int | None = None) -> None:
        """Raise RefusedError unless a member has signed a record with the key that holds at its version.

        Whoever lags behind may not know that key yet: then it is asked for.
        """
        try:
            self.members.check(author, record, version=version)
        except RefusedError:
            if not self.follow_amendments():
                raise
            self.members.check(author, record, version=version)

    def check_link(self, commit: Commit, version: int, previous: bytes | None) -> None:
        """Check that a commit is of a version, goes by the terms that hold there, and names its predecessor's bytes."""
        ours, theirs = self.terms_sha256(version), commit.contract_sha256
        by = {self.contract_sha256: "the contract as it was written"}
        by |= {terms.sha256: f"amendment {terms.number}" for terms in self.members.later}
        if commit.version == version and ours != theirs and self.members.later:
            other = by.get(theirs, f"{theirs[:12]}, neither the contract nor an amendment that was accepted")
            raise RefusedError(f"commit {version} goes by {other}; allowed: {by[ours]}, which holds there")
        check_link(commit, version, previous, ours)

    def write_contract(self, data: bytes) -> None:
        """Write the contract. Raises ConfigError if something is there."""
        try:
            self.objects.write(CONTRACT, data)
        except FileExistsError:
            raise self._taken(CONTRACT) from None
        self._go_by(data)

    def pass_over(self, name: str, why: object) -> None:
        """Say once, and for a few only, what is no object of ours: whoever writes to the store may make any number."""
        if name not in self._passed_over and len(self._passed_over) < 100:
            self._passed_over.add(name)
            print(f"{self.objects.url}: {shown(name)} is passed over: {shown(why)}", flush=True)

    def _taken(self, name: str) -> ConfigError:
        return ConfigError(
            f"exchange.url: {self.objects.url} given; {name} was not there, and cannot be written: something else has "
            "the name, or has just taken it; look at it, and start again"
        )

    def numbers(self, folder: str, *, after: str = "") -> list[int]:
        """The numbers that lie in a folder, sorted."""
        return sorted(n for name in self.objects.names(folder) if (n := number(name, after=after)) is not None)

    def _signed(self, name: str, word: Word) -> bytes:
        """A word of ours, as it is written under a name."""
        signature = self.members.sign_bytes("word", self._said_there(name, word))
        return dataclasses.replace(word, signature=signature).to_bytes()

    def _said_there(self, name: str, word: Word) -> bytes:
        """What is signed of a word: it counts in this run, and under this name."""
        place = f"{self.contract_sha256} {name}\n".encode()
        return place + dataclasses.replace(word, signature=None).to_bytes()

    def _word(self, kind: type[W], name: str, author: str) -> W | None:
        """A word of another party; None, and a line, if it is none, or not by its author."""
        try:
            word = kind.from_bytes(self.objects.read(name, limit_bytes=WORD_BYTES))
            try:
                self.members.check_bytes(author, "word", self._said_there(name, word), word.signature)
            except RefusedError:
                if not self.follow_amendments():  # by a key that is new to us
                    raise
                self.members.check_bytes(author, "word", self._said_there(name, word), word.signature)
            return word
        except (FileNotFoundError, RefusedError) as error:
            self.pass_over(name, error)
            return None
