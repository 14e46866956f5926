"""A silo's side of the outer step: deliver pseudo-gradients, wait for commits, adopt the merged parameters.

What takes time runs beside training: one thread codes and delivers, others wait for what was merged and decode it. The
loop comes back for the result when the schedule says so.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.exchange.base import Exchange, Outgoing, Received
from pretrain.exchange.payload import Held, Tensors, save_tensors
from pretrain.exchange.words import Evaluation
from pretrain.host.journal import Journal
from pretrain.host.stopping import StopRequested
from pretrain.merge.terms import commit_record
from pretrain.outer.blocks import Change, NotSentError, code
from pretrain.outer.codec import FEEDBACK_DECAY, decoded
from pretrain.outer.digest import Row, digest_rows, tensor_rows
from pretrain.outer.pieces import Piece
from pretrain.outer.quantize import Parts
from pretrain.silo.checkpoint import HostTensors, Progress
from pretrain.silo.engine import Engine
from pretrain.silo.ranks import Ranks
from pretrain.sync.flight import Coded, Flight, done
from pretrain.sync.gradients import adopt_moments, read_moments
from pretrain.trust.ledger import Commit, Manifest, sha256_bytes
from pretrain.trust.quality import say_not_counted


class SiloSync:
    """What the silo's loop calls at a sync. Reading and writing the engine takes all ranks; the rest is the leader's.

    The leader's host memory holds one fp32 copy of the global parameters, with error feedback another of what was not
    sent, and one fragment for each version in flight.
    """

    def __init__(
        self,
        config: RunConfig,
        silo: str,
        ranks: Ranks,
        journal: Journal | None,
        exchange: Exchange,
        *,
        asked_to_stop: Callable[[], bool],
    ) -> None:
        self.silo, self.config, self.ranks, self.journal = silo, config, ranks, journal
        self.schedule = config.schedule
        self._exchange, self._asked_to_stop = exchange, asked_to_stop
        self._last_commit: Commit | None = None
        self._directory = config.silo_directory(silo)
        self._outbox = self._directory / "outbox"
        decay = config.outer.error_feedback
        self._decay = FEEDBACK_DECAY[config.outer.codec] if decay is None else decay
        self._fragments: list[list[str]] = []  # cut when the engine is known
        self._flights: dict[int, Flight] = {}
        self._coder = ThreadPoolExecutor(1, thread_name_prefix="code")
        num_receivers = self.schedule.num_fragments if exchange.concurrent else 1
        self._receivers = ThreadPoolExecutor(num_receivers, thread_name_prefix="receive")
        self._rows: dict[str, Row] = {}  # of the digest, one a parameter
        self.global_parameters: dict[str, Tensor] = {}  # the leader's fp32 copy, host memory
        self.residuals: dict[str, Tensor] = {}  # error feedback: what was not sent yet
        self._text_tokens = 0  # of the silo's text, as `join` was told: what epochs are counted in

    @property
    def host_tensors(self) -> HostTensors:
        """What of the leader's memory a checkpoint must hold."""
        return {"global": self.global_parameters, "residual": self.residuals}

    @property
    def digest(self) -> str:
        """Of the leader's copy of the global parameters, as a commit has it."""
        return digest_rows(self._rows.values())

    def asked_to_stop(self) -> bool:
        """Whether this rank knows a reason to stop; the main loop asks as it goes on."""
        if self.ranks.is_leader:
            self._exchange.moved()
        return self._asked_to_stop() or (self.ranks.is_leader and bool(self._exchange.lost))

    @property
    def lost(self) -> str:
        """Which other silo is gone, if that is why we stop."""
        return self._exchange.lost if self.ranks.is_leader else ""

    def close(self, reason: str = "") -> None:
        """End the threads; what was delivered stays delivered. `reason`: why, in the past tense, unless all is done."""
        self._exchange.close(self.lost or reason)
        for pool in (self._coder, self._receivers):
            pool.shutdown(cancel_futures=True)

    # ---- before the first round

    def join(self, text_tokens: int = 0) -> str:
        """Wait for the contract, compare it with our configuration, take our name; returns the contract's sha256."""
        self._text_tokens = text_tokens
        joined = self._receivers.submit(self._exchange.join) if self.ranks.is_leader else None
        self._poll(joined, "the contract", Progress())
        if joined:
            joined.result()
        if self.journal:
            for record in self._exchange.rollbacks():
                self.journal.record("rollback", **record)
        contract_sha256 = self.ranks.from_leader(self._exchange.terms_sha256(0) if self.ranks.is_leader else None)
        if not self.ranks.is_leader:
            self._exchange.assist(self.ranks.rank)
        return contract_sha256

    def is_ours(self, version: int, commit_sha256: str) -> bool:
        """Whether a checkpoint with this version can go on; not if the run was rolled back since.

        Raises ConfigError if it is of another history: an older copy of the store or of the run directory.
        """
        ours = self._exchange.is_ours(version, commit_sha256)
        if not ours:
            print(f"the run was rolled back: the checkpoint with version {version} is dropped", flush=True)
        return ours

    def start(self, engine: Engine, progress: Progress) -> None:
        """Wait for version 0 and take it over, all fragments; or a later one, and what the ledger says of our text.

        Raises ConfigError where a later one cannot be started from.
        """
        initial = self._receivers.submit(self._initial) if self.ranks.is_leader else None
        self._poll(initial, "version 0", progress)
        if initial:
            received, progress.position = initial.result()
            if {name: value.shape for name, value in received.values.items()} != engine.shapes:
                raise ConfigError(
                    f"silo {self.silo}: version 0 has other parameters than this model; "
                    "do all parties have the same version of transformers?"
                )
            self._take_over(received)
            self._check_digest(progress, received.commit)
            progress.version = received.commit.version
        progress.version, progress.position = self.ranks.from_leader((progress.version, progress.position))
        self._write(engine, list(engine.shapes), self.global_parameters)
        self._go_on_from(progress, progress.version)
        progress.round = progress.step // self.schedule.sync_interval_steps

    def _initial(self) -> tuple[Received, int]:
        """What a silo without checkpoint starts from, and our position there. Raises ConfigError if it cannot."""
        received, outer = self._exchange.initial(), self.config.outer
        version = received.commit.version
        if version and not self.config.membership.is_elastic and (outer.num_fragments > 1 or outer.overlap_steps):
            raise ConfigError(
                f"silo {self.silo}: no checkpoint here, and the run is at version {version}; with fragments in turn or "
                "overlap, and no quorum, a silo goes on from a checkpoint only: restore one; a rollback may go only as "
                "far back as silo.keep_checkpoints reach"
            )
        return received, self._position(version)

    def _position(self, version: int, *, above: int = 0) -> int:
        """Sequences that we had consumed for what the commits after `above`, up to a version, hold of ours; else 0."""
        return self._exchange.tokens_total(version, above=above) // self.config.sequence_tokens

    def resume(self, engine: Engine, progress: Progress) -> None:
        """After a checkpoint was loaded: wait again for what was in flight when it was written."""
        if not self.ranks.is_leader:
            return
        self._rows = tensor_rows(self.global_parameters, torch.get_num_threads())
        for version in range(progress.version + 1, progress.sent + 1):
            self._take_off(version, self._names(engine, version), done(self._outgoing(version)))

    # ---- one sync

    def deliver(self, engine: Engine, progress: Progress, version: int) -> None:
        """Copy a fragment's local parameters to the host; coding and delivering them goes on beside training.

        A silo that has not trained the fragment since it was sent before, as it has just come, delivers nothing.
        """
        began, names = time.monotonic(), self._names(engine, version)
        fragment = self.schedule.fragment(version)
        num_sequences = progress.sequences_since(fragment)
        local = self._read(engine, names) if num_sequences else {}
        num_steps = num_sequences // self.config.silos[self.silo].global_batch_sequences
        is_leader, moments = self.ranks.is_leader, {}
        if num_sequences:
            moments = read_moments(self.config, self.silo, engine, names, num_steps, is_leader=is_leader)
        seconds = time.monotonic() - began
        if is_leader:
            coded = done(None)
            if num_sequences:
                now = dataclasses.replace(progress)
                self._coder.submit(engine.copies.arrival())  # it has one thread, so what follows comes after
                coded = self._coder.submit(self._code, version, local, moments, now)
                progress.unsettled.append(version)
            self._take_off(version, names, coded, wait_seconds=seconds)
        others = range(self.schedule.num_fragments) if self.schedule.in_turns else ()  # they have rested
        progress.was_sent({fragment, *others})
        progress.seconds_waiting += seconds
        progress.sent = version

    def _read(self, engine: Engine, names: Sequence[str]) -> dict[str, Tensor]:
        """Parameters as they are in the engine, in the leader's host memory when the copies are there; else empty."""
        found = {}
        for name in names:
            value = engine.read(name)
            if self.ranks.is_leader:
                found[name] = engine.copies.make(value)
            del value  # before the next one is gathered
        return found

    def _names(self, engine: Engine, version: int) -> list[str]:
        if not self._fragments:
            sizes = {name: shape.numel() for name, shape in engine.shapes.items()}
            self._fragments = self.config.cut(sizes)
        return self._fragments[self.schedule.fragment(version)]

    def _take_off(self, version: int, names: Sequence[str], coded: Coded, *, wait_seconds: float = 0.0) -> None:
        base = {name: self.global_parameters[name] for name in names}

        def receive() -> Received:
            sent = coded.result()
            if sent:
                self._exchange.deliver(sent)
            told = self._exchange.told(sent, base) if sent and self.config.outer.control_variates else {}
            return dataclasses.replace(self._exchange.receive(version, sent, base), told=told)

        received = self._receivers.submit(receive)
        self._flights[version] = Flight(wait_seconds=wait_seconds, coded=coded, received=received)

    def _outgoing(self, version: int) -> Outgoing | None:
        """What lies in the outbox for a version."""
        file = self._outbox / f"{version:06d}.safetensors"
        manifest = file.with_suffix(".json")
        return Outgoing(Manifest.from_bytes(manifest.read_bytes()), file) if manifest.is_file() else None

    def _code(
        self,
        version: int,
        local: dict[str, Tensor],
        moments: dict[str, Parts],
        progress: Progress,
    ) -> Outgoing:
        """Code a fragment against the global parameters; what travels as a file is written to the outbox."""
        outer, pieces = self.config.outer, self._exchange.pieces(list(local), self.global_parameters)
        base_digest = digest_rows(self._rows[name] for name in local)
        try:
            changes = [self._change(piece, local[piece.name]) for piece in pieces]
            sent = code(outer.codec, changes, self._decay, torch.get_num_threads())
        except NotSentError as error:
            number, reason = error.args
            name = pieces[number].name
            raise ConfigError(f"silo {self.silo}: version {version}: {name}: {reason}; nothing was sent") from None
        fragment, held = self.schedule.fragment(version), None
        tokens = progress.tokens_since(fragment, self.config.sequence_tokens)
        coded = {piece.key: parts for piece, (parts, _) in zip(pieces, sent, strict=True)}
        if masked := self._exchange.masked(version, self.global_parameters, local, moments, tokens):
            coded, moments = masked
        norm_squared = math.fsum(squared for _, squared in sent)
        file = self._outbox / f"{version:06d}.safetensors"
        if self._exchange.sends_files:
            payload = save_tensors(coded, file, fragment=fragment, moments=moments)
            payload = self._exchange.sealed(payload, file, version)
        else:
            held = Held(coded, moments)
            payload = held.describe(file, fragment)
        speed = {"seconds_per_step": progress.seconds_per_step} if self.config.membership.steps == "speed" else {}
        tokens_total = progress.position * self.config.sequence_tokens
        spent = progress.spent | ({"epochs": tokens_total / self._text_tokens} if self._text_tokens else {})
        manifest = Manifest(
            contract_sha256=self._exchange.terms_sha256(version),
            silo=self.silo,
            version=version,
            base_version=self.schedule.base(version),
            base_digest=base_digest,
            cosigned=progress.commit_sha256 if self.config.exchange.kind == "store" else "",
            codec=outer.sent_codec,
            payloads=[payload],
            tokens=tokens,
            steps=progress.sequences_since(fragment) // self.config.silos[self.silo].global_batch_sequences,
            tokens_total=tokens_total,
            metrics={"loss": progress.loss, "pseudo_gradient_norm": math.sqrt(norm_squared)} | speed | spent,
        )
        outgoing = Outgoing(manifest, file, held)
        if not held:
            outgoing.write()
        return outgoing

    def _change(self, piece: Piece, local: Tensor) -> Change:
        whole, residual = self.global_parameters[piece.name], None
        if self._decay:
            if piece.name not in self.residuals:
                self.residuals[piece.name] = torch.zeros_like(whole)
            residual = piece.of(self.residuals[piece.name])
        return Change(base=piece.of(whole), value=piece.of(local), residual=residual)

    def wait(self, progress: Progress, version: int) -> None:
        """Wait until a version has come. Raises StopRequested on all ranks, and what went wrong beside training."""
        flight = self._flights.get(version)
        began = time.monotonic()
        self._poll(flight.received if flight else None, f"version {version}", progress)
        seconds = time.monotonic() - began
        progress.seconds_waiting += seconds
        if flight:
            flight.wait_seconds += seconds

    def settle(self, progress: Progress) -> None:
        """Wait until a checkpoint can hold what is kept: all that was sent and is not adopted yet lies coded in the
        outbox, and what was adopted is on record.
        """
        for flight in self._flights.values():
            if (sent := flight.coded.result()) and sent.held:
                sent.write()
        if self._last_commit:
            self._last_commit = self._exchange.recorded(self._last_commit)
            progress.commit_sha256 = sha256_bytes(self._last_commit.to_bytes())

    def adopt(self, engine: Engine, progress: Progress, version: int) -> None:
        """Take over a version: check it, apply it to the host copy and, mixed with what is local, to the engine.

        Afterwards the host copy has the bits that the commit's digest names, and so have, without mixing, the
        fragment's parameters in the engine.
        """
        began, mixing, names = time.monotonic(), self.config.outer.mixing, self._names(engine, version)
        if self.ranks.is_leader:
            received = self._flights[version].received.result()
            self._take_over(received)
            self._check_digest(progress, received.commit)
            self._settle(progress, received.commit, refused=received.refused)
        new = {name: self.global_parameters[name] for name in names} if self.ranks.is_leader else {}
        if mixing:
            local = self._read(engine, names)
            engine.copies.wait()
            new = {name: local[name] * mixing + merged * (1 - mixing) for name, merged in new.items()}
        self._write(engine, names, new)
        adopt_moments(self.config, engine, names, received if self.ranks.is_leader else None)
        seconds = time.monotonic() - began
        progress.seconds_waiting += seconds
        progress.version = version
        if self.ranks.is_leader:
            flight = self._flights.pop(version)
            flight.wait_seconds += seconds
            self._record(progress, flight, received)

    def _take_over(self, received: Received) -> None:
        """Put a version's changes into the host copy."""
        self.global_parameters |= received.values
        self._rows |= received.rows

    def _check_digest(self, progress: Progress, commit: Commit) -> None:
        """Raise ConfigError unless the host copy is what a commit says."""
        digest = digest_rows(self._rows.values())
        if digest != commit.parameters_digest:
            raise ConfigError(
                f"silo {self.silo}: version {commit.version} cannot be used: its parameters have digest {digest[:12]}, "
                f"not {commit.parameters_digest[:12]}"
            )
        self._last_commit, progress.commit_sha256 = commit, sha256_bytes(commit.to_bytes())

    def _write(self, engine: Engine, names: Sequence[str], values: dict[str, Tensor]) -> None:
        """Write parameters into the engine, the leader's values, and read them back."""
        engine.write(iter([(name, values[name]) for name in names]) if self.ranks.is_leader else None, names)
        for name in names:
            found = engine.read(name)
            if self.ranks.is_leader and not torch.equal(engine.copies.look(found), values[name]):
                raise RuntimeError(f"{name} in the engine differs from what was just written")
            del found

    @contextmanager
    def global_model(self, engine: Engine, *, has_trained: bool = False) -> Iterator[None]:
        """Within, the engine computes with the global parameters; afterwards it has its own back, to the last bit.

        `has_trained`: since the last sync.
        """
        is_whole = self.schedule.num_fragments == 1 and not self.schedule.overlap_steps and not self.config.outer.mixing
        if is_whole and not has_trained:
            yield  # it has them already: this was called after a sync of everything
            return
        names, file = list(engine.shapes), self._directory / "local.safetensors"
        local = self._read(engine, names)
        engine.copies.wait()
        if self.ranks.is_leader:  # on the disk meanwhile: an evaluation needs the memory itself
            save_file(local, file)
            local.clear()
        self._write(engine, names, self.global_parameters)
        yield
        self._write(engine, names, load_file(file) if self.ranks.is_leader else {})
        if self.ranks.is_leader:
            file.unlink()

    def _record(self, progress: Progress, flight: Flight, received: Received) -> None:
        assert self.journal
        commit, sent = received.commit, flight.coded.result()
        say_not_counted(commit)
        self.journal.record(
            "sync",
            step=progress.step,
            round=self.config.round_of(commit.version),
            version=commit.version,
            fragment=self.schedule.fragment(commit.version),
            bytes_sent=received.bytes_sent,
            bytes_received=received.bytes_received,
            wait_seconds=flight.wait_seconds,
            pseudo_gradient_norm=sent.manifest.metrics["pseudo_gradient_norm"] if sent else 0.0,
            **progress.seconds,
        )
        if self.config.exchange.kind == "collective" and self.silo == min(self.config.silos):
            self.journal.record("commit", **commit_record(self.config, commit))

    def checkpointed(self, progress: Progress) -> None:
        """Our newest checkpoint holds where we are: what was sent before is not needed again."""
        if self.ranks.is_leader:
            self._exchange.checkpointed(progress.version)
            for file in self._outbox.glob("*.*"):
                version = int(file.name.split(".")[0])
                if version <= progress.version and version not in progress.unsettled:
                    file.unlink()

    def evaluated(
        self, version: int, losses: dict[str, float], sequences: dict[str, list[int]], wrong: Callable[[], str]
    ) -> None:
        """As the leader, tell the others what the held-out loss of the global parameters is, and of how many sequences.

        Nothing is told before `wrong` says that nothing is wrong with the text; it may take its time.
        """
        counts = {name: float(found[0]) for name, found in sequences.items()}
        found = Evaluation(version=version, parameters_digest=self.digest, losses=losses, sequences=counts)
        self._exchange.evaluated(found, wrong)

    def _go_on_from(self, progress: Progress, newest: int) -> None:
        """Set the place in the schedule at which all silos adopt version `newest`."""
        progress.version, progress.step = newest, self.schedule.adopted(newest) if newest else 0
        progress.sent = max(progress.sent, self.schedule.newest_sent(progress.step))
        progress.was_sent(range(self.schedule.num_fragments))
        progress.joined_step = progress.step

    def _settle(self, progress: Progress, commit: Commit, *, refused: bool) -> None:
        """What a commit of a fragment, or the next one, does not have of what we sent goes back to the feedback.

        What was refused as absurd does not: the feedback of its fragment starts anew.
        """
        merged = {c.version for c in commit.contributors if c.silo == self.silo}
        for version in list(progress.unsettled):
            same_fragment = self.schedule.fragment(version) == self.schedule.fragment(commit.version)
            if version > commit.version or not same_fragment:
                continue
            if version not in merged and version == commit.version and self.config.membership.stale_weight:
                continue  # it may be in the next one
            progress.unsettled.remove(version)
            outgoing = self._outgoing(version)
            if version in merged or not self._decay or not outgoing:
                continue
            coded = Tensors(outgoing.file)
            for name in coded.names:
                residual = self.residuals[name]
                if refused:
                    residual.zero_()
                else:
                    residual += decoded(self.config.outer.codec, residual, coded.parts(name)).float()

    def _poll(self, future: "Future[Any] | None", what: str, progress: Progress) -> None:
        """Ask the leader, who has the future, again and again, so that a stop reaches all ranks while they wait."""
        said = ""
        while not self.ranks.from_leader(future is not None and future.done() and not self.lost):
            text = f"{what} from {self._exchange.waiting_for}" if self._exchange.waiting_for else what
            if self.journal and text != said:
                said, round = text, self.config.round_at(progress.step)
                self.journal.status("waiting", step=progress.step, round=round, waiting_for=text)
            if self.ranks.sum([float(self.asked_to_stop())])[0]:
                raise StopRequested
            if future:  # the other ranks wait for the leader's answer
                wait([future], timeout=self.config.exchange.poll_seconds)
