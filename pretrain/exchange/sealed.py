"""A store whose payloads are sealed: sealing and opening them in their places, and the group's key. No torch.

keys/NAME.json           the group's key, sealed to a silo and signed by the aggregator's operator
keys/000003/NAME.json    that from amendment 3 on, which changed a key, and all before
"""

from collections.abc import Callable
from pathlib import Path

from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.store import REQUESTS_AT_ONCE, StoreExchange, version_path
from pretrain.outer.threads import in_threads
from pretrain.trust.ledger import GroupKey, Payload, RefusedError
from pretrain.trust.members import act_as
from pretrain.trust.seal import Epoch, Place

FOLDER = "keys"


def seal_payload(
    exchange: StoreExchange, author: str, version: int, payload: Payload, file: Path, *, keep: bool = False
) -> Payload:
    """Seal a file where the contract wants it: in its place, or, to `keep` it, beside it (`sealed_copy`).

    Returns what is told of it then.
    """
    if not exchange.is_sealed:
        return payload
    sealer = exchange.members.sealer
    assert sealer, "nobody here seals a payload"
    sealed = sealer.seal(payload, file, sealed_copy(file), _place(exchange, author, version, payload))
    if not keep:
        sealed_copy(file).replace(file)
    return sealed


def sealed_copy(file: Path) -> Path:
    """Where a file lies sealed."""
    return file.with_suffix(".sealed")


def open_payload(exchange: StoreExchange, author: str, version: int, payload: Payload, file: Path) -> None:
    """Put what is in a downloaded file in its place, where the contract has it sealed. Raises RefusedError."""
    if not exchange.is_sealed:
        return
    if not (sealer := exchange.members.sealer):
        raise RefusedError("it is sealed for the members of this run, and there is no key of any here")
    if author == OPERATOR and not sealer.can_open(version):
        take_group_key(exchange, sealer.epoch(version))  # the operator gave it before it sealed so
    sealer.open(file, _place(exchange, author, version, payload))


def fetch_version(exchange: StoreExchange, version: int, payload: Payload, file: Path) -> int:
    """Download one payload of a version, checked, and opened where it is sealed; returns the bytes that came.

    Raises RefusedError, which names it; what cannot be opened is left nowhere.
    """
    folder = version_path(version)
    num_bytes = exchange.fetch(folder, payload, file)
    try:
        open_payload(exchange, OPERATOR, version, payload, file)
    except RefusedError as error:
        file.unlink()
        raise RefusedError(f"{folder}/{payload.file}: {error}") from None
    return num_bytes


def _place(exchange: StoreExchange, author: str, version: int, payload: Payload) -> Place:
    return Place(
        contract_sha256=exchange.contract_sha256,
        author=author,
        version=version,
        fragment=payload.fragment,
        file=payload.file,
    )


# ---- the group's key


def give_group_key(exchange: StoreExchange) -> None:
    """As the operator: leave the group's keys for every silo that has a key by now, where they are not there yet.

    Before anything is sealed with the newest.
    """
    epoch = exchange.members.epochs()[-1]
    if exchange.is_sealed:
        in_threads(lambda silo: _give(exchange, epoch, silo), sorted({*epoch.keys} - {OPERATOR}), REQUESTS_AT_ONCE)


def _give(exchange: StoreExchange, epoch: Epoch, silo: str) -> None:
    sealer = exchange.members.sealer
    assert sealer, "nobody here gives the group's key"
    given, name = sealer.give(epoch, silo), group_key_path(epoch, silo)
    if (found := given_group_key(exchange, epoch, silo)) and found.sealed == given:
        return
    record = GroupKey(contract_sha256=epoch.sha256, member=silo, sealed=given)
    record = exchange.members.sign(record, version=epoch.from_version)
    exchange.write_over(name, record.to_bytes(), lambda: False)


def take_group_key(
    exchange: StoreExchange, epoch: Epoch | None = None, pause: Callable[[], object] | None = None
) -> None:
    """As a silo: wait for the group's keys, and open with them from then on; None: the newest. Raises RefusedError.

    Without `pause` they are there, or that is refused.
    """
    if not exchange.is_sealed:
        return
    sealer = exchange.members.sealer
    assert sealer, "nobody here opens a payload"
    epoch = epoch or sealer.newest_epoch()
    assert epoch, "nobody has added us"
    while not (found := given_group_key(exchange, epoch, sealer.member)):
        if not pause:
            name = group_key_path(epoch, sealer.member)
            raise RefusedError(f"{name}, the key of what is sealed for all, is not there")
        pause()
    sealer.take(epoch, found.sealed)


def read_as_a_member(exchange: StoreExchange, config: RunConfig) -> None:
    """Open what is sealed for all as a member whose key this machine has, if there is one. Raises ConfigError."""
    names = [name for name in (*sorted(config.silos), OPERATOR) if config.key_file(name).exists()]
    if not exchange.is_sealed or not names:
        return
    act_as(exchange.members, config, names[0])
    if names[0] != OPERATOR:
        take_group_key(exchange)


def given_group_key(exchange: StoreExchange, epoch: Epoch, silo: str) -> GroupKey | None:
    """What lies there for a silo; None, and a line, if that is not the operator's."""
    of = {"contract_sha256": epoch.sha256, "member": silo}
    return exchange.record(GroupKey, group_key_path(epoch, silo), OPERATOR, at=epoch.from_version, **of)


def group_key_path(epoch: Epoch, silo: str) -> str:
    """Where the operator leaves the group's keys up to an epoch for a silo."""
    return f"{FOLDER}/{epoch.number:06d}/{silo}.json" if epoch.number else f"{FOLDER}/{silo}.json"
