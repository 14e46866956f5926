"""What the silos of a collective say to each other, and sign: contract, ledgers, what each sends and what came out.

Words go over the board, which one silo keeps; so everybody says the hash of its own straight to all. What is signed
stays in every silo's ledger, beside the commit that came of it: so each can show to others what all of them have said.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import RunConfig
from pretrain.exchange.collective import Collective
from pretrain.exchange.lane import Lane, PeerLostError
from pretrain.exchange.lanes import Lanes
from pretrain.merge.outcome import Outcome, check_commit, manifest_path, outcome_path, read_outcome, settled
from pretrain.merge.terms import read_delivery
from pretrain.sync.own_ledger import OwnLedger
from pretrain.sync.packing import as_bytes, heard
from pretrain.trust.contract import check_same_contract, first_contract, other_software
from pretrain.trust.ledger import Agreement, Commit, Manifest, RefusedError, check_link, sha256_bytes
from pretrain.trust.members import Members
from pretrain.trust.policy import read_policy


class Parley:
    """One silo's place in it. All silos call the same, in the same order."""

    def __init__(
        self, config: RunConfig, silo: str, collective: Collective, ledger: OwnLedger, members: Members
    ) -> None:
        self._config, self._silo, self._roster = config, silo, config.full_roster
        self._collective, self._ledger, self._members = collective, ledger, members
        self.lanes: Lanes | None = None
        """From leader to leader, without other ranks."""

    # ---- meeting

    def meet(self, ours: dict[str, Any], leaves: Callable[[int, int], None]) -> Lane:
        """Compare contracts and ledgers with all others; returns the first lane. `leaves` is told what goes to whom.

        Raises ConfigError for another contract, and for ledgers that do not go together; PeerLostError.
        """
        agreed = self._members.sign(Agreement(contract_sha256=self._ledger.contract_sha256, member=self._silo))
        facts = {"contract": first_contract(ours).decode(), "newest": self._ledger.newest}
        shared = self._collective.share("facts", json.dumps(facts | {"agreed": agreed.to_bytes().decode()}))
        kinds = {"agreed": str, "contract": str, "newest": int}
        told = {silo: heard(silo, words, kinds) for silo, words in shared.items()}
        contract, where = told[self._roster[0]]["contract"].encode(), self._config.exchange.url
        check_same_contract(ours, contract, where)
        for line in other_software(contract, where):
            print(line, flush=True)
        for silo, of_silo in told.items():
            self._check_agreed(silo, of_silo["agreed"].encode())
        first = self._collective.first_lane()
        self.lanes = Lanes(first, 1, None)
        self.lanes.leaves = leaves
        self._confirm(shared)
        if self._members.keys:
            self._ledger.keep_agreements({silo: of_silo["agreed"].encode() for silo, of_silo in told.items()})
        self.catch_up({silo: of_silo["newest"] for silo, of_silo in told.items()})
        return first

    def _check_agreed(self, silo: str, said: bytes) -> None:
        """A silo has signed our contract. Raises PeerLostError."""
        try:
            agreed = Agreement.from_bytes(said)
            if (agreed.member, agreed.contract_sha256) != (silo, self._ledger.contract_sha256):
                raise RefusedError("it has agreed to another contract than this silo")
            self._members.check(silo, agreed)
        except RefusedError as error:
            raise PeerLostError(f"silo {silo}: {error}") from None

    def _share(self, what: str, words: str) -> dict[str, bytes]:
        """Every silo's words on `what`. Raises PeerLostError."""
        return self._confirm(self._collective.share(what, words))

    def _confirm(self, told: dict[str, bytes]) -> dict[str, bytes]:
        """Words that went over the board, which one silo keeps: everybody says the hash of its own straight to all."""
        hashes = [hashlib.sha256(told[silo]).digest() for silo in self._roster]
        own, sizes = as_bytes(hashes[self._roster.index(self._silo)]), [len(one) for one in hashes]
        arrived = self._swap([[own]] * len(hashes), sizes)
        for index, silo in enumerate(self._roster):
            if silo != self._silo and arrived[index].numpy().tobytes() != hashes[index]:
                raise PeerLostError(f"silo {self._roster[0]} passed on what silo {silo} has not said")
        return told

    def _swap(self, out: Sequence[list[Tensor]], sizes: Sequence[int]) -> list[Tensor]:
        assert self.lanes
        return swap_others(self.lanes, self._roster.index(self._silo), out, sizes)

    # ---- ledgers

    def catch_up(self, newest: Mapping[str, int]) -> None:
        """Give the newest version to those that died before they had written it; nobody can be further behind."""
        last = max(newest.values())
        ahead = [silo for silo in self._roster if newest[silo] == last]
        behind = [silo for silo in self._roster if newest[silo] < last]
        for silo in behind:
            if newest[silo] < last - 1:
                raise ConfigError(
                    f"silos: {silo!r} has version {newest[silo]} in its run directory where {ahead[0]!r} has {last}; "
                    "restore its run directory, or start all silos anew in others"
                )
        records, words = b"", ""
        if self._silo in ahead:
            records = self._packed(last)
            fact = {"commit": self._ledger.words(last), "records": sha256_bytes(records), "num_bytes": len(records)}
            words = json.dumps(fact)
        said = self._share("newest", words)
        for silo in ahead:
            if said[silo] != said[ahead[0]]:
                raise ConfigError(f"silos: {ahead[0]!r} and {silo!r} have different versions {last} in their ledgers")
        if behind:
            self._give(last, ahead[0], behind, said[ahead[0]], records)

    def _packed(self, version: int) -> bytes:
        """What all have signed of a version, in our ledger."""
        return json.dumps({name: data.decode() for name, data in self._ledger.records(version).items()}).encode()

    def _give(self, version: int, giver: str, behind: Sequence[str], said: bytes, records: bytes) -> None:
        """Pass a version of the giver's ledger on to those that lack it. Raises PeerLostError for what is none."""
        fact = heard(giver, said, {"commit": str, "records": str, "num_bytes": int})
        try:
            commit = Commit.from_bytes(fact["commit"].encode())
            (payload,) = commit.payloads
        except (RefusedError, ValueError) as error:
            raise PeerLostError(f"silo {giver}: its version {version}: {error}") from None
        gift = [as_bytes(self._ledger.payload(version)), as_bytes(records)] if self._silo == giver else []
        num_bytes = payload.num_bytes + fact["num_bytes"] if self._silo in behind else 0
        out = [gift if silo in behind else [] for silo in self._roster]
        arrived = self._swap(out, [num_bytes if silo == giver else 0 for silo in self._roster])
        if self._silo in behind:
            data = arrived[self._roster.index(giver)].numpy().tobytes()
            self._take(giver, commit, data[: payload.num_bytes], data[payload.num_bytes :], fact["records"])

    def _take(self, giver: str, commit: Commit, data: bytes, packed: bytes, sha256: str) -> None:
        """Write what another silo's ledger has, if all have signed it. Raises PeerLostError, ConfigError."""
        names = self._ledger.record_names(commit.version)
        given = heard(giver, packed, dict.fromkeys(names, str))
        records = {name: text.encode() for name, text in given.items()}
        try:
            if sha256_bytes(packed) != sha256:
                raise RefusedError("it gave other records than it said")
            before = self._ledger.words(commit.version - 1).encode()
            check_link(commit, self._ledger.newest + 1, before, self._ledger.contract_sha256)
            check_commit(commit, records, self._config, self._members)
        except RefusedError as error:
            raise PeerLostError(f"silo {giver}: its version {commit.version}: {error}") from None
        self._ledger.take(commit, data, records)

    # ---- one version

    def deliver(self, manifest: Manifest, base_digest: str) -> tuple[dict[str, bytes], dict[str, Manifest]]:
        """Sign and say what we send for a version; returns all silos' manifests, as bytes and read.

        Raises PeerLostError for one that is not as agreed, or not signed by its silo.
        """
        version, manifests = manifest.version, {}
        signed = self._members.sign(read_policy(self._config).leaving(manifest))
        told = self._share(f"{version}/manifest", signed.to_bytes().decode())
        for silo, words in told.items():
            try:
                manifests[silo] = read_delivery(
                    words,
                    silo=silo,
                    version=version,
                    base_digest=base_digest,
                    config=self._config,
                    contract_sha256=self._ledger.contract_sha256,
                )
                self._members.check(silo, manifests[silo])
            except RefusedError as error:
                raise PeerLostError(f"silo {silo}: its part of version {version}: {error}") from None
        for what in ("manifest", "outcome"):
            self._collective.forget(f"{version - 1}/{what}")  # all have come here, so they have heard it
        return told, manifests

    def settle(self, terms: Commit, ours: Outcome, manifests: Mapping[str, bytes]) -> tuple[Commit, dict[str, bytes]]:
        """Sign and say what came out of a version here, and compare it with what all others have.

        Returns its commit, but for the payload, and what all have signed, by its name in a ledger. Our part of the
        outer state is written by now: whoever adopts the version relies on it. Raises PeerLostError.
        """
        version = terms.version
        told = self._share(f"{version}/outcome", self._members.sign(ours).to_bytes().decode())
        said: list[Outcome] = []
        for silo, words in told.items():
            try:
                said.append(
                    read_outcome(
                        words,
                        silo=silo,
                        version=version,
                        contract_sha256=self._ledger.contract_sha256,
                        num_silos=len(self._roster),
                        members=self._members,
                    )
                )
            except RefusedError as error:
                raise PeerLostError(f"silo {silo}: what came out of version {version} there: {error}") from None
        found = [(outcome.terms_sha256, outcome.moments_digest) for outcome in said]
        usual, number = Counter(found).most_common(1)[0]
        if number < len(said):
            odd = [o.silo for o, own in zip(said, found, strict=True) if own != usual or 2 * number <= len(said)]
            raise PeerLostError(
                f"silo {named(odd)}: another version {version} than the other silos' came out of the same "
                "deliveries; the version is not written"
            )
        try:
            commit = settled(terms, said)
        except RefusedError as error:
            raise PeerLostError(str(error)) from None
        records = {manifest_path(silo, version): data for silo, data in manifests.items()}
        return commit, records | {outcome_path(silo, version): data for silo, data in told.items()}


def swap_others(lanes: Lanes, index: int, out: Sequence[list[Tensor]], sizes: Sequence[int]) -> list[Tensor]:
    """Pass bytes to all others on lanes, and take theirs; nothing to the silo at `index`, which is us."""
    return lanes.swap(
        [[] if number == index else parts for number, parts in enumerate(out)],
        [0 if number == index else size for number, size in enumerate(sizes)],
    )
