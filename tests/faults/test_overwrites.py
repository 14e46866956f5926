"""Whoever comes with nothing, or with something old, cannot overwrite a run: silo, aggregator, backup of a store."""

import shutil
from pathlib import Path

import pytest

from pretrain.config.keys import RunConfig
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome
from tests.distributed.guests import Guest, started
from tests.faults.scripted import with_faults
from tests.faults.test_full_disk import only
from tests.faults.test_kills import check_same, make_config
from tests.waiting import PATIENCE_SECONDS


def content(store: Path) -> dict[str, bytes]:
    """All objects but leases and signs of life, which whoever looks at a store leaves and takes back."""
    found = {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith("aggregator/") and "/beats/" not in name}


def refused(config: RunConfig, name: str) -> str:
    """Start a process that must end in one line and exit code 2; returns the line."""
    process = Guest(config, name)
    process.start()
    said = process.wait(120, code=2)
    *_, line = [line for line in said.splitlines() if line.startswith("atoll: ")]
    return line


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_nothing_is_overwritten(undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig) -> None:
    store, backup, url = tmp_path / "store", tmp_path / "backup", {"url": str(tmp_path / "store")}

    def institution(name: str, silo: str) -> RunConfig:
        return only(make_config(tiny_config, tmp_path / name, url), silo)

    alpha, beta = institution("alpha", "alpha"), institution("beta", "beta")
    elsewhere = institution("elsewhere", "alpha")
    dying = with_faults({"aggregator": [("before_commit", 2)]}, tmp_path / "fired")
    with Guest(alpha, "aggregator", dying) as first, Guest(elsewhere, "aggregator") as second:
        first.start()
        with started(Guest(alpha, "alpha"), Guest(beta, "beta"), seconds=120):
            first.wait(120, code=-9)
            shutil.copytree(store, backup)
            second.start()  # with an empty disk
        second.wait(PATIENCE_SECONDS)
    check_same(Outcome(config=alpha), undisturbed)
    check_same(Outcome(config=beta), undisturbed)

    # A silo with an empty disk, and version 0 at most.
    before = content(store)
    line = refused(institution("fresh", "beta"), "beta")
    assert "'beta' given; another run directory takes part under this name" in line
    assert content(store) == before

    # An old backup of the store: neither the aggregator that went on from it nor a silo takes it for the run.
    shutil.rmtree(store)
    shutil.copytree(backup, store)
    before = content(store)
    for config, name, who in ((elsewhere, "aggregator", "this aggregator"), (beta, "beta", "silo beta's checkpoint")):
        line = refused(config, name)
        assert line.startswith(f"atoll: exchange.url: {store} given, whose newest version is 1; {who} holds version 3 ")
        assert line.endswith("restore the newer copy, or name another run directory")
        assert content(store) == before

    # No store at all, where there was one: the aggregator does not begin anew.
    shutil.rmtree(store)
    line = refused(elsewhere, "aggregator")
    assert line.startswith(f"atoll: exchange.url: {store} given, whose newest version is -1; this aggregator holds ")
    assert content(store) == {}
