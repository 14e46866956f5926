"""Gaussian noise out of a secret key: nobody without the key can tell it from true noise, or draw it again.

ChaCha20's stream (RFC 8439, of the package cryptography) makes 53-bit fractions, Box and Muller's transform of them
normal numbers in float64. None is longer than 8.6 standard deviations, which one in 10^17 would be. What they are added
to is rounded to fp32, or to whole numbers, afterwards, which hides their own last bits (Mironov 2012, CCS, shows what
those could tell).
"""

import math
import os
import secrets
from pathlib import Path

import torch
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

KEY_BYTES = 32
PAIRS = 1 << 18  # of numbers that are made at once
MOST_DEVIATIONS = 8.6


def secret_key(file: Path) -> bytes:
    """The key in a file that only its owner can read; drawn by the operating system if there is none."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = file.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(secrets.token_hex(KEY_BYTES))
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(file)
    return bytes.fromhex(file.read_text())


def derived(key: bytes, *parts: "bytes | memoryview") -> bytes:
    """A key for each sequence of parts, of which neither the others nor the first one follow: BLAKE3 with a key."""
    hashed = blake3(key=key)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.digest()


def add_noise(values: Tensor, key: bytes, deviation: float) -> None:
    """Add independent normal numbers of a standard deviation to flat values, in place; a key is used but once.

    They are fp32 or fp64, to which the sums are rounded.
    """
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    for some in values.split(2 * PAIRS):
        pairs = -(-len(some) // 2)
        bits = torch.frombuffer(bytearray(stream.update(bytes(16 * pairs))), dtype=torch.int64).to(values.device)
        above_zero, angle = ((bits >> 11 & (1 << 53) - 1).double() + 1).mul_(2.0**-53).chunk(2)
        radius, angle = above_zero.log().mul_(-2).sqrt_(), angle * (2 * math.pi)
        noise = torch.cat([radius * angle.cos(), radius * angle.sin()])[: len(some)]
        some.copy_(some.double().add_(noise, alpha=deviation))
