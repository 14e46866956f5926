"""A member's keys: one that signs (Ed25519, RFC 8032), one to agree on secrets (X25519, RFC 7748). No torch.

The private pair is a file of the member's machine, or the signing key is elsewhere, behind a command. The public pair
is one line of text that can be pasted into YAML, and a fingerprint to compare by phone.
"""

import base64
import errno
import hashlib
import json
import os
import re
import shlex
import signal
import stat
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from pretrain.config.check import SILO_NAME
from pretrain.config.errors import ConfigError
from pretrain.host.foreign import loads, shown
from pretrain.trust.ledger import RefusedError

FORMAT = 1
PREFIX = "atoll-key-1:"
KEY_BYTES, SIGNATURE_BYTES = 32, 64
FILE_BYTES = 4096  # ten times what a private key's file has
KEY_VARIABLE = "ATOLL_KEY"  # a command may have several, after a rotation
COMMAND_SECONDS = 30.0  # somebody may have to touch a token
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # of a regular file, this does not wait
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
KIND = re.compile(r"[a-z0-9-]{1,64}")
# Curve25519: the field, and A of v^2 = u^3 + A u^2 + u (RFC 7748, section 4.1).
P, A = 2**255 - 19, 486662


@dataclass(frozen=True, kw_only=True)
class PublicKey:
    """What everybody may know of a member; `parse` alone makes one of what others say."""

    signing: bytes
    """Ed25519, 32 bytes."""
    agreement: bytes
    """X25519, 32 bytes."""

    @classmethod
    def parse(cls, text: object, key: str = "public key") -> Self:
        """The key that a line says. `key` is what an error calls it.

        Raises ConfigError for all but the one line that `text` makes of a key, for what is no point of the curve, and
        for points of small order, with which anybody could sign, or know what is agreed on.
        """
        data = None
        if isinstance(text, str) and text.startswith(PREFIX):
            data = _decoded(text.removeprefix(PREFIX), 2 * KEY_BYTES)
        if data is None:
            allowed = f"{PREFIX} and {_num_characters(2 * KEY_BYTES)} characters of base64url, as atoll keys show says"
            raise ConfigError(f"{key}: {shown(repr(text), limit=120)} given; allowed: {allowed}")
        found = cls(signing=data[:KEY_BYTES], agreement=data[KEY_BYTES:])
        if not _signs(found.signing) or not _agrees(found.agreement):
            raise ConfigError(f"{key}: {text} given; allowed: a key that atoll keys new made; this is no safe point")
        return found

    @property
    def text(self) -> str:
        """The one line that says it, 98 characters."""
        return PREFIX + _encoded(self.signing + self.agreement)

    @property
    def fingerprint(self) -> str:
        """120 bits of the line's sha256, as six groups of letters and digits 2 to 7."""
        letters = base64.b32encode(hashlib.sha256(self.text.encode()).digest()[:15]).decode().lower()
        return "-".join(letters[i : i + 4] for i in range(0, len(letters), 4))


class Signer(Protocol):
    """Whoever signs for a member."""

    @property
    def public(self) -> PublicKey:
        """What a signature is checked with."""

    def sign(self, kind: str, data: bytes) -> str:
        """A signature over bytes as something of a kind ("manifest", "commit"), as text for JSON."""


@dataclass(frozen=True, kw_only=True)
class PrivateKey:
    """Signs with the key in this process; both keys are known here."""

    name: str
    """The member's."""
    signing: Ed25519PrivateKey = field(repr=False)
    agreement: X25519PrivateKey = field(repr=False)

    @property
    def public(self) -> PublicKey:
        """Its public half."""
        return PublicKey(
            signing=self.signing.public_key().public_bytes_raw(),
            agreement=self.agreement.public_key().public_bytes_raw(),
        )

    def sign(self, kind: str, data: bytes) -> str:
        """See `Signer`."""
        return _encoded(self.signing.sign(_message(kind, data)))


@dataclass(frozen=True, kw_only=True)
class CommandSigner:
    """Signs with a command: a hardware token's, an agent's, or one that asks another machine."""

    public: PublicKey
    command: tuple[str, ...]
    """It gets the message on stdin, and the public line of the key that is to sign in ATOLL_KEY, and says 64 bytes on
    stdout, raw or as base64. No shell comes between."""
    limit_seconds: float = COMMAND_SECONDS

    def sign(self, kind: str, data: bytes) -> str:
        """See `Signer`. Raises ConfigError if the command fails, takes too long, or signs with another key."""
        said = self._ask(_message(kind, data))
        signature = said if len(said) == SIGNATURE_BYTES else _decoded_loosely(said)
        if len(signature) != SIGNATURE_BYTES:
            raise self._error(f"{len(said)} bytes on stdout; allowed: 64 bytes, raw or as base64")
        text = _encoded(signature)
        try:
            verify(self.public, kind, data, text)
        except RefusedError:
            raise self._error(
                f"a signature that is not by the key {self.public.fingerprint}; allowed: Ed25519 of all of stdin, with "
                "the key whose public line the key file has"
            ) from None
        return text

    def _ask(self, message: bytes) -> bytes:
        pipe, environment = subprocess.PIPE, os.environ | {KEY_VARIABLE: self.public.text}
        try:
            child = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=True
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL in it
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"key_command: {self.command[0]!r} cannot be started: {reason}") from None
        with child:
            try:
                said, complaint = child.communicate(message, timeout=self.limit_seconds)
            except BaseException as error:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # with what it has started, which holds the pipes, too
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                raise self._error(f"nothing for {self.limit_seconds:g} seconds; allowed: an answer by then") from None
        if child.returncode:
            last = complaint.decode(errors="replace").strip().rpartition("\n")[2]
            raise self._error(f"exit code {child.returncode}; allowed: 0; it says: {shown(last) or 'nothing'}")
        return said

    def _error(self, given: str) -> ConfigError:
        return ConfigError(f"key_command: {self.command[0]!r} gave {given}")


def verify(public: PublicKey, kind: str, data: bytes, signature: str | None) -> None:
    """Raise RefusedError, one line, unless `signature` is that of a key over these bytes as something of this kind."""
    if signature is None:
        raise RefusedError(f"the {kind} is not signed; it needs a signature by the key {public.fingerprint}")
    raw = _decoded(signature, SIGNATURE_BYTES)
    if raw is None:
        allowed = f"{_num_characters(SIGNATURE_BYTES)} characters of base64url"
        raise RefusedError(f"signature of the {kind}: {shown(repr(signature), limit=120)} given; allowed: {allowed}")
    try:
        Ed25519PublicKey.from_public_bytes(public.signing).verify(raw, _message(kind, data))
    except InvalidSignature:
        raise RefusedError(f"signature of the {kind}: not of these bytes by the key {public.fingerprint}") from None


def new_key(path: Path, name: str) -> PublicKey:
    """Make a member's keys and write them to a new file that only its owner can read. Raises ConfigError."""
    if not SILO_NAME.fullmatch(name):
        raise ConfigError(f"name: {name!r} given; allowed: {SILO_NAME.pattern}")
    made = PrivateKey(name=name, signing=Ed25519PrivateKey.generate(), agreement=X25519PrivateKey.generate())
    fields = {
        "format": FORMAT,
        "name": name,
        "public": made.public.text,
        "signing": _encoded(made.signing.private_bytes_raw()),
        "agreement": _encoded(made.agreement.private_bytes_raw()),
    }
    try:
        opened = os.open(path, CREATE, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path}: is there already; a key is never overwritten: give another name or place") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be made: {error.strerror}") from None
    try:
        with open(opened, "w", encoding="ascii") as file:
            os.fchmod(opened, 0o600)  # whatever the umask
            file.write(json.dumps(fields, indent=1) + "\n")
            file.flush()
            os.fsync(opened)
        return load_signer(path).public  # a file system without modes is found out now
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
        raise


def load_signer(path: Path, command: Sequence[str] = ()) -> Signer:
    """Who signs for a member: the private key in a file, or a command beside a file with the public line.

    Raises ConfigError for a file that is none, or that others may read, and for a command that does not sign: it is
    tried once.
    """
    found = read_key(path)
    if command:
        public = found if isinstance(found, PublicKey) else found.public
        signer = CommandSigner(public=public, command=tuple(command))
        signer.sign("trial", b"")
        return signer
    if isinstance(found, PublicKey):
        raise ConfigError(f"{path}: a public key given; allowed: the private one of atoll keys new, or a key_command")
    return found


def read_key(path: Path) -> PrivateKey | PublicKey:
    """The keys of a file: a private one of `new_key`, or just a public line. Raises ConfigError; see `load_signer`."""
    data, found = _read(path)
    if data.startswith(PREFIX.encode()):
        return PublicKey.parse(data.decode(errors="replace").removesuffix("\n"), str(path))
    if found.st_uid != os.geteuid():
        raise ConfigError(f"{path}: owner is user {found.st_uid}; allowed: {os.geteuid()}, whose process this is")
    if (mode := stat.S_IMODE(found.st_mode)) & 0o077:
        raise ConfigError(f"{path}: mode {mode:o} given; allowed: 600: chmod 600 {shlex.quote(str(path))}")
    key = _private(data)
    if key is None:
        raise ConfigError(f"{path}: no key of atoll keys new, or damaged; take your copy of it, or make a new one")
    return key


def _private(data: bytes) -> PrivateKey | None:
    """What a private file says; None if it is damaged. Nothing of it may get into a message."""
    try:
        fields = loads(data, limit_bytes=FILE_BYTES)
    except ValueError:
        return None
    if not isinstance(fields, dict) or set(fields) != {"format", "name", "public", "signing", "agreement"}:
        return None
    signing, agreement = (_decoded(fields[half], KEY_BYTES) for half in ("signing", "agreement"))
    name = fields["name"]
    if fields["format"] != FORMAT or not isinstance(name, str) or not SILO_NAME.fullmatch(name):
        return None
    if signing is None or agreement is None:
        return None
    key = PrivateKey(
        name=name,
        signing=Ed25519PrivateKey.from_private_bytes(signing),
        agreement=X25519PrivateKey.from_private_bytes(agreement),
    )
    return key if key.public.text == fields["public"] else None  # any 32 bytes are a key: this tells which


def _read(path: Path) -> tuple[bytes, os.stat_result]:
    """A small regular file, and what the disk knows of it."""
    try:
        opened = os.open(path, READ)
    except OSError as error:
        reason = "a link given; allowed: the file itself" if error.errno == errno.ELOOP else error.strerror
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    try:
        found = os.fstat(opened)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{path}: no file given; allowed: a key file of atoll keys new")
        if found.st_size > FILE_BYTES:
            raise ConfigError(f"{path}: {found.st_size} bytes given; allowed: a key file, up to {FILE_BYTES}")
        return os.read(opened, FILE_BYTES), found
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    finally:
        os.close(opened)


def _message(kind: str, data: bytes) -> bytes:
    """What is signed: a signature over a manifest is none over a commit, nor over what another program signs."""
    assert KIND.fullmatch(kind), kind
    return b"atoll/1 " + kind.encode() + b"\0" + data


def _signs(key: bytes) -> bool:
    """Whether 32 bytes are an Ed25519 key: y of a point, below P, on the curve, not of small order.

    The library takes any 32 bytes. With y = 1, say, everybody's signature of anything would pass.
    """
    y = int.from_bytes(key, "little") & ~(1 << 255)  # the highest bit is the sign of x
    if not 1 < y < P - 1:  # 1 and -1 are of order 1 and 2
        return False
    u = (1 + y) * pow(1 - y, -1, P) % P  # the same point on Curve25519
    return pow(u**3 + A * u**2 + u, (P - 1) // 2, P) == 1 and _agrees(u.to_bytes(KEY_BYTES, "little"))


def _agrees(key: bytes) -> bool:
    """Whether 32 bytes are an X25519 key: u below P, not of small order, which the library says by failing."""
    if int.from_bytes(key, "little") >= P:
        return False
    with suppress(ValueError):
        X25519PrivateKey.from_private_bytes(bytes(KEY_BYTES)).exchange(X25519PublicKey.from_public_bytes(key))
        return True
    return False


def _num_characters(num_bytes: int) -> int:
    return -(-num_bytes * 8 // 6)


def _encoded(data: bytes) -> str:
    """base64url (RFC 4648, section 5) without padding."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decoded(text: object, num_bytes: int) -> bytes | None:
    """The bytes whose `_encoded` this is, or None: no other text stands for them."""
    if not isinstance(text, str) or len(text) != _num_characters(num_bytes):
        return None
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        return None
    return data if _encoded(data) == text else None


def _decoded_loosely(said: bytes) -> bytes:
    """What a command says in either base64, with or without padding and line ends; empty if it is none."""
    text = b"".join(said.split()).rstrip(b"=").translate(bytes.maketrans(b"+/", b"-_")).decode("ascii", "replace")
    return _decoded(text, SIGNATURE_BYTES) or b""
