"""Every object of a store beside the chain and what it names: whose it is, and that it belongs where it lies.

What a run passes over is named here: what is not signed, or not by whose it is, what was signed for another place or
run, and what has a name that no object of a run has.
"""

import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange import words
from pretrain.exchange.amended import Amendments, Proposal
from pretrain.exchange.records import checked
from pretrain.exchange.revocation import read_signed
from pretrain.exchange.rollback import Rollback
from pretrain.exchange.store import REQUESTS_AT_ONCE, ROLLBACKS, StoreExchange
from pretrain.exchange.sums import FOLDER as SUMS
from pretrain.exchange.words import WORD_BYTES, Word
from pretrain.federation.preflight import PROBE
from pretrain.host.foreign import shown
from pretrain.outer.threads import in_threads
from pretrain.trust.contract import amend_rule
from pretrain.trust.keys import verify
from pretrain.trust.ledger import GroupKey, Manifest, RefusedError, Snapshot, sha256_bytes
from pretrain.trust.members import Members
from pretrain.trust.sums import Answer, Shares, Survivors

SILO, N = r"silos/(?P<silo>[^/]+)", rf"(?P<n>{words.NUMBER.pattern})"
REFUSED = r"refused-(?:0|[1-9][0-9]{0,3})\.json"
# Words are their silo's, where the name has one, else the operator's; so is a refusal.
WORDS: tuple[tuple[str, type[Word]], ...] = (
    (rf"{SILO}/identity\.json", words.Identity),
    (rf"{SILO}/membership/{N}\.json", words.Membership),
    (rf"{SILO}/beats/{N}", words.Beat),
    (rf"{SILO}/evaluations/{N}\.json", words.Evaluation),
    (rf"{SILO}/{N}/judged\.json", words.Evaluation),
    (rf"global/{N}/judged\.json", words.Evaluation),
    (rf"global/{N}/gate\.json", words.Decision),
    (rf"{SILO}/resumable/{N}", words.Resumable),
    (rf"{SILO}/{N}/{REFUSED}", words.Refusal),
    (rf"damaged/{N}/(?P<silo>[^/]+)", words.Damaged),
    (rf"waiting/{N}\.json", words.Waiting),
    (r"aggregator/[0-9]{6}\.json", words.Holder),
    (r"aggregator/(?P<term>[0-9]{6})\.(?:ended|beat-[0-9]{6,9})", words.TermSign),
    (rf"{ROLLBACKS}/{N}\.done", words.Done),
)
REVOCATION = rf"revocations/(?P<of>[^/]+)-(?P<first>{N})-(?P<last>[0-9]{{6,9}})/(?P<signer>[^/]+)\.json"
DEEPEST = 8  # of the folders in a store

Check = Callable[[str, re.Match[str]], None]


class ObjectsVerifier:
    """Of one store, whose chain was read."""

    def __init__(
        self,
        exchange: StoreExchange,
        config: RunConfig,
        contract: bytes,
        *,
        commits: Mapping[int, str | None],
        digests: Mapping[int, str],
        merged: Collection[tuple[str, int]],
    ) -> None:
        """`commits` has the sha256 of each version's, None where it is not as it should be; `digests` those of the
        parameters of all others; `merged` the deliveries that they name, which were checked.
        """
        self._exchange, self._objects, self._members = exchange, exchange.objects, exchange.members
        self._commits, self._digests, self._merged = commits, digests, merged
        self._tier, self._is_summed = config.trust.metrics["held_out"], config.outer.secure_sum
        of_terms = [terms.keys for terms in self._members.later]
        self._all_keys = [self._members.keys, *of_terms]
        self._silos = {*config.full_roster, *(name for keys in self._all_keys for name in keys)} - {OPERATOR}
        self.words: list[str] = []
        """Names of those that are as they should be."""
        self.past_words: list[str] = []
        """Of them, by a key that counts no more: what its member had said by then."""
        self._amendments: list[Proposal] | None = None
        """Those that follow the contract; None where that cannot be told."""
        self._not_amendments: dict[str, str] = {}
        self._read_amendments(contract)
        self._rollbacks: dict[int, Rollback] = {}
        folder = r"(?P<folder>[0-9]{6})"
        checks: list[tuple[str, Check]] = [
            (r"contract\.json|global/[0-9]{6,9}/commit\.json", lambda name, match: None),
            (rf"global/{N}/[a-z_]+-[0-9]{{3}}\.safetensors|{PROBE}[0-9a-f]+", lambda name, match: None),
            (rf"{SILO}/{N}/(?P=n)\.safetensors", self._check_silo),
            (rf"{SILO}/{N}/manifest\.json", self._check_manifest),
            *((pattern, self._check_word(kind)) for pattern, kind in WORDS),
            (rf"snapshots/{N}\.json", self._check_snapshot),
            (rf"{SILO}/{N}/shares\.json", self._check_summed(Shares)),
            (rf"{SILO}/{N}/answer\.json", self._check_summed(Answer)),
            (rf"{SUMS}/{N}\.json", self._check_summed(Survivors)),
            (r"signatures/(?P<member>[^/]+)\.json", self._check_signature),
            (r"keys/(?:(?P<epoch>[0-9]{6})/)?(?P<silo>[^/]+)\.json", self._check_group_key),
            (rf"amendments/{N}(?:\.json|\.accepted|/(?P<member>[^/]+)\.json)", self._check_amendment),
            (REVOCATION, self._check_revocation),
            (rf"{ROLLBACKS}/{N}\.json", self._check_rollback),
            (rf"rolled-back/{folder}/global/{N}/commit\.json", self._check_discarded),
            (rf"rolled-back/{folder}/{SILO}/{N}/manifest\.json", self._check_manifest),
            (rf"rolled-back/{folder}/(?P<name>{SILO}/{N}/{REFUSED})", self._check_word(words.Refusal)),
            (rf"rolled-back/{folder}/(?P<name>(?:{SILO}|global)/{N}/judged\.json)", self._check_word(words.Evaluation)),
            (rf"rolled-back/{folder}/(?P<name>global/{N}/gate\.json)", self._check_word(words.Decision)),
        ]
        self._checks = [(re.compile(pattern), check) for pattern, check in checks]

    def verify(self) -> list[tuple[str, str]]:
        """Name and fault of all that is not as it should be. Raises StoreTroubleError."""
        names = self._walk()
        for name in names:
            with suppress(RefusedError, FileNotFoundError):
                if name.startswith(f"{ROLLBACKS}/") and (number := words.number(name[10:], after=".json")) is not None:
                    self._rollbacks[number] = self._rollback(name)
        found = zip(names, in_threads(self._wrong, names, REQUESTS_AT_ONCE), strict=True)
        return [(name, shown(wrong, limit=1000)) for name, wrong in found if wrong]

    def _walk(self) -> list[str]:
        """The names of all objects, and of folders with nothing in them."""
        found, names = [], self._objects.names("")
        for _ in range(DEEPEST):
            folders = [name for name in names if "." not in name.rpartition("/")[2]]
            inside = dict(zip(folders, in_threads(self._objects.names, folders, REQUESTS_AT_ONCE), strict=True))
            found += [name for name in names if not inside.get(name)]
            names = [f"{folder}/{name}" for folder, inner in inside.items() for name in inner]
        return sorted(found + names)

    def _wrong(self, name: str) -> str:
        """What is wrong with an object; empty if nothing is, or it is gone by now, as beats are."""
        try:
            for pattern, check in self._checks:
                if match := pattern.fullmatch(name):
                    check(name, match)
                    return ""
            is_there = self._objects.read_if_there(name) is not None or self._objects.names(name)
        except FileNotFoundError:
            return ""
        except RefusedError as error:
            return str(error)
        return "no object of a run has this name" if is_there else ""

    def _silo(self, match: re.Match[str]) -> str:
        """The silo of a name. Raises RefusedError for what is none of this run."""
        if (silo := match["silo"]) not in self._silos:
            raise RefusedError(f"{shown(silo)} is no silo of this run")
        return silo

    def _check_silo(self, name: str, match: re.Match[str]) -> None:
        self._silo(match)

    # ---- words

    def _check_word(self, kind: type[Word]) -> Check:
        def check(name: str, match: re.Match[str]) -> None:
            found = match.groupdict()
            author = self._silo(match) if found.get("silo") else OPERATOR
            word = self._word(kind, name, found.get("name") or name, OPERATOR if kind is words.Refusal else author)
            if isinstance(word, words.TermSign):
                term = f"aggregator/{match['term']}.json"
                holder = words.Holder.from_bytes(self._objects.read(term, limit_bytes=WORD_BYTES))
                if word.nonce != holder.nonce:
                    raise RefusedError(f"it is not of the term of {term}")
            if isinstance(word, words.Evaluation):
                self._check_evaluation(word)

        return check

    def _check_evaluation(self, word: words.Evaluation) -> None:
        """Of a version that was taken back nobody knows the digest any more."""
        if self._tier == "member":
            raise RefusedError("trust.metrics in the contract keeps held_out with its silo")
        was_taken_back = any(r.to_version < (word.version or 0) <= r.from_version for r in self._rollbacks.values())
        is_of_it = word.version is None or word.parameters_digest == self._digests.get(word.version)
        if not (is_of_it or was_taken_back):
            raise RefusedError(f"it is of other parameters than those of version {word.version}")

    def _word(self, kind: type[Word], name: str, said_under: str, author: str) -> Word:
        data = self._objects.read(name, limit_bytes=WORD_BYTES)
        word = kind.from_bytes(data)
        if data != word.to_bytes():
            raise RefusedError("it is not in the one form that a word has")
        said = word.to_sign(self._exchange.contract_sha256, said_under)
        try:
            self._members.check_bytes(author, "word", said, word.signature)
        except RefusedError:
            if not self._by_a_past_key(author, "word", said, word.signature):
                raise
            self.past_words.append(name)
        self.words.append(name)
        return word

    def _by_a_past_key(self, author: str, kind: str, said: bytes, signature: str | None) -> bool:
        for key in (keys[author] for keys in self._all_keys if author in keys):
            with suppress(RefusedError):
                verify(key, kind, said, signature)
                return True
        return False

    # ---- records

    def _check_manifest(self, name: str, match: re.Match[str]) -> None:
        """Of a delivery that no commit names: late, refused by nobody yet, or discarded by a rollback."""
        silo, version, was_discarded = self._silo(match), int(match["n"]), "folder" in match.groupdict()
        if not was_discarded and (silo, version) in self._merged:
            return
        manifest, terms = Manifest.from_bytes(self._objects.read(name)), self._exchange.terms_sha256(version)
        known = {self._exchange.contract_sha256, *(one.sha256 for one in self._members.later)}
        if (manifest.silo, manifest.version) != (silo, version) or manifest.contract_sha256 not in known:
            contract = shown(manifest.contract_sha256, limit=12)
            raise RefusedError(
                f"it is of silo {shown(manifest.silo)}, version {manifest.version} of contract {contract}, put here"
            )
        if not was_discarded:
            if manifest.contract_sha256 != terms:
                raise RefusedError(f"it does not go by the terms of version {version}")
            self._members.check(silo, manifest, version=version)
        elif self._members.keys and not self._by_a_past_key(
            silo, "manifest", manifest.unsigned_bytes(), manifest.signature
        ):  # what held then may hold no more: amendments since may have come to hold earlier
            raise RefusedError(f"no key that {silo} ever had has signed it")

    def _check_snapshot(self, name: str, match: re.Match[str]) -> None:
        version = int(match["n"])
        if version not in self._commits:
            raise RefusedError(f"there is no commit {version}")
        if not self._commits[version]:
            return
        self._exchange.checked_record(
            Snapshot,
            name,
            OPERATOR,
            version=version,
            contract_sha256=self._exchange.terms_sha256(version),
            commit_sha256=self._commits[version],
        )

    def _check_summed(self, kind: type[Shares] | type[Answer] | type[Survivors]) -> Check:
        def check(name: str, match: re.Match[str]) -> None:
            if not self._is_summed:
                raise RefusedError("nothing is summed in this run")
            version = int(match["n"])
            of: dict[str, Any] = {"version": version, "contract_sha256": self._exchange.terms_sha256(version)}
            if kind is not Survivors:
                of["silo"] = self._silo(match)
            self._exchange.checked_record(kind, name, of.get("silo", OPERATOR), **of)

        return check

    def _check_signature(self, name: str, match: re.Match[str]) -> None:
        """Whether it is right is said of each member."""
        if match["member"] not in self._members.keys:
            raise RefusedError(f"{shown(match['member'])} is no member: the contract has no key of it")

    def _check_group_key(self, name: str, match: re.Match[str]) -> None:
        if not self._exchange.is_sealed:
            raise RefusedError("nothing is sealed in this run")
        epochs = {epoch.number: epoch for epoch in self._members.epochs()}
        if not (epoch := epochs.get(int(match["epoch"] or 0))):
            raise RefusedError(f"amendment {match['epoch']} has not changed the group's key")
        of = {"contract_sha256": epoch.sha256, "member": self._silo(match)}
        checked(self._objects, GroupKey, name, OPERATOR, Members(keys={**epoch.keys}), of=of)

    def _read_amendments(self, contract: bytes) -> None:
        def note(name: str, why: object) -> None:
            self._not_amendments[name] = str(why)

        if self._members.keys:
            rule, sha256 = amend_rule(contract), self._exchange.contract_sha256
            with suppress(RefusedError):  # one that was accepted and cannot hold: the run stops at it, and it is said
                first = Members(keys=self._members.keys)
                self._amendments = Amendments(first, rule, sha256, note).read(self._objects)
        else:
            self._amendments = []

    def _check_amendment(self, name: str, match: re.Match[str]) -> None:
        if name in self._not_amendments:
            raise RefusedError(self._not_amendments[name])
        if self._amendments is None:
            return
        if int(match["n"]) > len(self._amendments):
            raise RefusedError("it follows no amendment, and not the contract")
        proposal = self._amendments[int(match["n"]) - 1]
        new = proposal.amendment.new_key or ("", None)
        if (member := match["member"]) and member not in {*proposal.before.keys, new[0]}:
            raise RefusedError(f"{shown(member)} is no member: the contract has no key of it")

    def _check_revocation(self, name: str, match: re.Match[str]) -> None:
        span = int(match["first"]), int(match["last"])
        signed = read_signed(self._exchange, name.rpartition("/")[0], match["signer"], match["of"], span)
        if not signed.record:
            raise RefusedError(signed.wrong)
        self._check_known(signed.record.commit_sha256, span[1])

    def _check_known(self, commit_sha256: str, version: int) -> None:
        """Raise RefusedError unless that is a version's commit, or one that a rollback has discarded."""
        discarded = [sha256 for record in self._rollbacks.values() for sha256 in record.discarded]
        if commit_sha256 not in (self._commits.get(version), *discarded):
            raise RefusedError(f"it is of another commit {version}, {shown(commit_sha256[:12])}, than was ever here")

    # ---- rollbacks

    def _rollback(self, name: str) -> Rollback:
        record = Rollback.from_bytes(self._objects.read(name))
        self._members.check(OPERATOR, record, version=record.from_version)
        return record

    def _check_rollback(self, name: str, match: re.Match[str]) -> None:
        record, number = self._rollback(name), int(match["n"])
        before = self._objects.read_if_there(f"{ROLLBACKS}/{number - 1:06d}.json")
        if record.previous != (sha256_bytes(before) if before else None) or bool(before) != (number > 1):
            raise RefusedError("it does not follow the rollback before it")
        self._check_known(record.commit_sha256, record.to_version)

    def _check_discarded(self, name: str, match: re.Match[str]) -> None:
        record = self._rollbacks.get(int(match["folder"]))
        if not record or sha256_bytes(self._objects.read(name)) not in record.discarded:
            raise RefusedError(f"rollback {int(match['folder'])} has not discarded it")
