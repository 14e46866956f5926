"""The gate in whole runs: aggregator and silos as a user starts them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.show.report import summarize, write_report
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.gated import judged_path
from pretrain.exchange.words import Evaluation
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_same_bits, federate
from tests.faults.scripted import Faults, federate_with
from tests.gates import RULE, commanded, decisions, gate_data, poisoned, split_sha256
from tests.support import TinyText

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]


def said_by(*arguments: object, code: int = 0) -> str:
    """What a command prints."""
    found, said = commanded(*arguments)
    assert found == code, said
    return said


def result(config: RunConfig, judge: str, version: int) -> Evaluation:
    return Evaluation.from_bytes(Path(config.store_url, judged_path(judge, version)).read_bytes())


def exported(config: RunConfig, directory: Path, *options: str) -> dict[str, Any]:
    """What an export says of itself; its card is read, too."""
    said_by("export", config.directory, *options, "--output", directory)
    found: dict[str, Any] = json.loads((directory / "atoll.json").read_text())
    card = (directory / "README.md").read_text()
    assert f"| contract | sha256 `{found['contract_sha256']}` |" in card
    assert f"| commit | sha256 `{found['commit_sha256']}` |" in card
    return found | {"card": card}


def test_candidates_results_and_decisions_are_shown(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    """Version 0 stays the current one: another would have to be three nats lower."""
    public = tiny_text.packed["gamma"] / "valid"
    gate = {
        "every_versions": 1,
        "data": gate_data(tiny_text, "alpha", "beta"),
        "public": {"shared": split_sha256(public)},
        "places": {"shared": str(public)},
        "max_mean_rise": -3.0,
        "max_public": 100.0,
        "eval_sequences": 8,
    }
    changes: dict[str, Any] = {"inner": {"num_steps": 8}, "outer": {"sync_interval_steps": 4}}
    run = federate(tiny_config(tmp_path / "gate", gate=gate, **changes))
    config, directory = run.config, Path(run.config.directory)
    assert [one.current for one in decisions(config)] == [0, 0, 0]
    for silo in config.silos:  # the same as its own evaluation, which is of as many sequences
        told = {round: losses[silo] for round, losses in run.held_out(silo).items()}
        assert {version: result(config, silo, version).losses[silo] for version in range(3)} == told
    status = said_by("status", directory)
    assert "gate: version 0 is the current one" in status
    assert "gate: version 2 did not, version 0 stays: the mean of 2 silos is " in status
    assert f"{OPERATOR} {result(config, OPERATOR, 2).losses['shared']:.4f}" in status
    assert "gate        3 decisions recomputed; version 0 is current" in said_by("verify", directory)
    assert "max_mean_rise -3, max_public 100" in said_by("contract", "show", directory)
    assert [one["version"] for one in summarize(config)["gate"]] == [0, 1, 2]
    assert "the mean of 2 silos is" in write_report(config).read_text()
    found = exported(config, tmp_path / "current", "--current")
    assert (found["version"], found["gate"]["current"]) == (0, 0)
    assert "Version 0 is the run's current one, by the rule" in found["card"]
    newest = exported(config, tmp_path / "newest")
    assert newest["version"] == 2
    assert "Version 2 is not the run's current one, which is version 0, by the rule" in newest["card"]
    ungated = federate(tiny_config(tmp_path / "off", **changes))
    assert_same_bits(run.parameters(2), ungated.parameters(2))  # who is judged learns nothing by it


def test_a_silo_that_is_poisoned_from_version_5_on(tmp_path: Path, tiny_text: TinyText) -> None:
    """Its text is shuffled from the step on that makes version 5; without a gate what is exported is the bad one."""
    config, faults = poisoned(tmp_path / "gated", tiny_text, is_gated=True)
    gated = federate_with(faults, config, tmp_path / "fired")
    found = decisions(gated.config)
    assert [one.current for one in found] == [0, 1, 2, 3, 4, 4, 4, 4, 4]
    for one in found[5:]:
        assert any(why.startswith("silo alpha finds ") for why in one.reasons)
    assert exported(gated.config, tmp_path / "kept", "--current")["version"] == 4

    config, faults = poisoned(tmp_path / "off", tiny_text, is_gated=False)
    free = federate_with(faults, config, tmp_path / "fired-off")
    assert_same_bits(free.parameters(8), gated.parameters(8))
    bad = exported(free.config, tmp_path / "bad")
    assert bad["version"] == 8
    assert "gate" not in bad
    losses = {silo: free.held_out(silo) for silo in ("alpha", "beta")}
    assert all(found[8][silo] > found[4][silo] + 0.2 for silo, found in losses.items())
    refused = said_by("export", free.config.directory, "--current", "--output", tmp_path / "none", code=2)
    assert "--current: given, and this run's contract has no gate" in refused
    files = {str(path) for path in Path(free.config.store_url).rglob("*")}
    assert not any(path.endswith(("judged.json", "gate.json")) for path in files)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig, tiny_text: TinyText) -> Outcome:
    gate = RULE | {"data": gate_data(tiny_text, "alpha", "beta")}
    return federate(tiny_config(tmp_path_factory.mktemp("undisturbed"), gate=gate))


@pytest.mark.parametrize(
    "killed", [(OPERATOR, "before_decision"), (OPERATOR, "after_decision"), ("beta", "judging"), ("beta", "judged")]
)
def test_killed_around_a_decision(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, undisturbed: Outcome, killed: tuple[str, str]
) -> None:
    """The same decisions, from the same results, and the same run to the last bit."""
    gate = RULE | {"data": gate_data(tiny_text, "alpha", "beta")}
    faults: Faults = {killed[0]: [(killed[1], 2, 0, "kill", 0)]}
    run = federate_with(faults, tiny_config(tmp_path, gate=gate), tmp_path / "fired", max_restarts=1)
    assert decisions(run.config) == decisions(undisturbed.config)
    assert_same_bits(run.parameters(3), undisturbed.parameters(3))
    names = ["global/000002/commit.json", "global/000002/gate.json", "silos/beta/000002/judged.json"]
    for name in names:
        ours, theirs = (Path(one.config.store_url, name).read_bytes() for one in (run, undisturbed))
        assert ours == theirs


def test_thresholds_that_were_changed_after_the_fact(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, undisturbed: Outcome
) -> None:
    """Whoever comes with others is refused in one line."""
    config = Path(undisturbed.config.directory) / "config.yaml"
    for module, more in (("pretrain.aggregate", []), ("pretrain.train", ["--silo", "alpha"])):
        command = [sys.executable, "-m", module, "--config", str(config), *more, "gate.max_silo_rise=9"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 2
        assert "gate.max_silo_rise is 9.0 here and 0.2 there; change these keys, or name another store" in run.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"outer": {"sync_interval_steps": 4, "num_fragments": 2, "overlap_steps": 1, "codec": "int4"}},
        {"membership": {"quorum": 1, "deadline_floor_seconds": 60.0, "deadline_ceiling_seconds": 120.0}},
        {"silo": {"processes_per_node": 2, "micro_batch_sequences": 2}},
    ],
    ids=["streaming", "elastic", "ranks"],
)
def test_other_ways_to_train_are_judged_alike(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, changes: dict[str, Any]
) -> None:
    """Every version is judged by both silos and decided, and who is judged learns nothing by it."""
    gate = RULE | {"data": gate_data(tiny_text, "alpha", "beta"), "deadline_seconds": 120.0}
    run = federate(tiny_config(tmp_path / "gated", gate=gate, **changes))
    newest = len(decisions(run.config)) - 1
    assert newest >= 3
    for version in range(newest + 1):
        found = [result(run.config, silo, version).losses for silo in ("alpha", "beta")]
        assert [list(losses) for losses in found] == [["alpha"], ["beta"]]
    assert f"{newest + 1} decisions recomputed" in said_by("verify", run.config.directory)
    ungated = federate(tiny_config(tmp_path / "off", **changes))
    assert_same_bits(run.parameters(newest), ungated.parameters(newest))
