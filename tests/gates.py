"""What tests of the gate share: the hashes of tiny splits, and what a store says of its candidates."""

from pathlib import Path

from typer.testing import CliRunner

from launch.cli import app
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config
from pretrain.exchange.gated import Gated
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.words import Decision
from pretrain.silo.shards import read_manifest, text_sha256
from tests.faults.scripted import Faults
from tests.support import CORPORA, TinyText, tiny_silo, write_settings

RULE = {"every_versions": 1, "max_mean_rise": 0.1, "max_silo_rise": 0.2, "eval_sequences": 32}


def split_sha256(directory: Path) -> str:
    """As the contract has it."""
    return text_sha256(read_manifest(directory))


def gate_data(text: TinyText, *silos: str) -> dict[str, str]:
    """`gate.data` of silos that are called as their corpora."""
    return {f"{silo}/{silo}": split_sha256(text.packed[silo] / "valid") for silo in silos}


def poisoned(directory: Path, text: TinyText, *, is_gated: bool) -> tuple[RunConfig, Faults]:
    """Three silos and eight versions; the silo with two thirds of the tokens shuffles its text from version 5 on."""
    steps, silos = 20, {name: tiny_silo(text, name) for name in CORPORA}
    silos["gamma"] |= {"global_batch_sequences": 16, "micro_batch_sequences": 16}
    path = write_settings(
        directory,
        text,
        silos=silos,
        silo={"eval_sequences": 32},
        gate=RULE | {"data": gate_data(text, *silos)} if is_gated else {},
        inner={"num_steps": 8 * steps, "lr": 0.006},
        outer={"sync_interval_steps": steps, "optimizer": "sgd", "lr": 1.0},
    )
    return load_config([path]), {"gamma": [("reading", 4 * steps, 0, "shuffle", 0)]}


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
