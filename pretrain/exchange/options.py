"""How a store in a network is reached: what fsspec is told, and whose certificates are trusted. No torch."""

import os
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from pretrain.config.check import check_url
from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR, ExchangeConfig
from pretrain.config.load import CONFIG_FILE, load_run
from pretrain.config.paths import expand_home
from pretrain.exchange.identity import check_authorities, check_identity
from pretrain.host.clock import by_this_machine

OF_TIME = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID and _HAS_EXPIRED of OpenSSL
# What a server says of a client's certificate, as OpenSSL names it (RFC 8446, section 6.2).
ALERTS = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate of whoever asks",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the authority of our certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not take our certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "it does not take a certificate of our kind",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "it says that our certificate is revoked",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it says that our certificate has expired",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not take our certificate",
}
SKEWED = ("RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture")
OF_TLS = {
    "ca_file": "; for other kinds set SSL_CERT_FILE and REQUESTS_CA_BUNDLE in the environment",
    "client_certificate": "",
    "client_key": "",
}
OF_DIRECTORIES = (None, "file", "local")
OF_S3, OF_GOOGLE, OF_AZURE = ("s3", "s3a"), ("gs", "gcs"), ("az", "abfs", "abfss", "adl")


def store_options(exchange: ExchangeConfig, url: str) -> dict[str, Any]:
    """`exchange.options` for the store at `url`, with the files of certificates among them; nothing for a directory.

    Raises ConfigError for files that are none, and for a kind of store that cannot be given them.
    """
    if is_directory(url):
        return {}
    found = exchange.options
    for name, why in OF_TLS.items():
        if getattr(exchange, name) and fsspec.core.split_protocol(url)[0] not in OF_S3:
            raise ConfigError(
                f"exchange.{name}: {getattr(exchange, name)!r} given with {url}; allowed: with s3://{why}"
            )
    if exchange.ca_file:
        check_authorities(exchange.ca_file)
        found = found | {"client_kwargs": {**found.get("client_kwargs", {}), "verify": exchange.ca_file}}
    if exchange.client_certificate or exchange.client_key:
        check_identity(exchange.client_certificate, exchange.client_key)
        shows = exchange.client_certificate, exchange.client_key or exchange.client_certificate
        found = found | {"config_kwargs": {**found.get("config_kwargs", {}), "client_cert": shows}}
    return found


def reached(where: str) -> tuple[str, ExchangeConfig]:
    """The URL that a user gave, or of the store of the run directory that he gave; and how it is reached.

    Raises ConfigError for what is neither.
    """
    where = expand_home("store", where)
    check_url(where, "store")
    if (Path(where) / "store").is_dir():
        return str(Path(where) / "store"), ExchangeConfig()
    if not (Path(where) / CONFIG_FILE).is_file():
        return where, ExchangeConfig()
    config = load_run(Path(where))
    if config.exchange.kind != "store":
        ledgers = f"; allowed: {where}/silos/NAME/ledger, a silo's own" if config.exchange.kind == "collective" else ""
        raise ConfigError(f"store: {where!r} given; its run is one with exchange.kind={config.exchange.kind}{ledgers}")
    return config.store_url, config.exchange


def operators_key(where: str) -> Path | None:
    """The private key of the operator where a run directory, or its `trust.directory`, has it; None if it is not there.

    Raises ConfigError for a run directory whose configuration cannot be read.
    """
    folder = Path(expand_home("store", where))
    file = folder / "keys" / f"{OPERATOR}.key"
    if (folder / CONFIG_FILE).is_file():
        file = load_run(folder).key_file(OPERATOR)
    return file if file.is_file() else None


def destination(url: str, options: Mapping[str, Any]) -> str:
    """Where what is written to a store goes: a host's name, or a folder of this machine, from / on.

    Raises ConfigError for a kind of store of which that cannot be told.
    """
    if is_directory(url):
        return str(Path(fsspec.core.strip_protocol(url)).absolute())
    protocol = fsspec.core.split_protocol(url)[0]
    endpoint = str(options.get("endpoint_url") or options.get("client_kwargs", {}).get("endpoint_url") or "")
    if protocol in OF_S3 and not endpoint:
        endpoint = _endpoint_of_s3(options.get("profile"))
    elif protocol in OF_GOOGLE and not endpoint:
        endpoint = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
    elif protocol in OF_AZURE and (account := options.get("account_name")):
        endpoint = f"https://{account}.blob.core.windows.net"
    elif protocol in ("http", "https"):
        endpoint = url
    if host := urlsplit(endpoint if "://" in endpoint else f"//{endpoint}").hostname:
        return host
    raise ConfigError(
        f"exchange.url: {url!r} given; the host that its bytes go to cannot be told; allowed: with hosts in a policy, "
        "a directory, s3://, gs://, http://, or az:// with exchange.options.account_name"
    )


def _endpoint_of_s3(profile: str | None) -> str:
    """What the library makes of environment, ~/.aws and region."""
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    try:
        session = Session(profile=profile)
        region = session.get_config_variable("region") or "us-east-1"
        return str(session.create_client("s3", region_name=region).meta.endpoint_url)
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"exchange.options: the store's endpoint cannot be told: {error}") from None


def is_directory(url: str) -> bool:
    """Whether a store is a directory of this machine."""
    return fsspec.core.split_protocol(url)[0] in OF_DIRECTORIES


def distrust(error: BaseException | None) -> str:
    """Why a server's certificate was not accepted, or ours by it, if that is behind an error of whatever library."""
    for one in _chain(error):
        if isinstance(one, ssl.SSLCertVerificationError) and hasattr(one, "verify_message"):
            clock = f"; {by_this_machine()}" if one.verify_code in OF_TIME else ""
            return f"its certificate is not trusted: {one.verify_message}{clock} (exchange.ca_file)"
        if isinstance(one, ssl.SSLError) and (said := ALERTS.get(getattr(one, "reason", None) or "")):
            return f"{said} (exchange.client_certificate)"
    return ""


def is_of_another_time(error: BaseException | None) -> bool:
    """Whether a store refuses a request because its clock and this machine's differ (S3: RequestTimeTooSkewed)."""
    answers = (getattr(one, "response", None) for one in _chain(error))
    codes = (found.get("Error", {}).get("Code") for found in answers if isinstance(found, dict))
    return any(code in SKEWED for code in codes)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__ or error.__context__
