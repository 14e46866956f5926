"""`atoll launch slurm` on a real SLURM of four nodes."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from benchmarks.elastic import wait_until
from launch.local import process_directory
from launch.metrics import read_status
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
    usual: dict[str, Any] = {"outer": {"optimizer": "nesterov"}, "silo": {"checkpoint_interval_steps": 3}}
    return tiny_config(directory, silos={"alpha": alpha}, **(usual | changes))


def test_two_silos_train_as_with_a_local_launch(slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig) -> None:
    local = federate(make_config(tiny_config, tmp_path / "local", num_nodes=1))
    config = make_config(tiny_config, tmp_path / "slurm", num_nodes=2)
    jobs = submitted(slurm, written(slurm, config, tmp_path))
    assert list(jobs) == ["aggregator", "alpha", "beta"]
    slurm.wait(list(jobs.values()), seconds=150)
    check_same(Outcome(config=config), local)


@pytest.mark.soak
def test_a_cancelled_job_saves_and_does_not_come_back(slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = make_config(tiny_config, tmp_path, num_nodes=2, inner={"num_steps": 100_000})
    jobs = submitted(slurm, written(slurm, config, tmp_path))
    statuses = {name: process_directory(config, name) / "status.json" for name in jobs}
    wait_until(lambda: read_status(statuses["alpha"]).step > 20, 120)
    again = atoll(slurm, *written(slurm, config, tmp_path))
    assert again.returncode == 2
    assert f"its jobs {', '.join(jobs.values())} are still there" in again.stderr
    slurm.run("scancel", *jobs.values())
    wait_until(lambda: not slurm.run("squeue", "--noheader"), 60)
    assert {read_status(path).phase for path in statuses.values()} == {"stopped"}
    assert [slurm.num_restarts(job) for job in jobs.values()] == [0, 0, 0]
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if config.directory in command]


@pytest.mark.soak
def test_a_job_that_crashes_again_and_again_ends(slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = make_config(tiny_config, tmp_path, num_nodes=2)
    process_directory(config, "aggregator").mkdir(parents=True)
    (process_directory(config, "aggregator") / "status.json").write_text('{"phase": "stopped"}')  # by an earlier start
    jobs = submitted(slurm, written(slurm, config, tmp_path, max_crashes=0, setup=["srun() { false; }"]))
    wait_until(lambda: {slurm.state(job) for job in jobs.values()} == {"FAILED"}, 60)
    log = Path(config.directory) / "slurm" / "logs" / f"alpha-{jobs['alpha']}.log"
    assert log.read_text() == f"alpha has crashed 1 times: job {jobs['alpha']} ends\n"


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_preempted_and_stopped_by_time_limits_it_comes_to_the_same_bits(
    slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    long: dict[str, Any] = {
        "inner": {"num_steps": 1500},
        "outer": {"optimizer": "nesterov", "sync_interval_steps": 50},
        "silo": {"checkpoint_interval_steps": 70},
        "exchange": {"lease_seconds": 10},
    }
    local = federate(make_config(tiny_config, tmp_path / "local", num_nodes=1, **long))
    config = make_config(tiny_config, tmp_path / "slurm", num_nodes=2, **long)
    jobs = submitted(slurm, written(slurm, config, tmp_path, time_limit="2", warn_seconds=60))
    wanted, preempted, freed = ["alpha", "beta", "aggregator", "alpha"], list[str](), set[tuple[str, int]]()
    end = time.monotonic() + 800
    while set(states := [slurm.state(job) for job in jobs.values()]) != {"COMPLETED"}:
        assert time.monotonic() < end, slurm.run("squeue")
        assert not {"FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"} & set(states)
        for job, state in zip(jobs.values(), states, strict=True):
            start = (job, slurm.num_restarts(job))
            if state == "PENDING" and start not in freed:  # SLURM holds back for two minutes what was requeued
                freed.add(start)
                slurm.try_run("scontrol", "update", f"JobId={job}", "StartTime=now+5")
        if len(preempted) < len(wanted):
            name = wanted[len(preempted)]
            phase = read_status(process_directory(config, name) / "status.json").phase
            if slurm.state(jobs[name]) == "RUNNING" and phase in ("training", "waiting", "merging"):
                time.sleep(2)
                slurm.run("scontrol", "requeue", jobs[name])
                preempted.append(name)
        time.sleep(0.5)
    assert preempted == wanted
    logs = "".join(file.read_text() for file in (Path(config.directory) / "slurm" / "logs").iterdir())
    assert "has saved and stopped: job" in logs  # a time limit
    assert "has crashed" not in logs
    assert sum(slurm.num_restarts(job) for job in jobs.values()) > len(wanted)
    check_same(Outcome(config=config), local)


def test_a_dry_run_writes_checks_and_submits_nothing(slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = make_config(tiny_config, tmp_path, num_nodes=2)
    done = atoll(slurm, *written(slurm, config, tmp_path), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("aggregator: sbatch: Job ")
    assert slurm.run("squeue", "--noheader") == ""
    scripts = sorted((Path(config.directory) / "slurm").glob("*.sbatch"))
    assert [script.stem for script in scripts] == ["aggregator", "alpha", "beta"]
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", *scripts], check=True)


REFUSED = "sbatch does not take .*"
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no such partition": ({"partition": "gpu"}, f"aggregator: {REFUSED}invalid partition specified: gpu"),
    "too many nodes": ({}, f"alpha: {REFUSED}Requested node configuration is not available"),
    "no such constraint": ({"constraint": "a100"}, f"aggregator: {REFUSED}Invalid feature specification"),
    "no GPUs": ({"gpus_per_node": 4}, f"alpha: {REFUSED}Invalid generic resource"),
    "a time limit above the partition's": (
        {"partition": "short", "time_limit": "1:00:00"},
        "aggregator: time_limit: '1:00:00' given; allowed: up to 10:00, the limit of partition short",
    ),
    "unknown key": ({"partitions": "main"}, "job.partitions: unknown key given; .*did you mean job.partition"),
    "unknown silo": ({}, "silos.gamma: unknown silo given; allowed: alpha, beta"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_sbatch_would_not_take_is_one_line_and_nothing_is_submitted(
    mistake: str, slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    job, expected = MISTAKES[mistake]
    config = make_config(tiny_config, tmp_path, num_nodes=2)
    if mistake == "too many nodes":
        five = {"num_nodes": 5, "global_batch_sequences": 5, "micro_batch_sequences": 1}
        config.silos["alpha"] = dataclasses.replace(config.silos["alpha"], **five)
    options = written(slurm, config, tmp_path, **job)
    if mistake == "unknown silo":
        (tmp_path / "site.yaml").write_text("silos: {gamma: {}}")
    done = atoll(slurm, *options)
    assert done.returncode == 2
    assert re.fullmatch(f"atoll: {expected}.*\n", done.stderr), done.stderr
    assert slurm.run("squeue", "--noheader") == ""
    assert not (Path(config.directory) / "slurm" / "jobs.json").exists()
