"""Starting the aggregator on a store that is there: go on, or say in one line why not."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from pretrain import aggregate as module
from pretrain.aggregate import OuterState, aggregate
from pretrain.config.keys import RunConfig
from pretrain.exchange.store import StoreExchange
from pretrain.host.journal import Journal
from pretrain.outer.digest import digest_tensors
from pretrain.trust.ledger import RefusedError
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.test_aggregate import GOOD, OUTER, ROUNDS, one_version, plus_noise, sha256, start


@pytest.fixture
def config(tmp_path: Path, tiny_config: TinyConfig) -> RunConfig:
    return tiny_config(tmp_path, inner=ROUNDS, outer=OUTER)


CODED = {"codec": "int8", "downlink_codec": "int4", "num_fragments": 3}
STREAMS = {
    "one fragment": OUTER | {"num_fragments": 1},
    "two fragments, sgd": {"optimizer": "sgd", "lr": 0.7, "num_fragments": 2},
    "three coded fragments": OUTER | CODED,
    "two sparse fragments, sgd": {"optimizer": "sgd", "lr": 1.0, "codec": "topk", "num_fragments": 2}
    | {"downlink_codec": "topk"},
}


def deliver_all(config: RunConfig, state: OuterState) -> None:
    for index, silo in enumerate(("alpha", "beta")):
        GOOD.deliver(config, silo, state, plus_noise(state, seed=index), tokens=3 + index)


def two_versions(config: RunConfig) -> tuple[Path, OuterState]:
    """A run of two versions, found by an aggregator that has not made them; returns its store and state."""
    aggregator, state = start(config)
    for _ in range(2):
        deliver_all(config, state)
        one_version(aggregator, state)
    newest_file(config).unlink()
    return Path(config.store_url), state


def newest_file(config: RunConfig) -> Path:
    """What an aggregator notes of its newest commit."""
    return Path(config.directory) / "aggregator" / "newest.json"


def assert_same_state(found: OuterState, expected: OuterState) -> None:
    assert found.version == expected.version
    for kind in ("parameters", "target"):
        assert digest_tensors(getattr(found, kind).items()) == digest_tensors(getattr(expected, kind).items()), kind
    names = sorted(expected.parameters)
    assert found.kept_digest(names) == expected.kept_digest(names)
    assert found.rows == expected.rows
    assert (found.target is found.parameters) == (expected.target is expected.parameters)


def test_restart_writes_nothing_and_ends_when_all_is_done(config: RunConfig) -> None:
    aggregator, state = start(config)
    while state.version < config.schedule.num_versions:
        deliver_all(config, state)
        one_version(aggregator, state)
    store = Path(config.store_url)
    before = sorted((str(p), p.stat().st_mtime_ns) for p in store.rglob("*"))
    _, again = start(config)
    assert_same_state(again, state)
    assert sorted((str(p), p.stat().st_mtime_ns) for p in store.rglob("*")) == before
    aggregate(config, Journal(config, "aggregator", silo=None))  # has nothing left to do, and returns


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("stream", STREAMS)
def test_a_restart_at_every_version_is_the_uninterrupted_state(
    stream: str, pruned: bool, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    exchange = {"keep_versions": 1, "snapshot_versions": 1 if pruned else None}
    config = tiny_config(tmp_path, inner=ROUNDS, outer=STREAMS[stream], exchange=exchange)
    aggregator, state = start(config)
    store = StoreExchange(config.store_url)
    for version in range(1, config.schedule.num_versions + 1):
        assert_same_state(start(config)[1], state)
        deliver_all(config, state)
        for silo in ("alpha", "beta") if pruned else ():
            store.mark_resumable(silo, version - 1)  # a checkpoint after every version
        one_version(aggregator, state)
    assert_same_state(start(config)[1], state)
    with_tensors = {int(file.parent.name) for file in Path(config.store_url, "global").rglob("*.safetensors")}
    first_kept = version - config.outer.num_fragments if pruned else 0
    assert with_tensors == set(range(first_kept, version + 1))


@pytest.mark.parametrize("stream", STREAMS)
def test_killed_again_and_again_it_comes_to_the_same_ledger(
    stream: str, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    ledgers = []
    for name in ("whole", "restarted"):
        # The same run at two places: the contract holds no directory.
        config = tiny_config(tmp_path / name, inner=ROUNDS, outer=STREAMS[stream])
        aggregator, state = start(config)
        while state.version < config.schedule.num_versions:
            deliver_all(config, state)
            if name == "restarted":
                aggregator.merge(state, aggregator.collect(state))  # verified and merged, and killed before the commit
                aggregator, state = start(config)
            one_version(aggregator, state)
            if name == "restarted":
                aggregator, state = start(config)
        files = sorted(Path(config.store_url, "global").rglob("*"))
        ledgers.append([(file.parent.name, file.name, file.read_bytes()) for file in files if file.is_file()])
    assert ledgers[0] == ledgers[1]
    assert sum(name == "commit.json" for _, name, _ in ledgers[0]) == config.schedule.num_versions + 1


def test_a_version_without_commit_is_made_again(config: RunConfig) -> None:
    store, _ = two_versions(config)
    commit = (store / "global" / "000002" / "commit.json").read_bytes()
    (store / "global" / "000002" / "commit.json").unlink()  # killed between the last payload and the commit
    aggregator, state = start(config)
    assert state.version == 1
    one_version(aggregator, state)
    assert (store / "global" / "000002" / "commit.json").read_bytes() == commit


def test_an_old_copy_of_the_store_is_refused_by_whoever_knows_a_newer_version(config: RunConfig) -> None:
    aggregator, state = start(config)
    store, backup = Path(config.store_url), Path(config.directory) / "backup"
    shutil.copytree(store, backup)
    deliver_all(config, state)
    one_version(aggregator, state)
    _, again = start(config)
    assert again.version == 1
    commit_sha256 = json.loads(newest_file(config).read_text())["commit_sha256"]
    shutil.rmtree(store)
    shutil.copytree(backup, store)
    for newest in (0, -1):  # a backup, and nothing at all
        assert one_line_error(start, config) == (
            f"exchange.url: {store} given, whose newest version is {newest}; this aggregator holds version 1 with "
            f"commit {commit_sha256[:12]}, which is not there: an old copy was restored, or it is another run; restore "
            "the newer copy, or name another run directory"
        )
        shutil.rmtree(store, ignore_errors=True)
    newest_file(config).unlink()
    assert start(config)[1].version == 0


def resealed(store: Path, version: int, stem: str) -> None:
    """Add 1 to a tensor and give its payload the right checksum in its record, as a forger would."""
    folder = store / "global" / f"{version:06d}"
    file = folder / f"{stem}.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)] += 1
    save_file(tensors, file)
    for record_file in (folder / "commit.json", store / "snapshots" / f"{version:06d}.json"):
        if record_file.exists():
            record = json.loads(record_file.read_text())
            for row in (row for row in record["payloads"] if row["file"] == file.name):
                row["blake3"], row["num_bytes"] = blake3(file.read_bytes()).hexdigest(), file.stat().st_size
            if "commit_sha256" in record:
                record["commit_sha256"] = sha256((folder / "commit.json").read_bytes())
            record_file.write_text(json.dumps(record, sort_keys=True, indent=1) + "\n")


PARAMETERS, OUTER_STATE = "its parameters do not have the digest", "its outer state does not have the digest"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda store: resealed(store, 2, "parameter-000"), f"version 2: {PARAMETERS}"),
        (lambda store: resealed(store, 2, "velocity-000"), f"version 2: {OUTER_STATE}"),
        (lambda store: resealed(store, 1, "parameter-001"), "commit 2 follows"),
        (lambda store: resealed(store, 0, "parameter-000"), "commit 1 follows"),
        (
            lambda store: (store / "global/000001/velocity-001.safetensors").unlink(),
            "velocity-001.safetensors is missing",
        ),
        (lambda store: (store / "global/000001/parameter-001.safetensors").write_bytes(b"x"), "truncated"),
        (lambda store: (store / "global/000001/commit.json").write_text("{"), "not JSON"),
        (
            lambda store: shutil.copy(store / "global/000001/commit.json", store / "global/000002"),
            "says it is version 1",
        ),
        (lambda store: (store / "global/000001/commit.json").unlink(), "commit 1 is missing"),
    ],
)
def test_a_store_that_was_tampered_with_is_refused(
    spoil: Callable[[Path], object], expected: str, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    store, _ = two_versions(tiny_config(tmp_path, inner=ROUNDS, outer=OUTER, exchange={"snapshot_versions": 1}))
    spoil(store)
    with pytest.raises(RefusedError, match=rf"^[^\n]*{expected}[^\n]*$"):
        start(tiny_config(tmp_path, inner=ROUNDS, outer=OUTER))


@pytest.mark.parametrize(
    ("stem", "expected"),
    [("parameter-002", PARAMETERS), ("target-002", OUTER_STATE), ("velocity-002", OUTER_STATE)],
)
def test_a_coded_store_that_was_tampered_with_is_refused(
    stem: str, expected: str, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    config = tiny_config(tmp_path, inner=ROUNDS, outer=OUTER | CODED, exchange={"snapshot_versions": 1})
    store, _ = two_versions(config)
    resealed(store, 2, stem)
    with pytest.raises(RefusedError, match=f"^version 2: {expected} of its commit$"):
        start(config)


def test_an_outer_step_beyond_fp32_is_one_line_and_no_commit(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Every value that the silos sent is in range; 1e30 * 1.9 times their mean is not."""
    config = tiny_config(tmp_path, outer={"lr": 1e30, "momentum": 0.9, "num_fragments": 2})
    aggregator, state = start(config)
    for silo in ("alpha", "beta"):
        GOOD.deliver(config, silo, state, {n: torch.full_like(v, 1e10) for n, v in state.parameters.items()})
    with pytest.raises(RefusedError, match=r"^[^\n]*fp32[^\n]*$"):
        one_version(aggregator, state)
    assert not (Path(config.store_url) / "global" / "000001" / "commit.json").exists()


def test_another_contract_is_named_key_by_key(tmp_path: Path, tiny_config: TinyConfig) -> None:
    start(tiny_config(tmp_path, inner=ROUNDS, outer=OUTER))
    other = tiny_config(
        tmp_path, inner=ROUNDS | {"lr": 0.004}, outer=OUTER | {"codec": "bf16"}, silos={"gamma": {}}, name="other"
    )
    message = one_line_error(start, other)
    assert message.startswith(f"exchange.url: {other.store_url} given; it holds a run with another contract: ")
    for difference in (
        "inner.lr is 0.004 here and 0.003 there",
        'outer.codec is "bf16" here and "fp32" there',
        'name is "other" here and "tiny" there',
        'roster is ["alpha", "beta", "gamma"] here and ["alpha", "beta"] there',
    ):
        assert difference in message
    assert "num_steps" not in message


def test_what_is_not_in_the_contract_may_differ(tmp_path: Path, tiny_config: TinyConfig) -> None:
    _, state = start(tiny_config(tmp_path, inner=ROUNDS, outer=OUTER))
    other = tiny_config(tmp_path, inner=ROUNDS, outer=OUTER, silo={"precision": "bf16"}, exchange={"keep_versions": 9})
    assert start(other)[1].parameters_digest == state.parameters_digest


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_contract_that_is_none(config: RunConfig, content: str) -> None:
    store = Path(config.store_url)
    store.mkdir(parents=True)
    (store / "contract.json").write_text(content)
    assert one_line_error(start, config).startswith(f"exchange.url: {store} given; ")


def test_versions_without_a_contract(config: RunConfig) -> None:
    start(config)
    (Path(config.store_url) / "contract.json").unlink()
    message = one_line_error(start, config)
    assert message == f"exchange.url: {config.store_url} given; it has versions but no contract.json"
    assert not (Path(config.store_url) / "contract.json").exists()


def test_more_fragments_than_tensors(tmp_path: Path, tiny_config: TinyConfig) -> None:
    rounds, outer = {"num_steps": 1000}, {"num_fragments": 1000, "sync_interval_steps": 1000}
    message = one_line_error(start, tiny_config(tmp_path, inner=rounds, outer=outer))
    assert message == "outer.num_fragments: 1000 given; allowed: 1 to 21, the number of tensors"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["outer.sync_interval_steps=0"], "outer.sync_interval_steps: 0 given"),
        (["tokenizer=/nowhere/tokenizer.json"], "tokenizer: '/nowhere/tokenizer.json' given"),
        (["model.config.model_type=nosuch"], "model.config"),
    ],
)
def test_the_program_says_a_mistake_in_one_line(
    tmp_path: Path,
    tiny_config: TinyConfig,
    overrides: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_config(tmp_path)
    num_threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["aggregate", "--config", str(tmp_path / "tiny.yaml"), *overrides])
        assert module.main() == 2
    torch.set_num_threads(num_threads)
    error = capsys.readouterr().err
    assert error.startswith("atoll: ")
    assert expected in error
    assert error.count("\n") == 1
