"""What the egress ledger adds to a sync: deliveries with and without one, in turns.

    python -m benchmarks.egress [--sizes 0.5M 65M] [--versions 40]

A delivery is a payload of int4 and its manifest, signed, written to a directory store by the code that a silo has for
it; the ledger's lines are signed, too. Medians are compared. The ledger's own time, of all lines of a sync (payload,
manifest, mark), is timed by itself.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

from pretrain.exchange.store import StoreExchange, file_payload
from pretrain.trust.egress import Egress
from pretrain.trust.keys import Signer, load_signer, new_key
from pretrain.trust.ledger import Manifest
from pretrain.trust.members import Members

SIZES = {"0.5M": 500_000, "65M": 65_000_000}
BITS = 4.125  # of an element in int4, docs/formats.md


def ledger(file: Path, signer: Signer) -> Egress:
    """As a silo has one."""
    return Egress(file=file, signer=signer, round_of=lambda version: version)


def exchanges(folder: Path) -> dict[bool, StoreExchange]:
    """Stores without and with a ledger."""
    public = new_key(folder / "law.key", "law")
    signer = load_signer(folder / "law.key")
    found = {}
    for with_ledger in (False, True):
        exchange = StoreExchange(str(folder / f"store-{with_ledger}"))
        exchange.members = Members(keys={"law": public}, signer=signer)
        if with_ledger:
            exchange.objects.told_to(
                Egress(file=folder / "egress.jsonl", signer=signer, round_of=lambda version: version)
            )
        found[with_ledger] = exchange
    return found


def seconds(exchange: StoreExchange, file: Path, version: int) -> float:
    """Of one delivery, and the mark that a checkpoint leaves."""
    payload = dataclasses.replace(file_payload(file, 0), file=f"{version:06d}.safetensors")
    manifest = Manifest(
        contract_sha256="0" * 64,
        silo="law",
        version=version,
        base_version=version - 1,
        base_digest="0" * 64,
        cosigned="0" * 64,
        codec="int4",
        payloads=[payload],
        tokens=1,
        steps=1,
        tokens_total=1,
        metrics={},
    )
    manifest = exchange.members.sign(manifest)
    began = time.perf_counter()
    exchange.deliver(manifest, [(payload, file)])
    exchange.mark_resumable("law", version)
    return time.perf_counter() - began


def lines_seconds(folder: Path, num_versions: int) -> float:
    """The median of what all lines of a sync take."""
    signer, found = load_signer(folder / "law.key"), []
    egress = Egress(file=folder / "alone.jsonl", signer=signer, round_of=lambda version: version)
    for version in range(num_versions):
        began = time.perf_counter()
        for name in (
            f"{version:06d}/{version:06d}.safetensors",
            f"{version:06d}/manifest.json",
            f"resumable/{version:06d}",
        ):
            egress.leaves("s3://bucket/run", f"silos/law/{name}", 1, "0" * 64, of={"version": version, "tokens": 1})
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--versions", type=int, default=40)
    arguments = parser.parse_args()
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as directory:
            folder, found = Path(directory), {False: [0.0], True: [0.0]}
            stores, file = exchanges(folder), folder / "payload"
            file.write_bytes(os.urandom(int(SIZES[size] * BITS / 8)))
            for version in range(1, arguments.versions + 1):
                for with_ledger in (bool(version % 2), not version % 2):
                    found[with_ledger].append(seconds(stores[with_ledger], file, version))
            without, with_one = (statistics.median(found[each][3:]) for each in (False, True))
            own = lines_seconds(folder, 500)
            print(
                f"RESULT {size:>5}  without {1e3 * without:8.2f} ms  with {1e3 * with_one:8.2f} ms  ratio "
                f"{with_one / without:.3f}  the lines alone {1e3 * own:.3f} ms, {own / without:.2%} of a delivery",
                flush=True,
            )


if __name__ == "__main__":
    main()
