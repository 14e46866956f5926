"""The members of a federation by their keys: what each has signed, and signing as one of them. No torch."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pretrain.config.check import ConfigError
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.trust.keys import PrivateKey, PublicKey, Signer, load_signer, new_key, read_key, verify
from pretrain.trust.ledger import Record, RefusedError
from pretrain.trust.seal import Sealer

R = TypeVar("R", bound=Record)


@dataclass(kw_only=True)
class Members:
    """Who may write what into a store. Without keys nothing is signed, and nothing is asked for."""

    keys: dict[str, PublicKey] = field(default_factory=dict)
    """By the name of a silo, or `OPERATOR`."""
    signer: Signer | None = None
    """Ours, where we write."""
    sealer: Sealer | None = None
    """Ours, where payloads are sealed and we have the key."""

    def sign(self, record: R) -> R:
        """The same record, signed as ourselves."""
        return dataclasses.replace(record, signature=self.sign_bytes(_kind(record), record.unsigned_bytes()))

    def check(self, author: str, record: Record) -> None:
        """Raise RefusedError unless a member has signed a record."""
        self.check_bytes(author, _kind(record), record.unsigned_bytes(), record.signature)

    def sign_bytes(self, kind: str, data: bytes) -> str | None:
        """Our signature, where there are keys."""
        if not self.keys:
            return None
        assert self.signer, f"nobody here signs a {kind}"
        return self.signer.sign(kind, data)

    def check_bytes(self, author: str, kind: str, data: bytes, signature: str | None) -> None:
        """Raise RefusedError unless a member's signature is that of these bytes, where there are keys."""
        if not self.keys:
            return
        if author not in self.keys:
            raise RefusedError(f"{author} is no member: the contract has no key of it")
        verify(self.keys[author], kind, data, signature)


def _kind(record: Record) -> str:
    return type(record).__name__.lower()


def public_keys(config: RunConfig) -> dict[str, PublicKey]:
    """The keys of a configuration. Raises ConfigError for a line that is none, and for two members with one key."""
    _check_sealing(config)
    found = {name: PublicKey.parse(text, f"trust.keys.{name}") for name, text in sorted(config.trust.keys.items())}
    names: dict[bytes, str] = {}
    for name, key in found.items():
        if (other := names.setdefault(key.signing, name)) != name:
            raise ConfigError(f"trust.keys.{name}: the key of {other} given; allowed: one that no other member has")
    return found


def _check_sealing(config: RunConfig) -> None:
    if config.trust.seal and not config.trust.keys:
        raise ConfigError(
            "trust.seal: true given without trust.keys; allowed: with the key of every silo of the roster and of "
            f"{OPERATOR}, which a local launch of all silos makes itself"
        )


def act_as(members: Members, config: RunConfig, name: str) -> None:
    """Sign, and seal or open, as a member from now on. Raises ConfigError; see `own_signer` and `own_sealer`."""
    members.signer, members.sealer = own_signer(config, name), own_sealer(config, name)


def own_sealer(config: RunConfig, name: str) -> Sealer | None:
    """What seals or opens as a member on this machine; None where nothing is sealed. Raises ConfigError without it."""
    if not config.trust.seal:
        return None
    keys, own = public_keys(config), read_key(config.key_file(name))
    if not isinstance(own, PrivateKey):
        raise ConfigError(
            f"trust.seal: true given, and {config.key_file(name)} has a public key alone; allowed: the private file of "
            f"atoll keys new {name} there, as sealing takes the private half of its agreement key, which no "
            "trust.key_command has; or trust.seal=false"
        )
    return Sealer(own, keys)


def operator_sealer(file: Path, config: RunConfig) -> Sealer:
    """What opens the deliveries of a contract's members, with the operator's private key. Raises ConfigError."""
    own, keys = read_key(file), public_keys(config)
    agreed = keys[OPERATOR]
    if not isinstance(own, PrivateKey) or own.public != agreed:
        whose = own if isinstance(own, PublicKey) else own.public
        raise ConfigError(
            f"--key: {file}, {'a public key' if whose is own else 'the key'} {whose.fingerprint}, given; allowed: the "
            f"private key of the aggregator's operator, {agreed.fingerprint}, which opens what is sealed"
        )
    return Sealer(own, keys)


def own_signer(config: RunConfig, name: str) -> Signer | None:
    """Who signs for a member on this machine; None where nothing is signed. Raises ConfigError for another's key."""
    if not config.trust.keys:
        _check_sealing(config)
        return None
    agreed, file = PublicKey.parse(config.trust.keys[name], f"trust.keys.{name}"), config.key_file(name)
    if not file.exists():
        raise ConfigError(
            f"trust.directory: {config.trust.directory!r} given; there is no {file}, the private half of "
            f"trust.keys.{name}; allowed: where atoll keys new {name} made it"
        )
    signer = load_signer(file, config.trust.key_command)
    if signer.public != agreed:
        raise ConfigError(
            f"trust.keys.{name}: {agreed.text} given ({agreed.fingerprint}); {file} is the key of "
            f"{signer.public.text} ({signer.public.fingerprint}); allowed: the same on both sides"
        )
    return signer


def with_keys(config: RunConfig, *, make: bool) -> RunConfig:
    """The same configuration with the keys of all members, where it names none and all of them are this machine's.

    What is missing is made, with `make`; else, without all of them, nothing is signed. Raises ConfigError.
    """
    if config.trust.keys or config.exchange.kind != "store" or config.full_roster != sorted(config.silos):
        return config
    names = [*config.full_roster, OPERATOR]
    missing = [name for name in names if not config.key_file(name).exists()]
    if missing and not make:
        return config
    for name in missing:
        config.key_file(name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new_key(config.key_file(name), name)
    keys = {name: load_signer(config.key_file(name)).public.text for name in names}
    return dataclasses.replace(config, trust=dataclasses.replace(config.trust, keys=keys))
