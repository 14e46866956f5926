"""Processes of a federation that come and go one by one, as in several institutions, without a launcher's watch."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import psutil
from safetensors.torch import load_file

from launch.start.local import CommandBuilder, local_commands
from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config
from pretrain.outer.digest import digest_tensors


class Guest:
    """A silo with a run directory of its own, or an aggregator, which comes and goes without a launcher's watch.

    As a context it is killed in the end, if it still runs.
    """

    def __init__(self, config: RunConfig, name: str, build_commands: CommandBuilder = local_commands) -> None:
        self.config, self.name = config, name
        path = Path(config.directory) / "config.yaml"
        save_config(config, path)
        self._command = next(command for command in build_commands(config, path) if command.name == name)
        self._log = Path(config.directory).with_suffix(f".{name}.log")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it again."""
        environment = os.environ | self._command.environment
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command.argv, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def workers(self) -> list[psutil.Process]:
        """Of a silo, the processes that train: itself, or those that it has started."""
        assert self._process
        itself = psutil.Process(self._process.pid)
        return itself.children(recursive=True) or [itself]

    def kill(self) -> None:
        """SIGKILL all its processes, if it runs."""
        if not self._process or self._process.poll() is not None:
            return
        for process in [psutil.Process(self._process.pid), *self.workers()]:  # which have process groups of their own
            process.kill()
        self._process.wait()

    def stop(self, seconds: float | None = None) -> None:
        """SIGTERM, as a scheduler would; returns when the checkpoint is written, within so many seconds."""
        assert self._process
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(seconds)

    def wait(self, seconds: float, *, code: int | None = 0) -> str:
        """Wait until it has ended, with an exit code, if one is given; returns all that it printed."""
        assert self._process
        ended, text = self._process.wait(seconds), self._log.read_text()
        assert code is None or ended == code, text[-5000:]
        return text


@contextmanager
def started(*guests: Guest, seconds: float) -> Iterator[None]:
    """Start them; after the block each must end well within so many seconds."""
    with ExitStack() as ending:
        for guest in guests:
            ending.enter_context(guest).start()
        yield
        for guest in guests:
            guest.wait(seconds)


def final_digest(config: RunConfig, silo: str) -> str:
    """Of the global parameters that a silo's last checkpoint holds."""
    newest = max((config.silo_directory(silo) / "checkpoints").glob("step-*"))
    return digest_tensors(load_file(newest / "global.safetensors").items())
