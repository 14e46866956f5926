"""The members of a federation by their keys: what each has signed, and signing as one of them. No torch."""

import dataclasses
from dataclasses import dataclass, field
from typing import TypeVar

from pretrain.config.check import ConfigError
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.trust.keys import PublicKey, Signer, load_signer, new_key, verify
from pretrain.trust.ledger import Record, RefusedError

R = TypeVar("R", bound=Record)


@dataclass(kw_only=True)
class Members:
    """Who may write what into a store, or talk to us. Without keys nothing is signed, and nothing is asked for."""

    keys: dict[str, PublicKey] = field(default_factory=dict)
    """By the name of a silo, or `OPERATOR`."""
    signer: Signer | None = None
    """Ours, where we write."""

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
    found = {name: PublicKey.parse(text, f"trust.keys.{name}") for name, text in sorted(config.trust.keys.items())}
    names: dict[bytes, str] = {}
    for name, key in found.items():
        if (other := names.setdefault(key.signing, name)) != name:
            raise ConfigError(f"trust.keys.{name}: the key of {other} given; allowed: one that no other member has")
    return found


def own_signer(config: RunConfig, name: str) -> Signer | None:
    """Who signs for a member on this machine; None where nothing is signed. Raises ConfigError for another's key."""
    if not config.trust.keys:
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
    if config.trust.keys or config.exchange.kind == "none" or config.full_roster != sorted(config.silos):
        return config
    names = [*config.full_roster, *([OPERATOR] if config.exchange.kind == "store" else [])]
    missing = [name for name in names if not config.key_file(name).exists()]
    if missing and not make:
        return config
    for name in missing:
        config.key_file(name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new_key(config.key_file(name), name)
    keys = {name: load_signer(config.key_file(name)).public.text for name in names}
    return dataclasses.replace(config, trust=dataclasses.replace(config.trust, keys=keys))
