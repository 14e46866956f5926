"""What a version costs an aggregator by number of silos: seconds, memory, and requests to the store.

    python -m benchmarks.many_silos [--silos 8 64 512 1000] [--versions 3] [--directory DIR]
    python -m benchmarks.many_silos --restart 10000 [--silos 2 64]

The real aggregator commits versions of a model of half a million parameters in int4, from deliveries that are written
by hand and all there when it looks. Counted are the median seconds from its first look to its commit, the processors'
seconds, what its memory grows by while it holds the deliveries, and how often it reads, lists, writes and deletes in
the store.

With `--restart`, the seconds from the start of an aggregator until it has the newest of so many versions. All but the
last ones are commits alone, as pruning leaves them, of as many silos.
"""

import argparse
import gc
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from benchmarks.merge import SIZES, Deliveries, configuration, in_silence, one_version
from benchmarks.proc import status_bytes
from pretrain.aggregate import Aggregator
from pretrain.exchange.objects import Objects
from pretrain.exchange.store import version_path
from pretrain.host.journal import Journal
from pretrain.trust.ledger import Commit, Contributor, sha256_bytes

REQUESTS = {"read": "exists read download", "listed": "names", "written": "write upload", "deleted": "delete"}
REAL = 3  # versions that are made by the real aggregator before a restart
MODEL = SIZES["0.5M"] | {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 3200}


def counted(requests: Counter[str]) -> None:
    """Have all stores of this process count what is asked of them."""
    for kind, methods in REQUESTS.items():
        for method in methods.split():
            setattr(Objects, method, _counting(getattr(Objects, method), kind, requests))


def _counting(method: Callable[..., Any], kind: str, requests: Counter[str]) -> Callable[..., Any]:
    @wraps(method)
    def counting(*arguments: Any, **named: Any) -> Any:
        requests[kind] += 1
        return method(*arguments, **named)

    return counting


def measure(directory: Path, num_silos: int, num_versions: int) -> str:
    """The table's line."""
    torch.set_num_threads(1)
    names = [f"silo-{index:04d}" for index in range(num_silos)]
    codecs = ["outer.codec=int4", "outer.downlink_codec=int4", "exchange.poll_seconds=0.5"]
    config = configuration(directory, MODEL, names, [f"inner.num_steps={num_versions}", *codecs])
    requests = Counter[str]()
    counted(requests)
    aggregator = Aggregator(config, Journal(config, "aggregator", silo=None))
    state = aggregator.start()
    deliveries = Deliveries(config, state, aggregator._exchange.contract_sha256, directory)
    gc.collect()
    gc.freeze()  # as the aggregator's main does
    seconds, processor, grown = [], [], []
    for version in range(1, num_versions + 1):
        for _ in deliveries.write(version):
            pass
        requests.clear()
        before_kb, began, worked = anonymous_kb(), time.perf_counter(), time.process_time()
        with in_silence():
            arrived = aggregator.collect(state)
            merged = aggregator.merge(state, arrived)
            grown.append(anonymous_kb() - before_kb)
            aggregator.commit(state, arrived, merged)
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - worked)
    num_elements = sum(value.numel() for value in state.parameters.values())
    asked = "  ".join(f"{kind} {requests[kind] / num_silos:.2f}" for kind in REQUESTS)
    return (
        f"{num_silos:5d} silos  {num_elements / 1e6:.2f} M  {statistics.median(seconds):7.3f} s  "
        f"{statistics.median(seconds) / num_silos * 1e3:6.2f} ms a silo  "
        f"{statistics.median(processor) / num_silos * 1e3:6.2f} ms of processors  "
        f"{statistics.median(grown) / num_silos:7.1f} kB a silo  a silo and version {asked}"
    )


def restart(directory: Path, num_silos: int, num_versions: int) -> str:
    """The line of a start on a store with so many versions, the last `REAL` of them whole."""
    torch.set_num_threads(1)
    names = [f"silo-{index:04d}" for index in range(num_silos)]
    codecs = ["outer.codec=int4", "outer.downlink_codec=int4", "exchange.snapshot_versions=1"]
    config = configuration(directory, MODEL, names, [f"inner.num_steps={num_versions + 1}", *codecs])
    aggregator = Aggregator(config, Journal(config, "aggregator", silo=None))
    state = aggregator.start()
    made = Commit.from_bytes(aggregator._exchange.commit_bytes(0))
    for version in range(1, num_versions - REAL + 1):
        contributors = [
            Contributor(
                silo=silo,
                version=version,
                manifest_sha256="0" * 64,
                tokens=100,
                tokens_total=100 * version,
                steps=1,
                weight=100,
            )
            for silo in names
        ]
        made = replace(made, version=version, previous=sha256_bytes(made.to_bytes()), contributors=contributors)
        folder = Path(config.store_url) / version_path(version)
        folder.mkdir()
        (folder / "commit.json").write_bytes(made.to_bytes())
    state.version, aggregator._newest = num_versions - REAL, made
    aggregator._collector.past.committed(made)
    deliveries = Deliveries(config, state, aggregator._exchange.contract_sha256, directory)
    for version in range(num_versions - REAL + 1, num_versions + 1):
        for _ in deliveries.write(version):
            pass
        one_version(aggregator, state)
    requests = Counter[str]()
    counted(requests)
    seconds = []
    for _ in range(3):
        requests.clear()
        began = time.perf_counter()
        with in_silence():
            found = Aggregator(config, Journal(config, "aggregator", silo=None)).start()
        seconds.append(time.perf_counter() - began)
        assert found.version == num_versions
    asked = "  ".join(f"{kind} {requests[kind]}" for kind in REQUESTS)
    return f"{num_silos:5d} silos  {num_versions} versions  start {statistics.median(seconds):.2f} s  requests {asked}"


def anonymous_kb() -> int:
    """Memory of this process that is no file's: payloads are mapped."""
    return status_bytes()["RssAnon"] // 1024


def main() -> None:
    """Print a line for each number of silos, each measured in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silos", type=int, nargs="+", default=[8, 64, 512, 1000])
    parser.add_argument("--restart", type=int, metavar="VERSIONS", help="a start after so many, and no commits")
    parser.add_argument("--versions", type=int, default=3, help="commits, of which the median counts")
    parser.add_argument("--directory", type=Path, help="on the disk that is to be measured (default: a temporary one)")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for num_silos in arguments.silos:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory, context.Pool(1) as process:
            what, num_versions = (restart, arguments.restart) if arguments.restart else (measure, arguments.versions)
            print(process.apply(what, (Path(directory), num_silos, num_versions)), flush=True)


if __name__ == "__main__":
    main()
