"""The disk of a silo's run directory is full at each kind of write: one line, exit code 2; on after room is made."""

import dataclasses
import re
from pathlib import Path

import pytest

from pretrain.config.keys import RunConfig
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome
from tests.distributed.guests import Guest, started
from tests.faults.scripted import FILLER, with_faults
from tests.faults.test_kills import check_same, make_config
from tests.support import mounted
from tests.waiting import PATIENCE_SECONDS

# A step's line in metrics.jsonl and status.json; the payload in the outbox; the manifest beside it; the payload in the
# inbox; the engine's part of a checkpoint; all the rest of one.
POINTS = [("step", 2), ("sending", 1), ("coded", 2), ("fetching", 2), ("before_saving", 9), ("saving", 12)]


def only(config: RunConfig, silo: str) -> RunConfig:
    """One institution's configuration."""
    return dataclasses.replace(config, silos={silo: config.silos[silo]}, roster=config.full_roster)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_silo_says_so_and_goes_on_after_room_is_made(
    undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    fired, store = tmp_path / "fired", {"url": str(tmp_path / "store")}
    (tmp_path / "guest").mkdir()
    with mounted(tmp_path / "guest" / "run", num_bytes=24 << 20) as disk:
        faults = {"beta": [(point, number, 0, "fill", str(disk)) for point, number in POINTS]}
        hosts = only(make_config(tiny_config, tmp_path / "hosts", store), "alpha")
        guest = only(make_config(tiny_config, tmp_path / "guest", store), "beta")
        others = started(Guest(hosts, "aggregator"), Guest(hosts, "alpha"), seconds=120)
        with Guest(guest, "beta", with_faults(faults, fired)) as beta, others:
            before = ""
            for point, number in POINTS:
                beta.start()
                said = beta.wait(120, code=2)
                assert (fired / f"{point}-{number}").exists(), said
                (disk / FILLER).unlink()
                said, before = said.removeprefix(before), said
                assert re.findall("^atoll: .*", said, re.MULTILINE) == [
                    f"atoll: directory: '{disk}' given; there is no space left on its disk; make room and start again: "
                    "everything up to the last checkpoint is there"
                ]
            beta.start()
            beta.wait(PATIENCE_SECONDS)
        check_same(Outcome(config=hosts), undisturbed)
        check_same(Outcome(config=guest), undisturbed)
        assert not list(disk.rglob("*.tmp"))
