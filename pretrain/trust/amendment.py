"""Changes of a contract under which a run goes on: which may be, who has to sign, what holds at a version. No torch."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pretrain.config.check import SILO_NAME, check_config
from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.host.foreign import loads, shown
from pretrain.trust.keys import PublicKey
from pretrain.trust.ledger import Record, RefusedError

ALL = "all"
KEYS = "trust.keys."
MOST_CHANGES, CHANGE_CHARACTERS = 32, 300
# What the aggregator alone computes with, and whoever checks it: no silo's training depends on it, so that it can
# change between two versions. All else (model, data, inner steps, codecs, fragments, schedule, who trains how long)
# is in what silos have in flight and in their checkpoints: another run.
AMENDABLE = (
    "membership.quorum",  # of a run that has one: without, silos do not expect to be gone on without
    "membership.deadline_mads",
    "membership.deadline_floor_seconds",
    "membership.deadline_ceiling_seconds",
    "membership.max_norm_ratio",
    "membership.stale_weight",  # where late deliveries count at all: silos send them or not
    "outer.lr",
    "outer.weight_power",
    "outer.max_share",
    "outer.quality_floor",
    "outer.max_batch_sequences",
)
# What of it silos compute with, too, where they weigh and mask what they deliver.
NOT_IN_SUM = {"membership.quorum", "outer.weight_power", "outer.max_batch_sequences"}


@dataclass(frozen=True, kw_only=True)
class Amendment(Record):
    """A change of the contract that a member proposes; it holds once it was accepted (`Acceptance`)."""

    number: int
    previous: str
    """sha256 of the bytes of the amendment before, or of the contract."""
    from_version: int
    changes: list[str]
    """`key=value`, as on a command line; `trust.keys.NAME=` takes a key away, and the key of a new NAME adds a silo."""
    author: str

    @property
    def settings(self) -> dict[str, float | None]:
        """Of what is no key. Raises RefusedError for what no amendment may change."""
        return parsed(self.changes)[0]

    @property
    def new_key(self) -> tuple[str, PublicKey | None] | None:
        """Whose key it changes, and to which; None: it takes it away. Raises RefusedError."""
        return parsed(self.changes)[1]

    @property
    def is_succession(self) -> bool:
        """Whether a member replaces its own key, which needs nobody else's consent."""
        return bool(self.new_key and self.new_key[1] and self.new_key[0] == self.author)


@dataclass(frozen=True, kw_only=True)
class Acceptance(Record):
    """The operator's word that an amendment's signatures are complete, written before the commit of `version`.

    A silo that has seen the commit of the version on which its deliveries for `from_version` build knows so whether
    the amendment holds.
    """

    amendment_sha256: str
    version: int


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What holds from a version on: the contract with all amendments up to one."""

    from_version: int
    number: int
    sha256: str
    """Of the amendment's bytes."""
    keys: dict[str, PublicKey]
    settings: dict[str, float | None]
    """All that differ from the contract."""
    changes: list[str] = field(default_factory=list)
    """Of this amendment."""
    successor: str = ""
    """The member that replaced its own key with it."""


def parsed(changes: Sequence[str]) -> tuple[dict[str, float | None], tuple[str, PublicKey | None] | None]:
    """Settings, and whose key changes to what. Raises RefusedError, one line, for what no amendment may change."""
    if not 1 <= len(changes) <= MOST_CHANGES:
        raise RefusedError(f"{len(changes)} changes given; allowed: 1 to {MOST_CHANGES}")
    settings: dict[str, float | None] = {}
    new_key = None
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or len(change) > CHANGE_CHARACTERS:
            raise RefusedError(f"change {shown(repr(change))} given; allowed: key=value")
        if key in settings:
            raise RefusedError(f"{key}: given twice; allowed: once")
        if key.startswith(KEYS):
            try:
                new_key = key.removeprefix(KEYS), PublicKey.parse(text, shown(key)) if text else None
            except ConfigError as error:
                raise RefusedError(str(error)) from None
        elif key in AMENDABLE:
            settings[key] = _number(key, text)
        else:
            raise RefusedError(
                f"{shown(key)}: cannot be amended: it would be another run; allowed: {KEYS}NAME, {', '.join(AMENDABLE)}"
            )
    if new_key and len(changes) > 1:
        raise RefusedError(f"{KEYS}{new_key[0]}: given with other changes; allowed: alone, as others have to sign it")
    return settings, new_key


def _number(key: str, text: str) -> float | None:
    with suppress(ValueError):
        value = loads(text, limit_bytes=CHANGE_CHARACTERS)
        if value is None or type(value) in (int, float):
            return value  # type: ignore[no-any-return]
    raise RefusedError(f"{key}: {shown(repr(text))} given; allowed: a number, or null")


def amended(config: RunConfig, settings: Mapping[str, float | None], keys: Mapping[str, PublicKey]) -> RunConfig:
    """The same configuration with amended settings, and the members that have `keys`, where there are any.

    Raises ConfigError for what the contract could not have said.
    """
    found = copy.deepcopy(config)
    set_all(found, settings)
    _set_members(found, keys)
    before, after = config.membership, found.membership
    for key, had, has in (
        ("membership.quorum", before.quorum is not None, after.quorum is not None),
        ("membership.stale_weight", before.stale_weight > 0, (after.stale_weight or 0) > 0),
    ):
        if had != has:
            raise ConfigError(f"{key}: {settings.get(key)!r} given; allowed: another one where there is one already")
    if config.outer.secure_sum and (fixed := sorted(settings.keys() & NOT_IN_SUM)):
        given = f"{fixed[0]}: {settings[fixed[0]]!r} given"
        raise ConfigError(f"{given}; allowed: what the contract says, with outer.secure_sum: silos compute with it")
    check_config(found)
    return found


def set_all(config: RunConfig, settings: Mapping[str, Any]) -> None:
    """Set keys of a configuration in place; a whole number where the key's are whole. Raises ConfigError."""
    for key, value in settings.items():
        section = getattr(config, key.partition(".")[0])
        name = key.partition(".")[2]
        kind = str(next(f.type for f in dataclasses.fields(section) if f.name == name))
        if "int" in kind and isinstance(value, float):
            raise ConfigError(f"{key}: {value!r} given; allowed: a whole number")
        setattr(section, name, float(value) if "float" in kind and value is not None else value)


def _set_members(config: RunConfig, keys: Mapping[str, PublicKey]) -> None:
    """Whom amendments have added to the silos of the contract, and not taken away again."""
    known = {OPERATOR, *config.agreed_roster}
    config.trust.added = {name: key.text for name, key in keys.items() if name not in known}


def get_all(config: RunConfig) -> dict[str, Any]:
    """All that an amendment could change, as a configuration has it."""
    return {key: getattr(getattr(config, key.partition(".")[0]), key.partition(".")[2]) for key in AMENDABLE}


class Governed:
    """A configuration of one's own that says what holds at the version it has gone to.

    All who share its `config` see that: who merges, collects or verifies goes to a version before it works on it.
    """

    def __init__(self, config: RunConfig) -> None:
        self._at_first = get_all(config)
        self.config = copy.deepcopy(config)

    def go_to(self, terms: Terms | None) -> None:
        """What holds at a version; None: the contract. Raises ConfigError for what the contract could not have said."""
        set_all(self.config, self._at_first)
        if terms:
            amended(self.config, terms.settings, terms.keys)
            set_all(self.config, terms.settings)
        _set_members(self.config, terms.keys if terms else {})


def applied(amendment: Amendment, sha256: str, before: Terms) -> Terms:
    """What holds with an amendment. Raises RefusedError for keys that nobody could go on with."""
    keys = dict(before.keys)
    if amendment.new_key:
        member, key = amendment.new_key
        if member not in before.keys and (key is None or not SILO_NAME.fullmatch(member)):
            allowed = "a-z, 0-9, _ and - in the name of a new silo" if key else named(sorted(before.keys))
            raise RefusedError(f"{KEYS}{shown(member)}: given; allowed: {allowed}")
        if key is None and member == OPERATOR:
            raise RefusedError(f"{KEYS}{member}: taken away; allowed: another key, as nobody could commit without one")
        if key and key.signing in {one.signing for one in before.keys.values()}:
            raise RefusedError(f"{KEYS}{member}: a key that is in use given; allowed: one that no member has")
        if key:
            keys[member] = key
        else:
            del keys[member]
    return Terms(
        from_version=amendment.from_version,
        number=amendment.number,
        sha256=sha256,
        keys=keys,
        settings=before.settings | amendment.settings,
        changes=amendment.changes,
        successor=amendment.author if amendment.is_succession else "",
    )


def voters(amendment: Amendment, keys: Mapping[str, PublicKey]) -> list[str]:
    """The members whose signatures count: all silos that have a key, but not the one whose key it changes.

    Whoever replaces its own key asks nobody. The operator has no voice, but where one silo alone would decide on the
    key of the only other one; who is new has none.
    """
    if amendment.is_succession:
        return []
    member = amendment.new_key[0] if amendment.new_key else ""
    silos = [name for name in sorted(keys) if name not in (OPERATOR, member)]
    is_others = member in keys and member != OPERATOR
    return [OPERATOR, *silos] if is_others and len(silos) < 2 else silos


def still_missing(amendment: Amendment, rule: str, signed: Iterable[str], keys: Mapping[str, PublicKey]) -> list[str]:
    """Whose signatures an amendment waits for; none if it is complete. `rule` is the contract's `trust.amend`.

    Where k of n are enough, all who could still sign are named. Whose key is replaced signs with the new one, as a
    proof that it has it.
    """
    signed, may = {*signed}, voters(amendment, keys)
    missing = [name for name in may if name not in signed]
    num_needed = len(may) if rule == ALL or OPERATOR in may else min(int(rule), len(may))
    if len(may) - len(missing) >= num_needed:
        missing = []
    if amendment.new_key and amendment.new_key[1] and amendment.new_key[0] not in signed:
        missing.append(amendment.new_key[0])
    return missing
