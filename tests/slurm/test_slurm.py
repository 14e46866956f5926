"""`atoll launch slurm` on a real SLURM of four nodes."""

import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import cli
from launch.show.metrics import read_status
from launch.start.begin import Beginning, Text
from launch.start.local import process_directory
from launch.start.site import load_site
from launch.start.slurm import job_state, launch_slurm
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config, save_config
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, federate, left_behind
from tests.faults.test_kills import check_same
from tests.slurm.cluster import FAILED, NODES, NUM_NODES, Cluster, missing
from tests.support import TWO_RANKS, TinyText, free_port, one_line_error, zero
from tests.waiting import wait_for

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


def atoll(slurm: Cluster, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", "launch", "slurm", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | slurm.environment, capture_output=True, text=True, check=False)


def refused(arguments: list[str | Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says on stderr when it refuses; in this process, as starting one takes most of the time."""
    monkeypatch.setattr(sys, "argv", ["atoll", "launch", "slurm", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def written(slurm: Cluster, config: RunConfig, directory: Path, *, silos: Any = None, **job: Any) -> list[str | Path]:
    """Options that name the run and a site."""
    site = directory / "site.yaml"
    here = {"PYTHONPATH": str(Path.cwd()), **slurm.environment}
    settings = {"job": {"environment": here, "time_limit": "10", **job}, "silos": silos or {}}
    site.write_text(yaml.safe_dump(settings))
    run = directory / "run.yaml"
    save_config(config, run)
    return ["--config", run, "--site", site]


def submitted(slurm: Cluster, options: list[str | Path]) -> dict[str, str]:
    done = atoll(slurm, *options)
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^(\S+): (\d+)$", done.stdout, re.MULTILINE))


def make_config(tiny_config: TinyConfig, directory: Path, *, num_nodes: int, **changes: Any) -> RunConfig:
    """Two silos: ZeRO-3 on two ranks, and one rank."""
    alpha = TWO_RANKS | {"num_nodes": num_nodes, "processes_per_node": 2 // num_nodes} | zero(3)
    usual: dict[str, Any] = {"outer": {"optimizer": "nesterov"}, "silo": {"checkpoint_interval_steps": 3}}
    return tiny_config(directory, silos={"alpha": alpha}, **(usual | changes))


def test_two_silos_train_as_with_a_local_launch(slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig) -> None:
    local = federate(make_config(tiny_config, tmp_path / "local", num_nodes=1))
    config = make_config(tiny_config, tmp_path / "slurm", num_nodes=2)
    config.silos["alpha"].min_nodes = 1  # as two are free, it is to get both
    jobs = submitted(slurm, written(slurm, config, tmp_path))
    assert list(jobs) == ["aggregator", "alpha", "beta"]
    slurm.wait(list(jobs.values()), seconds=150)
    check_same(Outcome(config=config), local)


@pytest.mark.parametrize(("num_free", "num_used"), [(3, 2), (1, 1)])
def test_of_a_range_a_job_uses_as_many_nodes_as_are_free_and_divide_the_batch(
    slurm: Cluster,
    tmp_path: Path,
    tiny_config: TinyConfig,
    *,
    num_free: int,
    num_used: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    alpha = {"num_nodes": 4, "min_nodes": 1, "micro_batch_sequences": 1}  # of 4
    config = tiny_config(tmp_path, exchange={"kind": "none"}, silos={"alpha": alpha, "beta": None})
    elsewhere = NODES[num_free:NUM_NODES]
    for node in elsewhere:
        slurm.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=elsewhere")
    try:
        only_names = "srun() { command srun $1 $2 $3 $4 $5 $6 hostname; }"
        _, _, _, site = written(slurm, config, tmp_path, max_crashes=0, setup=[only_names])
        jobs, _ = launch_slurm(config, load_site([Path(site)], config))
        (job,) = jobs.values()
        wait_for(lambda: slurm.state(job) == "FAILED", seconds=60)
    finally:
        for node in elsewhere:
            slurm.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    log = (Path(config.directory) / "logs" / "latest" / "alpha.log").read_text()
    assert log.splitlines().count(socket.gethostname()) == num_used
    said = f"alpha: {num_used} of {num_free} nodes are used: its batch divides among 1, 2, 4"
    assert (said in log) == (num_used < num_free)


@pytest.mark.soak
def test_a_cancelled_job_saves_and_does_not_come_back(slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = make_config(tiny_config, tmp_path, num_nodes=2, inner={"num_steps": 100_000})
    jobs = submitted(slurm, written(slurm, config, tmp_path))
    statuses = {name: process_directory(config, name) / "status.json" for name in jobs}
    wait_for(lambda: read_status(statuses["alpha"]).step > 20, seconds=120)
    again = atoll(slurm, *written(slurm, config, tmp_path))
    assert again.returncode == 2
    assert f"its jobs {', '.join(jobs.values())} are still there" in again.stderr
    slurm.run("scancel", *jobs.values())
    wait_for(lambda: not slurm.run("squeue", "--noheader"), seconds=60)
    assert {read_status(path).phase for path in statuses.values()} == {"stopped"}
    assert [slurm.num_restarts(job) for job in jobs.values()] == [0, 0, 0]
    assert not left_behind(config.directory)


@pytest.mark.soak
def test_a_job_that_crashes_again_and_again_ends(slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = make_config(tiny_config, tmp_path, num_nodes=2)
    process_directory(config, "aggregator").mkdir(parents=True)
    (process_directory(config, "aggregator") / "status.json").write_text('{"phase": "stopped"}')  # by an earlier start
    jobs = submitted(slurm, written(slurm, config, tmp_path, max_crashes=0, setup=["srun() { false; }"]))
    wait_for(lambda: {slurm.state(job) for job in jobs.values()} == {"FAILED"}, seconds=60)
    start, end = (Path(config.directory) / "logs" / "latest" / "alpha.log").read_text().splitlines()
    assert start.startswith(f"--- start 1 of alpha: job {jobs['alpha']} on n")
    assert end == f"alpha has crashed 1 times: job {jobs['alpha']} ends"


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
    jobs = submitted(slurm, written(slurm, config, tmp_path, time_limit="2", warn_seconds=50))
    wanted, preempted = ["alpha", "beta", "aggregator", "alpha"], list[str]()

    def are_done_or_go_on() -> bool:
        states = {slurm.state(job) for job in jobs.values()}
        if states == {"COMPLETED"}:
            return True
        assert not FAILED & states
        for job in jobs.values():
            slurm.hurry(job)
        if len(preempted) < len(wanted):
            name = wanted[len(preempted)]
            phase = read_status(process_directory(config, name) / "status.json").phase
            if slurm.state(jobs[name]) == "RUNNING" and phase in ("training", "waiting", "merging"):
                time.sleep(2)
                slurm.run("scontrol", "requeue", jobs[name])
                preempted.append(name)
        return False

    wait_for(are_done_or_go_on, seconds=800, poll_seconds=0.5, tells=lambda: slurm.run("squeue"))
    assert preempted == wanted
    logs = "".join(file.read_text() for file in (Path(config.directory) / "logs" / "latest").glob("*.log"))
    assert "has saved and stopped: job" in logs  # a time limit
    assert "has crashed" not in logs
    assert sum(slurm.num_restarts(job) for job in jobs.values()) > len(wanted)
    check_same(Outcome(config=config), local)


def test_a_dry_run_writes_checks_and_submits_nothing(slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig) -> None:
    directory = tmp_path / "with a blank"
    directory.mkdir()
    config = make_config(tiny_config, directory, num_nodes=2)
    done = atoll(slurm, *written(slurm, config, directory), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("aggregator: sbatch: Job ")
    assert slurm.run("squeue", "--noheader") == ""
    scripts = sorted((Path(config.directory) / "logs" / "attempt-001").glob("*.sbatch"))
    assert [script.stem for script in scripts] == ["aggregator", "alpha", "beta"]
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", *scripts], check=True)


REFUSED = "sbatch does not take .*"
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no such partition": ({"partition": "no"}, f"aggregator: {REFUSED}invalid partition specified: no"),
    "too many nodes": ({}, f"alpha: {REFUSED}Requested node configuration is not available"),
    "no such constraint": ({"constraint": "a100"}, f"aggregator: {REFUSED}Invalid feature specification"),
    "fewer GPUs than processes": (
        {"gpus_per_node": 1},
        "silos.alpha.processes_per_node: 2 given; allowed: up to 1, the GPUs that the site's jobs have on a node",
    ),
    "no GPUs": ({"gpus_per_node": 4}, f"alpha: {REFUSED}Requested node configuration is not available"),
    "a time limit above the partition's": (
        {"partition": "short", "time_limit": "1:00:00"},
        "aggregator: time_limit: '1:00:00' given; allowed: up to 10:00, the limit of partition short",
    ),
    "a time limit that leaves no time": (
        {"time_limit": "2"},
        "aggregator: time_limit: '2' given; allowed: more than a minute above the 120 seconds",
    ),
    "unknown runtime": ({"runtime": "docker"}, "aggregator: runtime: 'docker' given; allowed: apptainer, pyxis"),
    "unknown binding": (
        {"numa": "core"},
        "aggregator: numa: 'core' given; allowed: null, node, socket, exclusive",
    ),
    "unknown key": ({"partitions": "main"}, "job.partitions: unknown key given; .*did you mean job.partition"),
    "unknown silo": ({}, "silos.gamma: unknown silo given; allowed: alpha, beta"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_sbatch_would_not_take_is_one_line_and_nothing_is_submitted(
    mistake: str,
    slurm: Cluster,
    tmp_path: Path,
    tiny_config: TinyConfig,
    *,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    job, expected = MISTAKES[mistake]
    config = make_config(tiny_config, tmp_path, num_nodes=1 if mistake == "fewer GPUs than processes" else 2)
    if mistake == "too many nodes":
        five = {"num_nodes": 5, "global_batch_sequences": 5, "micro_batch_sequences": 1}
        config.silos["alpha"] = dataclasses.replace(config.silos["alpha"], **five)
    options = written(slurm, config, tmp_path, **job)
    if mistake == "unknown silo":
        (tmp_path / "site.yaml").write_text("silos: {gamma: {}}")
    said = refused(options, monkeypatch, capsys)
    assert re.fullmatch(f"atoll: {expected}.*\n", said), said
    assert slurm.run("squeue", "--noheader") == ""
    assert not list(Path(config.directory).glob("logs/*/jobs.json"))


CONFIGS = Path("configs").absolute()
# A job does not depend on the model's size, and demo-chat's checkpoint cannot be beside the tests' own model.
OVERLAYS = [
    None,
    *sorted(
        path
        for path in CONFIGS.glob("*/*.yaml")
        if path.parent.name not in ("site", "model") and path.stem != "demo-chat"
    ),
]
SITES = sorted((CONFIGS / "site").glob("*.yaml"))
# By default every site with the run alone, and one of them with every overlay.
PAIRS = [
    pytest.param(overlay, site, marks=[pytest.mark.soak] if overlay and site != SITES[0] else [])
    for site in SITES
    for overlay in OVERLAYS
]


@pytest.mark.parametrize(("overlay", "site"), PAIRS, ids=lambda path: path and path.stem)
def test_every_shipped_configuration_makes_jobs_that_sbatch_takes(
    slurm: Cluster,
    tmp_path: Path,
    tiny_config: TinyConfig,
    *,
    overlay: Path | None,
    site: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    tiny_config(tmp_path)
    paths = [tmp_path / "tiny.yaml", *([overlay] if overlay else [])]
    config = load_config(paths, ["inner.num_steps=3000", f"directory={tmp_path}/run"])
    said, _ = launch_slurm(config, load_site([site], config), dry_run=True)
    partitions = {"cpu": ("main", "main"), "gpu": ("gpu", "cpu")}[site.stem]
    for name, words in said.items():
        assert words.endswith(f"in partition {partitions[name == 'aggregator']}")
    assert sorted(said) == sorted([*config.silos, *(["aggregator"] if config.exchange.kind == "store" else [])])
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", *(tmp_path / "run" / "logs" / "attempt-001").glob("*.sbatch")], check=True)


def test_what_init_writes_is_what_sbatch_takes(
    slurm: Cluster, tmp_path: Path, tiny_text: TinyText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "alpha").symlink_to(tiny_text.packed["alpha"])
    (tmp_path / "tokenizer").symlink_to(tiny_text.tokenizer.parent)
    text = [Text("alpha", str(tiny_text.packed["alpha"]))]
    run = Beginning(machine="slurm", role="federation", texts=text, model="llama-5m", nodes=2)
    for begun in (run, Beginning(machine="slurm", role="site")):
        Path(begun.default_file).write_text(begun.configuration(begun.default_file))
    config = load_config(["run.yaml"])
    said, _ = launch_slurm(config, load_site([Path("site.yaml")], config), dry_run=True)
    assert sorted(said) == ["aggregator", "alpha"]
    assert all(words.endswith("in partition main") for words in said.values())


def test_all_options_of_a_site_render(
    slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    config = make_config(tiny_config, tmp_path, num_nodes=2)
    every = {
        "modules": ["cuda/12"],
        "sbatch": ["--comment=atoll"],
        "container": "atoll image.sif",
        "mounts": ["/data", "/a b:/c"],
        "python": "/opt/atoll/bin/python",
        "scratch": "$TMPDIR",
        "numa": "node",
        "interface": "ib0",
        "memory": "0",
    }
    for runtime, expected in {
        "apptainer": """apptainer exec --pwd "$PWD" --bind /data --bind '/a b:/c' 'atoll image.sif' /opt/atoll/""",
        "pyxis": """='atoll image.sif' --container-workdir="$PWD" --container-mounts='/data,/a b:/c' /opt/atoll/""",
    }.items():
        _, run, _, site = written(slurm, config, tmp_path, runtime=runtime, **every)
        checked = load_config([run])
        launch_slurm(checked, load_site([Path(site)], checked), dry_run=True)
        scripts = sorted((Path(config.directory) / "logs").glob("attempt-*/alpha.sbatch"))
        assert expected in scripts[-1].read_text()
        assert '--interface ib0 --numa node --scratch "$TMPDIR"' in scripts[-1].read_text()
        # scontrol is not in the container
        assert f"exec {sys.executable} -m launch.start.requeue" in scripts[-1].read_text()
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", scripts[-1]], check=True)


def test_nodes_that_do_not_see_the_run_directory_are_named(
    slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    config = make_config(tiny_config, tmp_path, num_nodes=2)
    config.silos["alpha"] = dataclasses.replace(
        config.silos["alpha"], num_nodes=4, global_batch_sequences=4, micro_batch_sequences=1
    )
    options = written(slurm, config, tmp_path)
    try:
        slurm.stop_node("n3")
        hidden = f"mount -t tmpfs none {tmp_path} && exec " + '"$@"'
        slurm.start_node("n3", "unshare", "--mount", "sh", "-c", hidden, "sh")
        look = ("srun", "--nodelist=n3", "sh", "-c", f"ls {tmp_path}/run.yaml || echo sees nothing")
        wait_for(lambda: "sees nothing" in slurm.run(*look), seconds=30)
        done = atoll(slurm, *options)
    finally:
        slurm.stop_node("n3")
        slurm.start_node("n3")
        wait_for(lambda: slurm.has_state("n3", "idle"), seconds=30)
    assert done.returncode == 2
    script = Path(config.directory) / "logs" / "attempt-001" / "alpha.sbatch"
    line = f"atoll: alpha: node n3 does not see {script}; allowed: a file system that all nodes share\n"
    assert done.stderr == line
    assert slurm.run("squeue", "--noheader") == ""


@pytest.mark.soak
def test_a_slurm_that_does_not_answer_is_no_job_that_has_ended(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    assert job_state("987654", "run-law") == ""
    silent = re.sub("SlurmctldPort=.*", f"SlurmctldPort={free_port()}", (slurm.directory / "slurm.conf").read_text())
    (tmp_path / "slurm.conf").write_text(silent)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    assert one_line_error(job_state, "987654", "run-law").startswith("squeue: slurm_load_jobs error: Unable to contact")
