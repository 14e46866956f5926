"""What srun starts on every node of a silo's job: shards copied to the node, the silo, a note if it failed here.

    python -m launch.start.node --config run/config.yaml --silo law --host 10.0.0.1 --host 10.0.0.2 --port 20017

A silo of several nodes is started by torchrun. Exit code 2: a user's mistake, which another start would only repeat;
otherwise torchrun's, or the silo's own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launch.start.torchrun import config_path, node_command
from launch.start.workers import SAVE_SECONDS, SAVE_VARIABLE, Asked, run_workers, train_command
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig, SiloConfig
from pretrain.config.load import load_config
from pretrain.host.lock import lock_holder

LOCK_SECONDS = 300
CACHES = ("TRITON_CACHE_DIR",)  # torch.compile's own stays: later jobs start faster with it


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--silo", required=True)
    parser.add_argument("--host", action="append", required=True, help="address of a node, in the order of their ids")
    parser.add_argument("--port", type=int, required=True, help="of the rendezvous, on the first")
    parser.add_argument("--interface", help="network interface for NCCL and gloo")
    parser.add_argument("--numa", help="as torchrun's --numa-binding takes it")
    parser.add_argument("--scratch", help="folder of the node's own, for shards and caches")
    arguments = parser.parse_args()
    node, job = os.environ["SLURMD_NODENAME"], os.environ["SLURM_JOB_ID"]
    start = f"{job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    asked = Asked()  # SLURM signals all processes of a step: torchrun answers, or the workers that we pass it on to
    try:
        if not arguments.config.is_file():
            raise ConfigError(f"{arguments.config} is not there; put the run directory where all nodes see it")
        config = load_config([arguments.config])
        with staged(config, arguments.silo, arguments.scratch, f"{job}-{node}") as (overrides, environment):
            if os.environ.get("SLURM_RESTART_COUNT"):
                _wait_for_the_last_start(config.silo_directory(arguments.silo))
            if asked.first:
                return 128 + asked.first
            code = _run(config, arguments, asked, start=start, overrides=overrides, environment=environment)
    except ConfigError as error:
        print(f"node {node}: {error}", file=sys.stderr, flush=True)
        return 2
    if code and not asked.first:  # with signals it was ended, most likely because another node failed
        note_failure(notes_directory(config, arguments.silo), start, node)
    return code


def _run(
    config: RunConfig,
    arguments: argparse.Namespace,
    asked: Asked,
    *,
    start: str,
    overrides: list[str],
    environment: dict[str, str],
) -> int:
    """Run the silo's part on this node; returns the exit code."""
    silo, path = arguments.silo, config_path(config)
    if len(arguments.host) == 1:
        argv, variables = train_command(config, silo, path, overrides=overrides, numa=arguments.numa)
        seconds = float(os.environ.get(SAVE_VARIABLE, SAVE_SECONDS))
        num = config.silos[silo].processes_per_node
        return run_workers(argv, num, variables | environment, asked, save_seconds=seconds)
    command = node_command(
        config,
        silo,
        arguments.host,
        int(os.environ["SLURM_NODEID"]),
        port=arguments.port,
        interface=arguments.interface,
        identity=start,
        numa=arguments.numa,
        overrides=overrides,
    )
    return subprocess.run(command.argv, env=os.environ | command.environment | environment, check=False).returncode


def _wait_for_the_last_start(directory: Path) -> None:
    """A node that SLURM lost may go on for a while, and so may a file system's locks of it."""
    end = time.monotonic() + LOCK_SECONDS
    while lock_holder(directory) and time.monotonic() < end:
        time.sleep(1)


def notes_directory(config: RunConfig, silo: str) -> Path:
    """Where the node on which torchrun failed first notes it: a link for each start, to the node's name."""
    return config.silo_directory(silo) / "crashes"


def note_failure(notes: Path, start: str, node: str) -> None:
    """Note that a start failed on a node, unless it has failed on another before; clocks of two nodes tell nothing."""
    notes.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.symlink(node, notes / start)


@contextmanager
def staged(
    config: RunConfig, silo: str, scratch: str | None, identity: str
) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Copy a silo's shards into a folder of the node's own, removed at the end; overrides and variables that say so.

    Raises ConfigError if they do not fit there.
    """
    if scratch is None:
        yield [], {}
        return
    if not scratch:
        raise ConfigError("scratch: it is empty on this node; allowed: a folder, or a variable that is set")
    folder = Path(scratch) / f"atoll-{identity}-{silo}"
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of a start of this job that was ended in the middle
        yield _copy_shards(config.silos[silo], silo, folder), dict.fromkeys(CACHES, str(folder / "cache"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copy_shards(settings: SiloConfig, silo: str, folder: Path) -> list[str]:
    copies = {
        source: str(folder / str(number))
        for number, source in enumerate(dict.fromkeys([*settings.data, *settings.valid.values()]))
    }
    try:
        for source, copy in copies.items():
            shutil.copytree(source, copy)
    except (OSError, shutil.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"scratch: shards cannot be copied to {folder}: {reason}") from None
    print(f"{len(copies)} packed corpora copied to {folder}", flush=True)
    data = [copies[source] for source in settings.data]
    return [
        f"silos.{silo}.data={json.dumps(data)}",
        *(f"silos.{silo}.valid.{name}={copies[source]}" for name, source in settings.valid.items()),
    ]


if __name__ == "__main__":
    sys.exit(main())
