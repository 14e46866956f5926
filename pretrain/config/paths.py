"""The keys of a configuration that are places: ~ is the home, and a run directory can move with all that is in it."""

import copy
import os
from collections.abc import Callable
from pathlib import Path

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig

Change = Callable[[str, str], str]
"""Key and place to what stands there instead."""
INSIDE = "${directory}/"  # what OmegaConf puts the run directory in for


def expand_homes(config: RunConfig) -> RunConfig:
    """The same with ~ and ~NAME expanded in every key that is a place. Raises ConfigError for homes that are none."""
    return _changed(config, expand_home)


def expand_home(key: str, place: str) -> str:
    """One place, of a key or an option."""
    found = os.path.expanduser(place)
    if found.startswith("~"):
        raise ConfigError(f"{key}: {place!r} given; allowed: a ~ that is a home; for a folder of that name, ./{place}")
    return found


def absolute(config: RunConfig) -> RunConfig:
    """The same wherever it is read: every place from the root on."""
    return _changed(config, lambda _, place: place if "://" in place else str(Path(place).absolute()))


def portable(config: RunConfig) -> RunConfig:
    """The same as it is written: what is in the run directory is named from there, so that both can move."""
    config = absolute(config)
    stem = config.directory.rstrip("/") + "/"

    def named(key: str, place: str) -> str:
        is_inside = key != "directory" and place.startswith(stem)
        return INSIDE + place.removeprefix(stem) if is_inside else place

    return _changed(config, named)


def _changed(config: RunConfig, change: Change) -> RunConfig:
    """A copy with every place changed; empty ones stay."""
    config = copy.deepcopy(config)

    def at(key: str, place: str) -> str:
        return change(key, place) if place else place

    config.directory = at("directory", config.directory)
    config.tokenizer = at("tokenizer", config.tokenizer)
    config.chat_template = at("chat_template", config.chat_template)
    config.model.checkpoint = at("model.checkpoint", config.model.checkpoint or "") or None
    for name in ("ca_file", "client_certificate", "client_key"):
        setattr(config.exchange, name, at(f"exchange.{name}", getattr(config.exchange, name)))
    config.trust.directory = at("trust.directory", config.trust.directory)
    config.trust.archive = at("trust.archive", config.trust.archive)
    config.trust.policy = at("trust.policy", config.trust.policy)
    config.gate.places = {name: at(f"gate.places.{name}", place) for name, place in config.gate.places.items()}
    if config.exchange.kind == "store":
        config.exchange.url = at("exchange.url", config.exchange.url)
    for key, silo in [("silo", config.silo), *((f"silos.{name}", silo) for name, silo in config.silos.items())]:
        silo.data = [at(f"{key}.data", place) for place in silo.data]
        silo.practice.tasks = at(f"{key}.practice.tasks", silo.practice.tasks)
        silo.valid = {corpus: at(f"{key}.valid.{corpus}", place) for corpus, place in silo.valid.items()}
    return config
