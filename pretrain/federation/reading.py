"""The configuration with which this machine reads a federation: its run directory's, or the contract's. No torch."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.config.load import CONFIG_FILE, load_config, load_run
from pretrain.config.paths import expand_home
from pretrain.exchange.options import reached, store_options
from pretrain.exchange.store import StoreExchange
from pretrain.federation.join import read_terms
from pretrain.silo.shards import tokenizer_sha256
from pretrain.silo.weights import ADAPTER
from pretrain.trust.contract import build_contract, check_same_contract
from pretrain.trust.members import with_keys

MODEL_CONFIG = "config.json"  # what a `transformers` directory has


def configuration(where: str, contract: bytes, *, paths: Sequence[Path] = (), tokenizer: Path | None) -> RunConfig:
    """The run's, from the run directory, from files, or from the contract and a tokenizer. Raises ConfigError."""
    terms, _, _, agreed = read_terms(contract, where)
    run = Path(expand_home("store", where))
    if paths or (run / CONFIG_FILE).is_file():
        own = with_keys(load_config(paths) if paths else load_run(run), make=False)
        check_same_contract(build_contract(own), contract, where)
        return own
    if tokenizer is None or "checkpoint" in terms["model"]:
        what = "--tokenizer" if tokenizer is None else "--config"
        needs = (
            "the tokenizer, or --config" if tokenizer is None else "a configuration with this site's model.checkpoint"
        )
        raise ConfigError(f"{what}: none given, and {where!r} is no run directory; allowed: {needs}")
    own = dataclasses.replace(agreed, tokenizer=expand_home("--tokenizer", str(tokenizer)))
    if tokenizer_sha256(own.tokenizer_file, key="--tokenizer") != terms["tokenizer_sha256"]:
        raise ConfigError(
            f"--tokenizer: {str(tokenizer)!r} given; allowed: the one that the contract names by its sha256"
        )
    return own


def exported(where: str, *, options: Mapping[str, object]) -> Path | None:
    """The directory of an exported model, if `where` is one; None for a run or a store.

    Raises ConfigError for an adapter, and for one of the `options` that only these have, by name to whether it is
    given.
    """
    directory = Path(expand_home("model", where))
    if (directory / ADAPTER).is_file():
        raise ConfigError(
            f"model: {where!r} given, which is an adapter without its base; allowed: the run directory or the store "
            "that it is from, or a whole model"
        )
    if not (directory / MODEL_CONFIG).is_file():
        return None
    check_not_given(where, options)
    return directory


def check_not_given(where: str, options: Mapping[str, object]) -> None:
    """Raise ConfigError for one of the `options`, by name to whether it is given, that a model takes none of."""
    if wrong := [name for name, is_given in options.items() if is_given]:
        raise ConfigError(f"{wrong[0]}: given with {where!r}, which is a model; allowed: with a run or a store")


def found_configuration(where: str, *, paths: Sequence[Path] = (), tokenizer: Path | None = None) -> RunConfig:
    """The same, of a run directory, whatever its exchange, or of the URL of a store. Raises ConfigError."""
    run = Path(expand_home("store", where))
    if not paths and (run / CONFIG_FILE).is_file():
        return with_keys(load_run(run), make=False)
    url, exchange = reached(where)
    exchange = load_config(paths).exchange if paths else exchange
    contract = StoreExchange(url, options=store_options(exchange, url)).read_contract()
    if contract is None:
        raise ConfigError(f"store: {where!r} given; there is no run in it (no contract.json)")
    return configuration(where, contract, paths=paths, tokenizer=tokenizer)
