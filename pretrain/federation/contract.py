"""A contract as its members deal with it: read, compared, proposed, signed and amended. No torch, but for the model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.config.adapter import PROMPT
from pretrain.config.allowed import TIERS
from pretrain.config.check import check_config
from pretrain.config.errors import ConfigError, named
from pretrain.config.gate import GateConfig
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.config.load import load_unchecked
from pretrain.exchange.agreement import (
    adding,
    check_from_version,
    may_sign,
    not_signed,
    propose_amendment,
    sign_amendment,
    sign_contract,
)
from pretrain.exchange.amended import Proposal
from pretrain.exchange.options import reached, store_options
from pretrain.exchange.store import StoreExchange
from pretrain.federation.join import know_added, read_terms
from pretrain.federation.preflight import check_model
from pretrain.host.foreign import shown
from pretrain.trust.amendment import ALL, KEYS
from pretrain.trust.contract import (
    RUN,
    agreed_settings,
    amend_rule,
    build_contract,
    different_terms,
    first_contract,
    read_contract,
)
from pretrain.trust.keys import PublicKey, new_key, read_key
from pretrain.trust.ledger import RefusedError, sha256_bytes
from pretrain.trust.members import own_keys, own_signer, successors


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """The contract in a store."""

    url: str
    exchange: StoreExchange
    contract: bytes
    config: RunConfig
    """As it says; what is a silo's own has its default."""

    @classmethod
    def at(cls, where: str, paths: Sequence[Path] = (), overrides: Sequence[str] = ()) -> "Agreed":
        """Of the store or run directory, reached as a member's own configuration says. Raises ConfigError."""
        url, how = reached(where)
        if paths:
            how = load_unchecked(paths, overrides).exchange
        exchange = StoreExchange(url, options=store_options(how, url), retry_seconds=how.retry_seconds)
        if (contract := exchange.read_contract()) is None:
            raise ConfigError(f"store: {url!r} given; there is no run in it (no contract.json)")
        return cls(url=url, exchange=exchange, contract=contract, config=read_terms(contract, url)[-1])

    def own(self, paths: Sequence[Path], overrides: Sequence[str]) -> RunConfig:
        """A member's own configuration; what it does not say is as the contract says. Raises ConfigError."""
        config = load_unchecked(paths, overrides, below=read_terms(self.contract, self.url)[2])
        know_added(config, self.exchange)
        return config

    def differences(self, paths: Sequence[Path], overrides: Sequence[str]) -> list[str]:
        """A line for each term that a member's own configuration has otherwise. Raises ConfigError."""
        terms, config = read_contract(self.contract, self.url)[0], self.own(paths, overrides)
        agreed = agreed_settings(config)
        if found := different_terms(agreed, {key: terms.get(key) for key in agreed}):
            return found  # a wrong value would only blame a right one
        check_config(config)
        ours = build_contract(config)
        return different_terms(ours if ours[RUN] else ours | {RUN: terms[RUN]}, terms)

    def as_member(self, paths: Sequence[Path], overrides: Sequence[str], member: str) -> RunConfig:
        """The own configuration of a member who may sign what is here: it is the same, and the key is there.

        Raises ConfigError.
        """
        if not self.exchange.members.keys:
            raise ConfigError(
                f"store: {self.url!r} given; its contract names no trust.keys, and nothing is signed in it"
            )
        known = self.exchange.members.first_keys
        if member not in known and not adding(self.exchange, member):
            raise ConfigError(
                f"--silo: {member!r} given; allowed: {named(sorted(known))}, or a silo that is being added"
            )
        if differences := self.differences(paths, overrides):
            raise ConfigError(f"store: {self.url!r} given; nothing is signed, as {'; '.join(differences)}")
        config = self.own(paths, overrides)
        self.exchange.members.signer = own_signer(config, member)
        return config

    def proposals(self) -> list[Proposal]:
        """All amendments that lie there. Raises ConfigError."""
        try:
            return self.exchange.amendments.read(self.exchange.objects)
        except RefusedError as error:
            raise ConfigError(f"store: {self.url!r} given; {error}") from None


# ---- in plain words


def describe(agreed: Agreed) -> Iterator[tuple[str, str]]:
    """The contract in plain words: what each line is about, and what is agreed on it. Raises ConfigError."""
    config, members = agreed.config, agreed.exchange.members
    inner, outer, rules = config.inner, config.outer, config.membership
    run = read_contract(agreed.contract, agreed.url)[0][RUN]
    yield "contract", f"{config.name}, run {run}, sha256 {sha256_bytes(agreed.contract)[:12]}, in {agreed.url}"
    model = shown(config.model.config.get("model_type", "from a checkpoint"))
    yield "model", f"{model}, seed {config.model.seed}, sequences of {config.sequence_tokens:,} tokens"
    if (adapter := config.model.adapter).kind == PROMPT:
        yield "adapter", f"a prompt of {adapter.tokens} tokens, which begins as {shown(adapter.text)!r}"
    elif adapter.is_on:
        size = f"rank {adapter.rank}, alpha {adapter.alpha:g}, dropout {adapter.dropout:g}"
        beside = named([shown(name) for name in adapter.targets])
        yield "adapter", f"{adapter.kind} of {size}, beside {beside}; merge: {adapter.merge}"
    yield (
        "training",
        f"{inner.num_steps:,} steps of {inner.optimizer}, lr {inner.lr:g}: {config.num_rounds:,} rounds of H = "
        f"{outer.sync_interval_steps:,}",
    )
    if every := config.practice.every_rounds:
        yield "practice", f"after {config.practice.after_rounds:,} rounds and every {every:,} from then on"
    yield (
        "syncs",
        f"{outer.sent_codec} up, {outer.downlink_codec} down; fragments: {outer.num_fragments}, "
        f"overlap: {outer.overlap_steps} steps",
    )
    yield (
        "merging",
        f"{outer.merge}, weights by tokens to the power of {outer.weight_power:g}, at most {outer.max_share:g} of all; "
        f"outer {outer.optimizer}, lr {outer.lr:g}",
    )
    enough = (
        "every version waits for all of the roster, however long"
        if rules.quorum is None
        else f"{rules.quorum} of {len(config.full_roster)} are enough after the deadline, which is "
        f"{rules.deadline_floor_seconds:g} to {rules.deadline_ceiling_seconds:g} s after the commit before"
    )
    yield "quorum", enough
    yield from told_of_gate(config.gate)
    yield from told_of_silos(config)
    software = read_contract(agreed.contract, agreed.url)[1]
    versions = named([f"{package} {version}" for package, version in software.items()]) or "none recorded"
    rule = "others do not take part" if config.trust.software == "exact" else "others are told what differs"
    yield "software", f"{versions}: {rule}"
    if not members.keys:
        yield "roster", f"{named(config.full_roster)}; no keys are named: nothing is signed"
        return
    rule = amend_rule(agreed.contract)
    who = "all silos sign" if rule == ALL else f"{rule} of the {len(config.full_roster)} silos sign"
    yield "amending", f"{who}; the one whose key it changes has no voice, and its own key each changes alone"
    missing, keys = not_signed(agreed.exchange), members.first_keys
    for name in [*members.all_silos(config.full_roster), OPERATOR]:
        has = "has not signed" if name in missing else "has signed"
        if enters := members.enters_at(name):
            has = f"was added, from version {enters} on"
        yield name, f"{keys[name].fingerprint}  {has}{_since(agreed, name)}"
    for proposal in agreed.proposals():
        yield f"amendment {proposal.amendment.number}", describe_amendment(agreed, proposal)


def told_of_gate(gate: GateConfig) -> Iterator[tuple[str, str]]:
    """By which rule a version becomes the current one, if there is such a rule."""
    if not gate.is_on:
        return
    limits = ", ".join(f"{name} {limit:g}" for name, limit in gate.limits.items())
    judges = named(sorted(gate.data)) or "none"
    waits = "" if gate.deadline_seconds is None else f", for {gate.deadline_seconds:g} s at most"
    yield (
        "gate",
        f"every {gate.every_versions} versions one is a candidate: {limits}; else the run is to {gate.otherwise}",
    )
    yield "judged by", f"{judges}{waits}; by the operator: {named(sorted(gate.public)) or 'nothing'}"


def told_of_silos(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What silos tell of themselves by a contract, who sees it, and what it does."""
    if (floor := config.outer.quality_floor) is not None:
        yield "quality", f"a loss above {floor:g} times the median of the other silos' does not count"
    of_tier = {tier: named([name for name, its in config.trust.metrics.items() if its == tier]) for tier in TIERS}
    yield "metrics", "; ".join(f"{tier}: {names}" for tier, names in of_tier.items() if names)
    clip = config.inner.clip_norm
    clipped = f"gradients of a step clipped to {clip:g}" if clip else "gradients not clipped"
    yield "privacy", f"{clipped}, no noise; payloads {'sealed' if config.trust.seal else 'not sealed'}"


def _since(agreed: Agreed, name: str) -> str:
    """How a member's key has changed since the contract was signed."""
    members = agreed.exchange.members
    said, before = "", members.keys.get(name)
    for terms in members.later:
        key, since = terms.keys.get(name), f"from version {terms.from_version} on"
        if key != before and (before or name in members.keys or said):
            said += f"; {key.fingerprint} {since}" if key else f"; counts no more {since}"
        before = key
    return said


def describe_amendment(agreed: Agreed, proposal: Proposal) -> str:
    """What an amendment changes, and whether it holds."""
    amendment = proposal.amendment
    changes = ", ".join(_in_words(change, proposal) for change in amendment.changes)
    said = f"from version {amendment.from_version} on: {changes}; proposed by {amendment.author}; "
    if proposal.accepted:
        return said + "all that are needed have signed: it holds"
    try:
        check_from_version(agreed.exchange, agreed.config, amendment.from_version)
    except ConfigError:
        return said + f"void: it was not complete in time{_of(proposal.missing)}"
    if proposal.missing:
        return said + f"waits for the signature of {named(proposal.missing)}"
    return said + "all that are needed have signed: it holds with the aggregator's next commit"


def _of(missing: list[str]) -> str:
    return f", without the signature of {named(missing)}" if missing else ""


def _in_words(change: str, proposal: Proposal) -> str:
    key, _, value = change.partition("=")
    if not key.startswith(KEYS):
        return change
    name = key.removeprefix(KEYS)
    if name not in proposal.before.keys:
        return f"{name} is added, with the key {PublicKey.parse(value).fingerprint}"
    return f"{name} has the key {PublicKey.parse(value).fingerprint}" if value else f"the key of {name} counts no more"


# ---- what members do


def propose(config: RunConfig) -> str:
    """Write the contract of a configuration into a store where there is none; returns its sha256. Raises ConfigError.

    Nobody signs it by that: `atoll contract sign`, or a start, does.
    """
    if config.exchange.kind != "store":
        raise ConfigError(f"exchange.kind: {config.exchange.kind!r} given; a contract lies in a 'store'")
    exchange = StoreExchange.of_run(config)
    if exchange.read_contract() is not None:
        raise ConfigError(
            f"exchange.url: {config.store_url} given; there is a contract in it already; allowed: another store, or "
            "atoll contract check"
        )
    if exchange.newest_version() >= 0:
        raise ConfigError(f"exchange.url: {config.store_url} given; it has versions but no contract.json")
    ours = build_contract(config)
    check_model(config)  # a mistake in the model must not leave a contract behind
    exchange.write_contract(first_contract(ours))
    return exchange.contract_sha256


def sign(agreed: Agreed, member: str, number: int | None = None) -> list[str]:
    """Sign the contract, or an amendment, as a member (see `Agreed.as_member`); returns whose signature is missing.

    Raises ConfigError.
    """
    exchange = agreed.exchange
    if number is None:
        sign_contract(exchange, member)
        return not_signed(exchange)
    proposals = agreed.proposals()
    if not 1 <= number <= len(proposals):
        allowed = f"1 to {len(proposals)}" if proposals else "none, as there is no amendment"
        raise ConfigError(f"--amendment: {number} given; allowed: {allowed}")
    proposal = proposals[number - 1]
    if proposal.accepted:
        raise ConfigError(f"--amendment: {number} given; it holds already; allowed: one that waits for signatures")
    check_from_version(exchange, agreed.config, proposal.amendment.from_version)
    if member not in may_sign(proposal):
        raise ConfigError(f"--silo: {member!r} given; allowed: {named(may_sign(proposal))}, whose signatures count")
    sign_amendment(exchange, proposal, member)
    return agreed.proposals()[number - 1].missing


def amend(agreed: Agreed, member: str, from_version: int, changes: Sequence[str]) -> Proposal:
    """Propose an amendment as a member (see `Agreed.as_member`). Raises ConfigError."""
    return propose_amendment(agreed.exchange, agreed.config, member, from_version=from_version, changes=changes)


def rotate(
    agreed: Agreed, member: str, directory: Path, from_version: int, command: Sequence[str] = ()
) -> tuple[Proposal, Path]:
    """Make the successor of a member's key beside it, and propose that it holds from a version on.

    A successor that was made before and is of no amendment is taken. With a `command` that signs, for both keys, it has
    to be there, as a public line. Raises ConfigError.
    """
    exchange, file = agreed.exchange, directory / f"{member}.key"
    keys = exchange.members.first_keys
    if member not in keys:
        allowed = named(sorted(keys)) or "none, as this contract names no keys"
        raise ConfigError(f"name: {member!r} given; allowed: {allowed}")
    check_from_version(exchange, agreed.config, from_version)
    exchange.members.signer = own_keys(member, keys[member], file, given=str(directory), command=command)
    known = successors(file)
    used = {change.partition("=")[2] for p in agreed.proposals() for change in p.amendment.changes}
    made = known[-1] if known and _public(known[-1]).text not in used else None
    if made is None:
        made = file.with_name(f"{file.name}.{len(known) + 1}")
        if command:
            raise ConfigError(
                f"{made}: not there; allowed: the public line of the key that the key_command is to sign with, or the "
                f"file of atoll keys new {member}, which then signs itself"
            )
        new_key(made, member)
    return amend(agreed, member, from_version, [f"{KEYS}{member}={_public(made).text}"]), made


def _public(file: Path) -> PublicKey:
    found = read_key(file)
    return found if isinstance(found, PublicKey) else found.public
