"""What sealing a delivery costs: MB a second to seal it and to open it again, beside writing and reading it unsealed.

    python -m benchmarks.sealing [--parameters 65000000] [--codecs int4 fp32] [--turns 5]

One process and one thread, files in a temporary folder. Each turn writes the payload as a silo does (BLAKE3 on the
way), seals it, reads and hashes what was sealed as a download does, and opens it in its place. Medians.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pretrain.config.keys import OPERATOR
from pretrain.exchange.payload import save_tensors
from pretrain.exchange.store import file_payload
from pretrain.outer.codec import encode
from pretrain.trust.keys import PrivateKey, new_key, read_key
from pretrain.trust.seal import Epoch, Place, Sealer

PLACE = Place(contract_sha256="0" * 64, author="law", version=1, fragment=0, file="000001.safetensors")


def sealers(directory: Path) -> tuple[Sealer, Sealer]:
    """A silo's and the operator's, with new keys."""
    own = {}
    for name in ("law", OPERATOR):
        new_key(directory / f"{name}.key", name)
        key = read_key(directory / f"{name}.key")
        assert isinstance(key, PrivateKey)
        own[name] = key
    epochs = [Epoch(from_version=0, number=0, sha256="", keys={name: key.public for name, key in own.items()})]
    return (
        Sealer("law", lambda key: own["law"], lambda: epochs),
        Sealer(OPERATOR, lambda key: own[OPERATOR], lambda: epochs),
    )


def measure(codec: str, num_parameters: int, num_turns: int) -> str:
    """A line of results."""
    generator = torch.Generator().manual_seed(0)
    width = 8125
    values = {
        f"layer.{number}": torch.randn(width, 1000, generator=generator) * 1e-3
        for number in range(num_parameters // (width * 1000))
    }
    coded = {name: encode(codec, torch.zeros_like(value), value) for name, value in values.items()}
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        silo, operator = sealers(directory)
        file, sealed = directory / "000001.safetensors", directory / "000001.sealed"

        def timed(what: str, call: Callable[[], object]) -> None:
            began = time.perf_counter()
            call()
            found.setdefault(what, []).append(time.perf_counter() - began)

        for _ in range(num_turns):
            timed("write", lambda: save_tensors(coded, file))
            payload = file_payload(file, 0)
            timed("seal", lambda: silo.seal(payload, file, sealed, PLACE))  # noqa: B023
            timed("hash", lambda: file_payload(sealed, 0))
            timed("open", lambda: operator.open(sealed, PLACE))
        assert sealed.read_bytes() == file.read_bytes()
        num_bytes = file.stat().st_size
    rates = {what: num_bytes / statistics.median(seconds) / 1e6 for what, seconds in found.items()}
    said = "  ".join(f"{what} {rate:,.0f} MB/s" for what, rate in rates.items())
    return f"RESULT {codec:>5}  {num_bytes / 1e6:7.1f} MB  {said}"


def main() -> None:
    """Print a line for each codec."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=65_000_000)
    parser.add_argument("--codecs", nargs="+", default=["int4", "fp32"])
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for codec in arguments.codecs:
        print(measure(codec, arguments.parameters, arguments.turns), flush=True)


if __name__ == "__main__":
    main()
