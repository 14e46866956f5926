"""Clocks of another century: nothing is decided by them, in the store or in a collective."""

from pathlib import Path
from typing import Any

import pytest

from launch.show.status_reader import store_status
from pretrain.config.load import load_run
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_same_bits, federate
from tests.faults.clocks import with_clocks
from tests.faults.test_kills import check_same
from tests.support import free_port

YEARS = {"aggregator": (2126, 1926), "alpha": (1926,), "beta": (2126,)}


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> Outcome:
    """The same run with the clock of this machine."""
    return federate(tiny_config(tmp_path_factory.mktemp("right")))


@pytest.mark.parametrize("kind", ["store", "collective"])
def test_clocks_of_another_century_change_no_bit(
    right: Outcome, tmp_path: Path, tiny_config: TinyConfig, kind: str
) -> None:
    looked = tmp_path / "looked"
    looked.mkdir()
    exchange: dict[str, Any] = {"lease_seconds": 5.0}
    if kind == "collective":
        exchange |= {"kind": kind, "url": f"tcp://127.0.0.1:{free_port()}"}
    wrong = federate(tiny_config(tmp_path, exchange=exchange), build_commands=with_clocks(YEARS, looked))
    assert {path.name for path in looked.iterdir()} == ({*YEARS} if kind == "store" else {"alpha", "beta"})
    assert load_run(Path(wrong.config.directory)).trust.keys, "signed, and between silos TLS"
    if kind == "store":
        check_same(wrong, right)
        status = store_status(wrong.config.store_url)
        assert (status.is_finished, status.ahead, status.unsigned, status.unreadable) == (True, [], [], [])
    last = right.config.schedule.num_versions
    assert_same_bits(wrong.parameters(last), right.parameters(last))
    years = {name: {int(1970 + r["time"] / 86_400 / 365.2425) for r in of(wrong, name)} for name in ("alpha", "beta")}
    assert years == {"alpha": {1926}, "beta": {2126}}


def of(run: Outcome, silo: str) -> list[dict[str, Any]]:
    return [record for record in run.records if record.get("silo") == silo]
