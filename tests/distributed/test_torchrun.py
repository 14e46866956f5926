"""A silo over two nodes with addresses of their own, started by the commands that `atoll launch torchrun` prints."""

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.elastic import Guest
from benchmarks.links import inside, namespaces
from launch.torchrun import node_commands
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, federate
from tests.faults.test_kills import check_same
from tests.slurm.test_slurm import make_config
from tests.support import one_line_error

NEEDED = [tool for tool in ("ip", "tc", "sysctl") if not shutil.which(tool)]


@pytest.mark.soak
@pytest.mark.skipif(bool(NEEDED) or os.geteuid() != 0, reason=f"network namespaces need root, and {NEEDED}")
def test_a_silo_over_two_nodes(tmp_path: Path, tiny_config: TinyConfig) -> None:
    local = federate(make_config(tiny_config, tmp_path / "local", num_nodes=1))
    config = make_config(tiny_config, tmp_path / "nodes", num_nodes=2)
    hosts = {"node0": "10.77.0.2", "node1": "10.77.1.2"}
    command = [
        sys.executable,
        "-m",
        "launch.cli",
        "launch",
        "torchrun",
        "--config",
        str(tmp_path / "nodes" / "tiny.yaml"),
    ]
    options = [f"--host={address}" for address in hosts.values()]
    said = subprocess.check_output([*command, "--silo", "alpha", "--interface", "silo", *options], text=True)
    lines = said.splitlines()
    assert lines[::2] == [f"# {address}" for address in hosts.values()]
    with namespaces(list(hosts), "1gbit") as (_, spaces), ExitStack() as ending:
        others = [Guest(config, "aggregator"), Guest(config, "beta")]
        for process in others:
            ending.callback(process.kill)
            process.start()
        nodes = []
        for line, (name, space) in zip(lines[1::2], spaces.items(), strict=True):
            with (tmp_path / f"{name}.log").open("wb") as log:
                nodes.append(subprocess.Popen(inside(space, ["sh", "-c", f"exec env {line}"]), stdout=log, stderr=log))
            ending.callback(nodes[-1].kill)
        for node in nodes:
            assert node.wait(120) == 0, "".join(log.read_text() for log in tmp_path.glob("node*.log"))
        for process in others:
            process.wait(60)
    check_same(Outcome(config=config), local)


def test_mistakes_are_one_line(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = make_config(tiny_config, tmp_path, num_nodes=2)

    def said(silo: str, hosts: list[str], port: int = 29_400) -> str:
        return one_line_error(node_commands, config, silo, hosts, port=port, interface=None, max_restarts=0)

    assert said("gamma", ["a", "b"]) == "--silo: 'gamma' given; allowed: alpha, beta"
    two = "allowed: 2 different ones, as silos.alpha.num_nodes says"
    assert said("alpha", ["a"]) == f"--host: a given; {two}"
    assert said("alpha", ["a", "a"]) == f"--host: a, a given; {two}"
    assert said("alpha", ["a", "b"], port=80) == "--port: 80 given; allowed: 1024 to 65535"
    assert not Path(config.directory).exists()
