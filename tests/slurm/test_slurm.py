"""`atoll launch slurm` on a real SLURM of four nodes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config import RunConfig, save_config
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, federate
from tests.faults.test_kills import check_same
from tests.slurm.cluster import Cluster, cluster, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def atoll(slurm: Cluster, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", "launch", "slurm", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | slurm.environment, capture_output=True, text=True, check=False)


def written(slurm: Cluster, config: RunConfig, directory: Path, **job: Any) -> list[str | Path]:
    """Options that name the run and a site."""
    site = directory / "site.yaml"
    here = {"PYTHONPATH": str(Path.cwd()), **slurm.environment}
    site.write_text(yaml.safe_dump({"job": {"environment": here, "time_limit": "10", **job}}))
    run = directory / "run.yaml"
    save_config(config, run)
    return ["--config", run, "--site", site]


def submitted(slurm: Cluster, options: list[str | Path]) -> dict[str, str]:
    done = atoll(slurm, *options)
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ") for line in done.stdout.splitlines()[:-1])


def make_config(tiny_config: TinyConfig, directory: Path, *, num_nodes: int, **changes: Any) -> RunConfig:
    """Two silos: ZeRO-3 on two ranks, and one rank."""
    alpha = {"num_nodes": num_nodes, "processes_per_node": 2 // num_nodes, "micro_batch_sequences": 2}
    alpha["deepspeed"] = {"zero_optimization": {"stage": 3}}
    silo = {"checkpoint_interval_steps": 3}
    return tiny_config(directory, outer={"optimizer": "nesterov"}, silos={"alpha": alpha}, silo=silo, **changes)


def test_two_silos_train_as_with_a_local_launch(slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig) -> None:
    local = federate(make_config(tiny_config, tmp_path / "local", num_nodes=1))
    config = make_config(tiny_config, tmp_path / "slurm", num_nodes=2)
    jobs = submitted(slurm, written(slurm, config, tmp_path))
    assert list(jobs) == ["aggregator", "alpha", "beta"]
    slurm.wait(list(jobs.values()), seconds=150)
    check_same(Outcome(config=config), local)
