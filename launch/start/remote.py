"""The far end of `atoll launch torchrun --ssh`: whether a node is ready, and a program that ends with its connection.

    python -m launch.start.remote check --config run.yaml --silo law --address 10.0.0.1 --probe run/probe-1f [--port N]
    python -m launch.start.remote run --name law-10.0.0.1 --log run/logs/law-10.0.0.1.log -- PROGRAM ARGUMENT ...

`check` prints a JSON object: `wrong`, a line or "", `versions` and `num_gpus`. `run` returns the program's exit code;
when its own standard input ends, because the launcher closes it, dies, or cannot be reached any more, it has the
program save and stop.
"""

import argparse
import hashlib
import json
import os
import platform
import select
import socket
import sys
from pathlib import Path

from launch.start.gpus import num_gpus
from launch.start.processes import POLL_SECONDS, ChildCommand, Children
from pretrain.config.errors import ConfigError
from pretrain.config.load import load_config
from pretrain.federation.preflight import check_collective, check_silo, is_own_address, port_is_taken
from pretrain.host.software import installed

OURS = ("launch", "pretrain")


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check")
    checking.add_argument("--config", type=Path, required=True)
    checking.add_argument("--silo", required=True)
    checking.add_argument("--address", required=True, help="of this node")
    checking.add_argument("--probe", type=Path, required=True, help="file that the launcher has just made")
    checking.add_argument("--port", type=int, help="to serve the rendezvous at")
    checking.add_argument("--interface", help="network interfaces, with commas between them")
    running = commands.add_parser("run")
    running.add_argument("--name", required=True)
    running.add_argument("--log", type=Path, required=True)
    running.add_argument("--grace-seconds", type=float, required=True, help="between SIGTERM and SIGKILL")
    running.add_argument("program", nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "run":
        return run(arguments.program, arguments.name, arguments.log, grace_seconds=arguments.grace_seconds)
    wrong = ""
    try:
        check_node(
            arguments.config,
            arguments.silo,
            address=arguments.address,
            probe=arguments.probe,
            port=arguments.port,
            interface=arguments.interface,
        )
    except ConfigError as error:
        wrong = str(error)
    print(json.dumps({"wrong": wrong, "versions": versions(), "num_gpus": num_gpus()}))
    return 0


def check_node(
    config_path: Path, silo: str, *, address: str, probe: Path, port: int | None, interface: str | None
) -> None:
    """Raise ConfigError if this node could not take part: run directory, address, interface, ports, shards."""
    if not probe.is_file():
        raise ConfigError(
            f"directory: {str(probe.parent)!r} given; it is not the same there; allowed: on a file system that all "
            "nodes share"
        )
    if not is_own_address(address):
        raise ConfigError(f"--host: {address!r} given; allowed: one of that machine's own addresses")
    found = [name for _, name in socket.if_nameindex()]
    unknown = [name for name in (interface or "").split(",") if name and name not in found]
    if unknown:
        raise ConfigError(f"--interface: {unknown[0]!r} given; allowed: {', '.join(found)}")
    if port and port_is_taken(port):
        raise ConfigError(f"--port: {port} given; it is taken; allowed: a free one")
    config = load_config([config_path])
    check_silo(config, silo)
    check_collective(config, silo)


def versions() -> dict[str, str]:
    """What must be the same on all nodes; of our own code the first digits of its sha256."""
    digest, root = hashlib.sha256(), Path(__file__).parents[2]
    for path in sorted(path for package in OURS for path in (root / package).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    python = ".".join(platform.python_version_tuple()[:2])
    return {"atoll's code": digest.hexdigest()[:12], "Python": python, **installed()}


def run(program: list[str], name: str, log: Path, *, grace_seconds: float) -> int:
    """Run a program until it ends, or until standard input does; leaves nothing running. Returns the exit code.

    Its output goes into the log and not back through ssh: a save must not fail because nobody listens any more.
    """
    with Children(grace_seconds=grace_seconds) as children:
        child = children.start(ChildCommand(name=name, argv=program), log)
        while child.returncode is None and not _input_has_ended():
            pass
        children.stop()
    assert child.returncode is not None
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _input_has_ended() -> bool:
    """Wait a moment; whether standard input came to its end."""
    readable, _, _ = select.select([0], [], [], POLL_SECONDS)
    return bool(readable) and not os.read(0, 4096)


if __name__ == "__main__":
    sys.exit(main())
