"""A silo's own record of a collective run, in its run directory: what a restart needs, and what it owes the others.

    silos/NAME/ledger/        laid out like a store: contract.json, and of every version commit.json, the coded change,
                              and what all silos have signed of it (merge/outcome.py); whole parameters now and then,
                              in a snapshot, and always where the codec is fp32
    silos/NAME/kept/000017-velocity.safetensors   the outer state of the silo's part, as step 17 left it, and in
    silos/NAME/kept/000017.digest                 its digest

The outer state is written before anybody can adopt what belongs to it, a version beside training after it was adopted
(among_silos.py).
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.exchange.agreement import agreement_path
from pretrain.exchange.base import Received
from pretrain.exchange.history import History
from pretrain.exchange.payload import PARAMETER, Tensors, changed_tensors, keep_tensors, read_parameters, save_tensors
from pretrain.exchange.store import StoreExchange, file_payload, version_path
from pretrain.merge.outcome import record_paths
from pretrain.outer.digest import Row, digest_rows, tensor_rows
from pretrain.outer.pieces import Piece, cut_pieces
from pretrain.outer.quantize import QUANTIZERS, Parts
from pretrain.outer.state import OuterTensors, kept_at_start
from pretrain.silo.model import initial_parameters
from pretrain.trust.contract import check_same_contract, contract_bytes
from pretrain.trust.ledger import Commit, Contributor, RefusedError, Snapshot, sha256_bytes

Kept = dict[str, dict[str, Tensor]]  # kind to piece to tensor


MOST_CHANGES = 16  # that a restart applies to a fragment's whole parameters, however small they are


def whole_versions(codec: str) -> int:
    """A fragment's parameters are written whole at every so many of its outer steps.

    By then the changes since are as many bytes; that is what a ledger takes at most, beside the whole ones.
    """
    return min(MOST_CHANGES, math.ceil(QUANTIZERS["fp32"].bits / QUANTIZERS[codec].bits))


class OwnLedger:
    """The versions that this silo has seen. Nothing in it is ever overwritten."""

    def __init__(self, config: RunConfig, silo: str) -> None:
        self._config, self._silo, self._schedule = config, silo, config.schedule
        self._directory = config.silo_directory(silo)
        self._store = StoreExchange(config.ledger_url(silo))
        self._codec = config.outer.downlink_codec
        self._history = History(self._store, self._schedule.num_fragments, all_whole=self._codec == "fp32")
        self.newest = -1

    @property
    def contract_sha256(self) -> str:
        """sha256 of the contract."""
        return self._store.contract_sha256

    def open(self, contract: dict[str, Any]) -> None:
        """Begin with the contract and version 0, or go on; raises ConfigError if this is another run's."""
        stored = self._store.read_contract()
        parameters: dict[str, Tensor] = {}
        if stored is None:
            parameters = initial_parameters(self._config)  # a mistake in the model must not leave a contract behind
            self._store.write_contract(contract_bytes(contract))
        else:
            check_same_contract(contract, stored, self._store.objects.url)
        self.newest = self._store.newest_version()
        self.records(max(0, self.newest))
        if self.newest < 0:
            outer, parameters = self._config.outer, parameters or initial_parameters(self._config)
            kept = kept_at_start(parameters, outer.optimizer, outer.downlink_codec)
            terms = self.terms(
                0,
                digest_rows(tensor_rows(parameters, torch.get_num_threads()).values()),
                outer_digest=OuterTensors(parameters=parameters, kept=kept).kept_digest(parameters),
            )
            self.write(terms, {f: {n: parameters[n] for n in names} for f, names in enumerate(self._cut(parameters))})

    def _cut(self, parameters: Mapping[str, Tensor]) -> list[list[str]]:
        try:
            return self._config.cut({n: p.numel() for n, p in parameters.items()})
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def terms(
        self,
        version: int,
        parameters_digest: str,
        contributors: Sequence[Contributor] = (),
        *,
        outer_digest: str = "",
        metrics: Mapping[str, float] | None = None,
    ) -> Commit:
        """A commit of which the payloads are not known yet. The version before is in the ledger."""
        return Commit(
            contract_sha256=self.contract_sha256,
            version=version,
            previous=self.sha256(version - 1) if version else None,
            codec=self._codec if version else "fp32",
            payloads=[],
            contributors=list(contributors),
            divisor=sum(contributor.weight for contributor in contributors),
            parameters_digest=parameters_digest,
            outer_digest=outer_digest,
            metrics=dict(metrics or {}),
        )

    def write(
        self,
        terms: Commit,
        values: Mapping[int, Mapping[str, Tensor]],  # by fragment
        moments: Mapping[str, Parts] | None = None,
        records: Mapping[str, bytes] = MappingProxyType({}),
        *,
        change: Mapping[str, Parts] | None = None,
    ) -> None:
        """Write a version: its payloads, one a fragment, what all have signed of it, and the commit, which comes last.

        `records` has these by name (`record_paths`); `change` is the coded one of the tensors, where the codec is not
        fp32.
        """
        files = [self._file(fragment, terms.codec) for fragment in values]
        payloads = []
        for file, (fragment, tensors) in zip(files, values.items(), strict=True):
            coded = change or _whole(tensors)
            payloads.append(save_tensors(coded, file, fragment=fragment, moments=moments))
        for file in (self._directory / "kept").glob(f"{terms.version:06d}*"):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        self._put(records)
        commit = dataclasses.replace(terms, payloads=payloads)
        self.publish(commit, files)
        if commit.codec != "fp32" and self._schedule.count(commit.version) % whole_versions(commit.codec) == 0:
            self._write_whole(commit, *values.items())

    def _write_whole(self, commit: Commit, of_fragment: tuple[int, Mapping[str, Tensor]]) -> None:
        """Write a fragment's parameters as a version left them. Whoever dies before goes on from the whole ones before.

        The record that names them is signed by nobody: the commit has their digest.
        """
        fragment, tensors = of_fragment
        file = self._file(fragment, "fp32")
        payload = save_tensors(_whole(tensors), file, fragment=fragment)
        snapshot = Snapshot(
            contract_sha256=commit.contract_sha256,
            version=commit.version,
            commit_sha256=sha256_bytes(commit.to_bytes()),
            payloads=[payload],
        )
        self._history.write_snapshot(snapshot, [(payload, file)])
        file.unlink()

    def publish(self, commit: Commit, files: Sequence[Path]) -> None:
        """Write a version for ever, and prune what nobody needs again."""
        self._store.publish(commit, zip(commit.payloads, files, strict=True), give=True)
        self.newest = commit.version
        self._history.prune([self._silo], self.newest, self._config.exchange.keep_versions)
        for file in (self._directory / "kept").glob("*"):
            if int(file.name[:6]) <= self.newest - 2 * self._schedule.num_fragments:  # else `keep` takes it over
                file.unlink()

    def keep_agreements(self, agreed: Mapping[str, bytes]) -> None:
        """Keep the silos' signatures under the contract, by silo."""
        self._put({agreement_path(silo): data for silo, data in agreed.items()})

    def _put(self, records: Mapping[str, bytes]) -> None:
        """Write small objects, over what one who was killed before its commit has left."""
        for name, data in records.items():
            self._store.objects.replace(name, data)

    def _file(self, fragment: int, codec: str) -> Path:
        kind = PARAMETER if codec == "fp32" else "change"
        return self._directory / "inbox" / f"{kind}-{fragment:03d}.safetensors"

    # ---- reading

    def commit(self, version: int) -> Commit:
        """A commit."""
        return self._store.read_commit(version)

    def words(self, version: int) -> str:
        """The bytes of a commit, as text."""
        return self._store.commit_bytes(version).decode()

    def sha256(self, version: int) -> str:
        """sha256 of a commit."""
        return sha256_bytes(self._store.commit_bytes(version))

    def payload(self, version: int) -> bytes:
        """What a version has of the fragment that it changed, as its commit names it."""
        (payload,) = self._store.read_commit(version).payloads
        return self._store.objects.read(f"{version_path(version)}/{payload.file}", limit_bytes=payload.num_bytes)

    def record_names(self, version: int) -> list[str]:
        """The names of what all silos have signed of a version."""
        return record_paths(self._config.full_roster, version)

    def records(self, version: int) -> dict[str, bytes]:
        """What all silos have signed of a version, by name. Raises ConfigError if it is not all there."""
        found = {name: self._store.objects.read_if_there(name) for name in self.record_names(version)}
        for name in (name for name, data in found.items() if data is None):
            raise ConfigError(
                f"run directory: {self._store.objects.url}/{name} is missing, which a silo has signed of version "
                f"{version}; restore it; a run that was begun by an atoll that kept none goes on with that one"
            )
        return {name: data for name, data in found.items() if data is not None}

    def take(self, commit: Commit, data: bytes, records: Mapping[str, bytes]) -> None:
        """Write a version that another silo has and we do not. Raises ConfigError if the bytes are not the commit's."""
        (payload,) = commit.payloads
        file = self._file(payload.fragment, commit.codec)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        if file_payload(file, payload.fragment) != payload:
            raise ConfigError(f"silos: another silo's version {commit.version} is not what its commit says")
        self._put(records)
        self.publish(commit, [file])

    def initial(self) -> Received:
        """All tensors of version 0; where these are pruned, of the newest. Raises ConfigError."""
        try:
            version = 0 if self._history.has_parameters(0) else self.newest
            values = self._parameters(version)
            commit = self._store.read_commit(version)
        except RefusedError as error:
            raise ConfigError(f"run directory: {self._store.objects.url} cannot be used: {error}; restore it") from None
        rows = tensor_rows(values, torch.get_num_threads())
        return Received(commit=commit, values=values, rows=rows, bytes_sent=0, bytes_received=0)

    def tokens_total(self, version: int, *, above: int) -> int:
        """As an exchange has it."""
        return self._store.tokens_total(self._silo, version, above=above)

    def received(self, version: int, base: Mapping[str, Tensor] = MappingProxyType({})) -> Received:
        """A version that is there already; `base` has the tensors that it changes, as they are before."""
        commit = self._store.read_commit(version)
        values: dict[str, Tensor] = {}
        moments: dict[str, Parts] = {}
        for payload in commit.payloads:
            file = self._directory / "inbox" / payload.file
            self._store.fetch(version_path(version), payload, file)
            tensors = Tensors(file)
            values |= changed_tensors(tensors, commit.codec, {} if commit.codec == "fp32" else base)
            moments |= dict(tensors.moments)
            file.unlink()
        rows = tensor_rows(values, torch.get_num_threads())
        return Received(commit=commit, values=values, rows=rows, moments=moments, bytes_sent=0, bytes_received=0)

    def _parameters(self, version: int) -> dict[str, Tensor]:
        """All tensors as `version` has them. Raises RefusedError."""
        fragments = (self._fragment(version, fragment) for fragment in range(self._schedule.num_fragments))
        return {name: value for values in fragments for name, value in values.items()}

    def _fragment(self, version: int, fragment: int) -> dict[str, Tensor]:
        made = self._history.parameters(version, fragment)
        return read_parameters(self._store, made, self._directory / "inbox")

    # ---- our part of the outer state

    def keep(self, version: int, kept: Kept) -> str:
        """Write what step `version` made of our part, over what the fragment's last step but one made of it.

        Returns its digest, which a restart compares: the disk itself may not have all of it before `write`.
        """
        for kind, values in kept.items():
            file = self._kept_file(version, kind)
            temporary, old = file.with_suffix(".tmp"), self._kept_file(version - 2 * self._schedule.num_fragments, kind)
            if old.is_file():
                old.replace(temporary)
            keep_tensors(values, temporary, kind)
            temporary.replace(file)
        digest = _kept_digest(kept)
        if kept:
            self._kept_file(version).write_text(digest)
        return digest

    def _kept_file(self, version: int, kind: str = "") -> Path:
        """Of a kind, or that of the digest."""
        return self._directory / "kept" / (f"{version:06d}-{kind}.safetensors" if kind else f"{version:06d}.digest")

    def load(self) -> tuple[dict[str, Row], Kept]:
        """Of the newest version: the digest's rows, and our part of the outer state behind it."""
        rows: dict[str, Row] = {}
        pieces: dict[str, Tensor] = {}
        num_silos, index = len(self._config.full_roster), self._config.full_roster.index(self._silo)
        for fragment in range(self._schedule.num_fragments):
            values = self._fragment(self.newest, fragment)
            rows |= tensor_rows(values, torch.get_num_threads())
            mine = all_pieces(values, num_silos)[index]
            pieces |= {piece.key: piece.of(values[piece.name]).clone() for piece in mine}
        kept = kept_at_start(pieces, self._config.outer.optimizer, self._config.outer.downlink_codec)
        for version in range(max(1, self.newest - self._schedule.num_fragments + 1), self.newest + 1):
            for kind, values in self._load_kept(version, list(kept)).items():
                kept[kind] |= values
        return rows, kept

    def _load_kept(self, version: int, kinds: Sequence[str]) -> Kept:
        """What step `version` made of our part. Raises ConfigError if it is not all there."""
        found: Kept = {}
        digest = self._kept_file(version)
        for file in (*(self._kept_file(version, kind) for kind in kinds), digest) if kinds else ():
            if not file.is_file():
                raise ConfigError(f"run directory: {file} is missing, outer state of version {version}; restore it")
        try:
            for kind in kinds:
                tensors = Tensors(self._kept_file(version, kind), kind)
                found[kind] = {key: tensors.parts(key)["values"].clone() for key in tensors.names}
        except (SafetensorError, ValueError):
            found = {}
        if kinds and _kept_digest(found) != digest.read_text():
            raise ConfigError(
                f"run directory: {digest.with_suffix('')}-* are damaged, outer state of version {version}: they do not "
                "have their digest; restore them"
            )
        return found

    def mark_resumable(self, version: int) -> None:
        """A checkpoint holds `version`."""
        self._store.mark_resumable(self._silo, version)


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Parts]:
    return {name: {"values": value} for name, value in tensors.items()}


def _kept_digest(kept: Kept) -> str:
    return OuterTensors(parameters={}, kept=kept).kept_digest(next(iter(kept.values()), {}))


def all_pieces(fragment: Mapping[str, Tensor], num_silos: int) -> list[list[Piece]]:
    """The pieces of a fragment that each silo, in the order of the roster, merges."""
    return cut_pieces({name: fragment[name].numel() for name in sorted(fragment)}, num_silos)
