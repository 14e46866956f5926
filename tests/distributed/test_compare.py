"""A real comparison that is interrupted and goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.support import TinyText, tiny_settings
from tests.waiting import PATIENCE_SECONDS

COMPARE = [sys.executable, "-m", "launch.cli", "compare", "--jobs", "2", "--config"]


@pytest.mark.soak
def test_goes_on_where_it_was_interrupted(tmp_path: Path, tiny_text: TinyText) -> None:
    run = tiny_settings(tmp_path, tiny_text)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    models = {
        "central": {"kind": "central"},
        "shared": {"settings": ["outer.second_moments=shared", "outer.merge=importance"]},
        "isolated": {"kind": "isolated"},
        "personal": {"kind": "personalised", "of": "shared", "steps": 4},
    }
    directory, file = tmp_path / "all", tmp_path / "compare.yaml"
    spec = {"directory": str(directory), "run": [str(tmp_path / "run.yaml")], "models": models}
    file.write_text(yaml.safe_dump(spec, sort_keys=False))

    first = subprocess.Popen([*COMPARE, str(file)], stdout=subprocess.PIPE, text=True)
    assert first.stdout
    while "finished in" not in first.stdout.readline():
        assert first.poll() is None
    time.sleep(5)  # into the next ones
    first.send_signal(signal.SIGINT)
    assert first.wait(PATIENCE_SECONDS) == 128 + signal.SIGINT
    finished = {path: path.stat().st_mtime_ns for path in directory.rglob("summary.json")}
    assert 1 <= len(finished) < 6

    second = subprocess.run([*COMPARE, str(file)], capture_output=True, text=True, check=True)
    assert f"6 runs, {len(finished)} of them finished" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    results = json.loads((directory / "results.json").read_text())
    assert set(results) == set(models)
    untrained = results["central"]["0"]["curve"][0][1]
    assert all(one["0"]["all_text"] < untrained for one in results.values())
    assert results["shared"]["0"]["tokens"] == results["central"]["0"]["tokens"]
