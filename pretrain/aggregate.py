"""The aggregator's loop: wait for the silos of a round, verify, merge, take the outer step, commit. CPU only.

    python -m pretrain.aggregate --config run.yaml [key=value ...]

All its state is in the store: killed at any point, it goes on with the same round and comes to the same commit.
"""

import argparse
import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pretrain.config import ConfigError, RunConfig, load_config
from pretrain.exchange.store import StoreExchange, delivery_path, file_payload, version_path
from pretrain.journal import Journal
from pretrain.lock import lock_directory
from pretrain.outer.codec import CODECS, KIND, key
from pretrain.outer.digest import digest_tensors
from pretrain.outer.fragments import cut_fragments
from pretrain.outer.merge import mean_cosine, weighted_mean
from pretrain.outer.optimizer import outer_step
from pretrain.trust.contract import build_contract, check_same_contract, contract_bytes
from pretrain.trust.ledger import Commit, Contributor, Manifest, Payload, RefusedError, sha256_bytes


@dataclass(kw_only=True)
class OuterState:
    """The global parameters and the outer optimizer's state, fp32, in host memory: 8 bytes a parameter."""

    version: int
    parameters: dict[str, Tensor]
    velocity: dict[str, Tensor]  # empty for sgd
    parameters_digest: str


@dataclass(kw_only=True)
class Delivery:
    """One silo's verified delivery: its manifest, where its payloads lie, and the norm of its pseudo-gradient."""

    manifest: Manifest
    manifest_sha256: str
    files: list[Path]
    norm: float

    def tensor(self, fragment: int, name: str) -> Tensor:
        """One coded tensor, read from disk."""
        with safe_open(self.files[fragment], framework="pt") as tensors:
            return tensors.get_tensor(key(name))


class Aggregator:
    """Merges the silos of one store. Memory: the outer state and a few single tensors, however many silos there are."""

    def __init__(self, config: RunConfig, journal: Journal) -> None:
        self._config, self._journal = config, journal
        self._exchange = StoreExchange(config.store_url)
        self._scratch = Path(config.directory) / "aggregator"
        self._codec = CODECS[config.outer.codec]
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
        state = self._load(newest) if newest >= 0 else self._create()
        self._fragments = self._cut(state.parameters)
        return state

    def _cut(self, parameters: dict[str, Tensor]) -> list[list[str]]:
        try:
            return cut_fragments({n: p.numel() for n, p in parameters.items()}, self._config.outer.num_fragments)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _create(self) -> OuterState:
        """Version 0: the contract's initial parameters and an outer state of zeros."""
        from tokenizers import Tokenizer

        from pretrain.silo.model import build_initial

        vocab_size = Tokenizer.from_file(str(self._config.tokenizer_file)).get_vocab_size()
        model = build_initial(self._config.model, vocab_size)
        parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        with_velocity = self._config.outer.optimizer == "nesterov"
        velocity = {n: torch.zeros_like(p) for n, p in parameters.items()} if with_velocity else {}
        state = OuterState(version=-1, parameters=parameters, velocity=velocity, parameters_digest="")
        self._fragments = self._cut(parameters)
        self._commit(state, [], divisor=0, metrics={})
        return state

    def _load(self, newest: int) -> OuterState:
        """Restart: check the chain of commits, then load the newest version and compare its digests."""
        for version in range(newest + 1):
            commit = self._exchange.read_commit(version)
        parameters: dict[str, Tensor] = {}
        velocity: dict[str, Tensor] = {}
        for payloads, target in ((commit.payloads, parameters), (commit.state_payloads, velocity)):
            for payload in payloads:
                file = self._scratch / "inbox" / payload.file
                self._exchange.fetch(version_path(newest), payload, file)
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                        target[name.split("/", 1)[1]] = tensors.get_tensor(name).clone()
                file.unlink()
        if digest_tensors(parameters.items()) != commit.parameters_digest:
            raise RefusedError(f"version {newest}: its parameters do not have the digest of its commit")
        if digest_tensors(velocity.items()) != commit.outer_digest:
            raise RefusedError(f"version {newest}: its outer state does not have the digest of its commit")
        return OuterState(
            version=newest, parameters=parameters, velocity=velocity, parameters_digest=commit.parameters_digest
        )

    # ---- one round

    def collect(self, state: OuterState) -> list[Delivery]:
        """Wait for every silo of the roster; verify each delivery as it comes; refuse what is not as it should be."""
        round = state.version + 1
        arrived: dict[str, Delivery] = {}
        announced: list[str] = []
        while len(arrived) < len(self._roster):
            for silo in self._roster:
                manifest = self._exchange.delivery(silo, round) if silo not in arrived else None
                if manifest is None:
                    continue
                try:
                    arrived[silo] = self._verify(silo, manifest, state)
                except RefusedError as error:
                    print(f"round {round}: refused the delivery of silo {silo}: {error}", flush=True)
                    self._exchange.refuse(silo, round, manifest, str(error))
            missing = [silo for silo in self._roster if silo not in arrived]
            if missing and missing != announced:
                what = f"silo {', '.join(missing)}: delivery of round {round}"
                self._journal.status("waiting", round=round, waiting_for=what)
                print(f"round {round}: waiting for {what}", flush=True)
                announced = missing
            if missing:
                time.sleep(self._config.exchange.poll_seconds)
        return [arrived[silo] for silo in sorted(arrived)]

    def _verify(self, silo: str, data: bytes, state: OuterState) -> Delivery:
        """Check manifest, checksums, names, shapes, dtypes and values; raises RefusedError."""
        manifest, round = Manifest.from_bytes(data), state.version + 1
        expected = {
            "silo": silo,
            "round": round,
            "base_version": state.version,
            "base_digest": state.parameters_digest,
            "contract_sha256": self._exchange.contract_sha256,
            "codec": self._config.outer.codec,
            "steps": self._config.outer.sync_interval_steps,
        }
        for term, value in expected.items():
            if getattr(manifest, term) != value:
                raise RefusedError(f"its {term} is {getattr(manifest, term)!r}, not {value!r}")
        if manifest.tokens < 1:
            raise RefusedError(f"it counts {manifest.tokens} tokens")
        if [p.fragment for p in manifest.payloads] != list(range(len(self._fragments))):
            raise RefusedError(f"it has not the {len(self._fragments)} fragments of this run, in order")
        files, norm_squared = [], 0.0
        for payload, names in zip(manifest.payloads, self._fragments, strict=True):
            file = self._scratch / "inbox" / silo / f"{payload.fragment:03d}.safetensors"
            self._exchange.fetch(delivery_path(silo, round), payload, file)
            norm_squared += self._check_values(file, names, state)
            files.append(file)
        return Delivery(manifest=manifest, manifest_sha256=sha256_bytes(data), files=files, norm=norm_squared**0.5)

    def _check_values(self, file: Path, names: list[str], state: OuterState) -> float:
        """Check a payload's tensors; returns the squared norm of the pseudo-gradient in it."""
        norm_squared = 0.0
        try:
            with safe_open(file, framework="pt") as tensors:
                if set(tensors.keys()) != {key(name) for name in names}:
                    raise RefusedError(f"fragment {file.stem} holds other tensors than those of this run")
                for name in names:
                    coded, base = tensors.get_tensor(key(name)), state.parameters[name]
                    given = f"{coded.dtype} {list(coded.shape)}"
                    expected = f"{self._codec.dtype} {list(base.shape)}"
                    if given != expected:
                        raise RefusedError(f"{name} is {given}, not {expected}")
                    norm = torch.linalg.vector_norm(self._codec.decode(base, coded)).item()
                    if not math.isfinite(norm):
                        raise RefusedError(f"{name} has values that are not finite")
                    norm_squared += norm**2
        except SafetensorError as error:
            raise RefusedError(f"fragment {file.stem} is no safetensors file: {error}") from None
        return norm_squared

    def merge(self, state: OuterState, deliveries: list[Delivery]) -> tuple[int, dict[str, float]]:
        """Merge and take the outer step in place, one tensor at a time; returns the divisor and the round's metrics."""
        outer = self._config.outer
        update_squared, units_squared, divisor = 0.0, 0.0, 0
        for fragment, names in enumerate(self._fragments):
            for name in names:
                base = state.parameters[name]
                units = torch.zeros(base.shape, dtype=torch.float64)  # sum of the silos' directions, for the cosine
                weighted = self._weighted(deliveries, fragment, name, base, units)
                merged, divisor = weighted_mean(weighted, base.shape)
                new, velocity = outer_step(base, merged, state.velocity.get(name), lr=outer.lr, momentum=outer.momentum)
                if not new.isfinite().all():
                    raise RefusedError(f"round {state.version + 1}: {name}: the outer step leaves the range of fp32")
                update_squared += torch.linalg.vector_norm(new - base, dtype=torch.float64).item() ** 2
                units_squared += torch.linalg.vector_norm(units).item() ** 2
                base.copy_(new)
                if velocity is not None:
                    state.velocity[name].copy_(velocity)
        metrics = {"update_norm": update_squared**0.5, "cosine_mean": mean_cosine(units_squared, len(deliveries))}
        return divisor, metrics

    def _weighted(
        self, deliveries: list[Delivery], fragment: int, name: str, base: Tensor, units: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """Weight and pseudo-gradient of one tensor, silo after silo; adds each one's direction to `units`."""
        for delivery in deliveries:
            pseudo_gradient = self._codec.decode(base, delivery.tensor(fragment, name))
            if delivery.norm:
                units.add_(pseudo_gradient, alpha=1 / delivery.norm)
            yield delivery.manifest.tokens, pseudo_gradient

    def commit(self, state: OuterState, deliveries: list[Delivery], divisor: int, metrics: dict[str, float]) -> None:
        """Publish the next version, record it, prune what nobody can need again."""
        contributors = [
            Contributor(
                silo=d.manifest.silo,
                manifest_sha256=d.manifest_sha256,
                tokens=d.manifest.tokens,
                tokens_total=d.manifest.tokens_total,
                steps=d.manifest.steps,
                weight=d.manifest.tokens,
            )
            for d in deliveries
        ]
        self._commit(state, contributors, divisor=divisor, metrics=metrics)
        weights = [c.weight for c in contributors]
        print(
            f"commit {state.version:5d}/{self._config.num_rounds}  silos {', '.join(c.silo for c in contributors)}  "
            f"divisor {divisor}  update {metrics['update_norm']:.4f}  cosine {metrics['cosine_mean']:+.3f}  "
            f"digest {state.parameters_digest[:12]}",
            flush=True,
        )
        for fragment in range(len(self._fragments)):
            self._journal.record(
                "commit",
                version=state.version,
                fragment=fragment,
                silos=[c.silo for c in contributors],
                weights=weights,
                divisor=divisor,
                **metrics,
                digest=state.parameters_digest,
            )
        self._exchange.prune(self._roster, state.version, self._config.exchange.keep_versions)

    def _commit(
        self, state: OuterState, contributors: list[Contributor], *, divisor: int, metrics: dict[str, float]
    ) -> None:
        version = state.version + 1
        parameters_digest = digest_tensors(state.parameters.items())
        outbox = self._scratch / "outbox"
        shutil.rmtree(outbox, ignore_errors=True)
        outbox.mkdir(parents=True)
        payloads: list[tuple[Payload, Path]] = []
        state_payloads: list[tuple[Payload, Path]] = []
        for index, names in enumerate(self._fragments):
            for stem, kind, values, rows in (
                ("parameters", KIND, state.parameters, payloads),
                ("outer", "velocity", state.velocity, state_payloads),
            ):
                if values:
                    file = outbox / f"{stem}-{index:03d}.safetensors"
                    save_file({f"{kind}/{name}": values[name] for name in names}, file)
                    rows.append((file_payload(file, index), file))
        commit = Commit(
            contract_sha256=self._exchange.contract_sha256,
            version=version,
            previous=sha256_bytes(self._exchange.commit_bytes(version - 1)) if version else None,
            codec="fp32",
            payloads=[payload for payload, _ in payloads],
            state_payloads=[payload for payload, _ in state_payloads],
            contributors=contributors,
            divisor=divisor,
            parameters_digest=parameters_digest,
            outer_digest=digest_tensors(state.velocity.items()),
            metrics=metrics,
        )
        self._exchange.publish(commit, payloads + state_payloads)
        state.version, state.parameters_digest = version, parameters_digest


def aggregate(config: RunConfig, journal: Journal) -> None:
    """Commit one round after another until the last."""
    aggregator = Aggregator(config, journal)
    state = aggregator.start()
    while state.version < config.num_rounds:
        deliveries = aggregator.collect(state)
        journal.status("merging", round=state.version + 1)
        divisor, metrics = aggregator.merge(state, deliveries)
        aggregator.commit(state, deliveries, divisor, metrics)


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
