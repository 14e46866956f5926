"""What of `atoll launch slurm` needs no cluster."""

import dataclasses
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.start.site import load_site
from launch.start.slurm import render_jobs, time_limit_seconds
from pretrain.config.check import check_config
from pretrain.config.keys import RunConfig
from tests.conftest import TinyConfig
from tests.support import one_line_error


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-0", 86_400),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("2-00:00:01", 172_801),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(limit: str, seconds: int) -> None:
    assert time_limit_seconds(limit) == seconds


def test_a_time_limit_that_is_none_is_one_line() -> None:
    assert one_line_error(time_limit_seconds, "a day").startswith("time_limit: 'a day' given; allowed: ")


ENDS_ITS_LINE = "x'\ntouch PROOF\n#"


@pytest.mark.parametrize("key", ["name", "directory"])
def test_a_run_is_not_named_so_that_a_script_would_run_it(tmp_path: Path, tiny_config: TinyConfig, key: str) -> None:
    config = dataclasses.replace(tiny_config(tmp_path), **{key: ENDS_ITS_LINE})
    assert one_line_error(check_config, config).startswith(f"{key}: {ENDS_ITS_LINE!r} given; allowed: ")
    # If it came there all the same, no script would be written.
    config = dataclasses.replace(config, directory=str(tmp_path / f"run{'x' if key == 'name' else ENDS_ITS_LINE}"))
    said = one_line_error(rendered, config, tmp_path / "attempt")
    assert said.endswith("given for a batch script; allowed: one line, without control characters")
    assert not list((tmp_path / "attempt").glob("*"))


def rendered(config: RunConfig, attempt: Path, **job: Any) -> dict[str, str]:
    """The script of each job."""
    attempt.mkdir()
    site = attempt.with_suffix(".yaml")
    site.write_text(yaml.safe_dump({"job": job}))
    return {job.name: job.script.read_text() for job in render_jobs(config, load_site([site], config), attempt)}


TEXTS = (
    "partition",
    "account",
    "qos",
    "constraint",
    "time_limit",
    "memory",
    "exclude",
    "container",
    "python",
    "scratch",
)


@pytest.mark.parametrize("key", [*TEXTS, "scratch", "interface", "sbatch", "modules", "mounts", "environment"])
def test_no_value_of_a_site_ends_its_line(tmp_path: Path, tiny_config: TinyConfig, key: str) -> None:
    lists = {"sbatch": [ENDS_ITS_LINE], "modules": [ENDS_ITS_LINE], "mounts": [ENDS_ITS_LINE]}
    value = lists.get(key, {"A": ENDS_ITS_LINE} if key == "environment" else ENDS_ITS_LINE)
    said = one_line_error(rendered, tiny_config(tmp_path), tmp_path / "attempt", **{key: value})
    assert said == f"aggregator: {key}: {ENDS_ITS_LINE!r} given; allowed: one line, without control characters"


def test_a_variable_has_the_name_of_one(tmp_path: Path, tiny_config: TinyConfig) -> None:
    said = one_line_error(rendered, tiny_config(tmp_path), tmp_path / "attempt", environment={"A=$(id);B": "1"})
    assert said == "aggregator: environment: 'A=$(id);B' given; allowed: letters, digits, _"


def test_whatever_is_put_into_a_script_stays_a_value(tmp_path: Path, tiny_config: TinyConfig) -> None:
    proof, odd = tmp_path / "PROOF", "$(touch PROOF) `touch PROOF` ' \" ; touch PROOF #"
    config = dataclasses.replace(tiny_config(tmp_path), directory=str(tmp_path / odd.replace("/", "")))
    job: dict[str, Any] = dict.fromkeys(("partition", "account", "constraint", "memory", "container", "interface"), odd)
    job |= {"mounts": [odd], "modules": [odd], "environment": {"ODD": odd}, "sbatch": ["--comment=x"]}
    scripts = rendered(config, tmp_path / "attempt", **job)
    without = "module() { :; }\nsrun() { :; }\nscontrol() { :; }\n"
    names = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_CPUS_PER_TASK")
    variables = dict.fromkeys(names, "1")
    assert scripts
    for script in scripts.values():
        assert f"#SBATCH --job-name={config.name}-" in script
        # Only what does not leave this folder: the last line would put a job back.
        done = subprocess.run(
            ["bash", "-c", without + script[: script.rindex("exec ")] + 'printf %s "$ODD"'],
            cwd=tmp_path,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.endswith(odd), done.stderr
    assert not proof.exists()
