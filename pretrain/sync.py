"""A silo's side of the outer step: deliver pseudo-gradients, wait for commits, adopt the merged parameters.

What takes time runs beside training: one thread for each version in flight codes and delivers a fragment, then waits
for its commit and downloads it. The loop comes back for the result when the schedule says so.
"""

import json
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.config import ConfigError, RunConfig
from pretrain.exchange.store import StoreExchange, file_payload, version_path
from pretrain.journal import Journal
from pretrain.outer.codec import FEEDBACK_DECAY, apply_change, check, encode
from pretrain.outer.digest import Row, digest_rows, tensor_row
from pretrain.outer.fragments import cut_fragments
from pretrain.payload import Tensors, save_tensors
from pretrain.silo.checkpoint import HostTensors, Progress
from pretrain.silo.engine import Engine
from pretrain.silo.ranks import Ranks
from pretrain.trust.contract import build_contract, check_same_contract
from pretrain.trust.ledger import Commit, Manifest, RefusedError

MAX_REFUSALS = 3


class StopRequested(Exception):
    """A rank was told to stop (SIGTERM, SIGINT); all ranks agreed."""


@dataclass(frozen=True, kw_only=True)
class Received:
    """A commit and its downloaded payloads, checked against its sha256."""

    commit: Commit
    files: list[Path]
    num_bytes: int


@dataclass(kw_only=True)
class Flight:
    """One version between its delivery and its adoption."""

    wait_seconds: float
    """Time that training stood still for it."""
    delivered: Future[tuple[Manifest, Path]]
    received: Future[Received]


class SiloSync:
    """What the silo's loop calls at a sync. Reading and writing the engine takes all ranks; the rest is the leader's.

    The leader's host memory holds one fp32 copy of the global parameters, with error feedback another of what was not
    sent, and one fragment for each version in flight.
    """

    def __init__(
        self, config: RunConfig, silo: str, ranks: Ranks, journal: Journal | None, asked_to_stop: Callable[[], bool]
    ) -> None:
        self.silo, self.config, self.ranks, self.journal = silo, config, ranks, journal
        self.schedule = config.schedule
        self._asked_to_stop = asked_to_stop
        self._exchange = StoreExchange(config.store_url)
        self._directory = config.silo_directory(silo)
        self._outbox, self._inbox = self._directory / "outbox", self._directory / "inbox"
        decay = config.outer.error_feedback
        self._decay = FEEDBACK_DECAY[config.outer.codec] if decay is None else decay
        self._fragments: list[list[str]] = []  # cut when the engine is known
        self._flights: dict[int, Flight] = {}
        self._pool = ThreadPoolExecutor(2 * self.schedule.num_fragments, thread_name_prefix="sync")
        self._closing = threading.Event()
        self._rows: dict[str, Row] = {}  # of the digest, one a parameter
        self.global_parameters: dict[str, Tensor] = {}  # the leader's fp32 copy, host memory
        self.residuals: dict[str, Tensor] = {}  # error feedback: what was not sent yet

    @property
    def host_tensors(self) -> HostTensors:
        """What of the leader's memory a checkpoint must hold."""
        return {"global": self.global_parameters, "residual": self.residuals}

    def close(self) -> None:
        """End the threads; what was delivered stays delivered."""
        self._closing.set()
        self._pool.shutdown(cancel_futures=True)

    # ---- before the first round

    def join(self) -> str:
        """Wait for the contract, compare it with our configuration, take our name; returns the contract's sha256."""
        self._poll(lambda: self._exchange.read_contract() is not None, "contract.json from the aggregator", Progress())
        if self.ranks.is_leader:
            stored = self._exchange.read_contract()
            assert stored is not None
            check_same_contract(build_contract(self.config), stored, self._exchange.objects.url)
            self._exchange.claim_name(self.silo, self._identity())
        return self.ranks.from_leader(self._exchange.contract_sha256)

    def _identity(self) -> str:
        """A name for this run directory, made once: it tells a restarted silo from another of the same name."""
        file = self._directory / "identity.json"
        if not file.exists():
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps({"identity": uuid.uuid4().hex}))
            temporary.replace(file)
        return json.loads(file.read_text())["identity"]

    def start(self, engine: Engine, progress: Progress) -> None:
        """Wait for version 0 and take it over, all fragments."""
        self._poll(lambda: self._exchange.newest_version() >= 0, "commit 0 from the aggregator", progress)
        if self.ranks.is_leader:
            received = self._download(0)
            for file in received.files:
                tensors = Tensors(file)
                self.global_parameters |= {name: tensors.parts(name)["values"].clone() for name in tensors.names}
            self._check_shapes(engine)
            self._check_digest(received.commit, list(self.global_parameters))
            self._remove(received.files)
        self._write(engine, list(engine.shapes), self.global_parameters)
        progress.version = progress.sent = 0

    def resume(self, progress: Progress) -> None:
        """After a checkpoint was loaded: wait again for what was in flight when it was written."""
        if not self.ranks.is_leader:
            return
        self._rows = {name: tensor_row(name, value) for name, value in self.global_parameters.items()}
        for version in range(progress.version + 1, progress.sent + 1):
            file = self._outbox / f"{version:06d}.safetensors"
            manifest = Manifest.from_bytes(file.with_suffix(".json").read_bytes())
            delivered: Future[tuple[Manifest, Path]] = Future()
            delivered.set_result((manifest, file))
            self._take_off(version, delivered)

    # ---- one sync

    def deliver(self, engine: Engine, progress: Progress, version: int) -> None:
        """Copy a fragment's local parameters to the host; coding and delivering them goes on beside training."""
        began, names = time.monotonic(), self._names(engine, version)
        local = self._read(engine, names)
        seconds = time.monotonic() - began
        if self.ranks.is_leader:
            facts = (progress.position * self.config.sequence_tokens, progress.loss)
            self._take_off(version, self._pool.submit(self._send, version, local, *facts), seconds)
        progress.seconds_waiting += seconds
        progress.sent = version

    def _read(self, engine: Engine, names: Sequence[str]) -> dict[str, Tensor]:
        """Parameters as they are in the engine, in the leader's host memory; empty on the other ranks."""
        found = {}
        for name in names:
            value = engine.read(name)
            if self.ranks.is_leader:
                found[name] = value.to("cpu", copy=True)
        return found

    def _names(self, engine: Engine, version: int) -> list[str]:
        if not self._fragments:
            sizes = {name: shape.numel() for name, shape in engine.shapes.items()}
            self._fragments = cut_fragments(sizes, self.schedule.num_fragments)
        return self._fragments[self.schedule.fragment(version)]

    def _take_off(self, version: int, delivered: "Future[tuple[Manifest, Path]]", wait_seconds: float = 0.0) -> None:
        received = self._pool.submit(self._receive, version, delivered)
        self._flights[version] = Flight(wait_seconds=wait_seconds, delivered=delivered, received=received)

    def _send(self, version: int, local: dict[str, Tensor], tokens_total: int, loss: float) -> tuple[Manifest, Path]:
        """Code a fragment against the global parameters, write it to the outbox, deliver it."""
        coded, norm_squared, outer = {}, 0.0, self.config.outer
        base_digest = digest_rows(self._rows[name] for name in local)
        for name, value in local.items():
            base = self.global_parameters[name]
            norm_squared += torch.linalg.vector_norm(base - value, dtype=torch.float64).item() ** 2
            residual = self.residuals.setdefault(name, torch.zeros_like(base)) if self._decay else None
            try:
                coded[name] = encode(outer.codec, base, value, residual=residual, decay=self._decay)
            except ValueError as error:
                raise ConfigError(f"silo {self.silo}: version {version}: {name}: {error}; nothing was sent") from None
        file = self._outbox / f"{version:06d}.safetensors"
        save_tensors(coded, file)
        manifest = Manifest(
            contract_sha256=self._exchange.contract_sha256,
            silo=self.silo,
            version=version,
            base_version=self.schedule.base(version),
            base_digest=base_digest,
            codec=outer.codec,
            payloads=[file_payload(file, self.schedule.fragment(version))],
            tokens=self.schedule.steps(version) * self._step_tokens,
            steps=self.schedule.steps(version),
            tokens_total=tokens_total,
            metrics={"loss": loss, "pseudo_gradient_norm": math.sqrt(norm_squared)},
        )
        file.with_suffix(".json").write_bytes(manifest.to_bytes())
        if self._deliver(manifest, file) != manifest.to_bytes():
            print(
                f"version {version}: this pseudo-gradient differs from the one delivered before the restart (kernels "
                "that are not deterministic); the delivered one stands",
                flush=True,
            )
        return manifest, file

    @property
    def _step_tokens(self) -> int:
        return self.config.silos[self.silo].global_batch_sequences * self.config.sequence_tokens

    def _deliver(self, manifest: Manifest, file: Path) -> bytes:
        return self._exchange.deliver(manifest, [(payload, file) for payload in manifest.payloads])

    def _receive(self, version: int, delivered: "Future[tuple[Manifest, Path]]") -> Received:
        """Wait until the commit is there, delivering again what the aggregator refused; download its payloads.

        Raises ConfigError after MAX_REFUSALS refusals.
        """
        manifest, file = delivered.result()
        num_refused = len(self._exchange.refusals(self.silo, version))
        missed_before = False
        while self._exchange.newest_version(version - 1) < version:
            if self._exchange.delivery(self.silo, version) is None:
                refusals = self._exchange.refusals(self.silo, version)
                if len(refusals) > num_refused:
                    num_refused = len(refusals)
                    print(f"version {version}: the aggregator refused our delivery: {refusals[-1]}", flush=True)
                elif not missed_before:  # the reason is written just after the manifest is removed: look once more
                    missed_before = True
                    self._closing.wait(self.config.exchange.poll_seconds)
                    continue
                missed_before = False
                if num_refused >= MAX_REFUSALS:
                    raise ConfigError(
                        f"silo {self.silo}: version {version} was refused {num_refused} times: {refusals[-1]}"
                    )
                if self._exchange.newest_version(version - 1) < version:
                    self._deliver(manifest, file)
            if self._closing.wait(self.config.exchange.poll_seconds):
                raise StopRequested
        return self._download(version)

    def _download(self, version: int) -> Received:
        """Fetch a commit's payloads and check them before anybody decodes a byte."""
        try:
            commit = self._exchange.read_commit(version)
            files = [self._inbox / f"{version:06d}-{payload.fragment:03d}.safetensors" for payload in commit.payloads]
            num_bytes = [
                self._exchange.fetch(version_path(version), payload, file)
                for payload, file in zip(commit.payloads, files, strict=True)
            ]
        except RefusedError as error:
            raise ConfigError(f"silo {self.silo}: version {version} in the store cannot be used: {error}") from None
        return Received(commit=commit, files=files, num_bytes=sum(num_bytes))

    def wait(self, progress: Progress, version: int) -> None:
        """Wait until a version has come. Raises StopRequested on all ranks, and what went wrong beside training."""
        flight = self._flights.get(version)
        began = time.monotonic()
        what = f"commit {version} from the aggregator"
        self._poll(lambda: flight is not None and flight.received.done(), what, progress, flight)
        seconds = time.monotonic() - began
        progress.seconds_waiting += seconds
        if flight:
            flight.wait_seconds += seconds

    def settle(self) -> None:
        """Wait until everything that was sent is coded and delivered, so that a checkpoint can hold what is kept."""
        for flight in self._flights.values():
            flight.delivered.result()

    def adopt(self, engine: Engine, progress: Progress, version: int) -> None:
        """Take over a version: check it, apply it to the host copy and, mixed with what is local, to the engine.

        Afterwards the host copy has the bits that the commit's digest names, and so have, without mixing, the
        fragment's parameters in the engine.
        """
        began, mixing, names = time.monotonic(), self.config.outer.mixing, self._names(engine, version)
        if self.ranks.is_leader:
            received = self._flights[version].received.result()
            self._apply(received, names)
        new = {name: self.global_parameters[name] for name in names} if self.ranks.is_leader else {}
        if mixing:
            local = self._read(engine, names)
            new = {name: local[name] * mixing + merged * (1 - mixing) for name, merged in new.items()}
        self._write(engine, names, new)
        seconds = time.monotonic() - began
        progress.seconds_waiting += seconds
        progress.version = version
        if self.ranks.is_leader:
            flight = self._flights.pop(version)
            flight.wait_seconds += seconds
            self._record(progress, version, flight, received.num_bytes)
            self._remove(received.files)

    def _apply(self, received: Received, names: Sequence[str]) -> None:
        """Apply a commit's change to the host copy, and compare the digest."""
        commit = received.commit
        try:
            for file in received.files:
                tensors = Tensors(file)
                if tensors.names != sorted(names):
                    raise ValueError("it changes other tensors than those of its fragment")
                for name in names:
                    parts = tensors.parts(name)
                    check(commit.codec, parts, self.global_parameters[name].shape)
                    apply_change(commit.codec, self.global_parameters[name], parts)
        except (SafetensorError, ValueError) as error:
            raise ConfigError(
                f"silo {self.silo}: version {commit.version} in the store cannot be used: {error}"
            ) from None
        self._check_digest(commit, names)

    def _check_digest(self, commit: Commit, names: Sequence[str]) -> None:
        self._rows |= {name: tensor_row(name, self.global_parameters[name]) for name in names}
        digest = digest_rows(self._rows.values())
        if digest != commit.parameters_digest:
            raise ConfigError(
                f"silo {self.silo}: version {commit.version} in the store cannot be used: its parameters have digest "
                f"{digest[:12]}, not {commit.parameters_digest[:12]}"
            )

    def _check_shapes(self, engine: Engine) -> None:
        if {name: value.shape for name, value in self.global_parameters.items()} != engine.shapes:
            raise ConfigError(
                f"silo {self.silo}: the version in the store has other parameters than this model; "
                "do all parties have the same version of transformers?"
            )

    def _write(self, engine: Engine, names: Sequence[str], values: dict[str, Tensor]) -> None:
        """Write parameters into the engine, the leader's values, and read them back."""
        engine.write(iter([(name, values[name]) for name in names]) if self.ranks.is_leader else None, names)
        for name in names:
            found = engine.read(name)
            if self.ranks.is_leader and not torch.equal(found.cpu(), values[name]):
                raise RuntimeError(f"{name} in the engine differs from what was just written")

    @contextmanager
    def global_model(self, engine: Engine) -> Iterator[None]:
        """Within, the engine computes with the global parameters; afterwards it has its own back, to the last bit."""
        if self.schedule.num_fragments == 1 and not self.schedule.overlap_steps and not self.config.outer.mixing:
            yield  # it has them already: this is called after a sync of everything
            return
        names, file = list(engine.shapes), self._directory / "local.safetensors"
        local = self._read(engine, names)
        if self.ranks.is_leader:  # on the disk meanwhile: an evaluation needs the memory itself
            save_file(local, file)
            local.clear()
        self._write(engine, names, self.global_parameters)
        yield
        self._write(engine, names, load_file(file) if self.ranks.is_leader else {})
        if self.ranks.is_leader:
            file.unlink()

    def _record(self, progress: Progress, version: int, flight: Flight, bytes_received: int) -> None:
        assert self.journal
        manifest, _ = flight.delivered.result()
        self.journal.record(
            "sync",
            step=progress.step,
            round=self.config.round_of(version),
            version=version,
            fragment=self.schedule.fragment(version),
            bytes_sent=sum(payload.num_bytes for payload in manifest.payloads),
            bytes_received=bytes_received,
            wait_seconds=flight.wait_seconds,
            pseudo_gradient_norm=manifest.metrics["pseudo_gradient_norm"],
        )

    @staticmethod
    def _remove(files: Sequence[Path]) -> None:
        for file in files:
            file.unlink(missing_ok=True)

    def checkpointed(self, version: int) -> None:
        """Say in the store that our newest checkpoint holds `version`; what was sent for it is not needed again."""
        if self.ranks.is_leader:
            self._exchange.mark_resumable(self.silo, version)
            self._remove([file for file in self._outbox.glob("*.*") if int(file.name.split(".")[0]) <= version])

    def _poll(self, done: Callable[[], bool], what: str, progress: Progress, flight: Flight | None = None) -> None:
        """Ask the leader again and again, all ranks together, so that a stop reaches everybody while they wait."""
        ready = self.ranks.from_leader(self.ranks.is_leader and done())
        if not ready and self.journal:
            round = self.config.round_at(progress.step)
            self.journal.status("waiting", step=progress.step, round=round, waiting_for=what)
        while not ready:
            if self.ranks.sum([float(self._asked_to_stop())])[0]:
                raise StopRequested
            if flight:
                wait([flight.received], timeout=self.config.exchange.poll_seconds)
            elif self.ranks.is_leader:  # the others wait for its answer
                time.sleep(self.config.exchange.poll_seconds)
            ready = self.ranks.from_leader(self.ranks.is_leader and done())
