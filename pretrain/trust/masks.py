"""Masks that leave of all silos' values their sum alone: streams, where their seeds come from, who can lay them open.

A silo adds to its values, modulo 2^32, one stream that it alone knows, and one for each other silo that it shares with
that one, which subtracts it: in the sum of all, the shared ones are gone (Bonawitz et al., Practical secure aggregation
for privacy-preserving machine learning, 2017). sums.py says who tells whom what of the seeds. No torch.

Seeds follow from the members' X25519 keys (RFC 7748) by HKDF-SHA256 (RFC 5869), streams from a seed by AES-256 in
counter mode (NIST SP 800-38A) from counter 0: a seed makes one stream. Nothing is drawn at random, so that a silo that
was killed sends what it sent before. docs/formats.md has it byte by byte.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from pretrain.outer.threads import in_threads
from pretrain.trust.ledger import RefusedError, sha256_bytes
from pretrain.trust.shamir import SECRET_BYTES, SHARE_BYTES, split

Values = NDArray[np.unsignedinteger[Any]]
BLOCK_BYTES, RANGE_BYTES = 1 << 18, 1 << 22  # what lies in the cache; what a thread takes at a time
ZEROS = bytes(BLOCK_BYTES)
CIPHER_BLOCK = 16  # bytes: a tensor's stream begins at a whole block of the cipher
NO_NONCE = bytes(12)  # of a key that seals one message


class Stream(NamedTuple):
    """The numbers that follow from a seed, added or subtracted."""

    seed: bytes
    is_added: bool


def add(
    total: Sequence[Values],
    values: Sequence[Sequence[Values]],
    streams: Sequence[Stream],
    num_threads: int = 1,
    *,
    added: Callable[[int, slice], object] = lambda number, elements: None,
) -> None:
    """Add to the tensors of `total`, in place, those of all `values` and all streams: each modulo what its type holds.

    Tensors are flat, and all have the same ones. `added` is told which elements of which tensor are done: of `values`
    they are not read again. Memory: a block a thread.
    """
    tasks, at = [], 0  # tensor, the first byte of it in this range, and where that is in a stream
    for number, tensor in enumerate(total):
        tasks += [(number, start, at + start) for start in range(0, tensor.nbytes, RANGE_BYTES)]
        at += -(-tensor.nbytes // CIPHER_BLOCK) * CIPHER_BLOCK

    def of_range(task: tuple[int, int, int]) -> None:
        number, start, offset = task
        tensor, counter = total[number], (offset // CIPHER_BLOCK).to_bytes(16, "big")
        ciphers = [(Cipher(AES(one.seed), CTR(counter)).encryptor(), one.is_added) for one in streams]
        size, stop = tensor.itemsize, min(start + RANGE_BYTES, tensor.nbytes)
        scratch = np.empty(BLOCK_BYTES // size, tensor.dtype)
        for first in range(start, stop, BLOCK_BYTES):
            last = min(first + BLOCK_BYTES, stop)
            elements = slice(first // size, last // size)
            block, numbers = tensor[elements], scratch[: (last - first) // size]
            for of_silo in values:
                block += of_silo[number][elements]
            for cipher, is_added in ciphers:
                cipher.update_into(memoryview(ZEROS)[: last - first], numbers.view(np.uint8).data)
                (np.add if is_added else np.subtract)(block, numbers, out=block)
        added(number, slice(start // size, stop // size))

    in_threads(of_range, tasks, num_threads)


class Masker:
    """One silo's secrets of one version, with the silos that have a key then."""

    def __init__(
        self, silo: str, own: X25519PrivateKey, keys: Mapping[str, bytes], place: bytes, threshold: int
    ) -> None:
        """`keys` are the public X25519 keys of all silos, ours among them; `place` is of this run and version alone;
        with the answers of `threshold` silos the secrets can be laid open.
        """
        assert 1 < threshold <= len(keys)
        self.silo, self.silos, self._keys = silo, sorted(keys), keys
        self._own, self._place, self._threshold = own, place, threshold

    def salt(self, content: bytes) -> str:
        """What the secrets of just these values follow from; nobody else can try which values they may be."""
        found = HMAC(_derived(self._own.private_bytes_raw(), b"sum salt", self._place), SHA256())
        found.update(content)
        return found.finalize().hex()

    def seeds(self, salt: str) -> dict[str, bytes]:
        """The seed of the stream that we alone know, under our name, and of those that each other silo knows, too.

        The first depends on the values: two deliveries for one version never have all masks in common.
        """
        own = _derived(self._own.private_bytes_raw(), b"self mask", self._place, salt=bytes.fromhex(salt))
        shared = {}
        for silo in self.silos:
            if silo != self.silo:
                ends = b"".join(self._keys[name] for name in sorted((silo, self.silo)))
                shared[silo] = _derived(self._shared(silo), b"pair mask", ends + self._place)
        return {self.silo: own} | shared

    def streams(self, salt: str) -> list[Stream]:
        """What we add to our values."""
        return [Stream(seed, is_added(self.silo, other)) for other, seed in self.seeds(salt).items()]

    def deal(self, salt: str) -> tuple[list[str], list[str]]:
        """Sealed to each silo, in their order, its shares of all our seeds; and the hash of each seed. Hexadecimal."""
        seeds = self.seeds(salt)
        points = range(1, len(self.silos) + 1)
        chain = _derived(self._own.private_bytes_raw(), b"coefficients", self._place, salt=bytes.fromhex(salt))
        rows = []
        for about in self.silos:
            num_bytes = SHARE_BYTES * (self._threshold - 1)
            drawn = _numbers(_derived(chain, b"of a seed", about.encode()), num_bytes)
            coefficients = [drawn[at : at + SHARE_BYTES] for at in range(0, num_bytes, SHARE_BYTES)]
            rows.append(split(seeds[about], coefficients, points))
        sealed = [
            self._seal(self.silo, to, salt).encrypt(NO_NONCE, b"".join(row[place] for row in rows), None).hex()
            for place, to in enumerate(self.silos)
        ]
        return sealed, [sha256_bytes(seeds[about]) for about in self.silos]

    def open(self, dealer: str, salt: str, sealed: Sequence[str]) -> dict[str, bytes]:
        """Our share of each of a silo's seeds. Raises RefusedError if it has not sealed them to us so."""
        try:
            mine = bytes.fromhex(sealed[self.silos.index(self.silo)])
            data = self._seal(dealer, self.silo, salt).decrypt(NO_NONCE, mine, None)
        except (InvalidTag, ValueError, IndexError):
            data = b""
        if len(data) != SHARE_BYTES * len(self.silos):
            raise RefusedError(f"the shares that silo {dealer} has sealed to {self.silo} cannot be opened")
        return {about: data[SHARE_BYTES * n : SHARE_BYTES * (n + 1)] for n, about in enumerate(self.silos)}

    def _seal(self, dealer: str, to: str, salt: str) -> ChaCha20Poly1305:
        """What seals a silo's shares to another, or to itself: that one message."""
        ends = self._keys[dealer] + self._keys[to]
        other = to if dealer == self.silo else dealer
        return ChaCha20Poly1305(_derived(self._shared(other), b"shares", ends + self._place, salt=bytes.fromhex(salt)))

    def _shared(self, silo: str) -> bytes:
        return self._own.exchange(X25519PublicKey.from_public_bytes(self._keys[silo]))


def is_added(silo: str, other: str) -> bool:
    """Whether a silo adds the stream that it shares with another: of two, the first by name; and the one of its own."""
    return silo <= other


def _derived(secret: bytes, purpose: bytes, of: bytes, *, salt: bytes | None = None) -> bytes:
    info = b"atoll/1 " + purpose + b"\0" + of
    return HKDF(algorithm=SHA256(), length=SECRET_BYTES, salt=salt, info=info).derive(secret)


def _numbers(seed: bytes, num_bytes: int) -> bytes:
    return Cipher(AES(seed), CTR(bytes(16))).encryptor().update(bytes(num_bytes))
