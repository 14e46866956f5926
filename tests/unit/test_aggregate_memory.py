"""An aggregator that runs knows what it has committed: a store that says anything else ends it, or is put right."""

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain.config.keys import RunConfig
from pretrain.exchange.store import StoreExchange
from pretrain.outer.state import OuterState
from pretrain.trust.ledger import Commit
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.test_aggregate import GOOD, Hand, one_version, put_payload, sha256, start, times, wait_for_refusal
from tests.waiting import PATIENCE_SECONDS, wait_for


@pytest.fixture
def config(tiny_config: TinyConfig, tmp_path: Path) -> RunConfig:
    return tiny_config(tmp_path, exchange={"snapshot_versions": 1})


def commit_file(config: RunConfig, version: int) -> Path:
    return Path(config.store_url) / "global" / f"{version:06d}" / "commit.json"


def deliver_all(config: RunConfig, state: OuterState) -> None:
    for silo in config.full_roster:
        GOOD.deliver(config, silo, state, times(state, 1))


def test_it_does_not_chain_to_another_commit_than_its_own(config: RunConfig) -> None:
    aggregator, state = start(config)
    file = commit_file(config, 0)
    held, found = file.read_bytes(), file.read_bytes().replace(b'"divisor": 0', b'"divisor": 1')
    deliver_all(config, state)
    file.write_bytes(found)
    deliveries = aggregator._collector.collect(
        1, lambda silo, data, _, over: aggregator._merger.verify(silo, data, state, 1)
    )
    merged = aggregator.merge(state, deliveries)
    assert one_line_error(aggregator.commit, state, deliveries, merged) == (
        f"exchange.url: {config.store_url} given, whose version 0 has commit {sha256(found)[:12]}; this aggregator "
        f"holds that version with commit {sha256(held)[:12]}: somebody has changed it, or put another copy there; "
        f"restore the copy that has {sha256(held)[:12]}"
    )
    assert not commit_file(config, 1).exists()


def test_an_old_copy_put_under_it_while_it_waits_ends_it(config: RunConfig, tmp_path: Path) -> None:
    aggregator, state = start(config)
    shutil.copytree(config.store_url, tmp_path / "old")
    deliver_all(config, state)
    one_version(aggregator, state)
    held = sha256(commit_file(config, 1).read_bytes())
    shutil.rmtree(config.store_url)
    shutil.copytree(tmp_path / "old", config.store_url)
    assert one_line_error(aggregator.collect, state) == (
        f"exchange.url: {config.store_url} given, whose newest version is 0; this aggregator holds version 1 with "
        f"commit {held[:12]}, which is not there: an old copy was restored, or it is another run; restore the newer "
        "copy, or name another run directory"
    )


def test_a_version_of_somebody_else_is_one_line(config: RunConfig) -> None:
    aggregator, state = start(config)
    deliver_all(config, state)
    deliveries = aggregator.collect(state)
    merged = aggregator.merge(state, deliveries)
    commit_file(config, 1).parent.mkdir()
    commit_file(config, 1).write_text("{}")
    assert one_line_error(aggregator.commit, state, deliveries, merged) == (
        f"exchange.url: {config.store_url} given; version 1 is there already, and this aggregator has not made it: "
        "somebody else writes to this store; find out who, take global/000001 away and start again"
    )


def test_what_is_damaged_while_it_runs_is_published_again(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    aggregator, state = start(config)
    deliver_all(config, state)
    one_version(aggregator, state)
    store = StoreExchange(config.store_url)
    store.read_contract()
    files = sorted(commit_file(config, 1).parent.glob("*.safetensors"))
    before = {file: file.read_bytes() for file in files}
    assert len(before) == 2  # parameters and velocity
    files[0].write_bytes(before[files[0]][:-1] + b"\x7f")
    files[1].unlink()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(aggregator.collect, state)
        store.say_damaged("beta", 1, "it is corrupted")
        wait_for(lambda: not (Path(config.store_url) / "damaged" / "000001" / "beta").exists())
        deliver_all(config, state)
        waiting.result(PATIENCE_SECONDS)
    assert {file: file.read_bytes() for file in files} == before
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("it was published again")]
    assert [line.split(": ")[0] for line in lines] == ["version 1", "version 1"]


def test_what_is_damaged_when_it_starts_is_published_again(config: RunConfig) -> None:
    aggregator, state = start(config)
    deliver_all(config, state)
    one_version(aggregator, state)
    file = next(commit_file(config, 1).parent.glob("velocity-*.safetensors"))
    before = file.read_bytes()
    file.write_bytes(before[:-1] + b"\x7f")
    names = sorted(state.parameters)
    assert start(config)[1].kept_digest(names) == state.kept_digest(names)
    assert file.read_bytes() == before


def test_a_damaged_note_of_its_own_is_one_line(config: RunConfig) -> None:
    start(config)
    file = Path(config.directory) / "aggregator" / "newest.json"
    for damaged in (b"[", b"{}", b"\xff", b"[]"):
        file.write_bytes(damaged)
        assert one_line_error(start, config).startswith(f"run directory: '{file}' is damaged, which says what was ")


# ---- deliveries


@pytest.mark.parametrize("num_bytes", [3 << 30, 1 << 52])
def test_a_payload_that_is_too_large_for_the_model_is_not_fetched(num_bytes: int, config: RunConfig) -> None:
    aggregator, state = start(config)
    GOOD.deliver(config, "beta", state, times(state, 1))

    def grow(folder: Path) -> None:
        with (folder / "000001.safetensors").open("r+b") as file:
            file.truncate(3 << 30)  # of which a disk holds nothing

    Hand(manifest=put_payload(num_bytes=num_bytes), folder=grow).deliver(config, "alpha", state, times(state, 1))
    folder = Path(config.store_url) / "silos" / "alpha" / "000001"
    thread = threading.Thread(target=aggregator.collect, args=(state,), daemon=True)
    thread.start()
    wait_for_refusal(folder, thread)
    reason = json.loads((folder / "refused-0.json").read_text())["reason"]
    size = 4 * sum(value.numel() for value in state.parameters.values())
    assert reason == f"its payload has {num_bytes} bytes; allowed: {size} and names"
    GOOD.deliver(config, "alpha", state, times(state, 1))
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()


def test_commits_have_one_form(config: RunConfig) -> None:
    start(config)
    file = commit_file(config, 0)
    assert Commit.from_bytes(file.read_bytes()).to_bytes() == file.read_bytes()
    file.write_bytes(file.read_bytes() + b" " * 1000)
    (Path(config.directory) / "aggregator" / "newest.json").unlink()
    with pytest.raises(Exception, match=r"^commit 0 is not in the one form that a commit has$"):
        start(config)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", ["pipe", "folder", "link", "huge"])
def test_no_manifest_of_one_silo_holds_up_the_others(what: str, tiny_config: TinyConfig, tmp_path: Path) -> None:
    rules = {"quorum": 1, "deadline_floor_seconds": 0.1, "deadline_ceiling_seconds": 0.1}
    config = tiny_config(tmp_path, membership=rules)
    aggregator, state = start(config)
    file = Path(config.store_url) / "silos" / "beta" / "000001" / "manifest.json"
    file.parent.mkdir(parents=True)
    (tmp_path / "private").write_text("secret")
    make = {
        "pipe": lambda: os.mkfifo(file),
        "folder": file.mkdir,
        "link": lambda: file.symlink_to(tmp_path / "private"),
        "huge": lambda: file.write_bytes(bytes(5 << 20)),
    }
    make[what]()
    (file.parents[1] / "membership").mkdir()
    (file.parents[1] / "membership" / "000000.json").write_bytes(b"[1e999")
    GOOD.deliver(config, "alpha", state, times(state, 1))
    one_version(aggregator, state)
    assert [row["silo"] for row in json.loads(commit_file(config, 1).read_bytes())["contributors"]] == ["alpha"]
    assert (tmp_path / "private").read_text() == "secret"


def test_a_delivery_of_another_run_of_the_same_terms_is_refused(tiny_config: TinyConfig, tmp_path: Path) -> None:
    rules = {"quorum": 1, "deadline_floor_seconds": 0.1, "deadline_ceiling_seconds": 0.1}
    first, second = (tiny_config(tmp_path / name, membership=rules, run_id="") for name in ("first", "second"))
    (_, state), (aggregator, again) = start(first), start(second)
    GOOD.deliver(first, "beta", state, times(state, 2.0))
    folder = Path("silos") / "beta" / "000001"
    shutil.copytree(Path(first.store_url) / folder, Path(second.store_url) / folder)
    GOOD.deliver(second, "alpha", again, times(again, 1.0))
    one_version(aggregator, again)
    assert [row["silo"] for row in json.loads(commit_file(second, 1).read_bytes())["contributors"]] == ["alpha"]
    contracts = [json.loads((Path(run.store_url) / "contract.json").read_bytes()) for run in (first, second)]
    assert len({contract.pop("run_id") for contract in contracts}) == 2
    assert contracts[0] == contracts[1]
    reason = json.loads((Path(second.store_url) / folder / "refused-0.json").read_bytes())["reason"]
    assert reason.startswith("its contract_sha256 is ")
    start(first)  # a configuration without an id goes on with the one that was drawn
    other = tiny_config(tmp_path / "first", membership=rules, run_id="x")
    assert 'it holds a run with another contract: run_id is "x" here and ' in one_line_error(start, other)
