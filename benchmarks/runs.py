"""What the benchmarks share that train federations on a folder of corpora."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.start.local import CommandBuilder, launch_local
from pretrain.config.keys import RunConfig


def plain(config: RunConfig) -> RunConfig:
    """One process a silo and no ZeRO: the same arithmetic with less overhead than the demo's mixed layout."""
    layout: dict[str, Any] = {"processes_per_node": 1, "micro_batch_sequences": 16, "deepspeed": {}}
    silos = {name: dataclasses.replace(silo, **layout) for name, silo in config.silos.items()}
    return dataclasses.replace(config, silos=silos)


def launched(config: RunConfig, log_file: Path, build_commands: CommandBuilder | None = None) -> None:
    """Train to the end, told in `log_file`. Raises SystemExit if it fails."""
    with log_file.open("a") as log:
        if launch_local(config, build_commands=build_commands, console=Console(file=log, width=120)):
            raise SystemExit(f"{config.directory} failed: see {log_file}")


def finished(config: RunConfig, log_file: Path, build_commands: CommandBuilder | None = None) -> dict[str, Any]:
    """The summary of a run, which is made first unless it was."""
    summary = Path(config.directory) / "summary.json"
    if not summary.exists():
        launched(config, log_file, build_commands)
    return json.loads(summary.read_text())


def mean_loss(summary: dict[str, Any]) -> float:
    """Mean held-out loss over the corpora, in nats per token."""
    return statistics.mean(summary["val_loss"].values())
