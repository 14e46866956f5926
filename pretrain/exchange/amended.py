"""The amendments that lie in a store, and what holds with those of them that were accepted. No torch.

    amendments/000001.json        what a member proposes, from which version on, and its signature
    amendments/000001/NAME.json   a member's signature under it
    amendments/000001.accepted    the operator's, once all that are needed are there: it holds

Each names the one before, so that the sha256 of an amendment stands for all terms up to it.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from pretrain.config.check import named
from pretrain.config.keys import OPERATOR
from pretrain.exchange.objects import Objects
from pretrain.exchange.words import WORD_BYTES, number
from pretrain.trust.amendment import Acceptance, Amendment, Terms, applied, still_missing
from pretrain.trust.keys import PublicKey
from pretrain.trust.ledger import Agreement, RefusedError, sha256_bytes
from pretrain.trust.members import Members

FOLDER = "amendments"


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
        known = {terms.number for terms in self._members.later}
        listed = (number(name, after=".accepted") for name in objects.names(FOLDER))
        new = {n for n in listed if n is not None} - known
        if not new:
            return False
        later = self._terms(self.read(objects))[1:]
        self._check_none_missing(objects, sorted(new - {terms.number for terms in later}), later)
        if not known <= {terms.number for terms in later}:
            raise RefusedError(f"{FOLDER}/: an amendment that was accepted is not there any more; restore it")
        self._members.later = later
        for terms in (terms for terms in later if terms.number not in known):
            print(
                f"the contract is amended from version {terms.from_version} on: {', '.join(terms.changes)}", flush=True
            )
        return len(later) > len(known)

    def read(self, objects: Objects) -> list[Proposal]:
        """All that follow from the contract on, each from the one before; what is none is passed over, and said.

        Raises RefusedError for one that was accepted and cannot have been.
        """
        found: list[Proposal] = []
        while (data := self._found(objects, name := amendment_path(len(found) + 1))) is not None:
            accepted = self._acceptance(objects, sha256_bytes(data), found)
            try:
                proposal = dataclasses.replace(self.proposal(objects, data, found), accepted=accepted)
                if accepted:
                    _check_may_hold(proposal)
            except RefusedError as error:
                if accepted:
                    raise RefusedError(f"{name}, which the operator has accepted: {error}") from None
                self._pass_over(name, error)
                break
            found.append(proposal)
        return found

    def _found(self, objects: Objects, name: str) -> bytes | None:
        """What lies there; None for what is longer than any of ours, too, which is said."""
        try:
            return objects.read_if_there(name)
        except RefusedError as error:
            self._pass_over(name, error)
            return None

    def proposal(self, objects: Objects, data: bytes, earlier: list[Proposal]) -> Proposal:
        """An amendment after all that are there. Raises RefusedError for what is none."""
        amendment, sha256, rows = Amendment.from_bytes(data), sha256_bytes(data), self._terms(earlier)
        if data != amendment.to_bytes():
            raise RefusedError("it is not in the one form that an amendment has")
        previous = earlier[-1].sha256 if earlier else self._contract_sha256
        if (amendment.number, amendment.previous) != (len(earlier) + 1, previous):
            raise RefusedError("it does not follow the amendment before it, or the contract")
        # Whoever signs may do so at any version before: what holds at the last of these is asked for.
        keys = next(terms for terms in reversed(rows) if terms.from_version < max(1, amendment.from_version)).keys
        Members(keys=keys).check(amendment.author, amendment)
        applied(amendment, sha256, rows[-1])
        signed = [name for name in keys if self._has_signed(objects, amendment, name, keys[name])]
        return Proposal(
            amendment=amendment,
            sha256=sha256,
            before=rows[-1],
            missing=still_missing(amendment, self._rule, signed, keys),
        )

    def _terms(self, earlier: list[Proposal]) -> list[Terms]:
        """The contract, and what came to hold since; from ever later versions on."""
        first = Terms(from_version=0, number=0, sha256=self._contract_sha256, keys=self._members.keys, settings={})
        return [first, *(applied(p.amendment, p.sha256, p.before) for p in earlier if p.accepted)]

    def _has_signed(self, objects: Objects, amendment: Amendment, member: str, key: PublicKey) -> bool:
        name = signature_path(amendment.number, member)
        data = self._found(objects, name)
        if data is None:
            return False
        try:
            agreement = Agreement.from_bytes(data)
            if (agreement.contract_sha256, agreement.member) != (sha256_bytes(amendment.to_bytes()), member):
                raise RefusedError("it is under another amendment, or another member's")
            replaced, new = amendment.new_key or ("", None)
            Members(keys={member: new if new and replaced == member else key}).check(member, agreement)
        except RefusedError as error:
            self._pass_over(name, error)
            return False
        return True

    def _acceptance(self, objects: Objects, sha256: str, earlier: list[Proposal]) -> Acceptance | None:
        """The operator's word for the next amendment; what is none counts as not there, and is said."""
        name = acceptance_path(len(earlier) + 1)
        if (data := self._found(objects, name)) is None:
            return None
        try:
            acceptance = Acceptance.from_bytes(data)
            Members(keys=self._members.keys, later=self._terms(earlier)[1:]).check(OPERATOR, acceptance)
            if acceptance.amendment_sha256 != sha256:
                raise RefusedError("it is of another amendment than the one that lies here")
        except RefusedError as error:
            self._pass_over(name, error)
            return None
        return acceptance

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
