"""Seconds a billion parameters of a commit whose outer state lies on disk, and how long the disk alone would take.

    python -m benchmarks.disk_state [--memory 4] [--layers 80] [--width 8192] [--directory DIR] [key=value ...]
    python -m benchmarks.disk_state --start 65M --memory 0.6 [outer.state=memory]

The real aggregator with `outer.state: disk`, in a process that may use `--memory` GB, page cache included (a control
group of its own: needs root), commits one version of one fragment: a layer of a Llama of 70 billion parameters, cut
into as many fragments as it has layers and one. Files of all other tensors are there, and empty. The state is not in
the page cache when the clock starts, and on the disk when it ends; two silos' deliveries, int4, lie in a store on the
same disk. Beside it stands the disk's own time: to read and to write as many bytes as a commit has to, one after
another, measured before and after in the same run. Takes some 14 GB of disk as it is, and gives them back.

With `--start` a model of this size is made and published as version 0 in so much memory, and loaded again.
"""

import argparse
import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.merge import SIZES, configuration, in_silence
from benchmarks.proc import status_bytes
from pretrain.aggregate import Aggregator
from pretrain.config.keys import RunConfig
from pretrain.exchange.payload import save_tensors
from pretrain.exchange.store import delivery_path
from pretrain.host.journal import Journal
from pretrain.outer.digest import digest_rows, tensor_rows
from pretrain.outer.placing import OnDisk
from pretrain.outer.quantize import QUANTIZERS, Parts
from pretrain.outer.state import OuterState, kept_kinds
from pretrain.plan.bytes import model_shapes
from pretrain.trust.contract import build_contract, first_contract
from pretrain.trust.ledger import Commit, Manifest, sha256_bytes

GB, BLOCK_BYTES = 10**9, 1 << 22
NAMES = ["alpha", "beta"]
VOCAB_SIZE = 128_256
VERSION = 1
CONTROL_GROUPS = Path("/sys/fs/cgroup")


class Sparse(OnDisk):
    """Files that take no room until they are written to."""

    def _reserve(self, descriptor: int, num_bytes: int) -> None:
        os.ftruncate(descriptor, num_bytes)


# ---- in a process of its own


def measure(directory: Path, layers: int, width: int, overrides: list[str]) -> None:
    """Prepare, commit, print."""
    torch.set_num_threads(1)  # as the aggregator's main does
    model = {"hidden_size": width, "intermediate_size": width * 7 // 2, "num_hidden_layers": layers}
    model |= {"num_attention_heads": width // 128, "num_key_value_heads": max(1, width // 1024)}
    run = ["inner.num_steps=1000", "outer.sync_interval_steps=1000", f"outer.num_fragments={layers + 1}"]
    run += ["outer.codec=int4", "outer.downlink_codec=int4", "exchange.snapshot_versions=1000"]
    given = [*run, "outer.state=disk", *overrides]
    config = configuration(directory, model | {"vocab_size": VOCAB_SIZE}, NAMES, given)
    aggregator = Aggregator(config, Journal(config, "aggregator", silo=None))
    state, names = prepare(config, aggregator)
    num_elements = sum(state.parameters[name].numel() for name in names)
    real = [of[name] for of in (state.parameters, *state.kept.values()) for name in names]
    payload_bytes = deliver(config, aggregator, state, names)
    evict(real)
    state_bytes = sum(4 * value.numel() for value in real)
    before = disk_seconds(directory)
    seconds = commit(aggregator, state, real)
    after = disk_seconds(directory)
    assert state.version == VERSION
    read, written = (sum(of) / 2 for of in zip(before, after, strict=True))
    # Deliveries are read, written into the inbox and read again; a change is written, read, and written to the store.
    alone = read * (state_bytes + 2.5 * payload_bytes) + written * (state_bytes + 2 * payload_bytes)
    total = sum(value.numel() for value in state.parameters.values())
    words, all_of_it = ", ".join(f"{what} {took:.1f} s" for what, took in seconds.items()), sum(seconds.values())
    print(
        f"RESULT {total / 1e9:.2f} billion parameters, a fragment of {num_elements / 1e9:.3f}: {words}; "
        f"{all_of_it / num_elements * 1e9:.1f} s a billion; the disk alone {alone:.1f} s (reads {1 / read / GB:.2f} "
        f"GB/s, writes {1 / written / GB:.2f} GB/s): ratio {all_of_it / alone:.2f}",
        flush=True,
    )


def start_twice(directory: Path, size: str, overrides: list[str]) -> None:
    """Make version 0, and load it again as after a kill."""
    model = SIZES[size] | {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8192}
    given = ["outer.codec=int4", "outer.downlink_codec=int4", "outer.state=disk", *overrides]
    config = configuration(directory, model, NAMES, given)
    for what in ("made", "loaded again"):
        began = time.perf_counter()
        Aggregator(config, Journal(config, "aggregator", silo=None)).start()
        print(
            f"RESULT {size}, outer.state {config.outer.state}: {what} in {time.perf_counter() - began:.1f} s",
            flush=True,
        )


def prepare(config: RunConfig, aggregator: Aggregator) -> tuple[OuterState, list[str]]:
    """Version 0 of a store without its tensors, and the outer state, with values for the fragment of `VERSION`."""
    exchange = aggregator._exchange
    exchange.write_contract(first_contract(build_contract(config)))
    shapes, place = model_shapes(config, VOCAB_SIZE), Sparse(Path(config.directory) / "aggregator" / "state")
    parameters = {name: place.zeros(shape) for name, shape in shapes.items()}
    aggregator._merger.cut(parameters)
    kinds = kept_kinds(config.outer.optimizer, config.outer.downlink_codec)
    kept = {kind: {name: place.zeros(shape) for name, shape in shapes.items()} for kind in kinds}
    names = aggregator._merger.fragments[config.schedule.fragment(VERSION)]
    generator = torch.Generator().manual_seed(0)
    for scale, of in ((0.02, parameters), *((1e-3, of) for of in kept.values())):
        for name in names:
            fill(of[name], scale, generator)
        place.let_go(of[name] for name in names)
    rows = {name: [name, "torch.float32", list(value.shape), "blake3:"] for name, value in parameters.items()}
    rows |= tensor_rows({name: parameters[name] for name in names}, 2)
    state = OuterState(version=VERSION - 1, parameters=parameters, kept=kept, rows=rows)
    zero = Commit(
        contract_sha256=exchange.contract_sha256,
        version=VERSION - 1,
        previous=None,
        codec="fp32",
        payloads=[],
        contributors=[],
        divisor=0,
        parameters_digest=state.parameters_digest,
        outer_digest="0" * 64,
    )
    aggregator._publish(zero, [])
    aggregator._collector.past.committed(zero)
    return state, names


def fill(value: Tensor, scale: float, generator: torch.Generator) -> None:
    """Normal values, a few at a time."""
    for part in value.view(-1).split(1 << 22):
        part.copy_(torch.randn(part.shape, generator=generator)).mul_(scale)


def deliver(config: RunConfig, aggregator: Aggregator, state: OuterState, names: list[str]) -> int:
    """What two silos would have sent; returns its bytes."""
    generator, num_bytes = torch.Generator().manual_seed(1), 0
    for silo in NAMES:
        folder = Path(config.store_url) / delivery_path(silo, VERSION)
        coded = {name: random_parts(state.parameters[name].numel(), generator) for name in names}
        file = folder / f"{VERSION:06d}.safetensors"
        payload = save_tensors(coded, file, fragment=config.schedule.fragment(VERSION))
        num_bytes += payload.num_bytes
        manifest = Manifest(
            contract_sha256=aggregator._exchange.contract_sha256,
            silo=silo,
            version=VERSION,
            base_version=0,
            base_digest=digest_rows(state.rows[name] for name in names),
            cosigned=sha256_bytes(aggregator._exchange.commit_bytes(VERSION - 1)),
            codec="int4",
            payloads=[payload],
            tokens=100,
            steps=config.schedule.steps(VERSION),
            tokens_total=100,
            metrics={"loss": 1.0, "pseudo_gradient_norm": 1.0},
        )
        (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return num_bytes


def random_parts(num_elements: int, generator: torch.Generator) -> Parts:
    """A coded difference, of any codes and like scales."""
    parts = {}
    for part, (dtype, length) in QUANTIZERS["int4"].layout(num_elements).items():
        if dtype == torch.uint8:
            parts[part] = torch.randint(0, 256, (length,), dtype=dtype, generator=generator) & 0x77  # -8 is no code
        else:
            parts[part] = torch.full((length,), 1e-4, dtype=dtype)
    return parts


def commit(aggregator: Aggregator, state: OuterState, real: list[Tensor]) -> dict[str, float]:
    """Seconds of each part of a commit, from when all has been delivered until all of it is on the disk."""
    marks = [time.perf_counter()]
    deliveries = aggregator.collect(state)
    marks.append(time.perf_counter())
    merged = aggregator.merge(state, deliveries)
    marks.append(time.perf_counter())
    with in_silence():
        aggregator.commit(state, deliveries, merged)
    marks.append(time.perf_counter())
    flush(real)
    marks.append(time.perf_counter())
    words = ("download and check", "merge and step", "write and publish", "what the disk had still to write")
    return {what: marks[n + 1] - marks[n] for n, what in enumerate(words)}


def flush(tensors: list[Tensor]) -> None:
    """Until they are on the disk."""
    libc = ctypes.CDLL(None, use_errno=True)
    for tensor in tensors:
        if libc.msync(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(4 * tensor.numel()), 4):  # MS_SYNC
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def evict(tensors: list[Tensor]) -> None:
    """Out of the page cache, too."""
    flush(tensors)
    libc = ctypes.CDLL(None, use_errno=True)
    for tensor in tensors:
        advice = getattr(mmap, "MADV_PAGEOUT", 21)
        if libc.madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(4 * tensor.numel()), advice):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def disk_seconds(folder: Path, num_bytes: int = 2 * GB) -> tuple[float, float]:
    """Seconds a byte to read and to write a file, one block after another, that the page cache has nothing of."""
    block, file = os.urandom(BLOCK_BYTES), folder / "reference"
    began = time.perf_counter()
    with file.open("wb", buffering=0) as opened:
        for _ in range(num_bytes // BLOCK_BYTES):
            opened.write(block)
        os.fsync(opened.fileno())
        written = time.perf_counter() - began
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began, buffer = time.perf_counter(), bytearray(BLOCK_BYTES)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass
    read = time.perf_counter() - began
    file.unlink()
    return read / num_bytes, written / num_bytes


# ---- in as much memory as is given


@contextmanager
def limited(num_bytes: int) -> Iterator[Path | None]:
    """A control group below our own with so much memory, page cache included; None where none can be made."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    old = next((path for _, kinds, path in lines if "memory" in kinds.split(",")), None)
    new = next((path for number, _, path in lines if number == "0"), "/")
    above = CONTROL_GROUPS / "memory" / old.lstrip("/") if old else CONTROL_GROUPS / new.lstrip("/")
    group = above / f"atoll-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(num_bytes))
        yield group
    except OSError:
        yield None
    finally:
        group.rmdir()


def main() -> None:
    """Measure in a process with little memory, watch it, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=float, default=4.0, help="GB that the process may use")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--width", type=int, default=8192, help="a multiple of 128")
    parser.add_argument("--directory", type=Path, help="on the disk that is to be measured (default: a temporary one)")
    parser.add_argument("--start", choices=SIZES, help="only make and load a model of this size")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.inside and arguments.start:
        start_twice(arguments.directory, arguments.start, arguments.overrides)
        return
    if arguments.inside:
        measure(arguments.directory, arguments.layers, arguments.width, arguments.overrides)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # with all cleaned up
    with limited(round(arguments.memory * GB)) as group, tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        argv = ["--inside", "--directory", folder, f"--layers={arguments.layers}", f"--width={arguments.width}"]
        argv += ["--start", arguments.start] if arguments.start else []
        begin = f"echo $$ > {group}/cgroup.procs && " if group else ""
        command = [sys.executable, "-m", "benchmarks.disk_state", *argv, *arguments.overrides]
        process = subprocess.Popen(["sh", "-c", f'{begin}exec "$@"', "sh", *command])
        peak = 0
        try:
            while process.poll() is None:
                peak = max(peak, status_bytes(process.pid).get("RssAnon", 0))
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
        within = f"in {arguments.memory:g} GB, page cache included" if group else "NOT LIMITED: no control group here"
        print(f"RESULT {json.dumps(within)}: at most {peak / 1e6:.0f} MB of it anonymous", flush=True)
    if process.returncode:
        raise SystemExit(f"failed with {process.returncode}" + (": out of memory" if process.returncode == -9 else ""))


if __name__ == "__main__":
    main()
