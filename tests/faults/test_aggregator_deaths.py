"""The aggregator dies once at every point of its loop; paused and slow processes change nothing; NaN never leaves."""

from pathlib import Path

import pytest

from pretrain.config.keys import RunConfig
from pretrain.exchange.store import StoreExchange
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, federate, launched
from tests.faults.scripted import AGGREGATOR_POINTS, Faults, check_struck, federate_with, with_faults
from tests.faults.test_kills import check_same

NUM_VERSIONS = 6
pytestmark = pytest.mark.soak


def make_config(tiny_config: TinyConfig, directory: Path) -> RunConfig:
    """Six versions, so that old ones are pruned, with a target and a velocity beside 3 and 6."""
    return tiny_config(
        directory,
        inner={"num_steps": 4 * NUM_VERSIONS},
        outer={"optimizer": "nesterov", "downlink_codec": "bf16"},
        silo={"checkpoint_interval_steps": 3},
        exchange={"snapshot_versions": 3},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> Outcome:
    """The run that nothing happens to."""
    return federate(make_config(tiny_config, tmp_path_factory.mktemp("undisturbed")))


# In the order in which they strike. The numbers of before_merge and after_merge are those of the version before. At
# commit 4 version 3 is a snapshot of which all is made that is kept: 0 to 2 are pruned, and at commit 5 what is left.
DEATHS: Faults = {
    "aggregator": [
        ("starting", 0),
        ("contract_read", 0),
        ("before_contract", 0),
        ("after_contract", 0),
        ("lease_taken", 0),
        ("signing", 0),
        ("agreed", 0),
        ("before_upload", 0),
        ("mid_publish", 0),
        ("before_commit", 0),
        ("after_commit", 0),
        ("version_read", 0),
        ("version_loaded", 0),
        ("collecting", 0),
        ("reading_delivery", 1),
        ("delivery_read", 1),
        ("verified", 1),
        ("before_merge", 0),
        ("after_commit", 1),
        ("replaying", 1),
        ("noted", 2),
        ("before_refusal", 2),
        ("merging", 2),
        ("after_merge", 1),
        ("uploading", 3),
        ("velocity_uploaded", 3),
        ("target_uploaded", 3),
        ("before_snapshot", 3),
        ("before_pruning", 3),
        ("committing", 4),
        ("delivery_pruned", 1),
        ("pruning", 2),
        ("after_pruning", 6),
        ("releasing", 0),
        ("finishing", 0),
    ],
    "beta": [("corrupt_payload", 2)],  # for the aggregator to refuse
}


@pytest.mark.timeout(600)
def test_killed_at_every_point_of_its_loop_and_restarted(
    undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    assert {point for point, _ in DEATHS["aggregator"]} == set(AGGREGATOR_POINTS)
    config, num_deaths = make_config(tiny_config, tmp_path), len(DEATHS["aggregator"])
    run = federate_with(DEATHS, config, tmp_path / "fired", max_restarts=num_deaths)
    log = (Path(run.config.directory) / "logs" / "latest" / "aggregator.log").read_text()
    assert log.count("\n--- start ") == num_deaths
    check_same(run, undisturbed)
    assert StoreExchange(run.config.store_url).objects.names("global") == [f"{v:06d}" for v in range(NUM_VERSIONS + 1)]


def test_paused_and_slow_processes_change_nothing(
    undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    faults: Faults = {
        "alpha": [("step", 5, 0, "pause", 3.0)],
        "beta": [("step", 10, 0, "slow", 0.2)],
        "aggregator": [("verified", 1, 0, "pause", 1.0), ("before_merge", 3, 0, "slow", 0.5)],
    }
    run = federate_with(faults, make_config(tiny_config, tmp_path), tmp_path / "fired")
    alpha, beta = run.by_step("alpha", "time"), run.by_step("beta", "time")
    assert alpha[6] - alpha[5] > 2.9
    assert beta[24] - beta[10] > 14 * 0.2
    check_same(run, undisturbed)


def test_what_is_not_finite_never_leaves_a_silo(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config, faults = make_config(tiny_config, tmp_path), {"beta": [("sending", 2, 0, "nan")]}
    code, said = launched(config, build_commands=with_faults(faults, tmp_path / "fired"))
    assert code == 2
    check_struck(faults, tmp_path / "fired")
    assert "error: beta: silo beta: version 2: " in said
    assert "infinite or NaN given; allowed: finite values; nothing was sent" in said
    store = StoreExchange(config.store_url)
    assert store.newest_version() == 1
    assert store.delivery("beta", 2) is None
