"""Run the aggregator or a silo with a clock that is wrong: `python -m tests.faults.clocks MODULE SECONDS [arguments]`.

Its time of day is off by so many seconds; with `SECONDS,OTHERS` it jumps between the two at every look. Files that it
makes anew keep the file system's times. A process that looks at all leaves MODULE's name in the file $CLOCKS_LOOKED.
"""

import dataclasses
import importlib
import itertools
import os
import sys
import time
from pathlib import Path

from launch.start.local import CommandBuilder, local_commands
from launch.start.processes import ChildCommand
from pretrain.config.keys import RunConfig

LOOKED = "CLOCKS_LOOKED"

Years = dict[str, tuple[int, ...]]
"""Silo, or `aggregator`, to the year that its clock has, or to several in turns."""


def until(year: int) -> float:
    """Seconds from now to a year's beginning."""
    return (year - 1970) * 365.2425 * 86_400 - time.time()


def with_clocks(years: Years, looked: Path) -> CommandBuilder:
    """A command builder that gives each process its clock; those that look leave their names in `looked`."""

    def build(config: RunConfig, config_path: Path) -> list[ChildCommand]:
        commands = []
        for command in local_commands(config, config_path):
            at = command.argv.index("pretrain.aggregate" if command.name == "aggregator" else "pretrain.train")
            offsets = ",".join(str(until(year)) for year in years[command.name])
            argv = [*command.argv[:at], "tests.faults.clocks", command.argv[at], offsets, *command.argv[at + 1 :]]
            environment = command.environment | {LOOKED: str(looked / command.name)}
            commands.append(dataclasses.replace(command, argv=argv, environment=environment))
        return commands

    return build


def main() -> None:
    """Command line."""
    which, offsets, *arguments = sys.argv[1:]
    module = importlib.import_module(which)
    turns = itertools.cycle(float(offset) for offset in offsets.split(","))
    true_time, true_time_ns = time.time, time.time_ns

    def look() -> float:
        Path(os.environ[LOOKED]).touch()
        return next(turns)

    time.time = lambda: true_time() + look()
    time.time_ns = lambda: true_time_ns() + int(look() * 1e9)
    sys.argv = [which, *arguments]
    sys.exit(module.main())


if __name__ == "__main__":
    main()
