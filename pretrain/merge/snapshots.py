"""Snapshots of the outer state: written while silos train on from the version that they are of, loaded at a restart."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.history import History
from pretrain.exchange.payload import Tensors, save_tensors
from pretrain.exchange.sealed import fetch_version, seal_payload
from pretrain.exchange.store import StoreExchange, file_payload, version_path
from pretrain.host.beside import Beside
from pretrain.merge.terms import snapshot_kinds, snapshot_versions
from pretrain.outer.state import OuterState
from pretrain.trust.ledger import Commit, Payload, RefusedError, Snapshot, sha256_bytes


class Snapshots:
    """Of one store, which one aggregator writes.

    The outer state does not change from a commit until the deliveries for the next one are in: that is the time to
    write it, by a thread of its own.
    """

    def __init__(
        self,
        config: RunConfig,
        exchange: StoreExchange,
        scratch: Path,
        *,
        check_lease: Callable[[], None],
        let_go: Callable[[OuterState, Sequence[str]], None],
    ) -> None:
        """`let_go` is told of tensors that are not used again in their version."""
        self._config, self._scratch, self._check_lease, self._let_go = config, scratch, check_lease, let_go
        self._exchange, self._over = exchange, threading.Event()
        self.history = History(exchange, config.outer.num_fragments)
        self._beside = Beside("snapshot")

    def is_due(self, version: int) -> bool:
        """Whether a version's outer state is to be written."""
        return version > 0 and self._config.schedule.count(version) % snapshot_versions(self._config) == 0

    def begin(self, state: OuterState, commit: Commit, names: Sequence[str]) -> None:
        """Begin to write what a version made of these tensors, all of a fragment. `finish` comes before any change."""
        self._beside.begin(self._write, state, commit, names)

    def finish(self) -> None:
        """Wait for the snapshot that is being written; raises what went wrong with it."""
        self._beside.finish()

    def stop(self) -> None:
        """Write no more."""
        self._over.set()
        self._beside.stop()

    def _write(self, state: OuterState, commit: Commit, names: Sequence[str]) -> None:
        fragment = self._config.schedule.fragment(commit.version)
        found: list[tuple[Payload, Path]] = []
        for kind in snapshot_kinds(self._config.outer):
            values, file = _of_kind(state, kind), self._scratch / "outbox" / f"{kind}-{fragment:03d}.safetensors"
            tensors = {name: {"values": values[name]} for name in names}
            payload = save_tensors(tensors, file, kind, fragment=fragment)
            found.append((seal_payload(self._exchange, OPERATOR, commit.version, payload, file), file))
        self._let_go(state, names)
        snapshot = self._exchange.members.sign(
            Snapshot(
                contract_sha256=commit.contract_sha256,
                version=commit.version,
                commit_sha256=sha256_bytes(commit.to_bytes()),
                payloads=[payload for payload, _ in found],
            )
        )
        history = History(self._exchange.until(self._over), self._config.outer.num_fragments)
        history.write_snapshot(snapshot, found, check=self._check_lease)

    def load(self, version: int, fragment: int) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Kind and tensors of all that a snapshot, or version 0, holds of a fragment. Raises RefusedError.

        The tensors are gone when the next ones come.
        """
        for payload in self.history.whole(version, fragment):
            file = self._scratch / "inbox" / payload.file
            try:
                fetch_version(self._exchange, version, payload, file)
            except RefusedError:
                self.repair(version, [payload])
                fetch_version(self._exchange, version, payload, file)
            kind = payload.file.split("-")[0]
            tensors = Tensors(file, kind)
            yield kind, {name: tensors.parts(name)["values"] for name in tensors.names}
            file.unlink()

    def repair(self, version: int, payloads: Sequence[Payload]) -> None:
        """Publish again what is damaged of these payloads of a version, if it is still here; says what was."""
        folder = version_path(version)
        for payload in payloads:
            try:
                self._exchange.fetch(folder, payload, Path(os.devnull))
            except RefusedError as error:
                file, name = self._scratch / "outbox" / payload.file, f"{folder}/{payload.file}"
                what = "this aggregator does not have it any more"
                if file.is_file() and file_payload(file, payload.fragment) == payload:
                    self._check_lease()
                    self._exchange.objects.delete(name)
                    self._exchange.objects.upload(file, name, digest=payload.blake3)
                    what = "it was published again"
                print(f"version {version}: {error}; {what}", flush=True)

    def repair_all(self, commit: Commit) -> None:
        """Publish again what is damaged of a version and its snapshot, if it is still here."""
        version = commit.version
        of_snapshot = self.history.read_snapshot(version).payloads if version in self.history.snapshots() else []
        self.repair(version, commit.payloads + of_snapshot)


def _of_kind(state: OuterState, kind: str) -> Mapping[str, Tensor]:
    return state.kept.get(kind, state.parameters)
