"""The members of a federation by their keys: what each has signed, and signing as one of them. No torch."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TypeVar

from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.trust.amendment import Terms
from pretrain.trust.keys import PrivateKey, PublicKey, Signer, load_signer, new_key, read_key, verify
from pretrain.trust.ledger import Record, RefusedError
from pretrain.trust.seal import Epoch, Sealer

R = TypeVar("R", bound=Record)
EPOCH = ("from_version", "number", "sha256", "keys")  # what it has of the terms that begin it


class OwnKeys:
    """Signs for one member: with the key that the contract names, or the successor of it that holds at a version.

    `atoll keys rotate` puts successors beside NAME.key, as NAME.key.1 and so on, and removes none: whichever version a
    process is at when it starts, it finds the key of that version.
    """

    def __init__(self, member: str, file: Path, first: Signer, command: Sequence[str] = ()) -> None:
        """`file` has the key that the contract names, `first` signs with it."""
        self.member, self._file, self._command = member, file, command
        self._signers = {first.public: first}
        self.public = first.public

    def sign(self, kind: str, data: bytes) -> str:
        """With the key that the contract names; see `Signer`."""
        return self._signers[self.public].sign(kind, data)

    def holding(self, key: PublicKey) -> Signer:
        """Who signs with a key; what was put beside since is found. Raises ConfigError if it is not here."""
        for file in successors(self._file) if key not in self._signers else ():
            found = read_key(file)
            if isinstance(found, PublicKey) and found == key:
                self._signers[key] = load_signer(file, self._command)
            elif isinstance(found, PrivateKey):
                self._signers.setdefault(found.public, found)
        if key not in self._signers:
            raise ConfigError(
                f"trust.directory: {str(self._file.parent)!r} given; none of {self._file}, {self._file.name}.1, ... is "
                f"the private half of {key.fingerprint}, the key of {self.member} by an amendment of the contract; "
                "allowed: where atoll keys rotate made it"
            )
        return self._signers[key]

    def private(self, key: PublicKey) -> PrivateKey:
        """The private half of a key. Raises ConfigError if it is not here, or behind a command."""
        if isinstance(found := self.holding(key), PrivateKey):
            return found
        raise ConfigError(
            f"trust.directory: {self._file.parent} given, where of {key.fingerprint}, a key of {self.member}, there is "
            f"the public line alone; allowed: the private file of atoll keys new {self.member}, as trust.seal and "
            "outer.secure_sum take the private half of its agreement key, which no trust.key_command has; or neither"
        )


def successors(file: Path) -> list[Path]:
    """The files of a member's later keys, oldest first, beside that of its first."""
    names = (file.with_name(f"{file.name}.{number}") for number in count(1))
    found: list[Path] = []
    while (name := next(names)).exists():
        found.append(name)
    return found


@dataclass(kw_only=True)
class Members:
    """Who may write what into a store, or talk to us. Without keys nothing is signed, and nothing is asked for."""

    keys: dict[str, PublicKey] = field(default_factory=dict)
    """By the name of a silo, or `OPERATOR`, as the contract has them."""
    signer: Signer | None = None
    """Ours, where we write."""
    later: list[Terms] = field(default_factory=list)
    """The amendments that were accepted, oldest first."""
    contract_sha256: str = ""
    """Of the contract that has these keys, once it was read."""
    sealer: Sealer | None = None
    """Ours, where payloads are sealed and we have the key."""

    def terms_at(self, version: int) -> Terms | None:
        """The last amendment that holds at a version; None where the contract holds as it was written."""
        return next((terms for terms in reversed(self.later) if terms.from_version <= version), None)

    def keys_at(self, version: int) -> dict[str, PublicKey]:
        """The keys that hold at a version; those of members that lost theirs are not among them."""
        return terms.keys if (terms := self.terms_at(version)) else self.keys

    @property
    def first_keys(self) -> dict[str, PublicKey]:
        """The first key of all who ever had one, by the contract or an amendment."""
        oldest_last = [*(terms.keys for terms in reversed(self.later)), self.keys]
        return {name: key for keys in oldest_last for name, key in keys.items()}

    def all_silos(self, roster: Sequence[str]) -> list[str]:
        """Those of the contract, and all that amendments have ever added; sorted."""
        return sorted({*roster, *self.first_keys} - {OPERATOR})

    def roster_at(self, version: int, roster: Sequence[str]) -> list[str]:
        """Of whom a version's sample is drawn: the silos of the contract, and who is added by then; sorted."""
        return sorted({*roster, *self.keys_at(version)} - {OPERATOR})

    def enters_at(self, member: str) -> int | None:
        """The first version for which a member may sign; None if there is none yet."""
        if not self.keys or member in self.keys:
            return 0
        return next((terms.from_version for terms in self.later if member in terms.keys), None)

    def epochs(self) -> list[Epoch]:
        """The contract, and each amendment that changed a key."""
        found = [Epoch(from_version=0, number=0, sha256=self.contract_sha256, keys=self.keys)]
        for terms in self.later:
            if terms.keys != found[-1].keys:
                found.append(Epoch(**{name: getattr(terms, name) for name in EPOCH}))
        return found

    def has_key(self, member: str, version: int) -> bool:
        """Whether a member may sign for a version; where nothing is signed, all may."""
        return not self.keys or member in self.keys_at(version)

    def sign(self, record: R, *, version: int | None = None) -> R:
        """The same record, signed as ourselves with the key that holds at `version`, or the record's own."""
        at = _version(record) if version is None else version
        return dataclasses.replace(
            record, signature=self.sign_bytes(_kind(record), record.unsigned_bytes(), version=at)
        )

    def check(self, author: str, record: Record, *, version: int | None = None) -> None:
        """Raise RefusedError unless a member has signed a record with the key that holds at `version`, or its own."""
        at = _version(record) if version is None else version
        self.check_bytes(author, _kind(record), record.unsigned_bytes(), record.signature, version=at)

    def sign_bytes(self, kind: str, data: bytes, *, version: int | None = None) -> str | None:
        """Our signature, where there are keys; by the last that we had if it is of no version. Raises ConfigError."""
        if not self.keys:
            return None
        assert self.signer, f"nobody here signs a {kind}"
        if not isinstance(self.signer, OwnKeys):
            return self.signer.sign(kind, data)
        member = self.signer.member
        last = (terms.keys for terms in reversed(self.later) if member in terms.keys)
        keys = next(last, self.keys) if version is None else self.keys_at(version)
        if (key := keys.get(member)) is None:
            raise ConfigError(
                f"trust.keys.{member}: {self.signer.public.text} given, which {self._why_none(member, version)}, as "
                "the contract is amended; allowed: a member with a key"
            )
        return self.signer.holding(key).sign(kind, data)

    def check_bytes(
        self, author: str, kind: str, data: bytes, signature: str | None, *, version: int | None = None
    ) -> None:
        """Raise RefusedError unless a member's signature is that of these bytes, where there are keys.

        What is of no version, as words are, counts with the key of any time that led to the newest by the member's
        own will; not with one that the others have replaced or taken away.
        """
        if not self.keys:
            return
        if self.enters_at(author) is None:
            raise RefusedError(f"{author} is no member: the contract has no key of it")
        keys = self._keys_in_line(author) if version is None else [k for k in [self.keys_at(version).get(author)] if k]
        if not keys:
            raise RefusedError(f"the key of {author} {self._why_none(author, version)}")
        for key in keys[1:]:
            try:
                verify(key, kind, data, signature)
            except RefusedError:
                continue
            return
        verify(keys[0], kind, data, signature)

    def _keys_in_line(self, author: str) -> list[PublicKey]:
        """The newest key of a member, and those before that it replaced itself; none if it has none any more."""
        found = [self.keys[author]] if author in self.keys else []
        for terms in self.later:
            key = terms.keys.get(author)
            if key is None or not found:
                found = [key] if key else []
            elif key != found[0]:
                found = [key, *found] if terms.successor == author else [key]
        return found

    def _why_none(self, member: str, version: int | None) -> str:
        """Why a key of a member that had or will have one does not count, at a version or at all."""
        rows = [(0, member in self.keys), *((terms.from_version, member in terms.keys) for terms in self.later)]
        if (enters := self.enters_at(member)) is None:
            return "counts nothing until an amendment adds it"
        if version is not None and version < enters:
            return f"counts only from version {enters} on"
        had = [has for since, has in rows if version is None or since <= version]
        last = max(place for place, has in enumerate(had) if has)
        return f"counts no more from version {rows[last + 1][0]} on"


def _version(record: Record) -> int:
    """Of which version a record is; one under the contract is of none, and the contract's keys sign it."""
    return getattr(record, "version", 0)


def _kind(record: Record) -> str:
    return type(record).__name__.lower()


def public_keys(config: RunConfig) -> dict[str, PublicKey]:
    """The keys of a configuration. Raises ConfigError for a line that is none, and for two members with one key."""
    _check_sealing(config)
    found = {name: PublicKey.parse(text, f"trust.keys.{name}") for name, text in sorted(config.trust.keys.items())}
    found |= {name: PublicKey.parse(text, f"trust.added.{name}") for name, text in sorted(config.trust.added.items())}
    names: dict[bytes, str] = {}
    for name, key in found.items():
        if (other := names.setdefault(key.signing, name)) != name:
            raise ConfigError(f"trust.keys.{name}: the key of {other} given; allowed: one that no other member has")
    return found


def _check_sealing(config: RunConfig) -> None:
    for key, needs_keys in (("trust.seal", config.trust.seal), ("outer.secure_sum", config.outer.secure_sum)):
        if needs_keys and not config.trust.keys:
            raise ConfigError(
                f"{key}: true given without trust.keys; allowed: with the key of every silo of the roster and of "
                f"{OPERATOR}, which a local launch of all silos makes itself"
            )


def act_as(members: Members, config: RunConfig, name: str) -> None:
    """Sign, and seal or open, as a member from now on. Raises ConfigError; see `own_signer` and `own_sealer`."""
    members.signer = own = own_signer(config, name)
    if config.outer.secure_sum and own and name != OPERATOR:
        own.private(own.public)  # or that it is not here is only said at the first delivery
    members.sealer = own_sealer(members, config, name)


def own_sealer(members: Members, config: RunConfig, name: str) -> Sealer | None:
    """What seals or opens as a member on this machine; None where nothing is sealed. Raises ConfigError without it."""
    if not config.trust.seal or (own := own_signer(config, name)) is None:
        return None
    own.private(own.public)  # or what it cannot open is only said later
    return Sealer(name, own.private, members.epochs)


def operator_sealer(members: Members, file: Path, config: RunConfig) -> Sealer:
    """What opens the deliveries of a contract's members, with the operator's private key. Raises ConfigError.

    Its successors are found beside it.
    """
    own, agreed = read_key(file), public_keys(config)[OPERATOR]
    if not isinstance(own, PrivateKey) or own.public != agreed:
        whose = own if isinstance(own, PublicKey) else own.public
        raise ConfigError(
            f"--key: {file}, {'a public key' if whose is own else 'the key'} {whose.fingerprint}, given; allowed: the "
            f"private key of the aggregator's operator, {agreed.fingerprint}, which opens what is sealed"
        )
    return Sealer(OPERATOR, OwnKeys(OPERATOR, file, own).private, members.epochs)


def own_signer(config: RunConfig, name: str) -> OwnKeys | None:
    """Who signs for a member on this machine; None where nothing is signed. Raises ConfigError for another's key."""
    if not config.trust.keys:
        _check_sealing(config)
        return None
    if (text := (config.trust.keys | config.trust.added).get(name)) is None:
        raise ConfigError(f"trust.keys: none of {name} given; allowed: that of a member")
    agreed = PublicKey.parse(text, f"trust.keys.{name}")
    return own_keys(name, agreed, config.key_file(name), given=config.trust.directory, command=config.trust.key_command)


def own_keys(name: str, agreed: PublicKey, file: Path, *, given: str, command: Sequence[str] = ()) -> OwnKeys:
    """Who signs for a member whose key in the contract is `agreed`, with the keys in and beside a file.

    `given` is the directory as an error calls it. Raises ConfigError for another's key.
    """
    if not file.exists() and (later := successors(file)):  # it was lost, and the others agreed to another one
        return OwnKeys(name, file, load_signer(later[-1], command), command)
    if not file.exists():
        raise ConfigError(
            f"trust.directory: {given!r} given; there is no {file}, the private half of trust.keys.{name}; allowed: "
            f"where atoll keys new {name} made it"
        )
    signer = load_signer(file, command)
    if signer.public != agreed:
        raise ConfigError(
            f"trust.keys.{name}: {agreed.text} given ({agreed.fingerprint}); {file} is the key of "
            f"{signer.public.text} ({signer.public.fingerprint}); allowed: the same on both sides"
        )
    return OwnKeys(name, file, signer, command)


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
