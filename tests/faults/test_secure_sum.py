"""A launch whose aggregator learns sums alone, killed at every phase of one: the bits of one that was not."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.show.report import summarize
from pretrain.config.keys import RunConfig
from pretrain.trust.member import member_budget
from tests.conftest import TinyConfig
from tests.distributed.federation import federate
from tests.faults.scripted import Faults, federate_with
from tests.faults.test_kills import check_same
from tests.support import CORPORA, TinyText, tiny_silo
from tests.unit.federation.test_verify import verified
from tests.unit.test_member import KEPT, OUTER
from tests.unit.test_secure_sum import SECURE, TIERS

DEATHS: dict[str, Faults] = {
    "one of each": {"beta": [("answered", 1)], "aggregator": [("after_survivors", 1)]},
    "every phase": {
        "alpha": [("before_shares", 1), ("answering", 2)],
        "beta": [("before_manifest", 1), ("answered", 1), ("after_manifest", 3)],
        "aggregator": [("before_survivors", 1), ("after_survivors", 2), ("before_merge", 2), ("before_commit", 3)],
    },
}
STREAMING = {"num_fragments": 2, "overlap_steps": 1}
NOISED = OUTER | STREAMING


def make_config(tiny_config: TinyConfig, tiny_text: TinyText, directory: Path, **outer: Any) -> RunConfig:
    silos = {name: tiny_silo(tiny_text, name) for name in CORPORA}
    return tiny_config(
        directory,
        silos=silos,
        outer=SECURE | outer,
        trust={"metrics": KEPT if "member_privacy" in outer else TIERS},
        inner={"num_steps": 8},
        silo={"checkpoint_interval_steps": 3, "eval_interval_rounds": 0},
    )


@pytest.mark.parametrize("deaths", ["one of each", pytest.param("every phase", marks=pytest.mark.soak)])
def test_killed_in_a_sum_equals_undisturbed(
    deaths: str, tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    outer = STREAMING if deaths == "every phase" else {}
    undisturbed = federate(make_config(tiny_config, tiny_text, tmp_path / "undisturbed", **outer))
    config = make_config(tiny_config, tiny_text, tmp_path / "killed", **outer)
    run = federate_with(DEATHS[deaths], config, tmp_path / "fired", max_restarts=20)
    check_same(run, undisturbed)
    store, other = Path(run.config.store_url), Path(undisturbed.config.store_url)
    patterns = ("sums/*", "silos/*/*/shares.json", "silos/*/*/answer.json")
    files = [file for pattern in patterns for file in store.glob(pattern)]
    assert len(files) == (1 + 2 * 3) * run.config.schedule.num_versions
    for file in files:
        assert file.read_bytes() == (other / file.relative_to(store)).read_bytes(), file
    assert not verified(run.config, tmp_path / "scratch").findings


@pytest.mark.soak
def test_killed_with_noise_equals_undisturbed(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> None:
    undisturbed = federate(make_config(tiny_config, tiny_text, tmp_path / "undisturbed", **NOISED))
    config = make_config(tiny_config, tiny_text, tmp_path / "killed", **NOISED)
    for silo in CORPORA:  # of whose secrets the noise is
        there, here = (one.silo_directory(silo) / "private" for one in (undisturbed.config, config))
        shutil.copytree(there, here)
    run = federate_with(DEATHS["every phase"], config, tmp_path / "fired", max_restarts=20)
    check_same(run, undisturbed)
    budget = member_budget(config)
    assert budget
    spent = budget.epsilon(config.schedule.num_versions)
    assert summarize(config)["member_epsilon"] == spent
    assert f"{spent:.3g}</" in (Path(config.directory) / "report.html").read_text()
    assert not verified(run.config, tmp_path / "scratch").findings
