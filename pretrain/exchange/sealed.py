"""A store whose payloads are sealed: sealing and opening them in their places, and the group's key. No torch.

keys/NAME.json    the group's key, sealed to a silo and signed by the aggregator's operator
"""

from collections.abc import Callable
from pathlib import Path

from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.store import REQUESTS_AT_ONCE, StoreExchange, version_path
from pretrain.outer.threads import in_threads
from pretrain.trust.ledger import GroupKey, Payload, RefusedError
from pretrain.trust.members import act_as
from pretrain.trust.seal import Place

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
    """As the operator: leave the group's key for every silo of the contract, where it is not there yet."""
    if exchange.is_sealed:
        in_threads(lambda silo: _give(exchange, silo), sorted({*exchange.members.keys} - {OPERATOR}), REQUESTS_AT_ONCE)


def _give(exchange: StoreExchange, silo: str) -> None:
    sealer = exchange.members.sealer
    assert sealer, "nobody here gives the group's key"
    given, name = sealer.give(exchange.contract_sha256, silo), group_key_path(silo)
    if (found := given_group_key(exchange, silo)) and found.sealed == given:
        return
    record = GroupKey(contract_sha256=exchange.contract_sha256, member=silo, sealed=given)
    exchange.write_over(name, exchange.members.sign(record).to_bytes(), lambda: False)


def take_group_key(exchange: StoreExchange, silo: str, pause: Callable[[], object] | None = None) -> None:
    """As a silo: wait for the group's key, and open with it from then on. Raises RefusedError.

    Without `pause` it is there, or that is refused.
    """
    if not exchange.is_sealed:
        return
    sealer = exchange.members.sealer
    assert sealer, "nobody here opens a payload"
    while not (found := given_group_key(exchange, silo)):
        if not pause:
            raise RefusedError(f"{group_key_path(silo)}, the key of what is sealed for all, is not there")
        pause()
    sealer.take(exchange.contract_sha256, silo, found.sealed)


def read_as_a_member(exchange: StoreExchange, config: RunConfig) -> None:
    """Open what is sealed for all as a member whose key this machine has, if there is one. Raises ConfigError."""
    names = [name for name in (*sorted(config.silos), OPERATOR) if config.key_file(name).exists()]
    if not exchange.is_sealed or not names:
        return
    act_as(exchange.members, config, names[0])
    if names[0] != OPERATOR:
        take_group_key(exchange, names[0])


def given_group_key(exchange: StoreExchange, silo: str) -> GroupKey | None:
    """What lies there for a silo; None, and a line, if that is not the operator's."""
    if (data := exchange.found(group_key_path(silo))) is None:
        return None
    try:
        found = GroupKey.from_bytes(data)
        if (found.contract_sha256, found.member) != (exchange.contract_sha256, silo):
            raise RefusedError("it is of another contract, or for another member")
        exchange.members.check(OPERATOR, found)
    except RefusedError as error:
        exchange.pass_over(group_key_path(silo), error)
        return None
    return found


def group_key_path(silo: str) -> str:
    """Where the operator leaves the group's key for a silo."""
    return f"{FOLDER}/{silo}.json"
