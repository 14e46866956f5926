"""Arguments and options that several commands take, and the configuration that comes of them."""

from pathlib import Path
from typing import Annotated

import typer

from pretrain.config.keys import RunConfig

Config = Annotated[list[Path], typer.Option("--config", "-c", help="YAML file; several are merged in order.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes and presets, merged last.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check all and say what would start; start nothing.")]


def loaded(paths: list[Path], overrides: list[str] | None, *, needs_silo: bool = True) -> RunConfig:
    """A configuration, with the keys of its run directory where a launch has made them. Raises ConfigError.

    `needs_silo` is False where a configuration of the aggregator alone does, too.
    """
    from pretrain.config.check import check_has_silo
    from pretrain.config.load import load_config
    from pretrain.trust.members import with_keys

    config = with_keys(load_config(paths, overrides or []), make=False)
    if needs_silo:
        check_has_silo(config)
    return config


def store_of(where: str) -> str:
    """A store's URL: what is given, or the store of a run directory. Raises ConfigError."""
    from pretrain.exchange.options import reached

    return reached(where)[0]
