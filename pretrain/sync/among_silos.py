"""The exchange among the silos themselves, as one of them sees it: a coded all-reduce with the outer step inside.

A fragment is cut into one part a silo. Every silo sends each other one that one's part of its coded pseudo-gradient
(all-to-all), merges the parts that came for its own, takes the outer step of it, and sends its coded change to all
(all-gather): 2 (K - 1) / K coded fragments leave each of K silos, and each keeps a K-th of the outer optimizer's state.
The mathematics are the aggregator's, to the last bit.

Each silo writes the same ledger in its own run directory, beside training; what has come out is compared before
anybody adopts it. So a silo that resumes from an older checkpoint finds there what was merged meanwhile, and one that
died before it had the commit finds its part of the outer state there and the commit with the others. This is why:

- What step v made of our part of the outer state is written before we say what came out of v. All have to say so before
  anybody adopts v. So whoever holds v, in memory or on the disk, knows that nobody lacks the state behind it.
- Nobody speaks about v + 1 before its ledger has v. So ledgers are at most one version apart, and the commit that is
  missing in one is in another's, or in none: then no checkpoint has v either, and it is merged anew from deliveries
  that come out the same.
- No checkpoint of v is written before the ledger has v (`recorded`), nor one with v in flight before what we send for
  it is in the outbox.

The commit of v, whose payload is hashed as it is written, is compared as what v + 1 follows, and when silos meet.
"""

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import RunConfig
from pretrain.exchange.base import Outgoing, Received
from pretrain.exchange.channel import BrokenError, Credentials
from pretrain.exchange.collective import WORDS, Collective, reach_board
from pretrain.exchange.lane import Lane, PeerLostError
from pretrain.exchange.lanes import Lanes, carry
from pretrain.exchange.objects import StopWaitingError
from pretrain.exchange.payload import Held, Tensors
from pretrain.exchange.words import Evaluation
from pretrain.host.identity import own_identity
from pretrain.host.memory import give_back_memory
from pretrain.merge.outcome import Outcome, moments_digest
from pretrain.merge.step import Step, shares
from pretrain.merge.terms import LONGEST_NORM, check_norm, contributor, shared_moments
from pretrain.outer.blocks import Adopted, adopt, squared_norms
from pretrain.outer.digest import Row, digest_rows, tensor_rows
from pretrain.outer.moments import Moment, check_lengths, check_moments
from pretrain.outer.pieces import Piece
from pretrain.outer.quantize import Parts
from pretrain.outer.state import OuterTensors
from pretrain.sync.own_ledger import Kept, OwnLedger, all_pieces
from pretrain.sync.packing import check_parts, joined, length, num_bytes, pack, unpack, unpack_moments
from pretrain.sync.parley import Parley, swap_others
from pretrain.trust.contract import build_contract
from pretrain.trust.egress import to_peers
from pretrain.trust.ledger import Commit, Manifest, Payload, sha256_bytes
from pretrain.trust.members import Members, own_signer, public_keys
from pretrain.trust.quality import losses

LAST_SECONDS = 60.0  # for a silo that lacks the last version to come back
SETTLE_SECONDS = 3.0  # for the watch to find out who broke a connection, and why


class AmongSilos:
    """One silo's exchange with all others; see exchange/base.py for the verbs."""

    concurrent = False
    sends_files = False

    def __init__(self, config: RunConfig, silo: str, lanes: dist.ProcessGroup | None) -> None:
        """`lanes` has the silo's ranks that carry bytes, for that alone; None with one lane."""
        self._config, self._silo, self._lane_group = config, silo, lanes
        self._schedule, self._roster, self._index = config.schedule, config.full_roster, config.full_roster.index(silo)
        self._ledger, self._members = OwnLedger(config, silo), Members(keys=public_keys(config))
        settings = config.exchange
        self._collective = Collective(
            settings.url,
            self._roster,
            silo,
            self._credentials,
            dead_seconds=settings.dead_seconds,
            hung_seconds=settings.hung_seconds,
        )
        self._collective.leaves = self._tells = to_peers(config, silo)
        self._parley = Parley(config, silo, self._collective, self._ledger, self._members)
        self._lanes: Lanes | None = None
        self._carrier: threading.Thread | None = None
        self._passing = threading.Lock()
        self._lost = ""
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="ledger")  # writes, beside what needs no disk
        self._written: Future[None] = Future()  # of the newest version
        self._written.set_result(None)
        self._rows: dict[str, Row] = {}  # of the newest version
        self._kept: Kept = {}  # the outer state of our part of every fragment

    def terms_sha256(self, version: int) -> str:
        """sha256 of the contract, which nobody amends."""
        return self._ledger.contract_sha256

    @property
    def lost(self) -> str:
        """Which silo is gone, and how we know."""
        return self._lost or self._collective.lost

    @property
    def waiting_for(self) -> str:
        """The silos that have not come as far as we have."""
        return named([f"silo {silo}" for silo in self._collective.missing])

    # ---- coming and going

    def _credentials(self, lane: int = 0) -> Credentials:
        """What this process shows to other silos."""
        config = self._config
        self._members.signer = own_signer(config, self._silo)
        run = f"{config.name} {config.run_id}".strip()
        return Credentials(self._members, run=run, silo=self._silo, lane=lane)

    def join(self) -> None:
        """Wait for all silos; compare contracts and ledgers."""
        if not self._config.trust.keys:
            print("trust.keys: none given; whoever reaches the collective's ports may speak for all", flush=True)
        ours = build_contract(self._config)
        self._ledger.open(ours)
        with self._passing, self._naming_the_lost(), self._patience():
            directory = self._config.silo_directory(self._silo)
            self._collective.join(f"{own_identity(directory)}/{uuid.uuid4().hex}")
            first = self._parley.meet(ours, self._leaves)
            self._lanes = Lanes(first, self._config.exchange.num_lanes, self._lane_group)  # with the other ranks
            self._lanes.leaves = self._leaves
        self._rows, self._kept = self._ledger.load()
        give_back_memory()  # copies of the model that went through our hands

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """Where our ledger has all versions the others may have ended; one that lacks the last comes soon, or not."""
        if self._ledger.newest < self._schedule.num_versions:
            yield
            return
        seconds = max(LAST_SECONDS, 2 * self._config.exchange.dead_seconds)
        timer = threading.Timer(seconds, self._collective.give_up)
        timer.start()
        try:
            yield
        except StopWaitingError:
            print(f"all versions are here, and the other silos have not come in {seconds:.0f} s: done", flush=True)
        finally:
            timer.cancel()

    def assist(self, rank: int) -> None:
        """Carry a lane's bytes, beside training."""
        settings = self._config.exchange

        def make_lane() -> Lane:
            credentials, seconds, keeper = self._credentials(rank), settings.dead_seconds, self._roster[0]
            try:
                board = reach_board(credentials, settings.url, keeper, WORDS, seconds=seconds)
            except (OSError, BrokenError) as error:
                raise PeerLostError(
                    f"silo {keeper} is lost: lane {rank} does not reach {settings.url}: {error}"
                ) from None
            try:
                return Lane(board, credentials, settings.url, self._roster, dead_seconds=seconds)
            finally:
                board.close()

        if rank < settings.num_lanes:
            arguments = (make_lane, self._lane_group, len(self._roster))
            self._carrier = threading.Thread(target=carry, args=arguments, name="lane", daemon=True)
            self._carrier.start()

    def is_ours(self, version: int, commit_sha256: str) -> bool:
        """Our ledger lies beside the checkpoint, and is compared with the others' when we join."""
        return True

    def initial(self) -> Received:
        """Our own: everybody starts from the contract's parameters; who has lost all checkpoints, from the newest."""
        return self._ledger.initial()

    def tokens_total(self, version: int, *, above: int = 0) -> int:
        """Ask our ledger."""
        return self._ledger.tokens_total(version, above=above)

    def rollbacks(self) -> list[dict[str, Any]]:
        """Nobody can take a version back."""
        return []

    def moved(self) -> None:
        """The others may know."""
        self._collective.moved()

    def checkpointed(self, version: int) -> None:
        """For our ledger's pruning."""
        self._ledger.mark_resumable(version)

    def evaluated(self, evaluation: Evaluation, wrong: Callable[[], str]) -> None:
        """Nobody but us reads our ledger."""

    def close(self, reason: str) -> None:
        """Tell the others, and let go of the lanes."""
        if self._carrier:
            self._carrier.join()
            return
        if not reason and self._lanes:
            with suppress(PeerLostError), self._naming_the_lost():  # who has all leaves when all have
                self._collective.share("end", "")
            reason = self.lost
        self._collective.close(reason and f"silo {self._silo} {reason}" if reason != self.lost else reason)
        with self._passing:  # whoever passes bytes at this moment ends first
            if lanes := self._lanes or self._parley.lanes:
                lanes.close(len(self._roster))
            self._tells.close()
            self._beside.shutdown()

    # ---- one version

    def pieces(self, names: Sequence[str], base: Mapping[str, Tensor]) -> list[Piece]:
        """Every silo's part, cut into pieces of tensors."""
        return [piece for part in self._parts({name: base[name] for name in names}) for piece in part]

    def _parts(self, fragment: Mapping[str, Tensor]) -> list[list[Piece]]:
        return all_pieces(fragment, len(self._roster))

    def masked(self, *fragment: object) -> None:
        """Silos of a collective merge each other's parts."""

    def told(self, sent: Outgoing, base: object) -> Mapping[str, Parts]:
        """As they are coded."""
        return sent.coded.moments

    def sealed(self, payload: Payload, file: object, version: int) -> Payload:
        """No file travels."""
        return payload

    def deliver(self, sent: Outgoing) -> None:
        """Nothing leaves before all are there."""

    def receive(self, version: int, sent: Outgoing | None, base: Mapping[str, Tensor]) -> Received:
        """Merge a version with the others; one that is in our ledger already is taken from there."""
        self._written.result()  # nobody speaks of a version before its ledger has the one before
        if version <= self._ledger.newest:
            return self._ledger.received(version, base)
        assert sent  # nobody sits out a round of a collective
        with self._passing, self._naming_the_lost():
            return self._merge(version, sent.manifest, sent.coded, base)

    def recorded(self, commit: Commit) -> Commit:
        """Wait until our ledger has it."""
        self._written.result()
        return self._ledger.commit(commit.version)

    def _leaves(self, index: int, num_bytes: int) -> None:
        self._collective.leaves(self._roster[index], "lane", num_bytes)

    def _merge(self, version: int, manifest: Manifest, coded: Held | Tensors, base: Mapping[str, Tensor]) -> Received:
        assert version == self._ledger.newest + 1
        told, manifests = self._parley.deliver(manifest, digest_rows(self._rows[name] for name in base))

        uplink, downlink = self._config.outer.codec, self._config.outer.downlink_codec
        parts, others = self._parts(base), [silo != self._silo for silo in self._roster]
        mine = parts[self._index]
        own = [coded.parts(piece.key) for piece in mine]
        out = [pack([coded.parts(p.key) for p in part if other]) for part, other in zip(parts, others, strict=True)]
        arrived = self._swap(out, [num_bytes(uplink, mine)] * len(parts))
        told_moments, num_moment_bytes = self._swap_moments(coded.moments, base)
        values = {name: torch.empty_like(tensor) for name, tensor in base.items()}
        outer = OuterTensors(  # the step publishes our part where it belongs
            parameters={piece.key: piece.of(values[piece.name]).copy_(piece.of(base[piece.name])) for piece in mine},
            kept={kind: {piece.key: of[piece.key] for piece in mine} for kind, of in self._kept.items()},
        )
        weights, _ = shares(self._config.outer, [manifests[silo] for silo in self._roster])
        shapes = {name: value.shape for name, value in base.items()}
        step = Step(self._config, version, outer, weights=weights, told=told_moments, shapes=shapes, gram=True)
        changes = self._step(step, base, mine, self._unpacked(arrived, uplink, [mine] * len(parts), own), outer)
        sent, received = sum(map(length, out)), length(arrived)
        del arrived  # each of these is a fragment, or a silo's part of one
        keeping = self._beside.submit(self._ledger.keep, version, outer.kept)

        change = pack(changes)
        merged = self._swap([change] * len(parts), [num_bytes(downlink, part) for part in parts])
        coded_parts = self._unpacked(merged, downlink, parts, changes)
        values = self._apply(coded_parts, parts, base, values)
        whole_change = joined(parts, coded_parts) if downlink != "fp32" else None
        sent, received = sent + length(change) * sum(others), received + length(merged)
        del merged, change, changes, coded_parts
        rows = tensor_rows(values, torch.get_num_threads())
        contributors = [
            contributor(manifests[silo], told[silo], weight) for silo, weight in zip(self._roster, weights, strict=True)
        ]
        moments = step.merged_moments()
        digest, floor = digest_rows((self._rows | rows).values()), self._config.outer.quality_floor
        facts = losses([*manifests.values()], version) if floor is not None else {}
        terms = self._ledger.terms(version, digest, contributors, metrics=facts)
        outcome = self._outcome(terms, step, moments, kept_digest=keeping.result())
        terms, records = self._parley.settle(terms, outcome, told)
        self._rows |= rows
        fragment = self._schedule.fragment(version)
        self._written = self._beside.submit(
            self._ledger.write, terms, {fragment: values}, moments, records, change=whole_change
        )
        return Received(
            commit=terms,  # but for its payload's hash
            values=values,
            rows=rows,
            moments=moments,
            bytes_sent=sent + num_moment_bytes,
            bytes_received=received + num_moment_bytes,
        )

    def _outcome(self, terms: Commit, step: Step, moments: Mapping[str, Parts], *, kept_digest: str) -> Outcome:
        return Outcome(
            contract_sha256=terms.contract_sha256,
            silo=self._silo,
            version=terms.version,
            terms_sha256=sha256_bytes(terms.to_bytes()),
            moments_digest=moments_digest(moments),
            kept_digest=kept_digest,
            update_squared=step.update_squared,
            gram=step.gram.tolist(),
        )

    def _swap(self, out: Sequence[list[Tensor]], sizes: Sequence[int]) -> list[Tensor]:
        assert self._lanes
        return swap_others(self._lanes, self._index, out, sizes)

    def _unpacked(
        self, arrived: Sequence[Tensor], codec: str, pieces: Sequence[Sequence[Piece]], own: list[Parts]
    ) -> list[list[Parts]]:
        """What came from each silo, and `own`, as it is here."""
        return [
            own if index == self._index else unpack(data, codec, of_silo)
            for index, (data, of_silo) in enumerate(zip(arrived, pieces, strict=True))
        ]

    def _step(
        self,
        step: Step,
        base: Mapping[str, Tensor],
        mine: Sequence[Piece],
        arrived: Sequence[Sequence[Parts]],
        outer: OuterTensors,
    ) -> list[Parts]:
        """Take the step of our part; returns the coded changes of its pieces."""
        coded: dict[str, list[tuple[Parts, Tensor]]] = {piece.key: [] for piece in mine}
        for silo, of_silo in zip(self._roster, arrived, strict=True):
            for piece, parts in zip(mine, of_silo, strict=True):
                check_parts(silo, self._config.outer.codec, parts, piece)
                coded[piece.key].append((parts, outer.parameters[piece.key]))
        try:
            changes = step.take(mine, lambda piece: coded[piece.key], num_threads=torch.get_num_threads())
        except ValueError as error:
            self._check_norms(base, mine, arrived)  # one that is too long may be why
            raise ConfigError(str(error)) from None
        if not bool((step.gram.diagonal().sqrt() <= LONGEST_NORM).all()):  # of our whole part; a piece's is no longer
            self._check_norms(base, mine, arrived)
        return list(changes.values())

    def _check_norms(
        self, base: Mapping[str, Tensor], mine: Sequence[Piece], arrived: Sequence[Sequence[Parts]]
    ) -> None:
        """Raise PeerLostError if what a silo sent of a piece is absurdly long."""
        for silo, of_silo in zip(self._roster, arrived, strict=True):
            coded = [(parts, piece.of(base[piece.name])) for piece, parts in zip(mine, of_silo, strict=True)]
            for piece, squared in zip(mine, squared_norms(self._config.outer.codec, coded), strict=True):
                try:
                    check_norm(squared**0.5)
                except ValueError as error:
                    raise PeerLostError(f"silo {silo}: {piece.name}: {error}") from None

    def _moments(self, base: Mapping[str, Tensor]) -> dict[str, Moment]:
        return shared_moments(self._config, sorted(base), {name: value.shape for name, value in base.items()})

    def _swap_moments(self, own: Mapping[str, Parts], base: Mapping[str, Tensor]) -> tuple[list[dict[str, Parts]], int]:
        """Every silo's moments, which all merge whole, as they are small; and the bytes sent."""
        moments = self._moments(base)
        if not moments:
            return [{} for _ in self._roster], 0
        mine = pack([own[name] for name in moments])
        arrived = self._swap([mine] * len(self._roster), [length(mine)] * len(self._roster))
        found = [unpack_moments(data, moments) if len(data) else dict(own) for data in arrived]
        for silo, told in zip(self._roster, found, strict=True):
            try:
                check_moments(told, moments)
                check_lengths(told, moments, clip_norm=self._config.inner.clip_norm)
            except ValueError as error:
                raise PeerLostError(f"silo {silo} sent what cannot be used: {error}") from None
        return found, length(mine) * (len(self._roster) - 1)

    def _apply(
        self,
        merged: Sequence[list[Parts]],
        parts: Sequence[list[Piece]],
        base: Mapping[str, Tensor],
        values: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """The fragment after the step: every other silo's coded change applied to its part; ours is there."""
        changes, codec = [], self._config.outer.downlink_codec
        for silo, of_silo, pieces in zip(self._roster, merged, parts, strict=True):
            if silo == self._silo:
                continue
            for piece, change in zip(pieces, of_silo, strict=True):
                check_parts(silo, codec, change, piece)
                published, new = piece.of(base[piece.name]), piece.of(values[piece.name])
                changes.append(Adopted(published=published, parts=change, new=new))
        adopt(codec, changes, torch.get_num_threads())
        return values

    @contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        """Note why we cannot go on; a broken connection may only follow from somebody else's end."""
        try:
            yield
        except PeerLostError as error:
            deadline = time.monotonic() + SETTLE_SECONDS
            while not self._collective.lost and time.monotonic() < deadline:
                time.sleep(0.1)
            self._lost = self._collective.lost or str(error)
            raise
