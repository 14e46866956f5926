"""TensorBoard's event files beside a run; they stay on this machine. No torch before the first record."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.host.tracker import numbers

FOLDER = "tensorboard"


def check_tensorboard(config: RunConfig) -> None:
    """Raise ConfigError if event files are wanted and the library is not here."""
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError(
            "tensorboard: true given; the package is not installed here; allowed: false, or after pip install "
            "'atoll[tensorboard]'"
        )


class EventFiles:
    """What one process writes for TensorBoard, in a folder below its own; nothing unless `tensorboard` is set."""

    def __init__(self, config: RunConfig, part: str) -> None:
        """Raises ConfigError without the library."""
        check_tensorboard(config)
        self._directory = Path(config.directory) / part / FOLDER if config.tensorboard else None
        self._writer: Any = None

    def log(self, kind: str, values: dict[str, Any]) -> None:
        """The numbers of one record, by step, or by version where it has no step."""
        if not self._directory:
            return
        step = values.get("step", values.get("version"))
        if kind == "start" or not self._writer:
            from torch.utils.tensorboard import SummaryWriter

            self.close()
            # What was written of later steps before is done again, or was discarded.
            purge = step + 1 if kind == "start" and step is not None else None
            self._writer = SummaryWriter(str(self._directory), purge_step=purge)
        if step is not None:
            for name, number in numbers(kind, values).items():
                self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        """All is on the disk."""
        if self._writer:
            self._writer.close()
