"""A round with a secure sum at a size that users have, and the same round without: seconds, processor seconds, memory.

    python -m benchmarks.secure_sum --parameters 1000000000 --silos 4 10 [--ways secure plain sealed] [--directory DIR]

One version through a directory, by Atoll's own code, each party in a process of its own and one after another, as one
machine has not the memory for all: the aggregator makes version 0; each silo takes it over, is given values instead of
training, codes, masks, writes and delivers them; then manifests arrive one by one, and the aggregator verifies, asks
for the sum, adds up, takes the masks off, takes the outer step (Nesterov) and commits, while all silos' exchanges
answer. `plain` is the same without `outer.secure_sum`, `sealed` with it and with `trust.seal`.

Of a silo the median of all counts, and the largest peak. A part's seconds are of the clock and, in brackets, of the
processors, all threads together, as the machine may be busy. Masks are held against the cipher alone, which writes as
many bytes of AES-256 in counter mode into one buffer of a block, in the same process. Peaks are of the memory that is
no file's (RssAnon), and of all that is in memory, payloads that are mapped included, in bytes a parameter. The disk
has to hold one fp32 model for each silo, and four more: a payload is deleted from the store once the aggregator has
its copy.
"""

import argparse
import importlib
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from benchmarks.masks import cipher_alone
from benchmarks.merge import NOISE, SIZES, configuration, in_silence, one_version
from benchmarks.proc import status_bytes
from benchmarks.reading import one_rank_environment
from benchmarks.signing import start
from pretrain.aggregate import Aggregator
from pretrain.config.keys import RunConfig
from pretrain.exchange.store import delivery_path
from pretrain.host.journal import Journal
from pretrain.merge.collect import Delivery
from pretrain.outer.threads import in_threads
from pretrain.silo.checkpoint import Progress
from pretrain.silo.copies import HostCopies
from pretrain.silo.engine import Engine
from pretrain.silo.model import build_without_memory
from pretrain.silo.ranks import Ranks
from pretrain.sync.silo_sync import SiloSync
from pretrain.sync.through_store import ThroughStore
from pretrain.trust.members import with_keys

R = TypeVar("R")
CONTEXT = multiprocessing.get_context("forkserver")  # which has imported all once
WAYS: dict[str, dict[str, Any]] = {
    "secure": {},
    "plain": {"outer.secure_sum": "false"},
    "sealed": {"trust.seal": "true"},
}
SETTINGS: dict[str, Any] = {
    "inner.num_steps": 2,
    "outer.secure_sum": "true",
    "outer.max_share": 1.0,
    "outer.max_batch_sequences": 8,
    "outer.codec": "fp32",
    "outer.downlink_codec": "fp32",
    "trust.metrics.pseudo_gradient_norm": "member",
}
HEADS, FEWEST_TOKENS, NOISE_ELEMENTS = 8, 260, 1 << 20
SAMPLE_SECONDS = 0.05
# A part of a round, and the functions that do it, by their module (and class).
OF_SILO = {
    "norm": "pretrain.sync.silo_sync code",
    "code": "pretrain.sync.masked code",
    "mask": "pretrain.sync.masked add",
    "write": "pretrain.sync.silo_sync save_tensors",
    "seal, shares": "pretrain.sync.through_store ThroughStore.sealed",
    "deliver": "pretrain.sync.through_store ThroughStore.deliver",
}
OF_AGGREGATOR = {
    "verify": "pretrain.merge.verify Verifier.verify",
    "sum, unmask": "pretrain.merge.unmask Unmasker.total",
    "outer step": "pretrain.merge.step Step.take",
    "digest": "pretrain.merge.merger tensor_rows",
    "merge": "pretrain.merge.merger Merger.merge",
    "commit": "pretrain.aggregate Aggregator.commit",
}


@dataclass
class Measured:
    """What one process has spent: seconds and processor seconds by part, and its peaks of memory, in bytes."""

    wall: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)
    anonymous: int = 0
    resident: int = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done within counts to a part."""
        began, worked = time.perf_counter(), time.process_time()
        yield
        self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - began
        self.processor[name] = self.processor.get(name, 0.0) + time.process_time() - worked

    def parts(self, places: dict[str, str]) -> None:
        """Have this process's functions count, whoever calls them."""
        for name, place in places.items():
            module, _, path = place.partition(" ")
            *owner, last = path.split(".")
            at = importlib.import_module(module)
            at = getattr(at, owner[0]) if owner else at
            setattr(at, last, self._counting(name, getattr(at, last)))

    def _counting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                return call(*arguments, **named)

        return counting

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Look at this process's memory again and again."""
        done = threading.Event()

        def look() -> None:
            while not done.wait(SAMPLE_SECONDS):
                self.anonymous = max(self.anonymous, status_bytes()["RssAnon"])

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            self.resident = status_bytes()["VmHWM"]


class Still:
    """In an engine's place: parameters that no training changes, but values that are made when they are asked for."""

    def __init__(self, config: RunConfig, seed: int) -> None:
        found = build_without_memory(config.model, FEWEST_TOKENS)
        self.shapes = {name: parameter.shape for name, parameter in found.named_parameters()}
        self.num_parameters = sum(shape.numel() for shape in self.shapes.values())
        self.copies = HostCopies(torch.device("cpu"), of_gathered=False)
        self.has_trained = False
        self._values: dict[str, Tensor] = {}
        self._noise = NOISE * torch.randn(NOISE_ELEMENTS, generator=torch.Generator().manual_seed(seed))

    def write(self, values: Iterable[tuple[str, Tensor]], names: Iterable[str]) -> None:
        """Take them as they are, uncopied."""
        self._values |= dict(values)

    def read(self, name: str) -> Tensor:
        """As they were written, or as training would have made them."""
        value = self._values[name]
        if not self.has_trained:
            return value
        flat = value.clone().view(-1)
        for block in flat.split(len(self._noise)):
            block.add_(self._noise[: len(block)])
        return flat.view(value.shape)


def model(num_parameters: int) -> dict[str, Any]:
    """A Llama of so many parameters, to within two for each of its width: what layers leave are tokens."""
    found: dict[str, Any] = {}
    for size in SIZES.values():
        hidden = size["hidden_size"]
        body = size["num_hidden_layers"] * (4 * hidden**2 + 3 * hidden * size["intermediate_size"] + 2 * hidden)
        tokens = max(FEWEST_TOKENS, (num_parameters - body) // (2 * hidden))
        if not found or body <= num_parameters:
            found = size | {"vocab_size": tokens, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    return found


def federation(directory: Path, num_parameters: int, num_silos: int, way: str) -> RunConfig:
    """With keys of all."""
    names = [f"silo-{index:03d}" for index in range(num_silos)]
    given = SETTINGS | WAYS[way] | {f"silos.{name}": "{}" for name in names}
    overrides = [f"{key}={value}" for key, value in given.items()]
    return with_keys(configuration(directory, model(num_parameters), names, overrides), make=True)


def begin(config: RunConfig) -> int:
    """Make version 0; returns the number of parameters."""
    torch.set_num_threads(1)
    with in_silence():
        _, state = start(config)
    return sum(value.numel() for value in state.parameters.values())


def deliver(config: RunConfig, number: int) -> Measured:
    """One silo's round, up to what leaves it."""
    silo, found, num_threads = config.full_roster[number], Measured(), len(os.sched_getaffinity(0))
    one_rank_environment()
    torch.set_num_threads(num_threads)
    found.parts(OF_SILO)
    with in_silence(), found.memory():
        engine, progress = Still(config, number), Progress()
        as_engine = cast("Engine", engine)
        journal = Journal(config, f"silos/{silo}", silo=silo)
        through = ThroughStore(config, silo)
        sync = SiloSync(config, silo, Ranks(), journal, through, asked_to_stop=lambda: False)
        sync.join()
        with found.part("take over"):
            sync.start(as_engine, progress)
        engine.has_trained = True
        progress.position += config.silos[silo].global_batch_sequences
        sync.deliver(as_engine, progress, 1)
        while not (Path(config.store_url) / delivery_path(silo, 1) / "manifest.json").exists():
            time.sleep(SAMPLE_SECONDS)
        sync.close("delivered")
    _cipher(config, engine.num_parameters, found)
    return found


def _cipher(config: RunConfig, num_parameters: int, found: Measured) -> None:
    """What the cipher alone takes for as many bytes as one party adds or takes off."""
    num_threads = len(os.sched_getaffinity(0))
    if config.outer.secure_sum:
        with found.part("cipher"):
            cipher_alone(4 * num_parameters * len(config.full_roster), num_threads)


def answer(config: RunConfig) -> None:
    """All silos' exchanges wait for the commit, as after a restart."""

    def wait(silo: str) -> None:
        through = ThroughStore(config, silo)
        through.join()
        through.wait_for(1)
        through.close("")

    with in_silence():
        in_threads(wait, config.full_roster, len(config.full_roster))


def merge(config: RunConfig, num_parameters: int) -> Measured:
    """The aggregator's round, from manifests that come one by one."""
    torch.set_num_threads(1)  # as the aggregator's main does
    found, store, verified = Measured(), Path(config.store_url), threading.Semaphore(0)
    found.parts(OF_AGGREGATOR)
    manifests = [store / delivery_path(silo, 1) / "manifest.json" for silo in config.full_roster]
    aside = [Path(config.directory) / f"{silo}.json" for silo in config.full_roster]
    for manifest, waits in zip(manifests, aside, strict=True):
        manifest.rename(waits)
    with in_silence(), found.memory():
        aggregator = Aggregator(config, Journal(config, "aggregator", silo=None))
        state = aggregator.start()
        verify = aggregator._merger.verify

        def verify_once(*arguments: Any) -> Delivery:
            delivery = verify(*arguments)
            manifest = delivery.manifest
            (store / delivery_path(manifest.silo, 1) / manifest.payloads[0].file).unlink()
            verified.release()
            return delivery

        setattr(aggregator._merger, "verify", verify_once)  # noqa: B010 (mypy minds another signature)
        worker = threading.Thread(target=one_version, args=(aggregator, state))
        worker.start()
        for manifest, waits in zip(manifests[:-1], aside, strict=False):
            waits.rename(manifest)
            verified.acquire()
        found.wall.clear()
        found.processor.clear()
        with found.part("since the last came"):
            aside[-1].rename(manifests[-1])
            worker.join()
        aggregator.finish()
    _cipher(config, num_parameters, found)
    return found


def line(what: str, measured: list[Measured], num_parameters: int) -> str:
    """Medians of all parts, and the largest peaks."""
    parts = "  ".join(
        f"{name} {statistics.median(m.wall[name] for m in measured):.2f} "
        f"({statistics.median(m.processor[name] for m in measured):.2f})"
        for name in measured[0].wall
    )
    anonymous, resident = (max(m.anonymous for m in measured), max(m.resident for m in measured))
    return (
        f"RESULT {what}: {parts}  peak {anonymous / num_parameters:.2f} bytes a parameter, "
        f"{resident / num_parameters:.2f} with mapped files"
    )


def one_round(directory: Path, num_parameters: int, num_silos: int, way: str) -> None:
    """Print what each party takes."""
    config = federation(directory, num_parameters, num_silos, way)
    num_parameters = apart(begin, config)
    silos = []
    for number, silo in enumerate(config.full_roster):
        silos.append(apart(deliver, config, number))
        shutil.rmtree(config.silo_directory(silo) / "outbox")
    what = f"{num_parameters:,} parameters, {num_silos} silos, {way}"
    print(line(f"{what}: a silo", silos, num_parameters), flush=True)
    with CONTEXT.Pool(1) as others:
        answers = others.apply_async(answer, (config,))
        aggregator = apart(merge, config, num_parameters)
        answers.get()
    print(line(f"{what}: aggregator", [aggregator], num_parameters), flush=True)
    if config.outer.secure_sum:
        ratios = [m.processor["cipher"] / m.processor["mask"] for m in silos]
        of_sum = aggregator.processor["cipher"] / aggregator.processor["sum, unmask"]
        print(
            f"RESULT {what}: of the cipher's speed: mask {statistics.median(ratios):.2f}  sum {of_sum:.2f}", flush=True
        )


def apart(function: Callable[..., R], *arguments: Any) -> R:
    """Call it in a process of its own, so that its peak of memory is its own."""
    with CONTEXT.Pool(1) as process:
        return process.apply(function, arguments)


def main() -> None:
    """Print what each way takes with each number of silos."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=2_000_000)
    parser.add_argument("--silos", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=WAYS)
    parser.add_argument("--directory", type=Path, help="on the disk that is to be measured (default: a temporary one)")
    arguments = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores", flush=True)
    CONTEXT.set_forkserver_preload(["benchmarks.signing", "pretrain.silo.engine", "pretrain.sync.silo_sync"])
    for num_silos in arguments.silos:
        for way in arguments.ways:
            with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
                one_round(Path(directory), arguments.parameters, num_silos, way)


if __name__ == "__main__":
    main()
