"""Run a federation with real processes, and read back what it left."""

import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from launch.show.metrics import MetricsReader
from launch.start.local import CommandBuilder, launch_local, local_commands
from launch.start.processes import ChildCommand
from pretrain.config.keys import RunConfig
from pretrain.exchange.history import History
from pretrain.exchange.payload import read_parameters
from pretrain.exchange.sealed import read_as_a_member
from pretrain.exchange.store import StoreExchange
from pretrain.silo.data import PackedTokens
from pretrain.silo.model import build_initial, token_losses
from pretrain.trust.ledger import Commit
from pretrain.trust.members import with_keys
from tests.support import VOCAB_SIZE
from tests.warm import python as warm_python


@dataclass(kw_only=True)
class Outcome:
    """A run that ended."""

    config: RunConfig

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """metrics.jsonl."""
        return MetricsReader(Path(self.config.directory) / "metrics.jsonl").read_new()

    def by_step(self, silo: str, value: str) -> dict[int, float]:
        """Inner step to `value` of a silo's step records; a step that was done again must have come out the same."""
        found: dict[int, set[float]] = defaultdict(set)
        for record in self.records:
            if record["kind"] == "step" and record["silo"] == silo:
                found[record["step"]].add(record[value])
        assert all(len(values) == 1 for values in found.values()), "a repeated step came out differently"
        return {step: values.pop() for step, values in found.items()}

    def held_out(self, silo: str) -> dict[int, dict[str, float]]:
        """Round to the silo's held-out losses."""
        return {r["round"]: r["val_loss"] for r in self.records if r["kind"] == "eval" and r["silo"] == silo}

    @cached_property
    def exchange(self) -> StoreExchange:
        """The run's store."""
        exchange = StoreExchange(self.ledger)
        assert exchange.read_contract() is not None
        read_as_a_member(exchange, with_keys(self.config, make=False))
        return exchange

    @property
    def ledger(self) -> str:
        """Where the versions are: the store, or the first silo's own record of a collective."""
        return self.config.ledger_url(min(self.config.silos))

    def commit(self, version: int) -> Commit:
        """A commit, its link to the one before checked."""
        return self.exchange.read_commit(version)

    def parameters(self, version: int) -> dict[str, torch.Tensor]:
        """The global parameters of a version that was not pruned."""
        found: dict[str, torch.Tensor] = {}
        num_fragments = self.config.outer.num_fragments
        with tempfile.TemporaryDirectory() as scratch:
            for fragment in range(num_fragments):
                made = History(self.exchange, num_fragments).parameters(version, fragment)
                found |= read_parameters(self.exchange, made, Path(scratch))
        return found

    def delivered(self, silo: str, round: int) -> dict[str, torch.Tensor]:
        """What a silo delivered: with codec fp32, its local parameters."""
        folder = Path(self.config.store_url) / "silos" / silo / f"{round:06d}"
        files = sorted(folder.glob("*.safetensors"))
        return {name: value for file in files for name, value in values_in(file).items()}

    def alone(self, silo: str) -> dict[str, torch.Tensor]:
        """The final parameters of a silo that trained alone."""
        return load_file(self.config.final_parameters(silo))


def values_in(file: Path) -> dict[str, torch.Tensor]:
    """The parameters in a payload of codec fp32, without the moments beside them."""
    prefix = "parameter/values/"
    return {name.removeprefix(prefix): t for name, t in load_file(file).items() if name.startswith(prefix)}


def warm(build_commands: CommandBuilder) -> CommandBuilder:
    """The same commands, with processes that start warm; the workers of a silo, too.

    What another program starts, as one that enters a namespace, starts cold: a fork is where its parent is.
    """

    def warmed(command: ChildCommand) -> ChildCommand:
        if command.argv[0] != sys.executable:
            return command
        return replace(command, argv=[warm_python() if word == sys.executable else word for word in command.argv])

    return lambda config, config_path: [warmed(command) for command in build_commands(config, config_path)]


def federate(config: RunConfig, *, max_restarts: int = 0, build_commands: CommandBuilder | None = None) -> Outcome:
    """Launch aggregator and silos; fails with their output unless all end well."""
    code, said = launched(config, max_restarts=max_restarts, build_commands=build_commands)
    assert code == 0, said[-6000:]
    return Outcome(config=config)


def launched(
    config: RunConfig, *, max_restarts: int = 0, build_commands: CommandBuilder | None = None
) -> tuple[int, str]:
    """Launch as a user would, but warm (tests/warm), or other commands; returns the exit code and what was said."""
    log = Path(config.directory).with_suffix(".console")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        console = Console(file=file, width=1000)
        commands = warm(build_commands or local_commands)
        code = launch_local(config, max_restarts=max_restarts, build_commands=commands, console=console)
    return code, log.read_text()


def left_behind(directory: str) -> list[str]:
    """Command lines of living processes that name a directory, as all of a run do."""
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [command for command in commands if directory in command]


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Equal names and, tensor by tensor, equal bits."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert left
    assert not different


def assert_evaluated_last(run: Outcome) -> None:
    """Each silo's last held-out loss is that of a plain transformers model with the last version's parameters."""
    model = build_initial(run.config.model, VOCAB_SIZE)
    parameters = run.parameters(run.config.schedule.num_versions)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(parameters[name])
    for silo, settings in run.config.silos.items():
        tokens = PackedTokens([Path(settings.valid[silo])], sequence_tokens=16)
        input_ids, targets, *_ = tokens.batch([i * tokens.num_sequences // 8 for i in range(8)])  # spread over it
        with torch.no_grad():
            plain = token_losses(model, input_ids, targets).mean().item()
        tolerance = 1e-2 if settings.precision == "bf16" else 1e-6
        assert run.held_out(silo)[run.config.num_rounds][silo] == pytest.approx(plain, rel=tolerance)
