"""The members of a federation by their keys: what each has signed, and signing as one of them. No torch."""

import dataclasses
from dataclasses import dataclass, field
from typing import TypeVar

from pretrain.config.check import ConfigError
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.trust.keys import PublicKey, Signer, load_signer, new_key, verify
from pretrain.trust.ledger import Record

R = TypeVar("R", bound=Record)


@dataclass(kw_only=True)
class Members:
    """Who may write what into a store. Without keys nothing is signed, and nothing is asked for."""

    keys: dict[str, PublicKey] = field(default_factory=dict)
    """By the name of a silo, or `OPERATOR`."""
    signer: Signer | None = None
    """Ours, where we write."""

    def sign(self, record: R) -> R:
        """The same record, signed as ourselves."""
        if not self.keys:
            return record
        assert self.signer
        return dataclasses.replace(record, signature=self.signer.sign(_kind(record), record.unsigned_bytes()))

    def check(self, author: str, record: Record) -> None:
        """Raise RefusedError unless a member has signed a record."""
        if self.keys:
            verify(self.keys[author], _kind(record), record.unsigned_bytes(), record.signature)


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
    agreed = public_keys(config)[name]
    signer = load_signer(config.key_file(name), config.trust.key_command)
    if signer.public != agreed:
        raise ConfigError(
            f"trust.keys.{name}: {agreed.text} given ({agreed.fingerprint}); {config.key_file(name)} is the key of "
            f"{signer.public.text} ({signer.public.fingerprint}); allowed: the same on both sides"
        )
    return signer


def with_new_keys(config: RunConfig) -> RunConfig:
    """The same configuration with keys for all members, where all of them are this machine's.

    Those of an earlier start are taken again. Raises ConfigError.
    """
    if config.trust.keys or config.exchange.kind != "store" or config.full_roster != sorted(config.silos):
        return config
    names = [*config.full_roster, OPERATOR]
    for name in names:
        file = config.key_file(name)
        if not file.exists():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new_key(file, name)
    keys = {name: load_signer(config.key_file(name)).public.text for name in names}
    return dataclasses.replace(config, trust=dataclasses.replace(config.trust, keys=keys))
