"""The aggregator's loop: wait for the silos' fragments, verify, merge, take the outer step, commit. CPU only.

    python -m pretrain.aggregate --config run.yaml [key=value ...]

All its state is in the store: killed at any point, it goes on with the same version and comes to the same commit.
"""

import argparse
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from pretrain.config import ConfigError, RunConfig, load_config
from pretrain.exchange.store import StoreExchange, delivery_path, file_payload, version_path
from pretrain.journal import Journal
from pretrain.lock import lock_directory
from pretrain.merging import contributor, outer_optimizer, read_delivery
from pretrain.outer.codec import check, decoded, encode
from pretrain.outer.digest import Row, digest_rows, tensor_row
from pretrain.outer.fragments import cut_fragments
from pretrain.outer.merge import mean_cosine, weighted_mean
from pretrain.outer.quantize import Parts
from pretrain.outer.state import OuterTensors, kept_at_start, kept_kinds
from pretrain.payload import PARAMETER, Tensors, save_tensors
from pretrain.trust.contract import build_contract, check_same_contract, contract_bytes
from pretrain.trust.ledger import Commit, Contributor, Manifest, Payload, RefusedError, sha256_bytes


@dataclass(kw_only=True)
class OuterState(OuterTensors):
    """The global parameters and the outer optimizer's state."""

    version: int
    rows: dict[str, Row] = field(default_factory=dict)
    """Of the parameters' digest, one a tensor."""

    @property
    def parameters_digest(self) -> str:
        """Digest of all parameters as published."""
        return digest_rows(self.rows.values())


@dataclass(kw_only=True)
class Delivery:
    """One silo's verified delivery: its manifest, its payload on disk, and the norm of its pseudo-gradient."""

    manifest: Manifest
    manifest_bytes: bytes
    tensors: Tensors
    norm: float


class Aggregator:
    """Merges the silos of one store. Memory: the outer state and a few single tensors, however many silos there are."""

    def __init__(self, config: RunConfig, journal: Journal) -> None:
        self._config, self._journal, self._schedule = config, journal, config.schedule
        if config.exchange.kind != "store":
            raise ConfigError(f"exchange.kind: {config.exchange.kind!r} given; an aggregator serves only 'store'")
        self._exchange = StoreExchange(config.store_url)
        self._scratch = Path(config.directory) / "aggregator"
        self._roster = config.full_roster
        self._fragments: list[list[str]] = []

    # ---- start

    def start(self) -> OuterState:
        """Write or compare the contract; load the newest version, or write version 0."""
        ours = build_contract(self._config)
        stored = self._exchange.read_contract()
        if stored is None:
            if self._exchange.newest_version() >= 0:
                raise ConfigError(f"exchange.url: {self._config.store_url} given; it has versions but no contract.json")
            self._exchange.write_contract(contract_bytes(ours))
        else:
            check_same_contract(ours, stored, self._config.store_url)
        newest = self._exchange.newest_version()
        return self._load(newest) if newest >= 0 else self._create()

    def _create(self) -> OuterState:
        """Version 0: the contract's initial parameters and an outer state of zeros."""
        from pretrain.silo.model import initial_parameters

        parameters = initial_parameters(self._config)
        outer = self._config.outer
        state = OuterState(
            version=-1,
            parameters=parameters,
            kept=kept_at_start(parameters, outer.optimizer, outer.downlink_codec),
            rows={n: tensor_row(n, p) for n, p in parameters.items()},
        )
        self._cut(parameters)
        changes = {name: encode("fp32", value, value) for name, value in parameters.items()}
        self._commit(state, range(len(self._fragments)), changes, "fp32", [], divisor=0, metrics={})
        return state

    def _cut(self, parameters: Mapping[str, Tensor]) -> None:
        try:
            sizes = {name: value.numel() for name, value in parameters.items()}
            self._fragments = cut_fragments(sizes, self._schedule.num_fragments)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _load(self, newest: int) -> OuterState:
        """Restart: check the chain of commits, then load what the newest version is made of and compare the digests."""
        for version in range(newest + 1):
            commit = self._exchange.read_commit(version)
        kinds = kept_kinds(self._config.outer.optimizer, self._config.outer.downlink_codec)
        found: dict[str, dict[str, Tensor]] = {kind: {} for kind in (PARAMETER, *kinds)}
        for version, payload in self._exchange.newest_state(newest, self._schedule.num_fragments):
            file = self._scratch / "inbox" / payload.file
            self._exchange.fetch(version_path(version), payload, file)
            kind = payload.file.split("-")[0]
            tensors = Tensors(file, kind)
            found[kind] |= {name: tensors.parts(name)["values"].clone() for name in tensors.names}
            file.unlink()
        parameters = found.pop(PARAMETER)
        state = OuterState(
            version=newest,
            parameters=parameters,
            kept=found,
            rows={name: tensor_row(name, value) for name, value in parameters.items()},
        )
        if state.parameters_digest != commit.parameters_digest:
            raise RefusedError(f"version {newest}: its parameters do not have the digest of its commit")
        if state.kept_digest != commit.outer_digest:
            raise RefusedError(f"version {newest}: its outer state does not have the digest of its commit")
        self._cut(parameters)
        return state

    # ---- one version

    def collect(self, state: OuterState) -> list[Delivery]:
        """Wait for every silo of the roster; verify each delivery as it comes; refuse what is not as it should be."""
        version = state.version + 1
        arrived: dict[str, Delivery] = {}
        announced: list[str] = []
        while len(arrived) < len(self._roster):
            for silo in self._roster:
                manifest = self._exchange.delivery(silo, version) if silo not in arrived else None
                if manifest is None:
                    continue
                try:
                    arrived[silo] = self._verify(silo, manifest, state)
                except RefusedError as error:
                    print(f"version {version}: refused the delivery of silo {silo}: {error}", flush=True)
                    self._exchange.refuse(silo, version, manifest, str(error))
            missing = [silo for silo in self._roster if silo not in arrived]
            if missing and missing != announced:
                what = f"silo {', '.join(missing)}: delivery for version {version}"
                self._journal.status("waiting", round=self._config.round_of(version), waiting_for=what)
                print(f"version {version}: waiting for {what}", flush=True)
                announced = missing
            if missing:
                time.sleep(self._config.exchange.poll_seconds)
        return [arrived[silo] for silo in sorted(arrived)]

    def _verify(self, silo: str, data: bytes, state: OuterState) -> Delivery:
        """Check manifest, checksums, names, shapes, dtypes and values; raises RefusedError."""
        version = state.version + 1
        names = self._fragments[self._schedule.fragment(version)]
        manifest = read_delivery(
            data,
            silo=silo,
            version=version,
            base_digest=digest_rows(state.rows[name] for name in names),
            config=self._config,
            contract_sha256=self._exchange.contract_sha256,
        )
        file = self._scratch / "inbox" / f"{silo}.safetensors"
        self._exchange.fetch(delivery_path(silo, version), manifest.payloads[0], file)
        try:
            tensors = Tensors(file)
            norm = self._check_values(tensors, names, state)
        except SafetensorError as error:
            raise RefusedError(f"its payload is no safetensors file: {error}") from None
        except ValueError as error:
            raise RefusedError(str(error)) from None
        return Delivery(manifest=manifest, manifest_bytes=data, tensors=tensors, norm=norm)

    def _check_values(self, tensors: Tensors, names: list[str], state: OuterState) -> float:
        """Check a payload's tensors; returns the norm of the pseudo-gradient in it. Raises ValueError."""
        if tensors.names != sorted(names):
            raise ValueError("it holds other tensors than those of its fragment")
        norm_squared, codec = 0.0, self._config.outer.codec
        for name in names:
            parts, base = tensors.parts(name), state.parameters[name]
            try:
                check(codec, parts, base.shape)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            norm_squared += torch.linalg.vector_norm(decoded(codec, base, parts)).item() ** 2
        return norm_squared**0.5

    def merge(self, state: OuterState, deliveries: list[Delivery]) -> tuple[dict[str, Parts], int, dict[str, float]]:
        """Merge and take the outer step in place, one tensor at a time.

        Returns the coded changes of the published parameters, the divisor and the metrics.
        """
        outer, version = self._config.outer, state.version + 1
        optimizer, lr, count = outer_optimizer(outer), self._config.outer_lr(version), self._schedule.count(version)
        changes: dict[str, Parts] = {}
        update_squared, units_squared, divisor = 0.0, 0.0, 0
        for name in self._fragments[self._schedule.fragment(version)]:
            base = state.parameters[name]
            units = torch.zeros(base.shape, dtype=torch.float64)  # sum of the silos' directions, for the cosine
            merged, divisor = weighted_mean(self._weighted(deliveries, name, base, units), base.shape)
            try:
                changes[name], norm_squared = state.step(
                    name, merged, optimizer, lr=lr, count=count, codec=outer.downlink_codec
                )
            except ValueError as error:
                raise RefusedError(f"version {version}: {name}: {error}") from None
            update_squared += norm_squared
            units_squared += torch.linalg.vector_norm(units).item() ** 2
            state.rows[name] = tensor_row(name, base)
        metrics = {"update_norm": update_squared**0.5, "cosine_mean": mean_cosine(units_squared, len(deliveries))}
        return changes, divisor, metrics

    def _weighted(
        self, deliveries: list[Delivery], name: str, base: Tensor, units: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """Weight and pseudo-gradient of one tensor, silo after silo; adds each one's direction to `units`."""
        for delivery in deliveries:
            pseudo_gradient = decoded(self._config.outer.codec, base, delivery.tensors.parts(name))
            if delivery.norm:
                units.add_(pseudo_gradient, alpha=1 / delivery.norm)
            yield delivery.manifest.tokens, pseudo_gradient

    def commit(
        self,
        state: OuterState,
        changes: dict[str, Parts],
        deliveries: list[Delivery],
        divisor: int,
        metrics: dict[str, float],
    ) -> None:
        """Publish the next version, record it, prune what nobody can need again."""
        contributors = [contributor(delivery.manifest, delivery.manifest_bytes) for delivery in deliveries]
        fragment = self._schedule.fragment(state.version + 1)
        codec = self._config.outer.downlink_codec
        self._commit(state, [fragment], changes, codec, contributors, divisor=divisor, metrics=metrics)
        print(
            f"commit {state.version:5d}/{self._schedule.num_versions}  fragment {fragment}  "
            f"silos {', '.join(c.silo for c in contributors)}  divisor {divisor}  update {metrics['update_norm']:.4f}  "
            f"cosine {metrics['cosine_mean']:+.3f}  digest {state.parameters_digest[:12]}",
            flush=True,
        )
        self._journal.record(
            "commit",
            version=state.version,
            round=self._config.round_of(state.version),
            fragment=fragment,
            silos=[c.silo for c in contributors],
            weights=[c.weight for c in contributors],
            divisor=divisor,
            **metrics,
            digest=state.parameters_digest,
        )
        self._exchange.prune(
            self._roster, state.version, self._config.exchange.keep_versions, self._schedule.num_fragments
        )

    def _commit(
        self,
        state: OuterState,
        fragments: Sequence[int],
        changes: dict[str, Parts],
        codec: str,
        contributors: list[Contributor],
        *,
        divisor: int,
        metrics: dict[str, float],
    ) -> None:
        version, outbox = state.version + 1, self._scratch / "outbox"
        shutil.rmtree(outbox, ignore_errors=True)
        payloads: list[tuple[Payload, Path]] = []
        state_payloads: list[tuple[Payload, Path]] = []

        def write(stem: str, kind: str, fragment: int, values: Mapping[str, Parts]) -> tuple[Payload, Path]:
            file = outbox / f"{stem}-{fragment:03d}.safetensors"
            save_tensors(values, file, kind)
            return file_payload(file, fragment), file

        for fragment in fragments:
            names = self._fragments[fragment]
            coded = {name: changes[name] for name in names}
            payloads.append(write(PARAMETER if codec == "fp32" else "change", PARAMETER, fragment, coded))
            for kind, values in (state.kept | ({PARAMETER: state.parameters} if codec != "fp32" else {})).items():
                whole = {name: {"values": values[name]} for name in names}
                state_payloads.append(write(kind, kind, fragment, whole))
        commit = Commit(
            contract_sha256=self._exchange.contract_sha256,
            version=version,
            previous=sha256_bytes(self._exchange.commit_bytes(version - 1)) if version else None,
            codec=codec,
            payloads=[payload for payload, _ in payloads],
            state_payloads=[payload for payload, _ in state_payloads],
            contributors=contributors,
            divisor=divisor,
            parameters_digest=state.parameters_digest,
            outer_digest=state.kept_digest,
            metrics=metrics,
        )
        self._exchange.publish(commit, payloads + state_payloads)
        state.version = version


def aggregate(config: RunConfig, journal: Journal) -> None:
    """Commit one version after another until the last."""
    aggregator = Aggregator(config, journal)
    state = aggregator.start()
    while state.version < config.schedule.num_versions:
        deliveries = aggregator.collect(state)
        journal.status("merging", round=config.round_of(state.version + 1))
        changes, divisor, metrics = aggregator.merge(state, deliveries)
        aggregator.commit(state, changes, deliveries, divisor, metrics)


def main() -> int:
    """Command line; returns the exit code: 0 done, 2 a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", required=True, help="YAML file; may be given several times")
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_args()
    journal: Journal | None = None
    try:
        config = load_config(arguments.config, arguments.overrides)
        lock_directory(Path(config.directory) / "aggregator", "an aggregator")
        journal = Journal(config, "aggregator", silo=None)
        journal.status("starting")
        torch.set_num_threads(1)
        aggregate(config, journal)
    except (ConfigError, RefusedError) as error:
        print(f"atoll: {error}", file=sys.stderr, flush=True)
        if journal:
            journal.error(str(error))
            journal.status("failed")
        return 2
    peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    journal.record("aggregator", peak_memory_bytes=peak_memory_bytes)
    journal.status("finished", round=config.num_rounds)
    journal.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
