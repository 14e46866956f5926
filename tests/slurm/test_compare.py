"""`atoll compare --site` on a real SLURM."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import cli
from launch.show.metrics import read_status
from tests.slurm.cluster import Cluster, missing
from tests.support import ROOT, TinyText, tiny_settings
from tests.waiting import wait_for

LONG_SECONDS = 400.0  # for what several processes of a job have to be started for

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


class Comparison:
    """A central and a federated model, and what the second becomes alone."""

    def __init__(self, slurm: Cluster, directory: Path, text: TinyText, *, steps: int, models: dict[str, Any]) -> None:
        self.slurm, self.directory = slurm, directory
        run = tiny_settings(directory, text) | {"inner": {"num_steps": steps, "lr": 0.003}}
        run |= {"outer": {"sync_interval_steps": steps // 4}, "silo": run["silo"] | {"checkpoint_interval_steps": 50}}
        spec = {"directory": str(directory / "all"), "run": [str(directory / "run.yaml")], "models": models}
        here = {"PYTHONPATH": str(ROOT), **slurm.environment}
        site = {"job": {"environment": here, "time_limit": "10", "cpus_per_task": 1}}
        for name, written in (("run", run), ("compare", spec), ("site", site)):
            (directory / f"{name}.yaml").write_text(yaml.safe_dump(written, sort_keys=False))

    def command(self, *more: str) -> list[str]:
        files = ["--config", str(self.directory / "compare.yaml"), "--site", str(self.directory / "site.yaml")]
        return [sys.executable, "-m", "launch.cli", "compare", *files, *more]

    def start(self) -> subprocess.Popen[str]:
        """A call of the command; all that it says goes to `said`."""
        with (self.directory / "said").open("a") as said:
            environment = os.environ | self.slurm.environment | {"PYTHONPATH": str(ROOT)}
            return subprocess.Popen(self.command(), env=environment, stdout=said, stderr=said, text=True)

    @property
    def said(self) -> str:
        return (self.directory / "said").read_text()

    def jobs(self) -> dict[str, list[str]]:
        """All that was ever submitted, by model."""
        found: dict[str, list[str]] = {}
        for file in sorted((self.directory / "all").glob("runs/**/logs/attempt-*/jobs.json")):
            model = file.relative_to(self.directory / "all" / "runs").parts[0]
            found.setdefault(model, []).append(json.loads(file.read_text())["whole.run"])
        return found

    def phases(self, *models: str) -> set[str]:
        files = [file for model in models for file in self.runs(model).glob("silos/*/status.json")]
        return {read_status(file).phase for file in files}

    def are_training(self, *models: str) -> bool:
        files = [file for model in models for file in self.runs(model).glob("silos/*/status.json")]
        return len(files) >= len(models) and all(read_status(file).step > 10 for file in files)

    def runs(self, model: str) -> Path:
        return self.directory / "all" / "runs" / model / "seed-0"


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_killed_and_called_again_it_follows_the_jobs_that_are_there(
    slurm: Cluster, tmp_path: Path, tiny_text: TinyText
) -> None:
    models = {"central": {"kind": "central"}, "shared": {}, "alone": {"kind": "personalised", "of": "shared"}}
    models["alone"] |= {"steps": 4}  # type: ignore[dict-item]
    comparison = Comparison(slurm, tmp_path, tiny_text, steps=400, models=models)
    first = comparison.start()
    wait_for(lambda: comparison.are_training("central", "shared"), seconds=LONG_SECONDS, tells=lambda: comparison.said)
    first.kill()
    first.wait()
    jobs = comparison.jobs()
    assert {slurm.state(job) for found in jobs.values() for job in found} == {"RUNNING"}
    assert comparison.start().wait(600) == 0, comparison.said
    for model in ("central", "shared"):
        assert f"{model} seed 0: job {jobs[model][0]} of an earlier call is still there\n" in comparison.said
        assert f"{model} seed 0: finished (job {jobs[model][0]})\n" in comparison.said
    again = comparison.jobs()
    assert {model: len(found) for model, found in again.items()} == {"central": 1, "shared": 1, "alone": 2}
    assert again | jobs == again
    assert set(json.loads((tmp_path / "all" / "results.json").read_text())) == set(models)
    assert slurm.run("squeue", "--noheader") == ""


TWO_ALONE = {name: {"kind": "central"} for name in ("central", "b")}  # of one silo each


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ctrl_c_has_the_jobs_save_and_end(slurm: Cluster, tmp_path: Path, tiny_text: TinyText) -> None:
    comparison = Comparison(slurm, tmp_path, tiny_text, steps=100_000, models=TWO_ALONE)
    first = comparison.start()
    wait_for(lambda: comparison.are_training(*TWO_ALONE), seconds=LONG_SECONDS, tells=lambda: comparison.said)
    first.send_signal(signal.SIGINT)
    assert first.wait(LONG_SECONDS) == 128 + signal.SIGINT, comparison.said
    assert slurm.run("squeue", "--noheader") == ""
    assert comparison.phases(*TWO_ALONE) == {"stopped"}
    for name, (job,) in comparison.jobs().items():
        assert f"{name} seed 0: job {job} saves and stops\n" in comparison.said
        assert slurm.num_restarts(job) == 0


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_requeued_it_is_waited_for_and_cancelled_it_ends_the_comparison(
    slurm: Cluster, tmp_path: Path, tiny_text: TinyText
) -> None:
    comparison = Comparison(slurm, tmp_path, tiny_text, steps=100_000, models=TWO_ALONE)
    started = comparison.start()
    wait_for(lambda: comparison.are_training(*TWO_ALONE), seconds=LONG_SECONDS, tells=lambda: comparison.said)
    (central,), (other,) = (comparison.jobs()[name] for name in TWO_ALONE)
    metrics = comparison.runs("central") / "metrics.jsonl"
    slurm.run("scontrol", "requeue", central)

    def goes_on() -> bool:
        slurm.hurry(central)
        return slurm.num_restarts(central) == 1 and len(re.findall(r'"kind": *"start"', metrics.read_text())) == 2

    wait_for(goes_on, seconds=LONG_SECONDS, poll_seconds=0.5, meanwhile=lambda: started.poll() is None)
    slurm.run("scancel", other)
    assert started.wait(LONG_SECONDS) == 1, comparison.said
    log = comparison.runs("b") / "logs" / "attempt-001" / "whole.run.log"
    assert f"b seed 0: job {other} is CANCELLED, " in comparison.said
    assert f" in {comparison.runs('b')}; see {log}\n" in comparison.said
    assert f"central seed 0: job {central} saves and stops\n" in comparison.said
    assert slurm.run("squeue", "--noheader") == ""
    assert comparison.phases("central") == {"stopped"}


def test_a_dry_run_shows_what_would_be_submitted(
    slurm: Cluster,
    tmp_path: Path,
    tiny_text: TinyText,
    *,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    comparison = Comparison(slurm, tmp_path, tiny_text, steps=8, models={"central": {"kind": "central"}, "b": {}})
    before = sorted(tmp_path.rglob("*"))

    def called(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["atoll", *comparison.command(*more)[3:]])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    assert called("--dry-run") == 0
    shown = capsys.readouterr().out
    for name in ("central", "b"):
        assert re.search(rf"^{name} seed 0: sbatch: Job \d+ to start at .* in partition main$", shown, re.MULTILINE)
    assert shown.count("launch.cli launch local --config") == 1
    if shutil.which("shellcheck"):
        (script := tmp_path / "script").write_text("#!/bin/bash" + shown.partition("#!/bin/bash")[2])
        subprocess.run(["shellcheck", script], check=True)
        script.unlink()
    site = tmp_path / "site.yaml"
    site.write_text("job: {partition: none}")
    assert called() == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"atoll: whole.run: sbatch does not take .*invalid partition specified: none.*\n", said), said
    assert slurm.run("squeue", "--noheader") == ""
    assert called("--dry-run") == 2
    assert [path for path in sorted(tmp_path.rglob("*")) if "all" not in path.parts] == before
    assert comparison.jobs() == {}
