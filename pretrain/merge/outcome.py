"""What each silo of a collective signs of a version: what it delivered, and what came out of all deliveries there.

Nobody commits in a collective. The silos' signatures together are what an operator's would be: whoever has a commit and
these records of all silos can show to others that each of them stood by it.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pretrain.config.keys import RunConfig
from pretrain.exchange.store import delivery_path
from pretrain.merge.step import shares
from pretrain.merge.terms import contributor, read_delivery
from pretrain.outer.digest import digest_tensors
from pretrain.outer.merge import mean_cosine, unit_sum_squared
from pretrain.outer.quantize import Parts
from pretrain.trust.ledger import Commit, Manifest, Record, RefusedError, sha256_bytes
from pretrain.trust.members import Members
from pretrain.trust.quality import losses

SETTLED = ("update_norm", "cosine_mean")  # what all outcomes together say


@dataclass(frozen=True, kw_only=True)
class Outcome(Record):
    """What came out of a version's deliveries at one silo, said before any silo adopts it."""

    contract_sha256: str
    silo: str
    version: int
    terms_sha256: str
    """Of the bytes of the commit as `bare` has it: with the digest of all parameters, and the commit before."""
    moments_digest: str
    """Of the merged moments, as they are coded."""
    kept_digest: str
    """Of what the step made of the silo's part of the outer state."""
    update_squared: float
    """Squared norm of the outer step, of the silo's part."""
    gram: list[list[float]]
    """Scalar products of all silos' pseudo-gradients, of the silo's part."""


def manifest_path(silo: str, version: int) -> str:
    """A silo's manifest in a ledger."""
    return f"{delivery_path(silo, version)}/manifest.json"


def outcome_path(silo: str, version: int) -> str:
    """A silo's outcome in a ledger."""
    return f"{delivery_path(silo, version)}/outcome.json"


def record_paths(roster: Sequence[str], version: int) -> list[str]:
    """All that lies in a ledger beside a commit; of version 0 nothing, as it follows from the contract."""
    return [path(silo, version) for silo in roster for path in (manifest_path, outcome_path)] if version else []


def bare(commit: Commit) -> Commit:
    """A commit as a silo knows it by itself: without what all outcomes together say, and how the payload is written."""
    told = {name: value for name, value in commit.metrics.items() if name not in SETTLED}
    return dataclasses.replace(commit, payloads=[], outer_digest="", metrics=told)


def moments_digest(moments: Mapping[str, Parts]) -> str:
    """Digest of merged moments."""
    return digest_tensors((f"{name}/{part}", t) for name, of in moments.items() for part, t in of.items())


def read_outcome(
    data: bytes, *, silo: str, version: int, contract_sha256: str, num_silos: int, members: Members
) -> Outcome:
    """What a silo says of a version. Raises RefusedError unless it is that, signed by the silo."""
    outcome = Outcome.from_bytes(data)
    expected = {"silo": silo, "version": version, "contract_sha256": contract_sha256}
    for term, value in expected.items():
        if getattr(outcome, term) != value:
            raise RefusedError(f"its {term} is {getattr(outcome, term)!r}, not {value!r}")
    rows = [row for row in outcome.gram if type(row) is list and len(row) == num_silos]
    numbers = [number for row in rows for number in row if type(number) in (int, float)]
    if len(outcome.gram) != num_silos or len(numbers) != num_silos**2:
        raise RefusedError(f"its gram is not {num_silos} rows of {num_silos} numbers")
    members.check(silo, outcome)
    return outcome


def settled(terms: Commit, outcomes: Sequence[Outcome]) -> Commit:
    """A bare commit with what all silos, in the order of the roster, say together. Raises RefusedError."""
    squared = sum(outcome.update_squared for outcome in outcomes)
    gram = torch.tensor([outcome.gram for outcome in outcomes], dtype=torch.float64).sum(0)
    cosine = mean_cosine(unit_sum_squared(gram), len(outcomes))
    if not (math.isfinite(squared) and squared >= 0 and math.isfinite(cosine)):
        raise RefusedError(f"what the silos say of version {terms.version} makes no finite norm or cosine")
    return dataclasses.replace(
        terms,
        outer_digest=sha256_bytes(json.dumps([outcome.kept_digest for outcome in outcomes]).encode()),
        metrics=terms.metrics | dict(zip(SETTLED, (squared**0.5, cosine), strict=True)),
    )


def check_commit(commit: Commit, records: Mapping[str, bytes], config: RunConfig, members: Members) -> list[Outcome]:
    """The outcomes behind a commit; raises RefusedError unless it is what all silos' records say, and they signed them.

    Its deliveries are the roster's, with the weights of the contract; its payload's hash is left to the next commit.
    """
    roster, version = config.full_roster, commit.version
    if [(one.silo, one.version) for one in commit.contributors] != [(silo, version) for silo in roster]:
        raise RefusedError("its contributors are not the roster's silos, each for this version")
    manifests: list[Manifest] = []
    for one in commit.contributors:
        with _naming(name := manifest_path(one.silo, version)):
            data = _record(records, name)
            manifest = Manifest.from_bytes(data)
            base_digest = (manifests or [manifest])[0].base_digest
            read_delivery(
                data,
                silo=one.silo,
                version=version,
                base_digest=base_digest,
                config=config,
                contract_sha256=commit.contract_sha256,
            )
            members.check(one.silo, manifest)
            if contributor(manifest, data, one.weight) != one:
                raise RefusedError("the commit says something else of it")
            manifests.append(manifest)
    weights, said = shares(config.outer, manifests)[0], [one.weight for one in commit.contributors]
    if weights != said or commit.divisor != sum(said):
        raise RefusedError(f"its weights are {said}, and its divisor {commit.divisor}; by the contract: {weights}")
    told = losses(manifests, version) if config.outer.quality_floor is not None else {}
    if bare(commit).metrics != told:
        raise RefusedError(f"the losses in it are {bare(commit).metrics}; by the manifests: {told}")
    outcomes: list[Outcome] = []
    for silo in roster:
        with _naming(name := outcome_path(silo, version)):
            outcome = read_outcome(
                _record(records, name),
                silo=silo,
                version=version,
                contract_sha256=commit.contract_sha256,
                num_silos=len(roster),
                members=members,
            )
            if outcome.terms_sha256 != sha256_bytes(bare(commit).to_bytes()):
                raise RefusedError("it is of another commit than the one here")
            outcomes.append(outcome)
    _check_settled(commit, outcomes)
    return outcomes


def _check_settled(commit: Commit, outcomes: Sequence[Outcome]) -> None:
    expected = settled(bare(commit), outcomes)
    if commit.outer_digest != expected.outer_digest or commit.metrics.keys() != expected.metrics.keys():
        raise RefusedError("its outer_digest or metrics are not what its silos' outcomes make")
    for name, value in expected.metrics.items():  # sums in another order on another machine
        if not math.isclose(commit.metrics[name], value, rel_tol=1e-9, abs_tol=1e-12):
            raise RefusedError(f"its {name} is {commit.metrics[name]}; its silos' outcomes make {value}")


def _record(records: Mapping[str, bytes], name: str) -> bytes:
    if name not in records:
        raise RefusedError("it is missing")
    return records[name]


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except RefusedError as error:
        raise RefusedError(f"{name}: {error}") from None
