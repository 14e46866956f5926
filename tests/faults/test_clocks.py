"""Clocks of another century: nothing is decided by them, in the store or in a collective."""

from pathlib import Path
from typing import Any

import pytest

from launch.show.status_reader import store_status
from pretrain.config.load import load_run
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_same_bits, federate
from tests.faults.clocks import Years, with_clocks
from tests.support import free_port

STORE: Years = {"aggregator": (2126, 1926), "alpha": (1926,), "beta": (2126,)}
COLLECTIVE: Years = {"alpha": (2126, 1926), "beta": (2026,)}


@pytest.mark.soak
def test_clocks_of_another_century_change_no_bit(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Signed, and in the collective over TLS: each silo has another clock in one than in the other."""

    def run(name: str, years: Years, **exchange: Any) -> Outcome:
        looked = tmp_path / name / "looked"
        looked.mkdir(parents=True)
        found = federate(tiny_config(tmp_path / name, exchange=exchange), build_commands=with_clocks(years, looked))
        assert {path.name for path in looked.iterdir()} == {*years}
        assert load_run(Path(found.config.directory)).trust.keys.keys() == {*years}
        for silo in ("alpha", "beta"):
            times = {record["time"] for record in found.records if record.get("silo") == silo}
            assert {int(1970 + seconds / 86_400 / 365.2425) for seconds in times} == {*years[silo]}
        return found

    stored = run("store", STORE, lease_seconds=5.0)
    among = run("collective", COLLECTIVE, kind="collective", url=f"tcp://127.0.0.1:{free_port()}", dead_seconds=5.0)
    last = stored.config.schedule.num_versions
    assert_same_bits(stored.parameters(last), among.parameters(last))
    for silo in ("alpha", "beta"):
        assert stored.by_step(silo, "loss") == among.by_step(silo, "loss")
    status = store_status(stored.config.store_url)
    assert (status.is_finished, status.ahead, status.unsigned, status.unreadable) == (True, [], [], [])
