"""What signatures add to a sync: commits with and without keys, in turns, and what a silo signs and checks for each.

    python -m benchmarks.signing [--sizes 0.5M 65M] [--turns 3] [--versions 9] [key=value ...]

Two silos, int4 both ways, Nesterov, the real aggregator in this process on a directory store, deliveries by hand.
A commit is timed from the arrival of the last delivery to commit.json: a manifest to check, a commit to sign. A silo
signs its manifest and checks the commit, which is timed by itself and added. Medians of all turns are compared. Last
comes a word, a sign of life: what it takes to sign and to check, without the store.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.merge import SIZES, VOCAB_SIZE, Deliveries, configuration, in_silence, one_version
from pretrain.aggregate import Aggregator
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.agreement import sign_contract
from pretrain.exchange.store import StoreExchange, delivery_path, version_path
from pretrain.exchange.words import Beat
from pretrain.host.journal import Journal
from pretrain.outer.state import OuterState
from pretrain.trust.keys import load_signer, new_key
from pretrain.trust.ledger import Commit, Manifest
from pretrain.trust.members import own_signer, with_keys

NAMES = ["silo-0000", "silo-0001"]
WARM_UP = 2  # versions of a run that are not counted


def silo(config: RunConfig, name: str) -> StoreExchange:
    """The store as a silo sees it."""
    exchange = StoreExchange(config.store_url)
    exchange.members.signer = own_signer(config, name)
    exchange.read_contract()
    return exchange


def start(config: RunConfig) -> tuple[Aggregator, OuterState]:
    """An aggregator with version 0, for which all members sign."""
    aggregator = Aggregator(config, Journal(config, "aggregator", silo=None))
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(aggregator.start)
        while config.trust.keys and not (Path(config.store_url) / "signatures" / f"{OPERATOR}.json").exists():
            time.sleep(0.01)
        for name in config.full_roster if config.trust.keys else ():
            sign_contract(silo(config, name), name)
        return aggregator, starting.result()


def seconds(config: RunConfig, num_versions: int) -> list[float]:
    """Of each version's commit, and of what a silo does for it that it would not without keys."""
    with in_silence():
        aggregator, state = start(config)
    deliveries = Deliveries(config, state, aggregator._exchange.contract_sha256, Path(config.directory))
    alpha, found = silo(config, NAMES[0]), []
    for version in range(1, num_versions + 1):
        arriving = deliveries.write(version)
        worker = threading.Thread(target=one_version, args=(aggregator, state))
        worker.start()
        for _ in NAMES:
            next(arriving)
        time.sleep(0.3)  # until the first one is verified
        arrived = time.time()
        next(arriving, None)
        worker.join()
        folder = Path(config.store_url) / version_path(version)
        committed = (folder / "commit.json").stat().st_mtime - arrived
        manifest = Path(config.store_url) / delivery_path(NAMES[0], version) / "manifest.json"
        began = time.perf_counter()
        if config.trust.keys:
            alpha.members.sign(Manifest.from_bytes(manifest.read_bytes()))
            alpha.members.check(OPERATOR, Commit.from_bytes((folder / "commit.json").read_bytes()))
        found.append(committed + time.perf_counter() - began)
    with in_silence():
        aggregator.snapshots.finish()
    return found[WARM_UP:]


def measure(size: str, signed: bool, num_versions: int, overrides: Sequence[str]) -> list[float]:
    """The seconds of a run of its own."""
    torch.set_num_threads(1)  # as the aggregator's main does
    model = SIZES[size] | {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": VOCAB_SIZE}
    run = [f"inner.num_steps={num_versions}", "outer.codec=int4", "outer.downlink_codec=int4"]
    with tempfile.TemporaryDirectory() as directory:
        config = configuration(Path(directory), model, NAMES, [*run, f"silos.{NAMES[1]}={{}}", *overrides])
        return seconds(with_keys(config, make=True) if signed else config, num_versions)


def word_seconds(num_words: int = 5000) -> tuple[float, float]:
    """Of one core, to sign a sign of life, and to read and check it."""
    with tempfile.TemporaryDirectory() as directory:
        exchange, file = StoreExchange(directory), Path(directory) / "alpha.key"
        new_key(file, "alpha")
        exchange.members.signer = load_signer(file)
        exchange.members.keys = {"alpha": exchange.members.signer.public}
        exchange.contract_sha256, name, word = "0" * 64, "silos/alpha/beats/000001", Beat(lease_seconds=60.0)
        exchange.say(name, word, "alpha")
        said, began = exchange.objects.read(name), time.process_time()
        for _ in range(num_words):
            exchange.signed(name, word)
        signed = time.process_time()
        for _ in range(num_words):
            found = Beat.from_bytes(said)
            to_sign = found.to_sign(exchange.contract_sha256, name)
            exchange.members.check_bytes("alpha", "word", to_sign, found.signature)
        return (signed - began) / num_words, (time.process_time() - signed) / num_words


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["0.5M", "65M"], choices=SIZES)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--versions", type=int, default=9, help="of each run, the first two of which do not count")
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_intermixed_args()
    for size in arguments.sizes:
        found: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(arguments.turns):
            for signed in (bool(turn % 2), not turn % 2):
                found[signed] += measure(size, signed, arguments.versions, arguments.overrides)
        without, with_them = (statistics.median(found[signed]) for signed in (False, True))
        print(
            f"RESULT {size:>5}  without {1e3 * without:8.2f} ms ({1e3 * min(found[False]):.2f} to "
            f"{1e3 * max(found[False]):.2f})  with {1e3 * with_them:8.2f} ms ({1e3 * min(found[True]):.2f} to "
            f"{1e3 * max(found[True]):.2f})  ratio {with_them / without:.3f}",
            flush=True,
        )
    sign, check = word_seconds()
    print(f"RESULT  word  signed in {1e6 * sign:.0f} us  checked in {1e6 * check:.0f} us")


if __name__ == "__main__":
    main()
