"""Device memory that syncing needs beyond training, with fragments that take turns and overlap.

    python -m benchmarks.device_memory
    python -m launch.start.workers --num-processes 2 -- python -m benchmarks.device_memory --stage 3

First a silo's engine makes inner steps alone; then the silo's real loop goes on with it in a federation of one, with a
real aggregator: fragments are delivered, merged, mixed and adopted, and the global model is swapped in for an
evaluation. Shown are the highest bytes of any rank against the largest fragment in fp32: beyond the peak of the steps
that it made alone, and between two steps beyond what the step before has left.

On a GPU these are the allocator's own counts. On a CPU, where device and host are one memory, they are counted tensor
by tensor: what Engine.step, read and write create is the device's, as long as it lives and whoever holds it; what is
created outside of them (the leader's fp32 copies of the global parameters and of fragments in flight, payloads) is host
memory on a GPU machine too, and not counted. What a kernel or a collective uses inside for itself is not seen.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.silo_overhead import configuration, make_text
from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config
from pretrain.host.journal import Journal
from pretrain.outer.fragments import cut_fragments
from pretrain.silo.engine import Engine
from pretrain.silo.ranks import Ranks
from pretrain.sync.elastic import ElasticSync
from pretrain.sync.through_store import ThroughStore
from pretrain.train import prepare, train

KIB = 1 << 10


class Created(TorchDispatchMode):
    """Bytes of the tensors that were created within this context and are still alive, wherever they are held."""

    def __init__(self, patience_seconds: float = 0.0) -> None:
        """`patience_seconds`: gloo's threads let go of a tensor a moment after its collective; wait for it that long
        before a new peak is counted.
        """
        super().__init__()
        self.patience_seconds = patience_seconds
        self.num_bytes = self.peak_bytes = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor) or leaf.is_meta:  # on the meta device nothing takes memory
                continue
            if leaf.untyped_storage()._cdata not in known | self._alive:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        self._alive.add(key)
        self.num_bytes += num_bytes
        patient_until = time.monotonic() + self.patience_seconds
        while self.num_bytes > self.peak_bytes and time.monotonic() < patient_until:
            time.sleep(0.001)
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self.num_bytes -= num_bytes


class Meter:
    """Peaks of an engine's device memory: within its steps, and between two steps beyond what the first has left."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self.device = device
        self.step_bytes = self.sync_bytes = self.beyond_bytes = 0
        self._created = Created() if device.type == "cpu" else None
        self._left_bytes: int | None = None
        step = self._within(engine.step, patience_seconds=0.0)

        def measured_step(*arguments: Any) -> Any:
            self.between_steps()
            self._restart()
            result = step(*arguments)
            self.step_bytes = max(self.step_bytes, self._peak())
            self._left_bytes = self._restart()
            return result

        replaced = {"step": measured_step, "read": self._within(engine.read), "write": self._within(engine.write)}
        for name, method in replaced.items():
            setattr(engine, name, method)

    def between_steps(self) -> None:
        """Take up what happened since the last step."""
        if self._left_bytes is not None:
            self.sync_bytes = max(self.sync_bytes, self._peak())
            self.beyond_bytes = max(self.beyond_bytes, self._peak() - self._left_bytes)

    def _within(self, method: Callable[..., Any], patience_seconds: float = 0.1) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if self._created is None:
                return method(*arguments)
            self._created.patience_seconds = patience_seconds
            with self._created:
                return method(*arguments)

        return call

    def _peak(self) -> int:
        return self._created.peak_bytes if self._created else torch.cuda.max_memory_allocated(self.device)

    def _restart(self) -> int:
        """Begin a new peak at the bytes in use, which are returned."""
        if self._created:
            self._created.peak_bytes = self._created.num_bytes
            return self._created.num_bytes
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)


def settings(num_ranks: int) -> list[str]:
    """Fragments that overlap, few activations in which one could hide, and an embedding that is one of its own."""
    return [
        "exchange.kind=store",
        "inner.num_steps=32",
        "inner.warmup_steps=0",
        "outer.sync_interval_steps=8",
        "outer.num_fragments=4",
        "outer.overlap_steps=2",
        "outer.mixing=0.5",
        "sequence_tokens=16",
        f"silo.global_batch_sequences={num_ranks}",
        "silo.micro_batch_sequences=1",
        "silo.eval_interval_rounds=1",
        "silos.bench.deepspeed.zero_optimization.reduce_bucket_size=4194304",
        "model.config={model_type: llama, vocab_size: 16384, hidden_size: 256, intermediate_size: 704, "
        "num_hidden_layers: 6, num_attention_heads: 4}",
    ]


@contextmanager
def aggregator(config: RunConfig) -> Iterator[None]:
    """Merge the silos of `config` meanwhile, to the end of the run."""
    file = Path(config.directory) / "run.yaml"
    save_config(config, file)
    argv = [sys.executable, "-m", "pretrain.aggregate", "--config", str(file)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        yield
        process.wait()
    finally:
        process.kill()


def measure(
    config: RunConfig, ranks: Ranks, watch: Callable[[ElasticSync], None] = lambda sync: None
) -> tuple[list[int], int]:
    """Bytes of this rank beyond the peak of training alone, and between two steps beyond what was there before.

    With the largest fragment's. `watch` is given what syncs, before anything else happens.
    """
    journal = Journal(config, "silos/bench", silo="bench") if ranks.is_leader else None
    with aggregator(config) if ranks.is_leader else nullcontext():
        exchange = ThroughStore(config, "bench")
        sync = ElasticSync(config, "bench", ranks, journal, exchange, asked_to_stop=lambda: False)
        watch(sync)
        silo = prepare(config, "bench", ranks, journal, sync)
        meter = Meter(silo.engine, ranks.device)
        for _ in range(config.inner.num_steps):
            silo.engine.step([next(silo.batches)], config.inner.lr)
        alone_bytes = meter.step_bytes
        train(silo)
        silo.batches.close()
        sync.close()
    sizes = {name: shape.numel() for name, shape in silo.engine.shapes.items()}
    fragments = cut_fragments(sizes, config.outer.num_fragments)
    largest = max(sum(sizes[name] for name in names) for names in fragments)
    return [max(meter.step_bytes, meter.sync_bytes) - alone_bytes, meter.beyond_bytes], 4 * largest


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments, ranks = parser.parse_args(), Ranks()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(ranks.from_leader(scratch))
        if ranks.is_leader:
            make_text(directory / "text")
        ranks.barrier()
        overrides = [*settings(ranks.num_ranks), *arguments.overrides]
        config = configuration(directory, directory / "text", arguments.stage, ranks.num_ranks, overrides)
        found, fragment = measure(config, ranks)
        ranks.barrier()
    of_ranks = ranks.sum([float(bytes_) * (rank == ranks.rank) for rank in range(ranks.num_ranks) for bytes_ in found])
    beyond_peak, beyond_left = max(of_ranks[::2]), max(of_ranks[1::2])
    if ranks.is_leader:
        print(
            f"RESULT {ranks.device.type}, {ranks.num_ranks} ranks, ZeRO-{arguments.stage}, "
            f"{config.silos['bench'].precision}: beyond the peak of training alone {beyond_peak / fragment:.3f} "
            f"fragments, between two steps beyond what was there {beyond_left / fragment:.3f} fragments "
            f"({beyond_left / KIB:,.0f} of {fragment / KIB:,.0f} KiB)\n"
            f"CLAIM at most one fragment: {'holds' if max(beyond_peak, beyond_left) <= fragment else 'BROKEN'}",
            flush=True,
        )
    ranks.close()


if __name__ == "__main__":
    main()
