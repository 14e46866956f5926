"""A certificate authority of the tests' own, as institutions run them."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

VALID_DAYS = 2


class Authority:
    """Its certificate is `file`; it certifies servers and their clients by their address."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._name, self._key = directory, _name(name), ec.generate_private_key(ec.SECP256R1())
        self.file = directory / f"{name}.pem"
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        self.file.write_bytes(self._signed(self._name, self._key.public_key(), constraints))

    def certify(self, address: str, *, from_days: int = 0) -> tuple[Path, Path]:
        """Files of a certificate for whoever is at an IP address, valid in so many days, and of its private key."""
        key = ec.generate_private_key(ec.SECP256R1())
        addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
        certificate, secret = self._directory / f"{address}.pem", self._directory / f"{address}.key"
        certificate.write_bytes(self._signed(_name(address), key.public_key(), addresses, from_days))
        secret.touch(mode=0o600)
        secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return certificate, secret

    def _signed(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, extension: x509.ExtensionType, from_days: int = 0
    ) -> bytes:
        day = datetime.timedelta(days=1)
        now = datetime.datetime.now(datetime.UTC) + from_days * day
        builder = x509.CertificateBuilder(subject_name=subject, issuer_name=self._name, public_key=key)
        builder = builder.serial_number(x509.random_serial_number()).add_extension(extension, critical=True)
        builder = builder.not_valid_before(now - day).not_valid_after(now + VALID_DAYS * day)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
