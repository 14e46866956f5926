"""A silo that runs knows what it has sent and which commits it has seen: a store that says anything else ends it."""

import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pretrain.aggregate import Aggregator, OuterState
from pretrain.config.keys import RunConfig
from pretrain.exchange.base import Outgoing
from pretrain.sync.delivered import Delivered
from pretrain.sync.through_store import ThroughStore
from pretrain.trust.ledger import Manifest, sha256_bytes
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.test_aggregate import GOOD, one_version, start, times
from tests.waiting import PATIENCE_SECONDS

Run = tuple[RunConfig, Aggregator, OuterState, ThroughStore]


@pytest.fixture
def run(tmp_path: Path, tiny_config: TinyConfig) -> Run:
    """A run at version 0, and its silo alpha, which has the contract."""
    config = tiny_config(tmp_path)
    aggregator, state = start(config)
    silo = ThroughStore(config, "alpha")
    silo._store.read_contract()
    return config, aggregator, state, silo


def coded(run: Run, factor: float, *, tokens: int = 100) -> Outgoing:
    """What alpha is about to deliver for the next version."""
    config, _, state, _ = run
    GOOD.deliver(config, "alpha", state, times(state, factor), tokens=tokens)
    folder = Path(config.store_url) / "silos" / "alpha" / f"{state.version + 1:06d}"
    outbox = Path(config.directory) / "out" / f"{state.version + 1:06d}.safetensors"
    outbox.parent.mkdir(exist_ok=True)
    shutil.move(next(folder.glob("*.safetensors")), outbox)
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").unlink()
    return Outgoing(manifest, outbox)


def version(run: Run) -> None:
    """The aggregator makes one of what is there."""
    _, aggregator, state, _ = run
    one_version(aggregator, state)


def forged(run: Run, manifest_sha256: str) -> str:
    config = run[0]
    return (
        f"exchange.url: {config.store_url} given; somebody else has delivered for version 1 as silo alpha: manifest "
        f"{manifest_sha256[:12]} is none of ours (see {config.silo_directory('alpha')}/delivered.txt); find out who "
        "writes to the store; if this run directory is an older copy, delete that file and start again"
    )


def test_a_delivery_that_was_forged_before_ours_is_seen(run: Run) -> None:
    config, _, state, silo = run
    ours = coded(run, 0.5)
    GOOD.deliver(config, "alpha", state, times(state, 2.0), tokens=10**6)
    manifest = (Path(config.store_url) / "silos" / "alpha" / "000001" / "manifest.json").read_bytes()
    assert one_line_error(silo.deliver, ours) == forged(run, sha256_bytes(manifest))


def test_a_delivery_that_was_forged_after_ours_and_merged_is_seen(run: Run) -> None:
    config, _, state, silo = run
    ours = coded(run, 0.5)
    silo.deliver(ours)
    shutil.rmtree(Path(config.store_url) / "silos" / "alpha" / "000001")
    for name in ("alpha", "beta"):
        GOOD.deliver(config, name, state, times(state, 2.0), tokens=10**6)
    version(run)
    manifest = (Path(config.store_url) / "silos" / "alpha" / "000001" / "manifest.json").read_bytes()
    assert one_line_error(silo.receive, 1, ours, state.parameters) == forged(run, sha256_bytes(manifest))


def test_what_was_delivered_before_a_restart_stands(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    config, _, state, silo = run
    silo.deliver(coded(run, 0.5))
    folder = Path(config.store_url) / "silos" / "alpha" / "000001"
    shutil.copytree(folder, kept := Path(config.directory) / "kept")
    anew = coded(run, 0.25, tokens=200)  # of kernels that are not deterministic
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    again = ThroughStore(config, "alpha")
    again._store.read_contract()
    again.deliver(anew)
    assert "differs from the one delivered before the restart" in capsys.readouterr().out
    GOOD.deliver(config, "beta", state, times(state, 1.0))
    before = {name: value.clone() for name, value in state.parameters.items()}
    version(run)
    assert again.receive(1, anew, before).commit.version == 1


def test_a_run_directory_that_lost_its_note_judges_what_comes_later(tmp_path: Path) -> None:
    file = tmp_path / "delivered.txt"
    delivered = Delivered(file)
    delivered.begin(3)
    delivered.add(3, "ab")
    with file.open("a") as opened:
        opened.write("000004 cd\x00 half a li")  # killed
    again = Delivered(file)
    again.begin(9)  # has begun already
    again.add(5, "ef")
    for known in (again, Delivered(file)):
        assert [known.may_be_ours(*row) for row in ((2, "x"), (3, "ab"), (3, "x"), (4, "cd"), (5, "ef"))] == [
            *(True, True, False, False, True)
        ]


def test_commits_that_do_not_fit_what_was_seen(run: Run) -> None:
    config, aggregator, state, silo = run
    base = {name: value.clone() for name, value in state.parameters.items()}
    folders = [Path(config.store_url) / "global" / f"{number:06d}" for number in range(3)]
    for name in config.full_roster:
        GOOD.deliver(config, name, state, times(state, 1.0))
    silo._delivered.begin(9)  # whose deliveries these are is not asked here
    version(run)
    silo.receive(1, None, base)
    for number in (1, 2):  # somebody writes another history, chained as it should be
        commit = aggregator._exchange.read_commit(1)
        previous = sha256_bytes((folders[number - 1] / "commit.json").read_bytes())
        changed = commit.__class__(**commit.__dict__ | {"divisor": 7, "version": number, "previous": previous})
        folders[number].mkdir(exist_ok=True)
        (folders[number] / "commit.json").write_bytes(changed.to_bytes())
    for number in (1, 2):
        assert one_line_error(silo.receive, number, None, base) == (
            f"exchange.url: {config.store_url} given; its commit {number} does not fit the commits that silo alpha has "
            "seen: somebody has changed them, or put another copy there; restore the one that was there"
        )


def test_an_old_copy_put_under_a_silo_that_waits_ends_it(run: Run) -> None:
    config, _, state, silo = run
    base = {name: value.clone() for name, value in state.parameters.items()}
    shutil.copytree(config.store_url, old := Path(config.directory) / "old")
    for name in config.full_roster:
        GOOD.deliver(config, name, state, times(state, 1.0))
    silo._delivered.begin(9)
    version(run)
    silo.receive(1, None, base)
    shutil.rmtree(config.store_url)
    shutil.copytree(old, config.store_url)
    message = one_line_error(silo.wait_for, 2)
    assert message.startswith(
        f"exchange.url: {config.store_url} given, whose newest version is 0; silo alpha holds version 1"
    )


def test_a_damaged_version_is_waited_for_until_it_is_repaired(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    config, aggregator, state, silo = run
    base = {name: value.clone() for name, value in state.parameters.items()}
    for name in config.full_roster:
        GOOD.deliver(config, name, state, times(state, 0.5))
    silo._delivered.begin(9)
    version(run)
    file = Path(config.store_url) / "global" / "000001" / "parameter-000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(aggregator.collect, state)
        try:
            received = silo.receive(1, None, base)
        finally:  # or the aggregator would wait for ever
            for name in config.full_roster:
                GOOD.deliver(config, name, state, times(state, 0.5))
        waiting.result(PATIENCE_SECONDS)
    for name, value in state.parameters.items():
        assert torch.equal(received.values[name], value)
    out = capsys.readouterr().out
    assert "corrupted; asking the aggregator for 6 s to repair it\n" in out
    assert "corrupted; it was published again\n" in out


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_bytes": 3 << 30}, "its payload has 3221225472 bytes; allowed: "),
        ({"codec": "zip\x1b"}, r"its codec is zip\x1b, not fp32"),
    ],
)
def test_a_commit_that_is_larger_than_the_model_is_not_fetched(
    change: dict[str, object], expected: str, run: Run
) -> None:
    config, aggregator, state, silo = run
    base = {name: value.clone() for name, value in state.parameters.items()}
    for name in config.full_roster:
        GOOD.deliver(config, name, state, times(state, 1.0))
    silo._delivered.begin(9)
    version(run)
    commit = aggregator._exchange.read_commit(1)
    (payload,) = commit.payloads
    if "num_bytes" in change:
        change = {"payloads": [dataclasses.replace(payload, **change)]}
    file = Path(config.store_url) / "global" / "000001" / "commit.json"
    file.write_bytes(dataclasses.replace(commit, **change).to_bytes())
    message = one_line_error(silo.receive, 1, None, base)
    assert message.startswith(f"silo alpha: version 1 in the store cannot be used: {expected}")
