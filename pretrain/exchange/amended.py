"""The amendments that lie in a store, and what holds with those of them that were accepted. No torch.

    amendments/000001.json        what a member proposes, from which version on, and its signature
    amendments/000001/NAME.json   a member's signature under it
    amendments/000001.accepted    the operator's, once all that are needed are there: it holds

Each names the one before, so that the sha256 of an amendment stands for all terms up to it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from pretrain.config.errors import named
from pretrain.config.keys import OPERATOR
from pretrain.exchange.objects import Objects
from pretrain.exchange.records import heard
from pretrain.exchange.words import WORD_BYTES, number
from pretrain.trust.amendment import Acceptance, Amendment, Terms, applied, still_missing
from pretrain.trust.keys import PublicKey
from pretrain.trust.ledger import Agreement, RefusedError, sha256_bytes
from pretrain.trust.members import Members

FOLDER = "amendments"
MOST_OPEN = 16  # amendments of a member that may wait, or be void, since the last that holds
AMENDMENT_BYTES = 16 << 10  # more than its changes and names can have


def amendment_path(number: int) -> str:
    """The record of an amendment."""
    return f"{FOLDER}/{number:06d}.json"


def signature_path(number: int, member: str) -> str:
    """A member's signature under it."""
    return f"{FOLDER}/{number:06d}/{member}.json"


def acceptance_path(number: int) -> str:
    """The operator's word that it holds."""
    return f"{FOLDER}/{number:06d}.accepted"


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """An amendment in a store."""

    amendment: Amendment
    sha256: str
    before: Terms
    """What it changes."""
    missing: list[str]
    """Whose signature it waits for."""
    accepted: Acceptance | None = None


class Amendments:
    """Reads those of one store."""

    def __init__(
        self, members: Members, rule: str, contract_sha256: str, pass_over: Callable[[str, object], None]
    ) -> None:
        """`rule` is the contract's `trust.amend`; `members.later` is what comes out."""
        self._members, self._rule, self._contract_sha256, self._pass_over = members, rule, contract_sha256, pass_over
        self.void: set[int] = set()
        """Those that the aggregator, which alone may accept them, has seen come too late."""

    def follow(self, objects: Objects) -> bool:
        """Whether amendments were accepted that were not known. Raises RefusedError for one that cannot have been."""
        if not self._members.keys:
            return False
        known = self._members.later
        listed = (number(name, after=".accepted") for name in objects.names(FOLDER))
        new = sorted(n for n in listed if n is not None and n > (known[-1].number if known else 0))
        if not new:
            return False
        later = self._terms(self.read(objects, known, of_accepted=True), known)[1:]
        newest = later[-1].number if later else 0
        self._check_none_missing(objects, [n for n in new if n > newest][:MOST_OPEN], later)
        self._members.later = later
        for terms in later[len(known) :]:
            print(
                f"the contract is amended from version {terms.from_version} on: {', '.join(terms.changes)}", flush=True
            )
        return len(later) > len(known)

    def read(self, objects: Objects, since: Sequence[Terms] = (), *, of_accepted: bool = False) -> list[Proposal]:
        """All that follow, each from the one before; what is none is passed over, and said.

        They follow from the contract, or from the last that was accepted of all those `since`. `of_accepted`: who has
        signed is asked for accepted ones only. Raises RefusedError for one that was accepted and cannot have been.
        """
        found: list[Proposal] = []
        while True:
            number = (since[-1].number if since else 0) + len(found) + 1
            name, accepted = amendment_path(number), None
            try:
                if (data := objects.read_if_there(name, limit_bytes=AMENDMENT_BYTES)) is None:
                    break
                accepted = self._acceptance(objects, number, sha256_bytes(data), self._terms(found, since))
                is_asked = bool(accepted) or not (of_accepted or number in self.void)
                proposal = self.proposal(objects, data, found, since, ask=is_asked)
                proposal = dataclasses.replace(proposal, accepted=accepted)
                if accepted:
                    _check_may_hold(proposal)
            except RefusedError as error:
                if accepted:
                    raise RefusedError(f"{name}, which the operator has accepted: {error}") from None
                self._pass_over(name, error)
                break
            found.append(proposal)
        return found

    def proposal(
        self,
        objects: Objects,
        data: bytes,
        earlier: list[Proposal],
        since: Sequence[Terms] = (),
        *,
        ask: bool = True,
    ) -> Proposal:
        """An amendment after all that are there; `ask`: who has signed it. Raises RefusedError for what is none."""
        amendment, sha256, rows = Amendment.from_bytes(data), sha256_bytes(data), self._terms(earlier, since)
        if data != amendment.to_bytes():
            raise RefusedError("it is not in the one form that an amendment has")
        before = earlier[-1] if earlier else rows[-1]
        number = before.amendment.number if isinstance(before, Proposal) else before.number
        if (amendment.number, amendment.previous) != (number + 1, before.sha256):
            raise RefusedError("it does not follow the amendment before it, or the contract")
        # Whoever signs may do so at any version before: what holds at the last of these is asked for.
        keys = next(terms for terms in reversed(rows) if terms.from_version < max(1, amendment.from_version)).keys
        author = amendment.author
        Members(keys=keys).check(author, amendment)
        if amendment.is_succession and keys.get(author) != rows[-1].keys.get(author):
            raise RefusedError(f"{author} replaces a key that an amendment before has replaced or taken away")
        waiting = [one.amendment.author for one in takewhile(lambda one: not one.accepted, reversed(earlier))]
        if waiting.count(author) >= MOST_OPEN:  # or whoever looks would have to read any number
            raise RefusedError(
                f"{author} has proposed {MOST_OPEN} amendments since the last that holds; allowed: another once one of "
                "these holds, or one by another member"
            )
        applied(amendment, sha256, rows[-1])
        proves = {amendment.new_key[0]: key} if amendment.new_key and (key := amendment.new_key[1]) else {}
        signed = self._who_signed(objects, amendment, keys | proves) if ask else []
        return Proposal(
            amendment=amendment,
            sha256=sha256,
            before=rows[-1],
            missing=still_missing(amendment, self._rule, signed, keys),
        )

    def _terms(self, earlier: list[Proposal], since: Sequence[Terms]) -> list[Terms]:
        """The contract, and what came to hold since; from ever later versions on."""
        first = Terms(from_version=0, number=0, sha256=self._contract_sha256, keys=self._members.keys, settings={})
        return [first, *since, *(applied(p.amendment, p.sha256, p.before) for p in earlier if p.accepted)]

    def _who_signed(self, objects: Objects, amendment: Amendment, keys: Mapping[str, PublicKey]) -> list[str]:
        """Of some members those whose signature by these keys is there."""
        there = {*objects.names(f"{FOLDER}/{amendment.number:06d}")}
        asked = [(name, key) for name, key in keys.items() if f"{name}.json" in there]
        return [name for name, key in asked if self._has_signed(objects, amendment, name, key)]

    def _has_signed(self, objects: Objects, amendment: Amendment, member: str, key: PublicKey) -> bool:
        of = {"contract_sha256": sha256_bytes(amendment.to_bytes()), "member": member}
        members, name = Members(keys={member: key}), signature_path(amendment.number, member)
        return heard(objects, Agreement, name, member, members, of=of, pass_over=self._pass_over) is not None

    def _acceptance(self, objects: Objects, number: int, sha256: str, rows: list[Terms]) -> Acceptance | None:
        """The operator's word for an amendment after `rows`; what is none counts as not there, and is said."""
        members = Members(keys=self._members.keys, later=rows[1:])
        of, name = {"amendment_sha256": sha256}, acceptance_path(number)
        return heard(
            objects, Acceptance, name, OPERATOR, members, of=of, pass_over=self._pass_over, limit_bytes=WORD_BYTES
        )

    def _check_none_missing(self, objects: Objects, numbers: list[int], later: list[Terms]) -> None:
        """Raise RefusedError if the operator has accepted an amendment that is not there any more."""
        members = Members(keys=self._members.keys, later=later)
        for missing in numbers:
            try:
                acceptance = Acceptance.from_bytes(objects.read(acceptance_path(missing), limit_bytes=WORD_BYTES))
                members.check(OPERATOR, acceptance)
            except (RefusedError, FileNotFoundError):
                continue  # nobody's
            raise RefusedError(
                f"{acceptance_path(missing)} accepts the amendment {acceptance.amendment_sha256[:12]}, and "
                f"{amendment_path(missing)} is not that one any more; restore it"
            )


def _check_may_hold(proposal: Proposal) -> None:
    """Raise RefusedError if an amendment was accepted that could not be."""
    amendment, accepted, now = proposal.amendment, proposal.accepted, proposal.before
    assert accepted
    if proposal.missing:
        raise RefusedError(f"the signature of {named(proposal.missing)} is missing")
    if amendment.from_version < max(now.from_version, accepted.version + 1):
        raise RefusedError(
            f"it holds from version {amendment.from_version} on, and was accepted before version {accepted.version}, "
            f"where the terms of version {now.from_version} held"
        )
