"""A store in which everything is signed: reaching it, its contract, and words that count if their author said them."""

import copy
import dataclasses
import threading
from collections.abc import Mapping
from typing import Any, Self, TypeVar

from pretrain.config.check import ConfigError
from pretrain.config.keys import OPERATOR, ExchangeConfig, RunConfig
from pretrain.exchange.objects import Objects
from pretrain.exchange.options import store_options
from pretrain.exchange.words import WORD_BYTES, Membership, Word, number
from pretrain.host.foreign import shown
from pretrain.trust.contract import contract_keys
from pretrain.trust.egress import Egress
from pretrain.trust.ledger import RefusedError, sha256_bytes
from pretrain.trust.members import Members, own_signer
from pretrain.trust.policy import Policy, read_policy

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
        self.contract_sha256, self.members = "", Members()
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

    def speak_as(self, config: RunConfig, member: str) -> None:
        """Sign as a member of this machine, and keep its egress ledger. Raises ConfigError; see `own_signer`."""
        self.members.signer = own_signer(config, member)
        policy = Policy() if member == OPERATOR else read_policy(config)
        self.objects.told_to(Egress.of_run(config, member, self.members.signer, policy))

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
        return data

    def _go_by(self, contract: bytes) -> None:
        self.members.keys = contract_keys(contract)
        self.contract_sha256 = sha256_bytes(contract)

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
            self.members.check_bytes(author, "word", self._said_there(name, word), word.signature)
            return word
        except (FileNotFoundError, RefusedError) as error:
            self.pass_over(name, error)
            return None
