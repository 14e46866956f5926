"""What a process tells the outside: metrics records, its status, its last error, and Weights & Biases. No torch."""

import json
import os
import time
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig


class Journal:
    """One process's part of a run directory."""

    def __init__(self, config: RunConfig, part: str, *, silo: str | None) -> None:
        """`part` is the folder below the run directory: `aggregator`, or `silos/NAME`."""
        self._silo = silo
        self._metrics = Path(config.directory) / "metrics.jsonl"
        self.directory = Path(config.directory) / part
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "error.txt").unlink(missing_ok=True)
        self._wandb: Any = None
        if config.wandb.mode != "disabled":
            import wandb

            self._wandb = wandb.init(
                project=config.wandb.project,
                group=config.name,
                name=f"{config.name}-{silo or part}",
                mode=config.wandb.mode,  # type: ignore[arg-type]
                dir=str(self.directory),
                config={"silo": silo},
                settings=wandb.Settings(silent=True, console="off"),
            )

    def record(self, kind: str, **values: Any) -> None:
        """Append one line to metrics.jsonl. One write in append mode: lines of several processes do not mix."""
        head: dict[str, Any] = {"kind": kind, "time": time.time()}
        if self._silo:
            head["silo"] = self._silo
        line = json.dumps(head | values) + "\n"
        descriptor = os.open(self._metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
        if self._wandb:
            numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
            numbers |= {f"{kind}/{corpus}": loss for corpus, loss in values.get("val_loss", {}).items()}
            self._wandb.log(numbers)

    def status(self, phase: str, *, step: int = 0, round: int = 0, waiting_for: str | None = None) -> None:
        """Replace status.json: what this process does, and since when."""
        values = {"phase": phase, "waiting_for": waiting_for, "since": time.time(), "step": step, "round": round}
        temporary = self.directory / "status.json.tmp"
        temporary.write_text(json.dumps(values))
        temporary.replace(self.directory / "status.json")

    def error(self, message: str) -> None:
        """Leave the one line that a launcher shows for this process."""
        (self.directory / "error.txt").write_text(message + "\n")

    def close(self) -> None:
        """Finish the Weights & Biases run, if there is one."""
        if self._wandb:
            self._wandb.finish()
