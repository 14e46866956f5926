"""What tests of the gate share: the hashes of tiny splits, and what a store says of its candidates."""

from pathlib import Path

from typer.testing import CliRunner

from launch.cli import app
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.exchange.gated import Gated
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.words import Decision
from pretrain.silo.shards import read_manifest, text_sha256
from tests.support import TinyText


def split_sha256(directory: Path) -> str:
    """As the contract has it."""
    return text_sha256(read_manifest(directory))


def gate_data(text: TinyText, *silos: str) -> dict[str, str]:
    """`gate.data` of silos that are called as their corpora."""
    return {f"{silo}/{silo}": split_sha256(text.packed[silo] / "valid") for silo in silos}


def commanded(*arguments: object) -> tuple[int, str]:
    """What a command prints, and its exit code; a user's mistake as its main says it."""
    run = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "300"})
    if isinstance(run.exception, ConfigError):
        return 2, str(run.exception)
    return run.exit_code, run.output


def decisions(config: RunConfig) -> list[Decision]:
    """All in the store of a run, each checked against the results that it names."""
    exchange = StoreExchange(config.store_url)
    assert exchange.read_contract()
    gated = Gated(exchange, config.gate)
    found = gated.decisions(exchange.newest_version())
    for before, decision in zip([None, *found], found, strict=False):
        gated.check(decision, before)
    return found
