"""Sealed payloads: whoever keeps the store sees their sizes, and nothing of what is in them. No torch.

A silo and the aggregator's operator come to one secret by their X25519 keys (RFC 7748); for what the operator writes to
all members there is a key of the group, which it seals to each. From the secret, from where a payload belongs and from
what is in it follows a key of its own (HKDF, RFC 5869), with which it is sealed chunk by chunk (ChaCha20-Poly1305, RFC
8439; STREAM, https://eprint.iacr.org/2015/189). The same payload in the same place has the same sealed bytes, so that
who was killed writes what it wrote before. docs/formats.md has it byte by byte.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pretrain.config.keys import OPERATOR
from pretrain.trust.keys import PrivateKey, PublicKey
from pretrain.trust.ledger import Payload, RefusedError

MAGIC = b"atoll/1 sealed\n"
KEY_BYTES, SALT_BYTES, TAG_BYTES = 32, 32, 16
HEADER_BYTES = len(MAGIC) + SALT_BYTES
NO_NONCE = bytes(12)  # of a key that seals one message
CHUNK_BYTES = 1 << 20  # of a payload; sealed it is TAG_BYTES longer


def sealed_bytes(num_bytes: int) -> int:
    """Bytes of a sealed payload of so many."""
    return HEADER_BYTES + num_bytes + TAG_BYTES * max(1, -(-num_bytes // CHUNK_BYTES))


def opened_bytes(num_bytes: int) -> int:
    """Bytes of the payload in a sealed one of so many. Raises RefusedError for a size that none has."""
    whole, rest = divmod(num_bytes - HEADER_BYTES, CHUNK_BYTES + TAG_BYTES)
    found = whole * CHUNK_BYTES + max(0, rest - TAG_BYTES)
    if num_bytes < HEADER_BYTES or sealed_bytes(found) != num_bytes:
        raise RefusedError(f"its payload has {num_bytes} bytes; a sealed one never has so many: it was cut off")
    return found


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a payload belongs: it cannot be opened anywhere else."""

    contract_sha256: str
    """Of the run."""
    author: str
    """The silo that delivers it to the operator, or the operator, who writes to all."""
    version: int
    fragment: int
    file: str

    def to_bytes(self) -> bytes:
        """What keys are made of; no name holds a space."""
        return f"{self.contract_sha256} {self.author} {self.version} {self.fragment} {self.file}\n".encode()


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The versions from one change of the members' keys to the next, for which the group has one key."""

    from_version: int
    number: int
    """Of the amendment that changed a key; 0 of the contract."""
    sha256: str
    """Of the bytes of that."""
    keys: Mapping[str, PublicKey]


class Sealer:
    """Seals and opens as a member. Whoever can open what another has sealed could have sealed it: who did, signs."""

    def __init__(
        self, member: str, own: Callable[[PublicKey], PrivateKey], epochs: Callable[[], Sequence[Epoch]]
    ) -> None:
        """`own` is the private half of a key of ours, `epochs` are all that are known, the contract's first."""
        self.member, self._own, self._epochs = member, own, epochs
        self._group: dict[str, bytes] = {}  # the group's key, by sha256 of the epoch

    def seal(self, payload: Payload, file: Path, target: Path, place: Place) -> Payload:
        """Write a payload's file, sealed, to a new file; returns what is told of that, under the payload's name.

        Memory: two chunks. Raises OSError if the file does not hold what its hash says any more.
        """
        salt_key, chain = self._secrets(place)
        salt = _salt(salt_key, payload.blake3)
        cipher, read, written, num_bytes = _cipher(chain, salt, place), blake3(), blake3(), 0
        last = max(1, -(-payload.num_bytes // CHUNK_BYTES)) - 1
        target.unlink(missing_ok=True)
        with file.open("rb") as source, target.open("xb", buffering=0) as sealed:
            for number in range(-1, last + 1):
                if number < 0:
                    block = MAGIC + salt
                else:
                    chunk = source.read(CHUNK_BYTES)
                    read.update(chunk)
                    block = cipher.encrypt(_nonce(number, number == last), chunk, None)
                written.update(block)
                _write_all(sealed, block)
                num_bytes += len(block)
        if read.hexdigest() != payload.blake3:  # the salt was of other bytes, and may come again with these
            target.unlink()
            raise OSError(f"{file}: changed while it was sealed")
        return Payload(fragment=payload.fragment, file=payload.file, blake3=written.hexdigest(), num_bytes=num_bytes)

    def open(self, file: Path, place: Place) -> None:
        """Put the payload in the place of the sealed file's bytes; memory: two chunks.

        The file is to lie where nobody else can read it. Raises RefusedError, and leaves a file of no use then.
        """
        with file.open("r+b", buffering=0) as opened:
            sealed, total = os.fstat(opened.fileno()).st_size, 0
            num_bytes = opened_bytes(sealed)
            header = _read_all(opened, HEADER_BYTES, 0)
            if not header.startswith(MAGIC):
                raise RefusedError("its payload is not sealed, as the contract says it is")
            cipher = _cipher(self._secrets(place)[1], header[len(MAGIC) :], place)
            last = max(1, -(-num_bytes // CHUNK_BYTES)) - 1
            for number in range(last + 1):  # what is written ends before what was not read yet
                at = HEADER_BYTES + number * (CHUNK_BYTES + TAG_BYTES)
                block = _read_all(opened, min(CHUNK_BYTES + TAG_BYTES, sealed - at), at)
                try:
                    chunk = cipher.decrypt(_nonce(number, number == last), block, None)
                except InvalidTag:
                    raise RefusedError(
                        f"its payload cannot be opened: chunk {number + 1} of {last + 1} is not as "
                        f"{place.author} sealed it for version {place.version} of this run"
                    ) from None
                opened.seek(total)
                _write_all(opened, chunk)
                total += len(chunk)
            opened.truncate(total)

    # ---- the group's key

    def epoch(self, version: int) -> Epoch:
        """That of a version."""
        return next(epoch for epoch in reversed(self._epochs()) if epoch.from_version <= version)

    def newest_epoch(self) -> Epoch | None:
        """The last in which we have a key."""
        return next((epoch for epoch in reversed(self._epochs()) if self.member in epoch.keys), None)

    def can_open(self, version: int) -> bool:
        """Whether the group's key of a version is here."""
        return self.member == OPERATOR or self.epoch(version).sha256 in self._group

    def give(self, epoch: Epoch, member: str) -> str:
        """As the operator: the group's keys up to an epoch, for one member alone, in hexadecimal."""
        keys = b"".join(map(self._group_key, self._until(epoch)))
        return self._wrapping(epoch, member).encrypt(NO_NONCE, keys, None).hex()

    def take(self, epoch: Epoch, given: str) -> None:
        """As a member: go by what the operator has given us. Raises RefusedError if it is not for us."""
        epochs = self._until(epoch)
        try:
            keys = self._wrapping(epoch, self.member).decrypt(NO_NONCE, bytes.fromhex(given), None)
        except (InvalidTag, ValueError):
            keys = b""
        if len(keys) != KEY_BYTES * len(epochs):
            raise RefusedError(
                f"the group's key cannot be opened: it is not as the operator gave it to {self.member}"
            ) from None
        for number, one in enumerate(epochs):
            self._group[one.sha256] = keys[KEY_BYTES * number : KEY_BYTES * (number + 1)]

    def _until(self, epoch: Epoch) -> list[Epoch]:
        return [one for one in self._epochs() if one.number <= epoch.number]

    def _group_key(self, epoch: Epoch) -> bytes:
        """The operator's follows from its private key, so that it is the same after a restart."""
        if epoch.sha256 not in self._group:
            if self.member != OPERATOR:
                raise RefusedError(
                    f"the group's key from version {epoch.from_version} on was not given to {self.member}"
                )
            own = self._own(epoch.keys[OPERATOR]).agreement.private_bytes_raw()
            info = b"atoll/1 group\0" + epoch.sha256.encode()
            self._group[epoch.sha256] = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(own)
        return self._group[epoch.sha256]

    def _wrapping(self, epoch: Epoch, member: str) -> ChaCha20Poly1305:
        """What seals the group's keys to a member: that one message."""
        shared, ends = self._shared(epoch, member)
        info = b"atoll/1 group-key\0" + ends + f"{epoch.sha256} {member}\n".encode()
        return ChaCha20Poly1305(HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(shared))

    # ---- secrets

    def _secrets(self, place: Place) -> tuple[bytes, bytes]:
        """What those who may read can know of this place: the key of its salts, and what its keys follow from."""
        epoch = self.epoch(place.version)
        if place.author == OPERATOR:
            shared, ends = self._group_key(epoch), b""
        else:
            shared, ends = self._shared(epoch, place.author)
        info = b"atoll/1 seal\0" + ends + place.to_bytes()
        found = HKDF(algorithm=SHA256(), length=2 * KEY_BYTES, salt=None, info=info).derive(shared)
        return found[:KEY_BYTES], found[KEY_BYTES:]

    def _shared(self, epoch: Epoch, silo: str) -> tuple[bytes, bytes]:
        """The secret of a silo and the operator, and both public keys."""
        for member in (silo, self.member):
            if member not in epoch.keys:
                raise RefusedError(f"{member} has no key from version {epoch.from_version} on")
        its, operator = epoch.keys[silo].agreement, epoch.keys[OPERATOR].agreement
        own, other = self._own(epoch.keys[self.member]), its if self.member == OPERATOR else operator
        return own.agreement.exchange(X25519PublicKey.from_public_bytes(other)), its + operator


def _salt(key: bytes, plain_blake3: str) -> bytes:
    """Of the payload's hash, so that no two payloads have one key; keyed, so that nobody can try what it may be."""
    found = HMAC(key, SHA256())
    found.update(bytes.fromhex(plain_blake3))
    return found.finalize()


def _cipher(chain: bytes, salt: bytes, place: Place) -> ChaCha20Poly1305:
    info = b"atoll/1 payload\0" + place.to_bytes()
    return ChaCha20Poly1305(HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(chain))


def _nonce(number: int, is_last: bool) -> bytes:
    """A chunk's number, and whether it is the last: no chunk can be in another's place, and the end cannot be moved."""
    return number.to_bytes(11, "big") + bytes([is_last])


def _read_all(opened: FileIO, num_bytes: int, at: int) -> bytes:
    opened.seek(at)
    parts: list[bytes] = []
    while num_bytes and (part := opened.read(num_bytes)):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _write_all(opened: FileIO, block: bytes) -> None:
    """A disk that gets full writes a part, and says so at the next try."""
    left = memoryview(block)
    while left:
        left = left[opened.write(left) :]
