"""What a cluster does to a federation: nodes that die, nodes that are broken, and somebody who stops it all."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.show.metrics import read_status
from launch.start.local import process_directory
from pretrain.config.keys import RunConfig
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, federate, left_behind
from tests.faults.test_kills import check_same
from tests.slurm.cluster import Cluster, missing
from tests.slurm.test_slurm import atoll, make_config, submitted, written
from tests.waiting import wait_for

pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.soak, pytest.mark.timeout(600)]


def command(slurm: Cluster, *arguments: str | Path) -> str:
    line = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
    return subprocess.check_output(line, env=os.environ | slurm.environment | {"COLUMNS": "200"}, text=True)


def step_of(config: RunConfig, name: str) -> int:
    return read_status(process_directory(config, name) / "status.json").step


RULES = {"deadline_floor_seconds": 5, "deadline_ceiling_seconds": 30, "away_after_versions": 100}


@pytest.mark.parametrize("quorum", [None, 1])
def test_a_node_dies_and_its_job_goes_on_on_others(
    quorum: int | None, slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    long: dict[str, Any] = {
        "inner": {"num_steps": 1500},
        "outer": {"optimizer": "nesterov", "sync_interval_steps": 20 if quorum else 50},
        "silo": {"checkpoint_interval_steps": 70, "eval_interval_rounds": 0},
        "membership": {"quorum": quorum, **(RULES if quorum else {})},
    }
    config = make_config(tiny_config, tmp_path / "slurm", num_nodes=2, **long)
    # Alpha has two nodes for itself, the others share one, and one is left.
    jobs = submitted(slurm, written(slurm, config, tmp_path, silos={"alpha": {"cpus_per_task": 2}}))
    both = ["alpha", "beta"]
    wait_for(lambda: step_of(config, "alpha") > 300 and contributors(config).count(both) > 5, seconds=180)
    nodes = slurm.run("squeue", "--noheader", "--jobs", jobs["alpha"], "--format=%N").strip()
    last = slurm.run("scontrol", "show", "hostnames", nodes).split()[-1]
    slurm.fail_node(last)
    try:
        wait_for(lambda: slurm.state(jobs["alpha"]) == "PENDING", seconds=90)
        rule = "1 deliveries are enough" if quorum else "without a quorum there is no deadline"
        waits = rf"waiting for delivery for version \d+ from alpha: .*; {rule}"
        wait_for(lambda: re.search(waits, command(slurm, "status", config.directory)), seconds=60)
        slurm.wait(list(jobs.values()), seconds=400)
    finally:
        slurm.start_node(last)
        wait_for(lambda: slurm.has_state(last, "idle"), seconds=60)
    log = (Path(config.directory) / "logs" / "latest" / "alpha.log").read_text()
    assert log.count("--- start ") == 2
    assert last not in log[log.index("--- start 2") :].splitlines()[0]
    if quorum:
        found = contributors(config)
        assert found[found.index(both) :].count(["beta"]) > 1
        assert found[-1] == both
    else:
        check_same(Outcome(config=config), federate(make_config(tiny_config, tmp_path / "local", num_nodes=1, **long)))


@pytest.mark.timeout(900)
def test_a_job_goes_on_with_fewer_nodes_and_with_more_again(
    slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    long: dict[str, Any] = {"inner": {"num_steps": 450}, "outer": {"sync_interval_steps": 50}}
    local = federate(make_config(tiny_config, tmp_path / "local", num_nodes=1, **long))
    config = make_config(tiny_config, tmp_path / "slurm", num_nodes=2, **long)
    config.silos["alpha"].min_nodes = 1
    jobs = submitted(slurm, written(slurm, config, tmp_path, silos={"alpha": {"cpus_per_task": 2}}))
    wait_for(lambda: step_of(config, "alpha") > 120, seconds=180)
    nodes = slurm.run("squeue", "--noheader", "--jobs", jobs["alpha"], "--format=%N").strip()
    first, last = slurm.run("scontrol", "show", "hostnames", nodes).split()
    idle = slurm.run("sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", "--format=%N").split()
    for node in idle:
        slurm.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=elsewhere")
    slurm.fail_node(last)
    try:
        wait_for(lambda: slurm.state(jobs["alpha"]) == "PENDING", seconds=90)
        slurm.hurry(jobs["alpha"])
        before = step_of(config, "alpha")
        wait_for(lambda: step_of(config, "alpha") > before + 60, seconds=180)
    finally:
        for node in idle:
            slurm.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        slurm.start_node(last)
        wait_for(lambda: slurm.has_state(last, "idle"), seconds=60)
    slurm.run("scontrol", "requeue", jobs["alpha"])
    slurm.wait(list(jobs.values()), seconds=400)
    log = (Path(config.directory) / "logs" / "latest" / "alpha.log").read_text()
    assert log.count(", of 2 ranks, ZeRO 3, fp32, with 1 rank, ZeRO 3, fp32") == 1
    assert log.count(", of 1 rank, ZeRO 3, fp32, with 2 ranks, ZeRO 3, fp32") == 1
    assert f" on {first} ---" in log[log.index("--- start 2") :].splitlines()[0]
    mine, theirs = (run.exchange.read_commit(9).contributors for run in (Outcome(config=config), local))
    assert [one.tokens for one in mine] == [one.tokens for one in theirs]
    losses = [Outcome(config=config).records, local.records]
    last_losses = [[r["loss"] for r in of if r["kind"] == "step" and r["silo"] == "alpha"][-20:] for of in losses]
    assert last_losses[0] == pytest.approx(last_losses[1], rel=1e-2)


def contributors(config: RunConfig) -> list[list[str]]:
    """Of each commit so far."""
    outcome = Outcome(config=config)
    newest = outcome.exchange.newest_version()
    return [sorted(one.silo for one in outcome.commit(version).contributors) for version in range(1, newest + 1)]


def test_a_broken_node_is_left_out(slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = make_config(tiny_config, tmp_path / "slurm", num_nodes=2)
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('SLURMD_NODENAME') == 'n2' and 'pretrain.train' in sys.orig_argv: os._exit(1)\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}", **slurm.environment}
    jobs = submitted(slurm, written(slurm, config, tmp_path, environment=environment, max_crashes=5))
    slurm.wait(list(jobs.values()), seconds=240)
    log = (Path(config.directory) / "logs" / "latest" / "alpha.log").read_text()
    assert "goes back into the queue, without n2" in log


def test_stop_saves_all_and_the_same_command_goes_on(slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig) -> None:
    long: dict[str, Any] = {"inner": {"num_steps": 1500}, "outer": {"optimizer": "nesterov", "sync_interval_steps": 50}}
    config = make_config(tiny_config, tmp_path / "slurm", num_nodes=2, **long)
    options = written(slurm, config, tmp_path)
    jobs = submitted(slurm, options)
    wait_for(lambda: step_of(config, "alpha") > 120, seconds=180)
    slurm.run("scontrol", "requeue", jobs["beta"])  # so that one of them is in the queue
    wait_for(lambda: slurm.state(jobs["beta"]) == "PENDING", seconds=60)
    again = atoll(slurm, *options)
    assert again.returncode == 2
    assert f"its jobs {', '.join(jobs.values())} are still there" in again.stderr
    said = command(slurm, "stop", config.directory)
    assert said.splitlines()[-1] == "stopped: " + ", ".join(f"{name} (job {job})" for name, job in jobs.items())
    assert not slurm.run("squeue", "--noheader")
    assert not left_behind(config.directory)
    assert {read_status(process_directory(config, name) / "status.json").phase for name in jobs} == {"stopped"}
    assert command(slurm, "stop", config.directory) == "nothing runs\n"
    jobs = submitted(slurm, options)
    slurm.wait(list(jobs.values()), seconds=240)
    lines = command(slurm, "logs", config.directory, "alpha", "--lines", "9999").splitlines()
    assert lines[0].startswith(f"alpha | --- start 1 of alpha: job {jobs['alpha']} on n")
    assert (Path(config.directory) / "logs" / "attempt-001" / "alpha.log").is_file()
    check_same(Outcome(config=config), federate(make_config(tiny_config, tmp_path / "local", num_nodes=1, **long)))


def test_shards_are_copied_to_the_node_and_removed(slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = make_config(tiny_config, tmp_path / "slurm", num_nodes=2)
    (tmp_path / "scratch").mkdir()
    options = written(slurm, config, tmp_path, scratch="$NODE_DISK", setup=[f"export NODE_DISK={tmp_path}/scratch"])
    jobs = submitted(slurm, options)
    slurm.wait(list(jobs.values()), seconds=150)
    assert not list((tmp_path / "scratch").iterdir())
    assert f"copied to {tmp_path}/scratch/atoll-" in command(slurm, "logs", config.directory, "-n", "9999")
    check_same(Outcome(config=config), federate(make_config(tiny_config, tmp_path / "local", num_nodes=1)))
