"""Every member's signature under the contract: nothing begins before all are there. No torch."""

from collections.abc import Callable, Sequence

from pretrain.config.check import named
from pretrain.exchange.store import REQUESTS_AT_ONCE, StoreExchange
from pretrain.outer.threads import in_threads
from pretrain.trust.ledger import Agreement, RefusedError

FOLDER = "signatures"


def sign_contract(exchange: StoreExchange, member: str) -> None:
    """Put a member's signature under the contract that was read, unless it is there."""
    name = _name(member)
    if _has_signed(exchange, member):
        return
    signed = exchange.members.sign(Agreement(contract_sha256=exchange.contract_sha256, member=member))
    exchange.write_over(name, signed.to_bytes(), lambda: _has_signed(exchange, member))


def not_signed(exchange: StoreExchange) -> list[str]:
    """The members whose signature is missing; none where the contract names no keys."""
    return _missing(exchange, sorted(exchange.members.keys))


def _missing(exchange: StoreExchange, members: Sequence[str]) -> list[str]:
    """Those of some members whose signature is missing, looked for side by side."""
    signed = in_threads(lambda member: _has_signed(exchange, member), members, REQUESTS_AT_ONCE)
    return [member for member, is_there in zip(members, signed, strict=True) if not is_there]


def agree(
    exchange: StoreExchange,
    member: str,
    pause: Callable[[], object],
    *,
    say: Callable[[str], object] = lambda words: None,
) -> None:
    """Sign as a member, and wait until every other has; where the contract names no keys there is nothing to sign.

    `say` is told whose signature is missing, whenever it is others'.
    """
    if not exchange.members.keys:
        print("trust.keys: none given; nothing is signed: whoever can write to the store may speak for all", flush=True)
        return
    sign_contract(exchange, member)
    missing, said = not_signed(exchange), ""
    while missing:
        words = f"the signature of {named(missing)} under the contract"
        if words != said:
            said = words
            print(f"waiting for {words}", flush=True)
            say(words)
        pause()
        missing = _missing(exchange, missing)


def _has_signed(exchange: StoreExchange, member: str) -> bool:
    data = exchange.objects.read_if_there(_name(member))
    if data is None:
        return False
    try:
        found = Agreement.from_bytes(data)
        if (found.contract_sha256, found.member) != (exchange.contract_sha256, member):
            raise RefusedError("it is under another contract, or another member's")
        exchange.members.check(member, found)
    except RefusedError as error:
        exchange.pass_over(_name(member), error)
        return False
    return True


def _name(member: str) -> str:
    return f"{FOLDER}/{member}.json"
