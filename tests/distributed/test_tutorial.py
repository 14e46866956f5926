"""docs/tutorial.md, typed as it stands, but for the number of steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.typed import FENCE

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
STEPS = "num_steps: 200"


def test_from_three_directories_to_a_model(tmp_path: Path) -> None:
    blocks = [block for kind, block in FENCE.findall((ROOT / "docs/tutorial.md").read_text()) if kind == "sh"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "200"}
    said = []
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{block}{done.stdout}{done.stderr}"
        said.append(done.stdout)
        if block.startswith("atoll init"):
            written = (tmp_path / "run.yaml").read_text()
            assert written.count(STEPS) == 1
            (tmp_path / "run.yaml").write_text(written.replace(STEPS, "num_steps: 20"))
    _, begun, _, planned, trained, _, verified, spoken = said
    printed = [line.strip() for line in begun.splitlines() if line.startswith("  atoll ")]
    assert printed == [line for block in blocks[2:5] for line in block.splitlines()]
    assert "utilisation" in planned
    assert planned.endswith("dry run: nothing was started\n")
    assert "commit 2/2" in trained
    assert "2 merged again from their deliveries" in verified
    assert verified.endswith("all is as it should be\n")
    assert spoken.startswith("model: version 2 of run")
    assert spoken.count("perplexity") == 3
