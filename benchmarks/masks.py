"""What the masks of a secure sum cost: GB a second of masks added, beside the cipher's own speed in the same turn.

    python -m benchmarks.masks [--parameters 65000000] [--silos 4 10] [--threads 1 2] [--turns 5]
    python -m benchmarks.masks --upload 1 --parameters 1000000000 | rngtest
    python -m benchmarks.masks --upload 1000000 | dieharder -a -g 200

In one process, with new keys. A silo's side of a version: its values to whole numbers (`code`), and one mask for each
other silo and one of its own added (`mask`). The aggregator's: what all have sent added up, one mask for each silo
subtracted (`sum`). The cipher writes as many bytes of AES-256 in counter mode into one buffer of a block. Medians; a GB
is of masks, and seconds are of processor time, of all threads together, as the machine may be busy.

With `--upload` what one of the first number of silos sends where all its values are 0 goes to stdout, of so many
versions one after another, or until nobody reads on, for a suite of tests of random numbers: rngtest (Debian's
rng-tools5: FIPS 140-2), or dieharder, whose suite reads some 250 GB.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from pretrain.outer.fixed_point import code, scale
from pretrain.outer.threads import in_threads
from pretrain.trust.masks import ZEROS, Masker, add

WIDTH = 1_000_000  # elements of a tensor


def cipher_alone(num_bytes: int, num_threads: int) -> None:
    """As many bytes as so many threads write side by side."""

    def write(seed: int) -> None:
        cipher, buffer = Cipher(AES(bytes([seed]) * 32), CTR(bytes(16))).encryptor(), bytearray(len(ZEROS))
        for _ in range(num_bytes // len(ZEROS) // num_threads):
            cipher.update_into(ZEROS, buffer)

    in_threads(write, range(num_threads), num_threads)


def first_masker(num_silos: int) -> Callable[[int], Masker]:
    """By version, that of the first of so many silos with new keys."""
    keys = {f"silo-{n:03d}": X25519PrivateKey.generate() for n in range(num_silos)}
    public = {silo: key.public_key().public_bytes_raw() for silo, key in keys.items()}
    silo, key = next(iter(keys.items()))
    return lambda version: Masker(silo, key, public, f"a benchmark {version}\n".encode(), num_silos)


def upload(num_parameters: int, num_silos: int, num_versions: int) -> None:
    """Write what a silo sends of zeros to stdout, of each version as one tensor, until nobody reads it."""
    masked, masker_of = np.empty(num_parameters, np.uint32), first_masker(num_silos)
    with suppress(BrokenPipeError):
        for version in range(num_versions):
            masker = masker_of(version)
            masked[:] = 0
            add([masked], [], masker.streams(masker.salt(b"zeros")))
            sys.stdout.buffer.write(masked.data)


def measure(num_parameters: int, num_silos: int, num_threads: int, num_turns: int) -> str:
    """A line of results."""
    masker = first_masker(num_silos)(0)
    generator = torch.Generator().manual_seed(0)
    values = [1e-3 * torch.randn(WIDTH, generator=generator) for _ in range(num_parameters // WIDTH)]
    pairs, factor = [(torch.zeros(WIDTH), value) for value in values], scale(num_silos, 1.0)
    coded = [one.view(np.uint32) for one in code(pairs, factor, 1.0)]
    total, streams = [np.zeros_like(one) for one in coded], masker.streams(masker.salt(b""))
    num_bytes = 4 * num_silos * WIDTH * len(values)
    found: dict[str, list[float]] = {}

    def timed(what: str, call: Callable[[], object]) -> None:
        began = time.process_time()
        call()
        found.setdefault(what, []).append(time.process_time() - began)

    for _ in range(num_turns):
        timed("cipher", lambda: cipher_alone(num_bytes, num_threads))
        timed("code", lambda: code(pairs, factor, 1.0, num_threads))
        timed("mask", lambda: add(coded, [], streams, num_threads))
        timed("sum", lambda: add(total, [coded] * num_silos, streams, num_threads))
    seconds = {what: statistics.median(times) for what, times in found.items()}
    rates = {what: num_bytes / seconds[what] / 1e9 for what in ("cipher", "mask", "sum")}
    ratio = statistics.median(c / m for c, m in zip(found["cipher"], found["mask"], strict=True))
    return (
        f"RESULT {num_silos:3d} silos, {num_threads} threads, {num_bytes / num_silos / 4e6:.0f} M parameters: "
        + "  ".join(f"{what} {seconds[what]:.3f} s ({rate:.2f} GB/s)" for what, rate in rates.items())
        + f"  code {seconds['code']:.3f} s  mask/cipher {ratio:.2f}"
    )


def main() -> None:
    """Print a line for each number of silos and threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=65_000_000)
    parser.add_argument("--silos", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--upload", type=int, metavar="VERSIONS", help="write uploads of zeros to stdout, nothing else")
    arguments = parser.parse_args()
    if arguments.upload:
        return upload(arguments.parameters, arguments.silos[0], arguments.upload)
    torch.set_num_threads(1)
    for num_silos in arguments.silos:
        for num_threads in arguments.threads:
            print(measure(arguments.parameters, num_silos, num_threads, arguments.turns), flush=True)


if __name__ == "__main__":
    main()
