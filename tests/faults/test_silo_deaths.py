"""A silo dies once at every point of its loop, and comes to the bits of the undisturbed run."""

from pathlib import Path

import pytest

from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome
from tests.faults.scripted import SILO_POINTS, Faults, federate_with
from tests.faults.test_kills import check_same, make_config

OF_COLLECTIVE = {"before_keep", "after_keep", "before_publish", "after_publish"}
NO_DEATHS = {"corrupt_payload", "corrupt_version"}
# Three versions, at steps 4, 8 and 12; checkpoints at steps 3, 6, 9 and 12 hold versions 0, 1, 2 and 3.
DEATHS: Faults = {
    "alpha": [
        ("signing", 0),
        ("named", 0),
        ("gathering", 1),
        ("coded", 1),
        ("before_payload", 1),
        ("after_manifest", 2),
        ("fetching", 2),
        ("adopting", 2),
        ("before_saving", 9),
        ("marking", 3),
    ],
    "beta": [
        ("joining", 0),
        ("step", 2),
        ("sending", 1),
        ("delivering", 1),
        ("before_manifest", 1),
        ("waiting", 2),
        ("downloaded", 2),
        ("adopted", 2),
        ("saving", 9),
        ("marked", 2),
    ],
}


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_killed_at_every_point_of_its_loop_and_restarted(
    undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    assert {point for deaths in DEATHS.values() for point, _ in deaths} == {*SILO_POINTS} - OF_COLLECTIVE - NO_DEATHS
    run = federate_with(DEATHS, make_config(tiny_config, tmp_path), tmp_path / "fired", max_restarts=20)
    check_same(run, undisturbed)
