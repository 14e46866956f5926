"""Seconds of a whole commit, from the arrival of the last delivery to commit.json, in copies of the fp32 model.

    python -m benchmarks.merge [--sizes 65M 1B] [--silos 2 8] [--codecs int4 fp32] [--versions 5] [--directory DIR]
    taskset --cpu-list 0 python -m benchmarks.merge                   # on one core

The real aggregator, in a thread of this process, works on a directory store; deliveries are written by hand, each with
bytes of its own, and all but the last are verified before the clock starts. What is measured: download, check and
decode of the last one, merge, outer step (Nesterov), coding, hashing, writing and publishing. Beside each median stand,
measured between the versions with the same threads, a copy of the fp32 model in memory (`Tensor.copy_`), and a plain
write of the commit's bytes to the same disk with fsync, twice: into the aggregator's directory and into the store.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.tokenizer import train_tokenizer
from pretrain.aggregate import Aggregator
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config
from pretrain.exchange.payload import save_tensors
from pretrain.exchange.store import delivery_path, file_payload, version_path
from pretrain.host.journal import Journal
from pretrain.outer.codec import encode
from pretrain.outer.digest import digest_rows
from pretrain.outer.state import OuterState
from pretrain.trust.ledger import Manifest, sha256_bytes
from pretrain.trust.members import Members, own_signer, public_keys

SIZES: dict[str, dict[str, int]] = {
    "0.5M": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2},
    "65M": {"hidden_size": 768, "intermediate_size": 2112, "num_hidden_layers": 7},
    "350M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 26},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 18},
}
VOCAB_SIZE = 8192
NOISE = 1e-3  # of a pseudo-gradient's elements


def configuration(directory: Path, model: dict[str, Any], names: list[str], overrides: list[str]) -> RunConfig:
    """A federation whose silos nobody starts."""
    tokenizer = directory / "tokenizer"
    train_tokenizer(iter(["a silo, and another silo"] * 50), vocab_size=260, output=tokenizer)
    settings = {
        "directory": directory / "run",
        "tokenizer": tokenizer,
        "model.config": json.dumps(model | {"model_type": "llama"}),
        "outer.sync_interval_steps": 1,
        "outer.optimizer": "nesterov",
        "exchange.poll_seconds": 0.005,
        "wandb.mode": "disabled",
        "roster": json.dumps(names),
        f"silos.{names[0]}": "{}",
    }
    return load_config([], [*(f"{key}={value}" for key, value in settings.items()), *overrides])


class Deliveries:
    """What the silos would have sent."""

    def __init__(self, config: RunConfig, state: OuterState, contract_sha256: str, directory: Path) -> None:
        self._config, self._state, self._contract_sha256 = config, state, contract_sha256
        self._directory = directory
        keys = public_keys(config)
        self._members = {silo: Members(keys=keys, signer=own_signer(config, silo)) for silo in config.full_roster}

    def write(self, version: int) -> Iterator[None]:
        """Deliver one silo's after the other; the last manifest after the last yield."""
        state, codec = self._state, self._config.outer.codec
        base_digest = digest_rows(state.rows.values())
        before = Path(self._config.store_url) / version_path(version - 1) / "commit.json"
        cosigned = sha256_bytes(before.read_bytes())
        for index, silo in enumerate(self._config.full_roster):
            made = self._directory / f"{silo}.safetensors"
            if codec == "fp32" or not made.exists():
                generator = torch.Generator().manual_seed(index)
                save_tensors({name: self._coded(value, generator) for name, value in state.parameters.items()}, made)
                with made.open("rb") as written:
                    os.fsync(written.fileno())  # as a silo's upload leaves it
            folder = Path(self._config.store_url) / delivery_path(silo, version)
            folder.mkdir(parents=True)
            file = folder / f"{version:06d}.safetensors"
            os.link(made, file)
            manifest = Manifest(
                contract_sha256=self._contract_sha256,
                silo=silo,
                version=version,
                base_version=version - 1,
                base_digest=base_digest,
                cosigned=cosigned,
                codec=codec,
                payloads=[file_payload(file, 0)],
                tokens=100,
                steps=1,
                tokens_total=100 * version,
                metrics={"loss": 1.0, "pseudo_gradient_norm": 1.0},
            )
            yield
            temporary = folder / ".manifest"
            temporary.write_bytes(self._members[silo].sign(manifest).to_bytes())
            temporary.rename(folder / "manifest.json")

    def _coded(self, base: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return encode(self._config.outer.codec, base, base - NOISE * torch.randn(base.shape, generator=generator))


def copy_seconds(num_elements: int) -> float:
    """Of an fp32 model in memory, with as many threads as the aggregator has; at most 2^28 elements, scaled."""
    some = min(num_elements, 1 << 28)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    source, target = torch.ones(some), torch.empty(some)
    seconds = []
    for _ in range(4):  # the first one only touches the memory
        began = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - began)
    torch.set_num_threads(1)
    return statistics.median(seconds[1:]) * num_elements / some


def write_seconds(folder: Path, num_bytes: int) -> float:
    """Of so many bytes into a new file, with fsync, twice."""
    block = os.urandom(1 << 22)
    began = time.perf_counter()
    for name in ("one", "two"):
        with (folder / name).open("wb") as file:
            for start in range(0, num_bytes, len(block)):
                file.write(block[: num_bytes - start])
            file.flush()
            os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    (folder / "one").unlink()
    (folder / "two").unlink()
    return seconds


def measure(  # noqa: PLR0917 (apply has no others)
    directory: Path, size: str, num_silos: int, codec: str, num_versions: int, overrides: list[str]
) -> str:
    """The table's line of one setting."""
    torch.set_num_threads(1)  # as the aggregator's main does
    model = SIZES[size] | {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": VOCAB_SIZE}
    names = [f"silo-{index:04d}" for index in range(num_silos)]
    run = [f"inner.num_steps={num_versions}", f"outer.codec={codec}", f"outer.downlink_codec={codec}"]
    config = configuration(directory, model, names, [*run, *overrides])
    aggregator = Aggregator(config, Journal(config, "aggregator", silo=None))
    state = aggregator.start()
    deliveries = Deliveries(config, state, aggregator._exchange.contract_sha256, directory)
    num_elements = sum(value.numel() for value in state.parameters.values())
    commits, copies, writes = [], [], []
    for version in range(1, num_versions + 1):
        arriving = deliveries.write(version)
        worker = threading.Thread(target=one_version, args=(aggregator, state))
        worker.start()
        for _ in config.full_roster:
            next(arriving)
        time.sleep(0.2 + num_elements * num_silos / 1e9)  # until those that are there are verified
        arrived = time.time()
        next(arriving, None)
        worker.join()
        folder = Path(config.store_url) / version_path(version)
        commits.append((folder / "commit.json").stat().st_mtime - arrived)
        copies.append(copy_seconds(num_elements))
        writes.append(write_seconds(directory, sum(file.stat().st_size for file in folder.glob("*.safetensors"))))
    seconds, copy, write = map(statistics.median, (commits, copies, writes))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (
        f"{num_elements / 1e6:7.1f} M  {num_silos:4d} silos  {codec:>5}  {seconds:8.3f} s  ({min(commits):.3f} to "
        f"{max(commits):.3f})  {seconds / copy:6.1f} copies of {copy * 1e3:.1f} ms  {seconds / write:5.2f} "
        f"plain writes of {write:.3f} s  peak {peak_bytes / num_elements:.1f} bytes a parameter"
    )


def one_version(aggregator: Aggregator, state: OuterState) -> None:
    """What the aggregator's loop does, in silence."""
    with in_silence():
        deliveries = aggregator.collect(state)
        aggregator.commit(state, deliveries, aggregator.merge(state, deliveries))


@contextlib.contextmanager
def in_silence() -> Iterator[None]:
    """What is printed is lost."""
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        yield


def main() -> None:
    """Print a line for each setting, each measured in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["65M", "1B"], choices=SIZES)
    parser.add_argument("--silos", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--codecs", nargs="+", default=["int4", "fp32"])
    parser.add_argument("--versions", type=int, default=5, help="commits, of which the median counts")
    parser.add_argument("--directory", type=Path, help="on the disk that is to be measured (default: a temporary one)")
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_intermixed_args()
    context = multiprocessing.get_context("spawn")  # a process for each, so that its peak of memory is its own
    print(f"{len(os.sched_getaffinity(0))} cores", flush=True)
    for size in arguments.sizes:
        for codec in arguments.codecs:
            for num_silos in arguments.silos:
                settings = (size, num_silos, codec, arguments.versions, arguments.overrides)
                with tempfile.TemporaryDirectory(dir=arguments.directory) as directory, context.Pool(1) as process:
                    print(process.apply(measure, (Path(directory), *settings)), flush=True)


if __name__ == "__main__":
    main()
