"""The exchange through a store, as a silo sees it: deliver objects, wait for the aggregator's commits."""

import json
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from pretrain.config import ConfigError, RunConfig
from pretrain.exchange.base import Received, StopWaitingError
from pretrain.exchange.store import StoreExchange, version_path
from pretrain.outer.codec import apply_change, check
from pretrain.outer.digest import tensor_row
from pretrain.outer.pieces import Piece
from pretrain.payload import Tensors
from pretrain.trust.contract import build_contract, check_same_contract
from pretrain.trust.ledger import Manifest, RefusedError

MAX_REFUSALS = 3


class ThroughStore:
    """One silo's exchange through the store; see exchange/base.py for the verbs."""

    concurrent = True
    lost = ""
    waiting_for = "the aggregator"

    def __init__(self, config: RunConfig, silo: str) -> None:
        self._config, self._silo = config, silo
        self._store = StoreExchange(config.store_url)
        self._directory = config.silo_directory(silo)
        self._closing = threading.Event()

    @property
    def contract_sha256(self) -> str:
        """sha256 of the contract, once there is one."""
        return self._store.contract_sha256

    def join(self) -> None:
        """Wait for the aggregator's contract."""
        while (stored := self._store.read_contract()) is None:
            self._pause()
        check_same_contract(build_contract(self._config), stored, self._store.objects.url)
        self._store.claim_name(self._silo, own_identity(self._directory))

    def assist(self, rank: int) -> None:
        """The leader does it all."""

    def initial(self) -> Received:
        """Wait for the aggregator's version 0."""
        while self._store.newest_version() < 0:
            self._pause()
        return self._download(0, {})

    def pieces(self, names: Sequence[str], base: Mapping[str, Tensor]) -> list[Piece]:
        """Whole tensors."""
        return [Piece(name) for name in names]

    def deliver(self, manifest: Manifest, file: Path) -> None:
        """Write the payload and its manifest into the store."""
        if self._store.deliver(manifest, [(payload, file) for payload in manifest.payloads]) != manifest.to_bytes():
            print(
                f"version {manifest.version}: this pseudo-gradient differs from the one delivered before the restart "
                "(kernels that are not deterministic); the delivered one stands",
                flush=True,
            )

    def receive(self, version: int, manifest: Manifest, file: Path, base: Mapping[str, Tensor]) -> Received:
        """Wait until the commit is there, delivering again what the aggregator refused; then download it.

        Raises ConfigError after MAX_REFUSALS refusals.
        """
        num_refused = len(self._store.refusals(self._silo, version))
        missed_before = False
        while self._store.newest_version(version - 1) < version:
            if self._store.delivery(self._silo, version) is None:
                refusals = self._store.refusals(self._silo, version)
                if len(refusals) > num_refused:
                    num_refused = len(refusals)
                    print(f"version {version}: the aggregator refused our delivery: {refusals[-1]}", flush=True)
                elif not missed_before:  # the reason is written just after the manifest is removed: look once more
                    missed_before = True
                    self._pause()
                    continue
                missed_before = False
                if num_refused >= MAX_REFUSALS:
                    raise ConfigError(
                        f"silo {self._silo}: version {version} was refused {num_refused} times: {refusals[-1]}"
                    )
                if self._store.newest_version(version - 1) < version:
                    self.deliver(manifest, file)
            self._pause()
        return self._download(version, base, bytes_sent=sum(payload.num_bytes for payload in manifest.payloads))

    def _download(self, version: int, base: Mapping[str, Tensor], bytes_sent: int = 0) -> Received:
        """Fetch a commit's payloads and check them before a byte is decoded."""
        values: dict[str, Tensor] = {}
        num_bytes = 0
        try:
            commit = self._store.read_commit(version)
            for payload in commit.payloads:
                file = self._directory / "inbox" / f"{version:06d}-{payload.fragment:03d}.safetensors"
                num_bytes += self._store.fetch(version_path(version), payload, file)
                values |= changed_tensors(Tensors(file), commit.codec, base)
                file.unlink()
        except (RefusedError, SafetensorError) as error:
            raise ConfigError(f"silo {self._silo}: version {version} in the store cannot be used: {error}") from None
        rows = {name: tensor_row(name, value) for name, value in values.items()}
        return Received(commit=commit, values=values, rows=rows, bytes_sent=bytes_sent, bytes_received=num_bytes)

    def _pause(self) -> None:
        if self._closing.wait(self._config.exchange.poll_seconds):
            raise StopWaitingError

    def checkpointed(self, version: int) -> None:
        """Say so in the store, for its pruning."""
        self._store.mark_resumable(self._silo, version)

    def moved(self) -> None:
        """Nobody waits for us without end: the aggregator does not ask."""

    def close(self, reason: str) -> None:
        """End what waits."""
        self._closing.set()


def changed_tensors(payload: Tensors, codec: str, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a payload makes of the tensors in `base`, which are left as they are; of none, what it holds itself.

    Raises RefusedError if it changes others, or is of another codec or shape.
    """
    if not base:
        return {name: payload.parts(name)["values"].clone() for name in payload.names}
    if payload.names != sorted(base):
        raise RefusedError("it changes other tensors than those of its fragment")
    values = {}
    for name, before in base.items():
        parts = payload.parts(name)
        try:
            check(codec, parts, before.shape)
        except ValueError as error:
            raise RefusedError(f"{name}: {error}") from None
        values[name] = before.clone()
        apply_change(codec, values[name], parts)
    return values


def own_identity(directory: Path) -> str:
    """A name for a silo's run directory, made once: it tells a restarted silo from another of the same name."""
    file = directory / "identity.json"
    if not file.exists():
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"identity": uuid.uuid4().hex}))
        temporary.replace(file)
    return json.loads(file.read_text())["identity"]
