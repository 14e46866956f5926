"""What of `atoll compare --site` needs no cluster: its jobs' script, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from launch import cli
from launch.compare.compare import load_comparison, plan_runs
from launch.compare.pace import Followed, Pace
from launch.compare.site import cluster_of
from launch.start.local import WHOLE
from launch.start.requeue import _phase, _saved
from launch.start.site import JobConfig
from launch.start.slurm import batch_script
from tests.conftest import TinyConfig
from tests.support import TWO_RANKS, TinyText, one_line_error, tiny_settings


@pytest.fixture
def comparison(tmp_path: Path, tiny_text: TinyText) -> Path:
    """A comparison's YAML file."""
    run = tiny_settings(tmp_path, tiny_text)
    run["silo"] |= TWO_RANKS
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    models = {"central": {"kind": "central"}, "averaged": {}}
    spec = {"directory": str(tmp_path / "all"), "run": [str(tmp_path / "run.yaml")], "models": models}
    (file := tmp_path / "compare.yaml").write_text(yaml.safe_dump(spec))
    return file


def test_a_job_is_a_launch_of_the_whole_run(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path / "a b", silos={"alpha": TWO_RANKS})
    run, attempt = Path(config.directory), tmp_path / "attempt"
    job = JobConfig(partition="gpu", account="ours", time_limit="1:00:00", gpus_per_node=4, modules=["cuda"])
    script = batch_script(config, WHOLE, job, attempt)
    for option in ("partition=gpu", "account=ours", "time=1:00:00", "gpus-per-node=4", "nodes=1", "cpus-per-task=3"):
        assert f"#SBATCH --{option}\n" in script
    assert f"#SBATCH --output={attempt}/whole.run.log\n" in script
    # Only what does not leave this folder: the last line would put a job back.
    stubs = "".join(f"{name}() {{ printf '%s|' {name} \"$@\"; echo; }}\n" for name in ("module", "srun", "flock"))
    for variables, waits in (({}, False), ({"SLURM_RESTART_COUNT": "1"}, True)):
        names = dict.fromkeys(("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_CPUS_PER_TASK"), "3")
        done = subprocess.run(
            ["bash", "-c", stubs + script[: script.rindex("exec ")]],
            env=os.environ | names | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        atoll = f"{sys.executable}|-m|launch.cli|launch|local|--config|{run}/config.yaml|"
        assert done.stdout.splitlines()[-1] == f"srun|--kill-on-bad-exit=1|--cpus-per-task=3|{atoll}"
        assert (f"flock|--timeout|300|{run}/lock|true|" in done.stdout) == waits
        assert done.stdout.startswith("module|load|cuda|\n")


@pytest.mark.parametrize(
    ("code", "phase"),
    [(0, "finished"), (1, "failed"), (2, "failed"), (137, "failed"), (138, "stopped"), (143, "stopped")],
)
def test_a_launch_says_by_its_exit_code_whether_it_goes_on(
    tmp_path: Path, tiny_config: TinyConfig, code: int, phase: str
) -> None:
    assert _phase(tiny_config(tmp_path), WHOLE, code) == phase


def test_what_any_silo_or_the_aggregator_saves_is_progress_of_the_whole(
    tmp_path: Path, tiny_config: TinyConfig
) -> None:
    config = tiny_config(tmp_path)
    found = [_saved(config, WHOLE)]
    for path in ("aggregator/newest.json", "silos/beta/checkpoints/step-4/state.json"):
        file = Path(config.directory) / path
        file.parent.mkdir(parents=True)
        file.write_text("{}")
        found.append(_saved(config, WHOLE))
    assert len(set(found)) == 3


def test_the_queue_is_told_apart_from_what_runs(comparison: Path) -> None:
    first, second = (Followed(name=one.name, config=one.config) for one in plan_runs(load_comparison([comparison])))
    first.state, second.state = "running", "queued"
    line = Pace([first, second]).line()
    assert line.endswith(f"running: {first.name} at step 0 of 12; in the queue: {second.name}")


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"job": {"partitions": "main"}}, "job.partitions: unknown key given; "),
    "unknown silo": ({"silos": {"gamma": {}}}, "silos.gamma: unknown silo given; allowed: alpha, beta"),
    "scratch": ({"job": {"scratch": "$TMPDIR"}}, "job.scratch: '$TMPDIR' given; allowed: null in a comparison, whose "),
    "numa": ({"job": {"numa": "node"}}, "job.numa: 'node' given; allowed: null in a comparison, whose "),
    "GPUs": (
        {"job": {"gpus_per_node": 2}},
        "job.gpus_per_node: 2 given; allowed: 0, or one for each of the 4 processes of averaged seed 0, which run on",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_site_that_does_not_fit_is_one_line(comparison: Path, mistake: str) -> None:
    site, expected = MISTAKES[mistake]
    (file := comparison.with_name("site.yaml")).write_text(yaml.safe_dump(site))
    assert one_line_error(cluster_of, load_comparison([comparison]), [file]).startswith(expected)


def test_without_slurm_and_with_a_table_it_is_one_line(comparison: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(comparison.parent))
    said = one_line_error(cluster_of, load_comparison([comparison]), [Path("cpu")])
    assert said == "atoll compare --site: sbatch is not installed here; run it on a login node"
    table = ["compare", "--config", str(comparison), "--site", "cpu", "--table"]
    said = str(CliRunner().invoke(cli.app, table).exception)
    assert said == "--site: given with --table; allowed: without, as nothing is started"
    assert not (comparison.parent / "all").exists()
