"""What members have signed of a model from which one member's contributions were taken out. No torch.

revocations/beta-000005-000012/alpha.json    alpha has come to the same parameters without beta's versions 5 to 12
"""

import dataclasses
import re
from dataclasses import dataclass

from pretrain.config.errors import ConfigError, named
from pretrain.exchange.signed import SignedStore
from pretrain.host.foreign import shown
from pretrain.trust.ledger import Record, RefusedError

FOLDER = "revocations"
NAME = re.compile(r"([a-z0-9][a-z0-9_-]{0,62})-([0-9]{6,9})-([0-9]{6,9})")


@dataclass(frozen=True, kw_only=True)
class Revocation(Record):
    """What a run's model is without a member's contributions, from one version to another."""

    contract_sha256: str
    member: str
    """Whose contributions were taken out, ..."""
    from_version: int
    """... from this version on, ..."""
    to_version: int
    """... up to this one, ..."""
    commit_sha256: str
    """... whose commit's bytes have this sha256, and by their chain all before."""
    parameters_digest: str
    """Of what comes out."""
    reason: str
    signer: str
    """Who has come to this; empty in what nobody has signed."""


@dataclass(frozen=True, kw_only=True)
class Signed:
    """Who is said to have signed, and what."""

    signer: str
    record: Revocation | None
    """None: it is none, or not that signer's, and counts for nothing, ..."""
    wrong: str
    """... because of this."""


def revocations(exchange: SignedStore, member: str) -> dict[str, list[Signed]]:
    """All that is said to be signed of a member's revocations, by their folder."""
    found: dict[str, list[Signed]] = {}
    for name in exchange.objects.names(FOLDER):
        match = NAME.fullmatch(name)
        if match and match[1] == member:
            place, span = f"{FOLDER}/{name}", (int(match[2]), int(match[3]))
            signers = [n.removesuffix(".json") for n in exchange.objects.names(place) if n.endswith(".json")]
            found[place] = [read_signed(exchange, place, signer, member, span) for signer in signers]
    return found


def read_signed(exchange: SignedStore, place: str, signer: str, member: str, span: tuple[int, int]) -> Signed:
    """What lies under a signer's name in a folder: of these versions, of a member's revocation."""
    try:
        record = Revocation.from_bytes(exchange.objects.read(f"{place}/{signer}.json"))
        told = record.contract_sha256, record.member, record.from_version, record.to_version, record.signer
        if told != (exchange.contract_sha256, member, *span, signer):
            raise RefusedError("it is of another run, member, version or signer")
        if not exchange.members.keys:
            raise RefusedError("the contract names no keys")
        exchange.members.check(signer, record, version=record.to_version)
    except (RefusedError, FileNotFoundError) as error:
        return Signed(signer=shown(signer), record=None, wrong=shown(error, limit=1000))
    return Signed(signer=signer, record=record, wrong="")


def signed_before(exchange: SignedStore, member: str, first: int, until: int | None) -> Revocation | None:
    """What others have signed of a revocation from version `first`, up to `until` if that is given; None if nobody has.

    Raises ConfigError if it is not clear which.
    """
    found = [one.record for signed in revocations(exchange, member).values() for one in signed if one.record]
    found = [one for one in found if one.from_version == first and until in (None, one.to_version)]
    if len(ends := sorted({one.to_version for one in found})) > 1:
        allowed = named([str(end) for end in ends])
        raise ConfigError(f"--until: none given, and several such revocations are signed; allowed: {allowed}")
    return found[0] if found else None


def sign(exchange: SignedStore, record: Revocation, signer: str) -> Revocation:
    """Put our signature under what we have come to, in the store. Raises ConfigError if others have come to another."""
    ours = dataclasses.replace(record, signer=signer)
    place = f"{FOLDER}/{record.member}-{record.from_version:06d}-{record.to_version:06d}"
    for one in revocations(exchange, record.member).get(place, []):
        theirs = one.record
        if theirs and one.signer != signer and dataclasses.replace(theirs, signer=signer, signature=None) != ours:
            raise ConfigError(
                f"--sign: {signer} given; {one.signer} has signed {_short(theirs)}; here it comes to {_short(ours)}; "
                f"nothing is signed; if that one is wrong, take {place}/{one.signer}.json away"
            )
    signed = exchange.members.sign(ours, version=ours.to_version)
    exchange.objects.delete(f"{place}/{signer}.json")  # what somebody else has put there, or what we said before
    exchange.objects.write(f"{place}/{signer}.json", signed.to_bytes())
    return signed


def _short(record: Revocation) -> str:
    reason = f"reason {shown(record.reason)!r}"
    return f"parameters {record.parameters_digest[:12]} of commit {record.commit_sha256[:12]}, {reason}"
