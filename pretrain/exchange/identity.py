"""Files with which TLS is spoken to a store: the authorities that are trusted, and what this site shows. No torch."""

import os
import shlex
import ssl
import stat
import time
from pathlib import Path
from typing import Any

from cryptography import x509

from pretrain.config.errors import ConfigError
from pretrain.host.clock import by_this_machine, utc

PEM_BYTES = 1 << 20


class _PasswordError(Exception):
    """A key has one, and would ask for it on the terminal."""


def check_authorities(file: str) -> None:
    """Raise ConfigError unless a file holds certificates of authorities."""
    try:
        ssl.create_default_context(cafile=file)
    except OSError as error:
        reason = "it holds no certificates" if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigError(f"exchange.ca_file: {file!r} given; allowed: a PEM file; {reason}") from None


def check_identity(certificate: str, key: str) -> None:
    """Raise ConfigError unless these are a certificate that holds today and its key, which nobody else can read.

    Without `key` that is in the certificate's file, too.
    """
    if not certificate:
        raise ConfigError(f"exchange.client_key: {key!r} given; allowed: with exchange.client_certificate")
    made = _read("exchange.client_certificate", certificate)
    secret, name = (key, "exchange.client_key") if key else (certificate, "exchange.client_certificate")
    _read(name, secret)
    if (mode := stat.S_IMODE(os.stat(secret).st_mode)) & 0o077:
        raise ConfigError(f"{name}: {secret!r} of mode {mode:o} given; allowed: 600: chmod 600 {shlex.quote(secret)}")
    try:
        own = x509.load_pem_x509_certificates(made)[0]
    except (ValueError, IndexError):
        raise _wrong("exchange.client_certificate", certificate, "it holds no certificate") from None
    _check_dates(own, certificate)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, secret, password=_no_password)
    except _PasswordError:
        raise _wrong(name, secret, "its key has a password") from None
    except ssl.SSLError as error:
        reason = f"it is not the key of {certificate!r}" if error.reason == "KEY_VALUES_MISMATCH" else "it holds no key"
        raise _wrong(name, secret, reason) from None


def _check_dates(certificate: x509.Certificate, file: str) -> None:
    begins, ends = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    if not begins <= time.time() <= ends:
        raise ConfigError(
            f"exchange.client_certificate: {file!r} given; it is valid from {utc(begins)} to {utc(ends)}, and "
            f"{by_this_machine()}; set the clock, or ask the store's keeper for another"
        )


def _no_password() -> Any:
    raise _PasswordError


def _read(name: str, file: str) -> bytes:
    try:
        with Path(file).open("rb") as opened:
            return opened.read(PEM_BYTES)
    except OSError as error:
        raise _wrong(name, file, error.strerror) from None


def _wrong(name: str, file: str, reason: str | None) -> ConfigError:
    return ConfigError(f"{name}: {file!r} given; allowed: a PEM file; {reason}")
