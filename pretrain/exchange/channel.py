"""A connection between two silos: TLS 1.3 between members of the roster, or plain where it has no keys. No torch.

Every process makes a key that is never written down, a certificate of it, and a passport: the member's signature over
certificate, key, run, name and lane. There is no authority to ask, so TLS itself accepts any certificate; then

- the server says its passport, and the client compares it with the certificate that TLS has seen: whoever has the
  certificate's key is that member, so nobody is in between, and what is said from then on only the two can read;
- the client says its own passport, and signs with its own key what the server has just drawn, together with the
  server's certificate: said anywhere else, or again, this proves nothing.

A passport is no secret: without its key, which a process takes with it, it opens nothing.
"""

import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from pretrain.host.foreign import shown
from pretrain.trust.ledger import Record, RefusedError
from pretrain.trust.members import Members

CONNECT_SECONDS, HANDSHAKE_SECONDS = 5.0, 10.0
PIECE_BYTES = 4 << 20  # a peer that passes less than one in the time that it has is gone
GREETING_BYTES = 4096  # of any frame before both know each other
CHALLENGE_BYTES, PROOF_BYTES, LENGTH_BYTES = 32, 64, 4
WELCOME = b"welcome"
PROOF = b"atoll/1 channel\0"


class BrokenError(Exception):
    """A connection is of no use any more; the message, one line, says why."""


class GoneError(BrokenError):
    """The other end has closed it, or died."""


class Channel:
    """One connection. Of its two directions each is used by one thread at a time; over TLS, both by the same one.

    Whatever takes longer than its time, or is not as agreed, is a BrokenError.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self.silo, self.lane, self.purpose = "", 0, ""
        """Who is at the other end, and what for, once that is known."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    @property
    def certificate(self) -> str:
        """sha256 of the certificate that the server has shown; empty without TLS."""
        shown_there = self._socket.getpeercert(binary_form=True) if isinstance(self._socket, ssl.SSLSocket) else None
        return sha256(shown_there).hexdigest() if shown_there else ""

    def send(self, data: memoryview | bytes, seconds: float | None) -> None:
        """Send all; each PIECE_BYTES have so long."""
        view = memoryview(data)
        with _naming_what_broke(seconds):
            for begin in range(0, len(view), PIECE_BYTES):
                self._pass(self._socket.send, view[begin : begin + PIECE_BYTES], seconds)

    def receive(self, into: memoryview, seconds: float | None) -> None:
        """Fill a piece of memory; each PIECE_BYTES have so long."""
        with _naming_what_broke(seconds):
            for begin in range(0, len(into), PIECE_BYTES):
                self._pass(self._socket.recv_into, into[begin : begin + PIECE_BYTES], seconds)

    def _pass(self, some: Callable[[memoryview], int], data: memoryview, seconds: float | None) -> None:
        over = time.monotonic() + seconds if seconds is not None else None
        while data:
            if over is not None and (left := over - time.monotonic()) <= 0:
                raise TimeoutError
            self._socket.settimeout(left if over is not None else None)
            if not (passed := some(data)):
                raise ConnectionResetError
            data = data[passed:]

    def send_frame(self, data: bytes, seconds: float | None) -> None:
        """Send bytes with their length before them."""
        self.send(len(data).to_bytes(LENGTH_BYTES) + data, seconds)

    def receive_frame(self, limit_bytes: int, seconds: float | None, *, begin_seconds: float | None = -1) -> bytes:
        """What `send_frame` sent. It may take `begin_seconds` to begin (None: for ever); by default no longer."""
        length = bytearray(LENGTH_BYTES)
        self.receive(memoryview(length), seconds if begin_seconds == -1 else begin_seconds)
        if (num_bytes := int.from_bytes(length)) > limit_bytes:
            raise BrokenError(f"a message of {num_bytes} bytes came; allowed: {limit_bytes}")
        data = bytearray(num_bytes)
        self.receive(memoryview(data), seconds)
        return bytes(data)

    def shake_hands(self) -> None:
        """TLS, if it is one of those."""
        with _naming_what_broke(HANDSHAKE_SECONDS):
            self._socket.settimeout(HANDSHAKE_SECONDS)
            if isinstance(self._socket, ssl.SSLSocket):
                self._socket.do_handshake()

    def cut(self) -> None:
        """End it for both, from whichever thread; who uses it finds it broken."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # SSLSocket's own would go on unencrypted

    def close(self) -> None:
        """Let go of it, when no other thread uses it."""
        self.cut()
        self._socket.close()


@contextmanager
def _naming_what_broke(seconds: float | None) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise BrokenError(f"nothing passed for {seconds:g} s") from None
    except (ConnectionError, ssl.SSLEOFError):
        raise GoneError("the connection was closed at the other end") from None
    except ssl.SSLError as error:
        raise BrokenError(f"TLS: {(error.reason or str(error)).replace('_', ' ').lower()}") from None
    except (OSError, ValueError) as error:  # ValueError: of a socket that is closed
        raise BrokenError(getattr(error, "strerror", None) or str(error)) from None


@dataclass(frozen=True, kw_only=True)
class Passport(Record):
    """A member's word for a process: who has this key, and shows this certificate, speaks for it."""

    run: str
    silo: str
    lane: int
    certificate: str
    """sha256 of it, as DER; empty where nothing is encrypted."""
    key: str
    """Ed25519 public key, in hexadecimal."""


class Credentials:
    """What a process shows and asks for. A member's key signs once, here."""

    def __init__(self, members: Members, *, run: str, silo: str, lane: int = 0) -> None:
        """`run` tells one federation of the same members from another."""
        self._members, self._key = members, Ed25519PrivateKey.generate()
        self._server = self._client = None
        certificate = b""
        if members.keys:
            certificate = _certificate(self._key, silo)
            self._server, self._client = _contexts(self._key, certificate)
            certificate = ssl.PEM_cert_to_DER_cert(certificate.decode())
        self.passport = members.sign(
            Passport(
                run=run,
                silo=silo,
                lane=lane,
                certificate=sha256(certificate).hexdigest() if certificate else "",
                key=self._key.public_key().public_bytes_raw().hex(),
            )
        )

    # ---- the server's side

    def accepted(self, connection: socket.socket) -> Channel:
        """A channel of a connection that has just come; nothing is read yet. Raises OSError."""
        if self._server:
            connection = self._server.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return Channel(connection)

    def admit(self, channel: Channel) -> None:
        """Find out who came, and name the channel so. Raises BrokenError."""
        channel.shake_hands()
        challenge = os.urandom(CHALLENGE_BYTES)
        said = channel.receive_frame(GREETING_BYTES, HANDSHAKE_SECONDS)
        channel.send_frame(self.passport.to_bytes(), HANDSHAKE_SECONDS)
        channel.send_frame(challenge, HANDSHAKE_SECONDS)
        greeting = channel.receive_frame(GREETING_BYTES, HANDSHAKE_SECONDS)
        try:
            theirs = self._read(said)
            proof, purpose = greeting[:PROOF_BYTES], greeting[PROOF_BYTES:]
            self._check_proof(theirs, proof, _proven(challenge, self.passport, said, purpose))
        except RefusedError as error:
            with suppress(BrokenError):
                channel.send_frame(f"refused: {error}".encode()[:GREETING_BYTES], HANDSHAKE_SECONDS)
            raise BrokenError(str(error)) from None
        channel.silo, channel.lane, channel.purpose = theirs.silo, theirs.lane, shown(purpose.decode(errors="replace"))
        channel.send_frame(WELCOME, HANDSHAKE_SECONDS)

    # ---- the client's side

    def dial(self, host: str, port: int, silo: str, *, lane: int = 0, purpose: str) -> Channel:
        """A channel to a silo's process, which listens there. Raises OSError if nobody does, BrokenError."""
        connection = socket.create_connection((host, port), CONNECT_SECONDS)
        if self._client:
            connection = self._client.wrap_socket(connection, do_handshake_on_connect=False)
        channel = Channel(connection)
        try:
            self._introduce(channel, silo, lane, purpose.encode())
        except BaseException as error:
            channel.close()
            if isinstance(error, RefusedError):
                raise BrokenError(str(error)) from None
            raise
        channel.silo, channel.lane, channel.purpose = silo, lane, purpose
        return channel

    def _introduce(self, channel: Channel, silo: str, lane: int, purpose: bytes) -> None:
        channel.shake_hands()
        ours = self.passport.to_bytes()
        channel.send_frame(ours, HANDSHAKE_SECONDS)
        theirs = self._read(channel.receive_frame(GREETING_BYTES, HANDSHAKE_SECONDS))
        if (theirs.silo, theirs.lane) != (silo, lane):
            raise RefusedError(f"{shown(theirs.silo)}, lane {theirs.lane}, is there, and not {silo}, lane {lane}")
        if theirs.certificate != channel.certificate:
            raise RefusedError(f"the passport of {silo} came with another certificate than its own")
        challenge = channel.receive_frame(GREETING_BYTES, HANDSHAKE_SECONDS)
        proof = self._key.sign(_proven(challenge, theirs, ours, purpose))
        channel.send_frame(proof + purpose, HANDSHAKE_SECONDS)
        answer = channel.receive_frame(GREETING_BYTES, HANDSHAKE_SECONDS)
        if answer != WELCOME:
            raise RefusedError(f"{silo} says: {shown(answer.decode(errors='replace'))}")

    # ---- both

    def _read(self, said: bytes) -> Passport:
        """A passport of another party, if its member has signed it for this run. Raises RefusedError."""
        theirs = Passport.from_bytes(said)
        if theirs.run != self.passport.run:
            raise RefusedError(f"a passport of run {shown(theirs.run)} was shown, and this is {self.passport.run}")
        self._members.check(theirs.silo, theirs)
        return theirs

    @staticmethod
    def _check_proof(theirs: Passport, proof: bytes, proven: bytes) -> None:
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(theirs.key)).verify(proof, proven)
        except (InvalidSignature, ValueError):
            raise RefusedError(f"the passport of {shown(theirs.silo)} was shown without its key") from None


def _proven(challenge: bytes, server: Passport, client: bytes, purpose: bytes) -> bytes:
    """What a client signs: both passports, and with them both certificates and keys, for this connection alone."""
    return b"".join([PROOF, *(sha256(part).digest() for part in (challenge, server.to_bytes(), client, purpose))])


def _certificate(key: Ed25519PrivateKey, silo: str) -> bytes:
    """Signed by its own key, as PEM (RFC 5280). It never ends: clocks differ, and the key ends with the process."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, silo[:64])])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(1970, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(9999, 12, 31, tzinfo=UTC))
        .sign(key, None)
    )
    return made.public_bytes(Encoding.PEM)


def _contexts(key: Ed25519PrivateKey, certificate: bytes) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of server and client; the key reaches OpenSSL through a file that is in memory only."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.minimum_version = client.minimum_version = ssl.TLSVersion.TLSv1_3
    server.num_tickets = 0  # nobody comes back without a passport
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE  # the passport says whose it is
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with os.fdopen(os.memfd_create("certificate", os.MFD_CLOEXEC), "wb") as file:
        file.write(pem + certificate)
        file.flush()
        server.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    return server, client
