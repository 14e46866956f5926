"""Measured rounds: a trace, shares of the time, and the bits of a run that was not measured."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from launch.show.report import write_report
from pretrain.host.journal import Journal
from pretrain.silo.profile import KEPT_TRACES, RoundProfile
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, federate
from tests.support import TWO_RANKS, zero

OF_A_STEP = {"data", "forward", "backward", "optimizer", "other"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> list[Outcome]:
    """A silo of two ranks with two micro batches, not measured, and measured in its second and fourth round."""
    found = []
    for name, rounds in (("plain", 0), ("measured", 2)):
        alpha = TWO_RANKS | zero(2) | {"micro_batch_sequences": 1, "profile_rounds": rounds}
        changes: dict[str, Any] = {"inner": {"num_steps": 16}, "silos": {"beta": None, "alpha": alpha}}
        outer = {"num_fragments": 2, "overlap_steps": 1}
        found.append(federate(tiny_config(tmp_path_factory.mktemp(name), outer=outer, **changes)))
    return found


def test_a_measured_run_has_the_bits_of_one_that_is_not(runs: list[Outcome]) -> None:
    plain, measured = runs
    last = plain.config.schedule.num_versions
    assert plain.commit(last).parameters_digest == measured.commit(last).parameters_digest
    for value in ("loss", "grad_norm"):
        assert plain.by_step("alpha", value) == measured.by_step("alpha", value)
    assert not [record for record in plain.records if record["kind"] == "profile"]
    assert not (plain.config.silo_directory("alpha") / "traces").exists()


def test_shares_and_trace(runs: list[Outcome]) -> None:
    measured = runs[1]
    records = [record for record in measured.records if record["kind"] == "profile"]
    assert [(record["round"], record["step"]) for record in records] == [(2, 8), (4, 16)]
    for record in records:
        assert record["shares"].keys() == OF_A_STEP | {"sync", "waiting"}
        assert sum(record["shares"].values()) == pytest.approx(1)
        assert all(0 < record["shares"][part] < 1 for part in OF_A_STEP | {"sync"})
        with gzip.open(measured.config.silo_directory("alpha") / record["trace"]) as file:
            events = json.load(file)["traceEvents"]
        named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        assert [named.count(part) for part in ("data", "forward", "backward", "optimizer")] == [2, 2, 2, 2]
        assert named.count("sync") == {8: 1, 16: 2}[record["step"]]  # what leaves after it; in the end both fragments
        assert any(event["name"].startswith("aten::") for event in events)
    assert len([*(measured.config.silo_directory("alpha") / "traces").iterdir()]) == 2
    html = write_report(measured.config).read_text()
    assert f"forward {records[-1]['shares']['forward']:.1%}" in html


def test_traces_are_never_overwritten_and_the_newest_stay(tmp_path: Path, tiny_config: TinyConfig) -> None:
    journal = Journal(tiny_config(tmp_path), "silos/alpha", silo="alpha")
    profile = RoundProfile(tmp_path, journal, 1)
    for number in range(KEPT_TRACES + 2):
        with profile.step(1 if number < 3 else number, 4, is_last=True), profile.part("forward"):
            pass
        with profile.part("waiting"):  # what ends the trace, but not the round
            assert len([*tmp_path.glob("traces/*")]) == min(number, KEPT_TRACES)
        profile.end_round()
    names = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert names[0] == "round-000001-3.json.gz"
    assert names[1:] == [f"round-{number:06d}-1.json.gz" for number in range(3, KEPT_TRACES + 2)]


def test_a_round_that_is_broken_off_leaves_nothing(tmp_path: Path, tiny_config: TinyConfig) -> None:
    profile = RoundProfile(tmp_path, Journal(tiny_config(tmp_path), "silos/alpha", silo="alpha"), 1)
    for _ in range(2):  # torch can record again after it
        with pytest.raises(KeyboardInterrupt), profile.step(1, 4, is_last=True):
            raise KeyboardInterrupt
        profile.close()
    profile.end_round()
    assert not (tmp_path / "traces").exists()
