"""A store in which everything is signed: reaching it, its contract, and words that count if their author said them."""

import copy
import dataclasses
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR, ExchangeConfig, RunConfig
from pretrain.exchange.amended import Amendments
from pretrain.exchange.objects import Objects
from pretrain.exchange.options import store_options
from pretrain.exchange.records import R, checked, heard
from pretrain.exchange.words import WORD_BYTES, Membership, Word, number
from pretrain.host.foreign import shown
from pretrain.trust.contract import amend_rule, contract_keys, contract_seals
from pretrain.trust.egress import Egress
from pretrain.trust.ledger import Commit, Record, RefusedError, check_link, sha256_bytes
from pretrain.trust.members import Members, act_as
from pretrain.trust.policy import Policy, read_policy

CONTRACT = "contract.json"
TRIES = 100  # against somebody who puts something there again and again
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
        self.egress: Egress | None = None
        """Of what is written here, once we speak as a member."""
        self.amendments = Amendments(self.members, "all", "", self.pass_over)
        self._passed_over: set[str] = set()
        self._said: dict[str, tuple[list[int], Membership | None]] = {}  # words of membership, and the last
        self._heard: set[str] = set()  # nonces of what may be said anew, so that a copy does not count

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

    def speak_as(self, config: RunConfig, member: str) -> None:
        """Sign and seal as a member of this machine, and keep its egress ledger. Raises ConfigError; see `act_as`."""
        act_as(self.members, config, member)
        policy = Policy() if member == OPERATOR else read_policy(config)
        self.egress = Egress.of_run(config, member, self.members.signer, policy)
        self.objects.told_to(self.egress)

    def until(self, over: threading.Event) -> Self:
        """The same store until `over` is set; see Objects."""
        bounded = copy.copy(self)
        bounded.objects = self.objects.until(over)
        return bounded

    def at_once(self) -> Self:
        """The same store, where nothing is tried again; see Objects."""
        hasty = copy.copy(self)
        hasty.objects = self.objects.at_once()
        return hasty

    def read_contract(self, *, follow: bool = True) -> bytes | None:
        """The contract's bytes, or None while there is none; what is read from then on is checked against them.

        And its amendments, unless whoever asks will `follow_amendments`. Raises ConfigError.
        """
        try:
            data = self.objects.read_if_there(CONTRACT)
        except RefusedError as error:
            raise ConfigError(f"exchange.url: {self.objects.url} given; {error}; name another store") from None
        if data is None:
            return None
        self._go_by(data)
        try:
            if follow:
                self.follow_amendments()
        except RefusedError as error:
            raise ConfigError(f"exchange.url: {self.objects.url} given; {error}") from None
        return data

    def _go_by(self, contract: bytes) -> None:
        sha256 = sha256_bytes(contract)
        if sha256 == self.contract_sha256:
            return
        self.members.keys, self.members.later, self.contract_sha256 = contract_keys(contract), [], sha256
        self.members.contract_sha256 = sha256
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

    def signed(self, name: str, word: Word) -> bytes:
        """A word of ours, as it is written under a name."""
        signature = self.members.sign_bytes("word", word.to_sign(self.contract_sha256, name))
        return dataclasses.replace(word, signature=signature).to_bytes()

    def found(self, name: str) -> bytes | None:
        """The bytes of a record, whoever has written them; None if there is none, or, where all is signed, if they are
        more than any of ours has, which is said.
        """
        try:
            return self.objects.read_if_there(name)
        except RefusedError as error:
            if not self.members.keys:
                raise
            self.pass_over(name, error)
            return None

    def heard(self, kind: type[W], name: str, author: str) -> W | None:
        """A word of another party, if it is there; None, and a line, if it is none, or not by its author."""
        try:
            return self.checked(kind, name, author)
        except FileNotFoundError:
            return None
        except RefusedError as error:
            self.pass_over(name, error)
            return None

    def record(self, kind: type[R], name: str, author: str, *, at: int | None = None, **of: object) -> R | None:
        """A record of another party of which all is as given, if it is there; None, and a line, if it is none such."""
        return heard(self.objects, kind, name, author, self.members, of=of, pass_over=self.pass_over, at=at)

    def checked_record(self, kind: type[R], name: str, author: str, *, at: int | None = None, **of: object) -> R:
        """The same. Raises FileNotFoundError, and RefusedError for what is none such."""
        return checked(self.objects, kind, name, author, self.members, of=of, at=at)

    def given(self, kind: type[Word], name: str, author: str) -> bytes | None:
        """The bytes of a word that its author has said, to hand on; where nothing is signed, whatever is there."""
        if self.members.keys and not self.heard(kind, name, author):
            return None
        return self.objects.read_if_there(name, limit_bytes=WORD_BYTES)

    def checked(self, kind: type[W], name: str, author: str) -> W:
        """The same. Raises FileNotFoundError, and RefusedError for what is no such word, or not by its author."""
        try:
            word = kind.from_bytes(self.objects.read(name, limit_bytes=WORD_BYTES))
        except IsADirectoryError as error:
            raise RefusedError(str(error)) from None
        said = word.to_sign(self.contract_sha256, name)
        try:
            self.members.check_bytes(author, "word", said, word.signature)
        except RefusedError:
            if not self.follow_amendments():  # by a key that is new to us
                raise
            self.members.check_bytes(author, "word", said, word.signature)
        return word

    def say(self, name: str, word: Word, author: str) -> None:
        """Leave a word of ours, unless one of ours is there; what another has put there gives way.

        Raises FileExistsError where nothing is signed and something is there.
        """
        self.put(type(word), name, self.signed(name, word), author)

    def put(self, kind: type[Word], name: str, data: bytes, author: str) -> None:
        """The same of a word as its author has signed it."""
        self.write_over(name, data, lambda: self.heard(kind, name, author) is not None)

    def write_over(
        self, name: str, data: bytes, stands: Callable[[], bool], *, of: Mapping[str, float] | None = None
    ) -> None:
        """Write a small object; what lies there gives way, however often, unless it `stands`, as its author's.

        Raises FileExistsError for what stands, which is all where nothing is signed.
        """
        for _ in range(TRIES):
            with suppress(FileExistsError):
                return self.objects.write(name, data, of=of)
            if not self.members.keys or stands():
                break
            self.objects.delete(name)
        raise FileExistsError(f"{name} exists already")

    def upload_over(
        self, file: Path, name: str, *, digest: str, of: Mapping[str, float] | None = None, give: bool = False
    ) -> None:
        """Write a payload in the place of what another, or one of us who was killed, has left under its name."""
        carry = self.objects.give if give else self.objects.upload
        for _ in range(TRIES if self.members.keys else 1):
            self.objects.delete(name)
            with suppress(FileExistsError):
                return carry(file, name, digest=digest, of=of)
        raise FileExistsError(f"{name} exists already")
