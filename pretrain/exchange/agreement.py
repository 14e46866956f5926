"""Members' signatures: all of them under the contract, before anything begins, and those under amendments. No torch."""

import dataclasses
from collections.abc import Callable, Sequence

from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import RunConfig
from pretrain.exchange.amended import FOLDER, Proposal, acceptance_path, amendment_path, signature_path
from pretrain.exchange.sealed import give_group_key
from pretrain.exchange.store import REQUESTS_AT_ONCE, StoreExchange
from pretrain.outer.threads import in_threads
from pretrain.trust.amendment import KEYS, Acceptance, Amendment, amended, applied, voters
from pretrain.trust.ledger import Agreement, RefusedError
from pretrain.trust.members import OwnKeys

SIGNATURES = "signatures"
MOST_AHEAD = 16  # versions, between the commit before which a member's own successor is accepted and where it signs


def sign_contract(exchange: StoreExchange, member: str) -> None:
    """Put a member's signature under the contract that was read, unless it is there. Raises ConfigError."""
    name = agreement_path(member)
    if _has_signed(exchange, member):
        return
    signed = exchange.members.sign(Agreement(contract_sha256=exchange.contract_sha256, member=member), version=0)
    try:
        exchange.write_over(name, signed.to_bytes(), lambda: _has_signed(exchange, member))
    except FileExistsError:  # said by another process of ours meanwhile, or a folder, which nobody deletes
        if not _has_signed(exchange, member):
            what = f"{name} cannot be written: something else has the name; take it away"
            raise ConfigError(f"exchange.url: {exchange.objects.url} given; {what}") from None


def not_signed(exchange: StoreExchange) -> list[str]:
    """The members whose signature is missing; none where the contract names no keys."""
    return _missing(exchange, sorted(exchange.members.keys))


def _missing(exchange: StoreExchange, members: Sequence[str]) -> list[str]:
    """Those of some members whose signature is missing, looked for side by side."""
    signed = in_threads(lambda member: _has_signed(exchange, member), members, REQUESTS_AT_ONCE)
    return [member for member, is_there in zip(members, signed, strict=True) if not is_there]


def agree(
    exchange: StoreExchange,
    config: RunConfig,
    member: str,
    pause: Callable[[], object],
    *,
    say: Callable[[str], object] = lambda words: None,
) -> None:
    """Sign as a member, and wait until every other has; where the contract names no keys there is nothing to sign.

    A silo that the contract does not have waits until the amendment that adds it holds. `say` is told whose signature
    is missing, whenever it is others'. Raises ConfigError for a silo that nobody adds.
    """
    if not exchange.members.keys:
        print("trust.keys: none given; nothing is signed: whoever can write to the store may speak for all", flush=True)
        return
    said = ""

    def wait_for(words: str) -> None:
        nonlocal said
        if words != said:
            said = words
            print(f"waiting for {words}", flush=True)
            say(words)
        pause()

    if is_founder := member in exchange.members.keys:
        sign_contract(exchange, member)
    else:
        while words := not_added_yet(exchange, config, member):
            wait_for(words)
            exchange.follow_amendments()
    missing = not_signed(exchange)
    while missing:
        wait_for(f"the signature of {named(missing)} under the contract")
        if is_founder:
            sign_contract(exchange, member)  # once more, where somebody has taken it away
        missing = _missing(exchange, missing)


def _has_signed(exchange: StoreExchange, member: str) -> bool:
    name, sha256 = agreement_path(member), exchange.contract_sha256
    found = exchange.record(Agreement, name, member, at=0, contract_sha256=sha256, member=member)
    return found is not None


def agreement_path(member: str) -> str:
    """Where a member's signature under the contract lies."""
    return f"{SIGNATURES}/{member}.json"


# ---- amendments


def accept_amendments(
    exchange: StoreExchange, config: RunConfig, *, before: int, check: Callable[[], None] = lambda: None
) -> None:
    """As the operator, before the commit of a version: accept what has all its signatures and can still hold.

    A silo whose deliveries build on that commit reads it first, and so knows what holds; what is not accepted by then
    never holds. `config` is as the contract says, `check` is called before a write. Raises RefusedError.
    """
    while (proposal := _complete(exchange, config, before)) is not None:  # one by one, as each may change who signs
        name = acceptance_path(proposal.amendment.number)
        accepted = exchange.members.sign(Acceptance(amendment_sha256=proposal.sha256, version=before))
        check()
        exchange.write_over(name, accepted.to_bytes(), lambda: False)
        if not exchange.follow_amendments():
            raise RefusedError(f"{name} was written, and is not there as it was: somebody else writes to this store")
        if proposal.amendment.new_key:
            check()
            give_group_key(exchange)


def _complete(exchange: StoreExchange, config: RunConfig, before: int) -> Proposal | None:
    """The first amendment that can be accepted before the commit of a version; what is too late is noted as void."""
    later, void = exchange.members.later, exchange.amendments.void
    number, earliest = (later[-1].number, later[-1].from_version) if later else (0, 0)
    if not exchange.members.keys or all(n <= number or n in void for n in exchange.numbers(FOLDER, after=".json")):
        return None
    for proposal in exchange.amendments.read(exchange.objects, later):
        amendment = proposal.amendment
        if amendment.number in void:
            continue
        if config.schedule.base(amendment.from_version) < before or amendment.from_version < earliest:
            void.add(amendment.number)
        elif not proposal.missing and not _has_to_wait(exchange, amendment, before, config.outer.num_fragments):
            try:
                check_amended(config, proposal)
                return proposal
            except ConfigError as error:
                exchange.pass_over(amendment_path(amendment.number), error)
    return None


def _has_to_wait(exchange: StoreExchange, amendment: Amendment, before: int, num_fragments: int) -> bool:
    """Whether the successor of a member's own key is not accepted yet: one after another, and not long before it signs.

    Nothing that is accepted later can hold earlier: else one member could keep the others from amending anything.
    """
    last = next((terms for terms in reversed(exchange.members.later) if terms.successor == amendment.author), None)
    is_early = amendment.from_version > before + num_fragments + MOST_AHEAD
    return amendment.is_succession and (is_early or (last is not None and last.from_version > before))


def adding(exchange: StoreExchange, member: str) -> Proposal | None:
    """The newest amendment that adds a silo, whether it holds or not. Raises ConfigError for one that cannot hold."""
    try:
        found = exchange.amendments.read(exchange.objects)
    except RefusedError as error:
        raise ConfigError(f"exchange.url: {exchange.objects.url} given; {error}") from None
    keys = ((one, one.amendment.new_key) for one in reversed(found) if member not in one.before.keys)
    return next((one for one, new in keys if new and new[0] == member), None)


def not_added_yet(exchange: StoreExchange, config: RunConfig, member: str) -> str:
    """What a silo that the contract does not have waits for before it counts as a member; empty if it does.

    Raises ConfigError where no amendment would add it, or not any more.
    """
    if exchange.members.enters_at(member) is not None:
        return ""
    if (proposal := adding(exchange, member)) is None:
        raise ConfigError(
            f"silos: {member!r} given; neither the contract nor an amendment has this silo; allowed: "
            f"{named(exchange.members.all_silos([]))}, or one that a member adds by atoll contract amend"
        )
    number = proposal.amendment.number
    try:
        check_from_version(exchange, config, proposal.amendment.from_version)
    except ConfigError:
        if exchange.follow_amendments():  # accepted since, before the newest commit
            return not_added_yet(exchange, config, member)
        raise ConfigError(
            f"silos: {member!r} given; amendment {number}, which adds it, is void, as it was not complete in time; "
            "allowed: once a member has proposed it anew"
        ) from None
    if proposal.missing:
        return f"the signature of {named(proposal.missing)} under amendment {number}, which adds {member}"
    return f"the aggregator, which has to accept amendment {number} before its next commit"


def check_amended(config: RunConfig, proposal: Proposal) -> None:
    """Raise ConfigError if a run of a configuration could not go on with an amendment."""
    amendment, before = proposal.amendment, proposal.before
    keys = applied(amendment, proposal.sha256, before).keys
    found = amended(config, before.settings | amendment.settings, keys)
    gone = amendment.new_key if amendment.new_key and not amendment.new_key[1] else None
    num_gone, rules = len(found.full_roster) - (len(keys) - 1), found.membership
    if new := sorted(keys.keys() - before.keys.keys()):
        allowed = "in a run with a membership.quorum, as all others wait for nobody to come"
        if rules.quorum is None:
            raise ConfigError(f"{KEYS}{new[0]}: a new silo given; allowed: {allowed}")
    most = (rules.sample or len(found.full_roster)) - num_gone
    if num_gone and (rules.quorum is None or rules.quorum > most):
        given = f"trust.keys.{gone[0]}: '' given" if gone else f"membership.quorum: {rules.quorum} given"
        raise ConfigError(f"{given}; allowed: with a membership.quorum of {most} or less, as no version could be made")


def sign_amendment(exchange: StoreExchange, proposal: Proposal, member: str) -> None:
    """Put a member's signature under an amendment. Raises ConfigError if its key is not here."""
    _put(exchange, proposal, _agreement(exchange, proposal, member))


def _put(exchange: StoreExchange, proposal: Proposal, agreement: Agreement) -> None:
    name = signature_path(proposal.amendment.number, agreement.member)
    exchange.write_over(name, agreement.to_bytes(), lambda: False)  # over one of another key, too


def _agreement(exchange: StoreExchange, proposal: Proposal, member: str) -> Agreement:
    """By the key that holds until then; by the new one, if that is what changes, as a proof that it is there."""
    amendment = proposal.amendment
    agreement = Agreement(contract_sha256=proposal.sha256, member=member)
    if amendment.new_key and amendment.new_key[0] == member and amendment.new_key[1]:
        signer = exchange.members.signer
        assert isinstance(signer, OwnKeys)
        signature = signer.holding(amendment.new_key[1]).sign("agreement", agreement.unsigned_bytes())
        return dataclasses.replace(agreement, signature=signature)
    return exchange.members.sign(agreement, version=amendment.from_version - 1)


def propose_amendment(
    exchange: StoreExchange, config: RunConfig, member: str, *, from_version: int, changes: Sequence[str]
) -> Proposal:
    """Write an amendment, signed as a member, with its signature under it if that counts.

    `config` is as the contract says. Raises ConfigError for what the run could not go on with.
    """
    newest = check_from_version(exchange, config, from_version)
    earlier = exchange.amendments.read(exchange.objects)
    is_taken = exchange.objects.exists(amendment_path(len(earlier) + 1))  # by what is no amendment
    later = exchange.members.later
    if later and from_version < later[-1].from_version:
        raise ConfigError(
            f"--from: {from_version} given; allowed: {later[-1].from_version} or later, where amendment "
            f"{later[-1].number} holds"
        )
    amendment = Amendment(
        number=len(earlier) + 1,
        previous=earlier[-1].sha256 if earlier else exchange.contract_sha256,
        from_version=from_version,
        changes=list(changes),
        author=member,
    )
    try:
        amendment = exchange.members.sign(amendment, version=from_version - 1)
        proposal = exchange.amendments.proposal(exchange.objects, amendment.to_bytes(), earlier)
    except RefusedError as error:
        raise ConfigError(error) from None
    check_amended(config, proposal)
    most = newest + config.outer.num_fragments + MOST_AHEAD
    if amendment.is_succession and from_version > most:
        raise ConfigError(
            f"--from: {from_version} given; allowed: up to {most} for a key of one's own, by version {newest}"
        )
    agreement = _agreement(exchange, proposal, member) if member in may_sign(proposal) else None
    name = amendment_path(amendment.number)
    if exchange.newest_version() != newest:
        check_from_version(exchange, config, from_version)
    if is_taken:
        exchange.objects.delete(name)
    try:
        exchange.objects.write(name, amendment.to_bytes())
    except FileExistsError:
        raise ConfigError(f"exchange.url: {name} was just written by somebody else; try again") from None
    if agreement:
        _put(exchange, proposal, agreement)
    return exchange.amendments.read(exchange.objects)[amendment.number - 1]


def may_sign(proposal: Proposal) -> list[str]:
    """The members whose signature under an amendment counts."""
    amendment = proposal.amendment
    proves = [amendment.new_key[0]] if amendment.new_key and amendment.new_key[1] else []
    return voters(amendment, proposal.before.keys) + proves


def check_from_version(exchange: StoreExchange, config: RunConfig, from_version: int) -> int:
    """The newest version; raises ConfigError if an amendment could not hold from a version on any more."""
    newest, last = exchange.newest_version(), config.schedule.num_versions
    if newest < 0:
        raise ConfigError(
            f"--from: {from_version} given; the run has no version yet; allowed: a contract that is proposed anew"
        )
    first = newest + 1 + config.outer.num_fragments
    if not first <= from_version <= last:
        raise ConfigError(
            f"--from: {from_version} given; allowed: {first} to {last}, as silos may be at work on the versions before"
            if first <= last
            else f"--from: {from_version} given; allowed: none, as the run ends with version {last}"
        )
    return newest
