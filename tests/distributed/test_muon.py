"""Muon's work shared out over real ranks comes to the bits of one that does all, whole or in flat partitions."""

import json
import subprocess
import sys

from tests.support import ROOT
from tests.warm import python as warm_python


def digests(num_ranks: int) -> list[tuple[int, bool, str]]:
    """Of all matrices: rank, whether they were in flat partitions, hash of their bits."""
    worker = [warm_python(), "-m", "tests.distributed.muon_worker"]
    run = subprocess.run(
        [sys.executable, "-m", "launch.start.workers", "--num-processes", str(num_ranks), "--", *worker],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(
        next(line for line in run.stdout.splitlines() if line.startswith("RESULT")).removeprefix("RESULT")
    )


def test_shared_out_muon_has_the_same_bits() -> None:
    alone, together = digests(1), digests(3)
    assert sorted([rank, is_flat] for rank, is_flat, _ in together) == [[r, f] for r in range(3) for f in (False, True)]
    assert {digest for *_, digest in together} == {digest for *_, digest in alone}
    assert len({digest for *_, digest in alone}) == 1
