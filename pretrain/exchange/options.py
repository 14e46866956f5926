"""How a store in a network is reached: what fsspec is told, and whose certificates are trusted. No torch."""

import ssl
from pathlib import Path
from typing import Any

import fsspec

from pretrain.config.check import ConfigError, check_url
from pretrain.config.keys import OPERATOR, ExchangeConfig
from pretrain.config.load import CONFIG_FILE, load_run
from pretrain.config.paths import expand_home

OF_DIRECTORIES = (None, "file", "local")
OF_S3 = ("s3", "s3a")


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
        raise ConfigError(f"store: {where!r} given; its run is one with exchange.kind={config.exchange.kind}")
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
