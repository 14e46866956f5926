"""`atoll demo --chat`, whole: what it makes, trains and says, and that the same command finds all of it done."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

MODELS = ("base, before", "federated", "docs alone", "code alone", "calls alone", "central")
CELL = re.compile(r"(\d+\.\d+) +(\d+)%")


def losses_of(model: str, lines: list[str]) -> list[float]:
    """On each institution's conversations, and on all, as the table has them."""
    (cells,) = (found for line in lines if model in line and len(found := CELL.findall(line)) == 4)
    return [float(loss) for loss, _ in cells]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_demo_ends_with_models_that_learned_to_answer(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "demo", "--chat", "--directory", str(tmp_path / "demo")]
    found = {}
    for time in ("first", "second"):
        made = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "120"}
        )
        assert made.returncode == 0, made.stdout + made.stderr
        lines = made.stdout.splitlines()
        rows = {
            name: [float(cell[0]) for line in lines if name in line for cell in CELL.findall(line)] for name in MODELS
        }
        assert all(len(losses) == 4 for losses in rows.values()), made.stdout
        found[time] = rows
        assert [line for line in lines if line.startswith(("a conversation ", "report ", "model ", "next "))]
    assert found["first"] == found["second"]
    before, federated = found["first"]["base, before"], found["first"]["federated"]
    assert all(after < first for after, first in zip(federated, before, strict=True))
    alone = [found["first"][f"{name} alone"][3] for name in ("docs", "code", "calls")]
    assert federated[3] < min(alone)  # on what all three have, nobody alone comes as far
    assert (tmp_path / "demo" / "report.html").is_file()
