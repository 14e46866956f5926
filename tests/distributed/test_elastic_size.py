"""A silo goes on with other ranks, at another ZeRO stage and precision, as if nothing had happened."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, federate, launched
from tests.support import TWO_RANKS, torchrun, zero

WORKER = Path(__file__).parent / "elastic_worker.py"
# Ranks; ZeRO stage, steps before, and after. The first goes on to the end, undisturbed, behind its checkpoint.
LEGS = [(1, (0, 0, 2, 6)), (2, (2, 2, 3, 3)), (4, (3, 3, 5, 5)), (1, (1, 5, 6, 6))]


def leg(directory: Path, num_ranks: int, arguments: Sequence[int]) -> dict[str, Any]:
    """What one start of the worker printed, by optimizer."""
    lines = torchrun(WORKER, directory, *arguments, num_ranks=num_ranks, timeout=120).splitlines()
    rows = [json.loads(line.removeprefix("RESULT")) for line in lines if line.startswith("RESULT")]
    return {row["optimizer"]: row for row in rows}


@pytest.fixture(scope="module")
def legs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One after another."""
    directory = tmp_path_factory.mktemp("elastic")
    return [leg(directory, *one) for one in LEGS]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parameters_and_moments_have_the_same_bits_at_another_size(legs: Any, optimizer: str) -> None:
    for earlier, later in itertools.pairwise(legs):
        assert later[optimizer]["before"] == earlier[optimizer]["after"]
    assert len({one[optimizer]["after"] for one in legs}) == len(LEGS)  # training went on in each


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_losses_are_those_of_the_undisturbed_run(legs: Any, optimizer: str) -> None:
    undisturbed, losses = legs[0][optimizer]["losses"], legs[0][optimizer]["losses"][:2]
    losses = losses + [loss for one in legs[1:] for loss in one[optimizer]["losses"]]
    # Muon's Newton-Schulz iteration is in bf16 and makes more of the last bits of a mean over ranks.
    assert losses == pytest.approx(undisturbed, rel=2e-6 if optimizer == "adamw" else 1e-3)


def test_a_silo_changes_its_size_between_two_starts(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """A whole silo that loses its last checkpoint and goes on with two ranks: same sequences, same losses."""
    finished = federate(tiny_config(tmp_path, silos={"beta": None}, exchange={"kind": "none"}))
    checkpoints = finished.config.silo_directory("alpha") / "checkpoints"
    state = json.loads((checkpoints / "step-00000012/state.json").read_text())
    shutil.rmtree(checkpoints / "step-00000012")
    silo = finished.config.silos["alpha"]
    finished.config.silos["alpha"] = dataclasses.replace(silo, **TWO_RANKS, **zero(2))
    code, said = launched(finished.config)
    assert code == 0, said[-4000:]
    log = (Path(finished.config.directory) / "logs/latest/alpha.log").read_text()
    assert "goes on from step-00000008, of 1 rank, ZeRO 0, fp32, with 2 ranks, ZeRO 2, fp32" in log
    again = json.loads((checkpoints / "step-00000012/state.json").read_text())
    assert (again["step"], again["position"]) == (state["step"], state["position"])
    losses = [record["loss"] for record in Outcome(config=finished.config).records if record["kind"] == "step"]
    assert len(losses) == 12 + 4
    assert losses[12:] == pytest.approx(losses[8:12], rel=1e-5)
