"""How a store in a network is reached: what fsspec is told, and whose certificates are trusted. No torch."""

import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from pretrain.config.check import ConfigError, check_url
from pretrain.config.keys import OPERATOR, ExchangeConfig
from pretrain.config.load import CONFIG_FILE, load_run
from pretrain.config.paths import expand_home

OF_DIRECTORIES = (None, "file", "local")
OF_S3, OF_GOOGLE, OF_AZURE = ("s3", "s3a"), ("gs", "gcs"), ("az", "abfs", "abfss", "adl")


def store_options(exchange: ExchangeConfig, url: str) -> dict[str, Any]:
    """`exchange.options` for the store at `url`, with `exchange.ca_file` among them; nothing for a directory.

    Raises ConfigError for a file that holds no certificates, and for a kind of store that cannot be given one.
    """
    if is_directory(url):
        return {}
    if not exchange.ca_file:
        return exchange.options
    if fsspec.core.split_protocol(url)[0] not in OF_S3:
        raise ConfigError(
            f"exchange.ca_file: {exchange.ca_file!r} given with {url}; allowed: with s3://; for other kinds set "
            "SSL_CERT_FILE and REQUESTS_CA_BUNDLE in the environment"
        )
    try:
        ssl.create_default_context(cafile=exchange.ca_file)
    except OSError as error:
        reason = "it holds no certificates" if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigError(f"exchange.ca_file: {exchange.ca_file!r} given; allowed: a PEM file; {reason}") from None
    client = {**exchange.options.get("client_kwargs", {}), "verify": exchange.ca_file}
    return {**exchange.options, "client_kwargs": client}


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
    """Why a server's certificate was not accepted, if that is behind an error of whatever library; else nothing."""
    while error:
        if isinstance(error, ssl.SSLCertVerificationError) and hasattr(error, "verify_message"):
            return error.verify_message  # which libraries' own kinds of it have not
        error = error.__cause__ or error.__context__
    return ""
