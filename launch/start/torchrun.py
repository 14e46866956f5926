"""`atoll launch torchrun`: the command of every node of a silo, for machines without a scheduler."""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.start.workers import KEEP_FREED_MEMORY, silo_command
from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config

HOST = re.compile(r"[A-Za-z0-9\[:][A-Za-z0-9._:%\]-]*")


@dataclass(frozen=True, kw_only=True)
class NodeCommand:
    """What to run on one node."""

    host: str
    environment: dict[str, str]
    argv: list[str]

    def __str__(self) -> str:
        """As a shell takes it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.argv)])


def node_commands(
    config: RunConfig, silo: str, hosts: list[str], *, port: int, interface: str | None, max_restarts: int
) -> list[NodeCommand]:
    """The torchrun of each of a silo's nodes; `hosts` are their addresses, and the first serves the rendezvous.

    Writes the resolved configuration into the run directory, which all nodes must see at the same place. Workers that
    crash are started again by torchrun, up to `max_restarts` times, and resume from the checkpoint. Raises ConfigError.
    """
    check_options(config, silo, hosts, port)
    save_config(config, config_path(config))
    return [
        node_command(config, silo, hosts, number, port=port, interface=interface, max_restarts=max_restarts)
        for number in range(len(hosts))
    ]


def check_options(config: RunConfig, silo: str, hosts: list[str], port: int) -> None:
    """Raise ConfigError for an unknown silo, as many hosts as it has no nodes, or a port that nobody may serve."""
    if silo not in config.silos:
        raise ConfigError(f"--silo: {silo!r} given; allowed: {named(sorted(config.silos))}")
    settings = config.silos[silo]
    if settings.min_nodes:
        raise ConfigError(
            f"silos.{silo}.min_nodes: {settings.min_nodes} given; allowed: 0 with --host, as num_nodes says how many"
        )
    if len(set(hosts)) != settings.num_nodes or len(hosts) != settings.num_nodes:
        raise ConfigError(
            f"--host: {', '.join(hosts) or 'none'} given; allowed: {settings.num_nodes} different ones, as "
            f"silos.{silo}.num_nodes says"
        )
    for host in hosts:  # it is printed for a shell, and handed to ssh, which would take -o for an option
        if not HOST.fullmatch(host):
            raise ConfigError(f"--host: {host!r} given; allowed: names or addresses")
    if not 1024 <= port <= 65_535:
        raise ConfigError(f"--port: {port} given; allowed: 1024 to 65535")


def config_path(config: RunConfig) -> Path:
    """Where the nodes find the resolved configuration."""
    return Path(config.directory).absolute() / "config.yaml"


def node_command(
    config: RunConfig,
    silo: str,
    hosts: list[str],
    number: int,
    *,
    port: int,
    interface: str | None = None,
    max_restarts: int = 0,
    identity: str = "",
    numa: str | None = None,
    overrides: Sequence[str] = (),
) -> NodeCommand:
    """What runs a silo on node `number`: torchrun, if there are several; `identity` keeps the rendezvous apart from
    that of another start.
    """
    settings, path = config.silos[silo], config_path(config)
    if len(hosts) == 1:
        argv, environment = silo_command(config, silo, path, max_restarts=max_restarts)
        return NodeCommand(host=hosts[0], environment=environment, argv=argv)
    environment = {"OMP_NUM_THREADS": str(settings.num_threads), **KEEP_FREED_MEMORY}
    if interface:
        environment |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    torchrun += ["--nnodes", str(len(hosts)), "--nproc-per-node", str(settings.processes_per_node)]
    # The dynamic rendezvous, c10d, unpickles what it finds at that port, whoever wrote it.
    torchrun += ["--rdzv-backend", "static", "--rdzv-endpoint", f"{hosts[0]}:{port}", "--node-rank", str(number)]
    torchrun += ["--rdzv-id", f"{config.name}-{silo}-{identity}"]
    torchrun += ["--local-addr", hosts[number], "--max-restarts", str(max_restarts)]
    torchrun += ["--numa-binding", numa] if numa else []
    train = ["-m", "pretrain.train", "--config", str(path), "--silo", silo, *overrides]
    return NodeCommand(host=hosts[number], environment=environment, argv=[*torchrun, *train])
