"""A secure sum: what each says of a version when, what it writes down before, and what one who lies learns. No torch.

K silos have keys at a version; T of them have to answer (`membership.quorum`, or all K).

1.  A silo multiplies its pseudo-gradient, and what it tells of its gradients, by its share of the largest weight there
    can be and by scales that all know (outer/fixed_point.py, outer/summed.py), rounds, and adds its masks modulo 2^32
    or 2^64 (masks.py): a stream that it alone knows, and for each of the other K - 1 one that both of them know. It
    deals each of its K seeds into K shares, any T of which lead back to it, seals each silo's shares to that silo, and
    writes payload, `Shares`, and last the manifest into the store. All of it follows from its values and keys: killed,
    it writes the same again; with other values, as after kernels that are not deterministic, the stream of its own is
    another one.
2.  When as many have delivered as a version takes, the aggregator writes down whose deliveries it will add up, each by
    the hash of its manifest (`Survivors`). That stands: an aggregator that starts again adds up these and no others.
3.  A silo that waits for the version checks this: it is the operator's, has T silos or more, never fewer than three or
    than the silo's own `least_silos`, and each manifest and its shares are their silo's. Then it notes the record's
    hash, on the disk, beside its private key (sync/answered.py) and in its run directory, and what a commit of that
    says, and only then writes its `Answer`: of each delivery that is in the sum, its share of the seed of that silo's
    own stream, and of the seeds that it shares with silos that are not in it. For another record of this version it
    ends in one line, whatever it is shown later, in whatever run directory. What is missing, or signed by nobody, as
    after somebody has written over it, it waits for.
4.  With T answers the aggregator joins the shares, compares each seed with the hash that its dealer has signed, makes
    those streams again, and takes them from the sum of what was delivered. The streams that two in the sum share are
    gone by themselves. What is left is the weighted sum. A commit does not depend on whose answers these were.
5.  A silo that has answered takes no commit of other deliveries than those, or of other weights: it ends in one line.

All of it stays in the store but for payloads, which are pruned as ever, so that whoever replays or verifies a version
comes to the same sum. A silo may die at any point: before its manifest, the version waits for it or is made without it;
after, T others' answers are enough.

Two deliveries of a silo for one version have the masks in common that it shares with others: after kernels that are
not deterministic, or from another run directory under the same contract. They cannot be salted by a number that is
drawn for a delivery, as both ends must know it before either codes, without a message in between; what tells the two
apart is the stream of the silo's own, and at most one of them is in the one set for which that is laid open. So the
note of what was answered has to outlive the run directory: it lies with the key. And a silo delivers under one contract
from one run directory, as the note says before it delivers anything; another one is refused.

What an aggregator that lies learns: the sum of one set of T or more silos for each version, and nothing of a smaller
one. To have two sets answered it needs T answers to each, of K, so that 2 T - K silos have answered both; T is above
two thirds of K, so more than a third of the silos would have to lie with it. Nor does it help to leave out a silo whose
delivery it has: its own stream stays secret then. What it can do: name sums of silos that are its own. K - 1 silos who
lie together know what the last one sent, from the sum. A silo can deliver whatever it likes, as nobody can look at it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.trust.ledger import Record


@dataclass(frozen=True, kw_only=True)
class Shares(Record):
    """What a silo has dealt with a delivery; rows are of all silos that have a key at the version, sorted by name."""

    contract_sha256: str
    silo: str
    version: int
    blake3: str
    """Of the delivery's payload."""
    salt: str
    sealed: list[str]
    """To each silo its shares of all seeds, in hexadecimal."""
    seeds: list[str]
    """sha256 of the seed that it shares with each; under its own name, of that of its own stream."""


@dataclass(frozen=True, kw_only=True)
class Survivors(Record):
    """Whose deliveries are added up for a version."""

    contract_sha256: str
    version: int
    silos: list[str]
    """Sorted."""
    manifests: list[str]
    """sha256 of the bytes of each one's manifest."""


@dataclass(frozen=True, kw_only=True)
class Answer(Record):
    """What a silo lays open, so that the sum of these can be known."""

    contract_sha256: str
    silo: str
    version: int
    survivors_sha256: str
    """Of the record's bytes."""
    shares: list[str]
    """Of what `laid_open` says, in hexadecimal."""


def laid_open(survivors: Survivors, silos: Sequence[str]) -> list[tuple[str, str]]:
    """The seeds that are in a sum and have to be known: who dealt each, and with whom it is shared, or itself."""
    missing = [silo for silo in silos if silo not in survivors.silos]
    return [(dealer, about) for dealer in survivors.silos for about in (dealer, *missing)]
