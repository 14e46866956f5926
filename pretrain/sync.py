"""A silo's side of the outer step: deliver the pseudo-gradient, wait for the commit, adopt the merged parameters."""

import json
import math
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pretrain.config import ConfigError, RunConfig
from pretrain.exchange.store import StoreExchange, file_payload, version_path
from pretrain.journal import Journal
from pretrain.outer.codec import CODECS, key
from pretrain.outer.digest import digest_tensors
from pretrain.outer.fragments import cut_fragments
from pretrain.silo.checkpoint import Progress
from pretrain.silo.engine import Engine
from pretrain.silo.ranks import Ranks
from pretrain.trust.contract import build_contract, check_same_contract
from pretrain.trust.ledger import Manifest, Payload, RefusedError

MAX_REFUSALS = 3


class StopRequested(Exception):
    """A rank was told to stop (SIGTERM, SIGINT); all ranks agreed."""


class SiloSync:
    """What the silo's loop calls at a sync. Reading and writing the engine takes all ranks; the rest is the leader's.

    The leader's host memory holds one fp32 copy of the global parameters, and while it delivers, one coded fragment.
    """

    def __init__(
        self, config: RunConfig, silo: str, ranks: Ranks, journal: Journal | None, asked_to_stop: Callable[[], bool]
    ) -> None:
        self.silo, self.config, self.ranks, self.journal = silo, config, ranks, journal
        self._asked_to_stop = asked_to_stop
        self._exchange = StoreExchange(config.store_url)
        self._directory = config.silo_directory(silo)
        self._codec = CODECS[config.outer.codec]
        self._files: list[tuple[Payload, Path]] = []
        self._manifest: Manifest | None = None
        self._norms: list[float] = []
        self._began = time.monotonic()
        self._base_digest = ""
        self.global_parameters: dict[str, Tensor] = {}  # the leader's fp32 copy, host memory

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

    # ---- one sync

    def deliver(self, engine: Engine, progress: Progress) -> None:
        """Code `global - local` fragment by fragment, tensor by tensor, and hand it to the exchange."""
        self._began = time.monotonic()
        fragments = cut_fragments(
            {name: shape.numel() for name, shape in engine.shapes.items()}, self.config.outer.num_fragments
        )
        outbox = self._directory / "outbox"
        if self.ranks.is_leader:
            shutil.rmtree(outbox, ignore_errors=True)
            outbox.mkdir(parents=True)
        self._files, self._norms = [], []
        for index, names in enumerate(fragments):
            coded, norm_squared = {}, 0.0
            for name in names:
                local = engine.read(name)
                if self.ranks.is_leader:
                    base, local = self.global_parameters[name], local.cpu()
                    coded[key(name)] = self._codec.encode(base, local)
                    norm_squared += torch.linalg.vector_norm(base - local, dtype=torch.float64).item() ** 2
            if self.ranks.is_leader:
                file = outbox / f"{index:03d}.safetensors"
                save_file(coded, file)
                self._files.append((file_payload(file, index), file))
                self._norms.append(norm_squared**0.5)
        if self.ranks.is_leader:
            self._manifest = self._describe(progress)
            standing = self._exchange.deliver(self._manifest, self._files)
            if standing != self._manifest.to_bytes():
                print(
                    f"round {self._manifest.round}: this pseudo-gradient differs from the one delivered before the "
                    "restart (kernels that are not deterministic); the delivered one stands",
                    flush=True,
                )

    def _describe(self, progress: Progress) -> Manifest:
        """The manifest of the files that are about to be delivered."""
        config, settings = self.config, self.config.silos[self.silo]
        steps = config.outer.sync_interval_steps
        return Manifest(
            contract_sha256=self._exchange.contract_sha256,
            silo=self.silo,
            round=progress.version + 1,
            base_version=progress.version,
            base_digest=self._base_digest or digest_tensors(self.global_parameters.items()),
            codec=config.outer.codec,
            payloads=[payload for payload, _ in self._files],
            tokens=steps * settings.global_batch_sequences * config.sequence_tokens,
            steps=steps,
            tokens_total=progress.position * config.sequence_tokens,
            metrics={"loss": progress.loss, "pseudo_gradient_norm": math.hypot(*self._norms)},
        )

    def wait(self, progress: Progress) -> None:
        """Wait until the round's commit is there; deliver again what the aggregator refused.

        Raises StopRequested on all ranks, and ConfigError after three refusals.
        """
        round = progress.version + 1
        num_refused = len(self._exchange.refusals(self.silo, round)) if self.ranks.is_leader else 0
        missed_before = False

        def committed() -> bool:
            nonlocal num_refused, missed_before
            if self._exchange.newest_version(progress.version) >= round:
                return True
            if self._manifest and self._exchange.delivery(self.silo, round) is None:
                refusals = self._exchange.refusals(self.silo, round)
                if len(refusals) > num_refused:
                    num_refused = len(refusals)
                    print(f"round {round}: the aggregator refused our delivery: {refusals[-1]}", flush=True)
                elif not missed_before:  # the reason is written just after the manifest is removed: look once more
                    missed_before = True
                    return False
                missed_before = False
                if num_refused >= MAX_REFUSALS:
                    raise ConfigError(
                        f"silo {self.silo}: round {round} was refused {num_refused} times: {refusals[-1]}"
                    )
                if self._exchange.newest_version(progress.version) < round:
                    self._exchange.deliver(self._manifest, self._files)
            return False

        self._poll(committed, f"commit {round} from the aggregator", progress)

    def adopt(self, engine: Engine, progress: Progress) -> None:
        """Take over the next version: check it, copy it to the host copy and into the engine, and read it back.

        Afterwards `progress.version` is one more and every parameter has the bits that the commit's digest names.
        """
        version = progress.version + 1
        if self.ranks.is_leader:
            received = self._fetch(version)
            shapes = {name: value.shape for name, value in self.global_parameters.items()}
            if shapes != engine.shapes:
                raise ConfigError(
                    f"silo {self.silo}: version {version} in the store has other parameters than this model; "
                    "do all parties have the same version of transformers?"
                )
        ordered = ((name, self.global_parameters[name]) for name in engine.shapes) if self.ranks.is_leader else None
        engine.write(ordered)
        for name in engine.shapes:
            value = engine.read(name)
            if self.ranks.is_leader and not torch.equal(value.cpu(), self.global_parameters[name]):
                raise RuntimeError(f"{name} in the engine differs from version {version} right after it was written")
        wait_seconds = time.monotonic() - self._began
        progress.seconds_waiting += wait_seconds
        if self.ranks.is_leader and self._files:
            self._record(progress, received, wait_seconds)
        progress.version = version

    def _fetch(self, version: int) -> list[int]:
        """Download and check a version into the host copy; returns the bytes of each fragment."""
        received = []
        try:
            commit = self._exchange.read_commit(version)
            for payload in commit.payloads:
                file = self._directory / "inbox" / payload.file
                received.append(self._exchange.fetch(version_path(version), payload, file))
                with safe_open(file, framework="pt") as tensors:
                    for coded_name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                        value = tensors.get_tensor(coded_name)
                        mine = self.global_parameters.setdefault(
                            coded_name.removeprefix(key("")), torch.empty_like(value)
                        )
                        mine.copy_(value)
                file.unlink()
            digest = digest_tensors(self.global_parameters.items())
            if digest != commit.parameters_digest:
                raise RefusedError(f"its parameters have digest {digest[:12]}, not {commit.parameters_digest[:12]}")
        except RefusedError as error:
            raise ConfigError(f"silo {self.silo}: version {version} in the store cannot be used: {error}") from None
        self._base_digest = digest
        return received

    def _record(self, progress: Progress, received: list[int], wait_seconds: float) -> None:
        assert self.journal
        for fragment, (payload, _) in enumerate(self._files):
            last = fragment == len(self._files) - 1
            self.journal.record(
                "sync",
                step=progress.step,
                round=progress.version + 1,
                fragment=fragment,
                bytes_sent=payload.num_bytes,
                bytes_received=received[fragment],
                wait_seconds=wait_seconds if last else 0.0,
                pseudo_gradient_norm=self._norms[fragment],
            )

    def checkpointed(self, version: int) -> None:
        """Say in the store that our newest checkpoint holds `version`."""
        if self.ranks.is_leader:
            self._exchange.mark_resumable(self.silo, version)

    def _poll(self, done: Callable[[], bool], what: str, progress: Progress) -> None:
        """Ask the leader again and again, all ranks together, so that a stop reaches everybody while they wait."""
        if self.journal:
            self.journal.status("waiting", step=progress.step, round=progress.version + 1, waiting_for=what)
        while True:
            ready = self.ranks.from_leader(self.ranks.is_leader and done())
            if ready:
                return
            if self.ranks.sum([float(self._asked_to_stop())])[0]:
                raise StopRequested
            time.sleep(self.config.exchange.poll_seconds)
