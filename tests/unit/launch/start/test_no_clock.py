"""What a launcher decides without any clock: the newest attempt, and the node that failed first."""

import json
import os
from pathlib import Path

import pytest

from launch.start.node import note_failure
from launch.start.requeue import _count_crash
from launch.start.slurm import JOBS_FILE, submitted_jobs


def test_the_last_attempt_is_that_with_the_largest_number(tmp_path: Path) -> None:
    for number, written in ((9, 4.9e9), (10, 0.0), (1000, 1e9), (11, 2e9)):
        file = tmp_path / "logs" / f"attempt-{number:03}" / JOBS_FILE
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"law": str(number)}))
        os.utime(file, (written, written))
    (tmp_path / "logs" / "attempt-1001").mkdir()  # which submitted nothing
    assert submitted_jobs(tmp_path) == (tmp_path / "logs" / "attempt-1000", {"law": "1000"})
    assert submitted_jobs(tmp_path / "nowhere") == (None, {})


def test_the_node_that_failed_first_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    notes = tmp_path / "crashes"
    assert _count_crash(tmp_path, notes, "7", "")["nodes"] == {}
    for node in ("n2", "n1"):
        note_failure(notes, "7-0", node)
    assert _count_crash(tmp_path, notes, "7", "") == {"job": "7", "crashes": 2, "saved": "", "nodes": {"n2": 1}}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    note_failure(notes, "7-1", "n2")
    assert _count_crash(tmp_path, notes, "7", "")["nodes"] == {"n2": 2}
