"""Several silos on one machine do not compute on the same GPU."""

import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from launch.demo import run_demo
from launch.start.gpus import gpus_here, share_gpus
from launch.start.local import launch_local
from launch.start.processes import ChildCommand
from pretrain.config.keys import RunConfig, SiloConfig
from tests.support import one_line_error

SAYS = "import os; print('GPUs', os.environ.get('CUDA_VISIBLE_DEVICES'))"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    config = RunConfig(name="trial", directory=str(tmp_path / "run"))
    config.silos = {"law": SiloConfig(processes_per_node=2), "medicine": SiloConfig()}
    return config


def machine(monkeypatch: pytest.MonkeyPatch, directory: Path, *, num_gpus: int, stated: str | None = None) -> None:
    """nvidia-smi of so many GPUs comes first, and the environment states so much."""
    lines = "".join(f"echo 'GPU {n}: NVIDIA H100 80GB HBM3 (UUID: GPU-{n})'\n" for n in range(num_gpus))
    (directory / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
    (directory / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if stated is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", stated)


def test_each_process_has_a_gpu_of_its_own(config: RunConfig) -> None:
    law, medicine = ({"CUDA_VISIBLE_DEVICES": names} for names in ("0,1", "2"))
    assert share_gpus(config, ["0", "1", "2", "3"]) == {"law": law, "medicine": medicine}
    assert share_gpus(config, []) == {}


@pytest.mark.parametrize(
    ("num_gpus", "stated", "expected"),
    [
        (3, None, ["0", "1", "2"]),
        (8, "5,6", ["5", "6"]),
        (1, "0,0", ["0", "0"]),
        (2, "GPU-1,MIG-7/1/0", ["GPU-1", "MIG-7/1/0"]),
        (2, "1,-1,0", ["1"]),
        (2, "", []),
        (0, "0,1", []),
    ],
)
def test_the_gpus_of_a_machine_are_those_that_our_environment_leaves_us(
    num_gpus: int, stated: str | None, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, tmp_path, num_gpus=num_gpus, stated=stated)
    assert gpus_here() == expected
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert gpus_here() == []


@pytest.mark.parametrize(("num_gpus", "expected"), [(4, ["0,1", "2", "None"]), (0, ["None", "None", "None"])])
def test_what_a_silo_sees_of_a_local_launch(
    num_gpus: int, expected: list[str], config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, tmp_path, num_gpus=num_gpus)
    names = [*config.silos, "aggregator"]
    commands = [ChildCommand(name=name, argv=[sys.executable, "-c", SAYS]) for name in names]
    with (tmp_path / "console").open("w") as console:
        assert launch_local(config, build_commands=lambda *_: commands, console=Console(file=console)) == 0
    logs = [(tmp_path / "run" / "logs" / "latest" / f"{name}.log").read_text() for name in names]
    assert logs == [f"GPUs {seen}\n" for seen in expected]


def test_the_demo_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, tmp_path, num_gpus=1, stated="0")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")  # both are put back after the test
    assert run_demo(tmp_path / "demo", corpora=None, compare=False, overrides=[], dry_run=True) == 0
    assert gpus_here() == []


def test_too_few_gpus_are_one_line(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, tmp_path, num_gpus=2)
    assert one_line_error(launch_local, config) == (
        "silos: 3 processes of law, medicine given; allowed: one for each GPU that CUDA_VISIBLE_DEVICES leaves of this "
        "machine, up to 2; one named there twice is shared, and CUDA_VISIBLE_DEVICES= has all compute on the CPU"
    )
    assert not Path(config.directory).exists()
