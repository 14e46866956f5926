"""Who can write to a signed store moves, copies, removes and floods: the real parties name it, and go on."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain.aggregate import Aggregator, OuterState
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.agreement import not_signed, sign_contract
from pretrain.exchange.lease import Lease
from pretrain.exchange.rollback import read_rollbacks
from pretrain.exchange.words import Membership
from pretrain.sync.through_store import ThroughStore
from pretrain.trust.ledger import RECORD_BYTES, RefusedError
from tests.support import one_line_error
from tests.unit.test_aggregate import one_version, start
from tests.unit.test_aggregate_restart import assert_same_state
from tests.unit.test_signed import as_member, begin, deliver, manifest_file
from tests.waiting import PATIENCE_SECONDS, wait_for

Said = Callable[[], str]
Run = tuple[Aggregator, OuterState]


@pytest.fixture
def config(signed_config: RunConfig) -> RunConfig:
    return signed_config


def version(config: RunConfig, run: Run) -> None:
    """One version of all silos."""
    aggregator, state = run
    for silo in config.full_roster:
        deliver(config, state, silo)
    one_version(aggregator, state)


def other_run(config: RunConfig, directory: Path) -> tuple[RunConfig, Run]:
    """Of the same terms, members and keys; version 1 is made."""
    trust = dataclasses.replace(config.trust, directory=str(Path(config.directory) / "keys"))
    other = dataclasses.replace(config, run_id="other", directory=str(directory), trust=trust)
    run = begin(other)
    version(other, run)
    return other, run


@pytest.mark.parametrize("what", ["an old round", "another run", "another silo"])
def test_a_delivery_from_another_place_counts_as_none(what: str, config: RunConfig, tmp_path: Path, said: Said) -> None:
    """Signed by alpha, or by beta, as it is; alpha's own comes in its place, and no try of alpha's is used up."""
    run = begin(config)
    aggregator, state = run
    version(config, run)
    if what == "another run":
        other, elsewhere = other_run(config, tmp_path / "other")
        deliver(other, elsewhere[1], "alpha")
        source = manifest_file(other, "alpha", 2).parent
    else:
        source = manifest_file(config, "beta" if what == "another silo" else "alpha", 1).parent
    target = manifest_file(config, "alpha", 2).parent
    shutil.copytree(source, target)
    deliver(config, state, "beta")
    alpha = as_member(config, "alpha")
    assert not alpha.is_delivered("alpha", 2)
    with ThreadPoolExecutor(1) as pool:
        collecting = pool.submit(aggregator.collect, state)
        wait_for(lambda: "silos/alpha/000002/manifest.json is passed over: " in said())
        shutil.rmtree(target)
        deliver(config, state, "alpha")
        deliveries = collecting.result(PATIENCE_SECONDS)
    assert [delivery.manifest.silo for delivery in deliveries] == ["alpha", "beta"]
    assert alpha.refusals("alpha", 2) == []


@pytest.mark.parametrize("what", ["an older version", "another run"])
def test_a_commit_from_another_place_is_none(what: str, config: RunConfig, tmp_path: Path, said: Said) -> None:
    """Signed by the operator, as it is: silos wait for the true one, and the aggregator puts that in its place."""
    run = begin(config)
    source = Path(config.store_url) / "global" / "000000"
    if what == "another run":
        source = Path(other_run(config, tmp_path / "other")[0].store_url) / "global" / "000001"
    shutil.copytree(source, Path(config.store_url) / "global" / "000001")
    alpha = as_member(config, "alpha")
    assert (alpha.newest_version(), alpha.newest_version(0)) == (0, 0)
    assert "global/000001/commit.json is passed over: it is of version" in said()
    version(config, run)
    assert alpha.newest_version(0) == 1
    assert alpha.read_commit(1).parameters_digest == run[1].parameters_digest


def test_a_contract_that_was_changed_before_a_member_joins(config: RunConfig) -> None:
    """Beta names the key that differs and signs nothing; with the true one it takes part."""
    begin(config)
    file = Path(config.store_url) / "contract.json"
    whole = file.read_bytes()
    (file.parent / "signatures" / "beta.json").unlink()
    for key, value in (("num_versions", 7), ("outer", {"lr": 9.0}), ("run_id", "other")):
        terms = json.loads(whole)
        terms[key] = terms[key] | value if isinstance(value, dict) else value
        file.write_text(json.dumps(terms))
        silo = ThroughStore(config, "beta")
        line = one_line_error(silo.join)
        assert f"{key}.lr is" in line or f"{key} is" in line
        assert not (file.parent / "signatures" / "beta.json").exists()
        silo.close("failed")
    file.write_bytes(whole)
    config.silo_directory("beta").mkdir(parents=True)
    silo = ThroughStore(config, "beta")
    silo.join()
    assert silo._store.has_name("beta", silo._store.holder("beta"))
    silo.close("")


def test_a_commit_that_was_removed_is_missed_by_its_number(config: RunConfig, tmp_path: Path) -> None:
    """Nobody makes another one in its place; put back, the run goes on."""
    run = begin(config)
    for _ in range(3):
        version(config, run)
    run[0].snapshots.finish()
    folder = Path(config.store_url) / "global" / "000002"
    whole = (folder / "commit.json").read_bytes()
    (folder / "commit.json").unlink()
    with pytest.raises(RefusedError, match=r"^commit 2 is missing: "):
        start(config)
    folder.rename(tmp_path / "away")  # as if its tensors were pruned, too
    assert one_line_error(start, config) == (
        f"exchange.url: {config.store_url} given; version 2 is missing there, and the newest that this aggregator has "
        "made is 3; restore global/000002/commit.json"
    )
    (tmp_path / "away").rename(folder)
    (folder / "commit.json").write_bytes(whole)
    assert_same_state(start(config)[1], run[1])


def test_any_number_of_forged_objects(config: RunConfig) -> None:
    """Terms of the lease, signs of life, words, refusals, marks, snapshots: hundreds of each, and the run goes on."""
    run, store = begin(config), Path(config.store_url)
    names = {
        "aggregator/{:06d}.json": range(1, 200),
        "aggregator/{:06d}.ended": range(1, 200),
        "aggregator/000200.beat-{:06d}": range(200),
        "silos/alpha/membership/{:06d}.json": range(200),
        "silos/alpha/000001/refused-{}.json": range(200),
        "silos/alpha/resumable/{:06d}": range(200),
        "silos/alpha/beats/{:06d}": range(200),
        "snapshots/{:06d}.json": range(1, 200),
        "rollbacks/{:06d}.json": range(1, 200),
        "global/{:06d}/commit.json": range(1, 200),
    }
    for name, numbers in names.items():
        for number in numbers:
            file = store / name.format(number)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"{}")
    lease = Lease(as_member(config, OPERATOR), seconds=60)
    alpha = as_member(config, "alpha")
    alpha.announce("alpha", left=False, version=0)
    alpha.mark_resumable("alpha", 0)
    version(config, run)
    lease.check()
    lease.release()
    assert (store / "aggregator" / "000200.ended").is_file()
    operator = as_member(config, OPERATOR)
    assert operator.membership("alpha") == Membership(left=False, version=0)
    assert (operator.newest_version(0), operator.resumable("alpha"), operator.refusals("alpha", 1)) == (1, 0, [])


def test_what_is_longer_than_any_record_counts_as_none(config: RunConfig, said: Said) -> None:
    """Under every name that is read next, the signature of alpha among them."""
    aggregator, state = begin(config)
    store, long = Path(config.store_url), bytes(RECORD_BYTES + 1)
    names = ["amendments/000001.json", "amendments/000001.accepted", "rollbacks/000001.json", "snapshots/000001.json"]
    names += ["global/000001/commit.json", "silos/alpha/000001/manifest.json", "signatures/alpha.json"]
    for name in names:
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(long)
    alpha = as_member(config, "alpha")
    assert not_signed(alpha) == ["alpha"]
    sign_contract(alpha, "alpha")
    assert not_signed(alpha) == []
    assert not alpha.is_delivered("alpha", 1)
    manifest_file(config, "alpha", 1).unlink()
    for silo in config.full_roster:
        deliver(config, state, silo)
    one_version(aggregator, state)
    assert alpha.newest_version() == state.version == 1
    assert read_rollbacks(alpha) == []
    lines = said()
    for name in {*names} - {"amendments/000001.accepted"}:  # which nobody reads then
        assert f"{name} is passed over: {name} has more than the " in lines
