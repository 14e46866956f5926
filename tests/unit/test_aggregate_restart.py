"""Starting the aggregator on a store that is there: go on, or say in one line why not."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain import aggregate as module
from pretrain.aggregate import aggregate
from pretrain.config import RunConfig
from pretrain.journal import Journal
from pretrain.trust.ledger import RefusedError
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.test_aggregate import GOOD, OUTER, ROUNDS, one_round, sha256, start, times


@pytest.fixture
def config(tmp_path: Path, tiny_config: TinyConfig) -> RunConfig:
    return tiny_config(tmp_path, inner=ROUNDS, outer=OUTER)


def two_rounds(config: RunConfig) -> tuple[Path, dict[str, torch.Tensor]]:
    """A finished run of two rounds; returns its store and parameters."""
    aggregator, state = start(config)
    for factor in (2.0, 0.5):
        GOOD.deliver(config, "alpha", state, times(state, factor))
        GOOD.deliver(config, "beta", state, times(state, factor + 1))
        one_round(aggregator, state)
    return Path(config.store_url), state.parameters


def test_restart_loads_the_newest_version(config: RunConfig) -> None:
    store, parameters = two_rounds(config)
    before = sorted((str(p), p.stat().st_mtime_ns) for p in store.rglob("*"))
    _, again = start(config)
    assert again.version == 2
    assert again.parameters.keys() == parameters.keys()
    assert all(torch.equal(again.parameters[name], value) for name, value in parameters.items())
    assert sorted((str(p), p.stat().st_mtime_ns) for p in store.rglob("*")) == before
    aggregate(config, Journal(config, "aggregator", silo=None))  # has nothing left to do, and returns


def test_killed_after_every_round_it_comes_to_the_same_ledger(tmp_path: Path, tiny_config: TinyConfig) -> None:
    ledgers = []
    for name in ("whole", "restarted"):
        # The same run at two places: the contract holds no directory.
        config = tiny_config(tmp_path / name, inner=ROUNDS, outer=OUTER)
        aggregator, state = start(config)
        for factor in (2.0, 0.5):
            GOOD.deliver(config, "alpha", state, times(state, factor), tokens=3)
            GOOD.deliver(config, "beta", state, times(state, factor + 1), tokens=4)
            if name == "restarted":
                aggregator.collect(state)  # verified, and killed before the commit
                aggregator, state = start(config)
            one_round(aggregator, state)
            if name == "restarted":
                aggregator, state = start(config)
        ledgers.append(
            [(Path(config.store_url) / "global" / f"00000{v}" / "commit.json").read_bytes() for v in range(3)]
        )
    assert ledgers[0] == ledgers[1]


def test_a_version_without_commit_is_made_again(config: RunConfig) -> None:
    store, _ = two_rounds(config)
    commit = (store / "global" / "000002" / "commit.json").read_bytes()
    (store / "global" / "000002" / "commit.json").unlink()  # killed between the last payload and the commit
    aggregator, state = start(config)
    assert state.version == 1
    one_round(aggregator, state)
    assert (store / "global" / "000002" / "commit.json").read_bytes() == commit


def resealed(store: Path, version: int, change: Callable[[dict[str, torch.Tensor]], None], stem: str) -> None:
    """Change a payload and give it the right checksum in its commit, as a forger would."""
    folder = store / "global" / f"{version:06d}"
    file = folder / f"{stem}-000.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    commit = json.loads((folder / "commit.json").read_text())
    rows = commit["payloads"] if stem == "parameters" else commit["state_payloads"]
    rows[0]["sha256"], rows[0]["num_bytes"] = sha256(file.read_bytes()), file.stat().st_size
    (folder / "commit.json").write_text(json.dumps(commit))


def add_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)] += 1


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda store: resealed(store, 2, add_one, "parameters"), "version 2: its parameters do not have the digest"),
        (lambda store: resealed(store, 2, add_one, "outer"), "version 2: its outer state does not have the digest"),
        (lambda store: resealed(store, 0, add_one, "parameters"), "commit 1 follows"),
        (lambda store: (store / "global/000002/outer-001.safetensors").unlink(), "outer-001.safetensors is missing"),
        (lambda store: (store / "global/000002/parameters-000.safetensors").write_bytes(b"x"), "truncated"),
        (lambda store: (store / "global/000001/commit.json").write_text("{"), "not JSON"),
        (
            lambda store: shutil.copy(store / "global/000001/commit.json", store / "global/000002"),
            "says it is version 1",
        ),
        (lambda store: (store / "global/000001/commit.json").unlink(), "commit 1 or its predecessor is missing"),
    ],
)
def test_a_store_that_was_tampered_with_is_refused(
    config: RunConfig, spoil: Callable[[Path], object], expected: str
) -> None:
    store, _ = two_rounds(config)
    spoil(store)
    with pytest.raises(RefusedError, match=rf"^[^\n]*{expected}[^\n]*$"):
        start(config)


def test_an_outer_step_beyond_fp32_is_one_line_and_no_commit(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Every value that the silos sent is finite; 0.7 * 1.9 times their mean is not."""
    config = tiny_config(tmp_path, outer={"lr": 0.7, "momentum": 0.9, "num_fragments": 2})
    aggregator, state = start(config)
    for silo in ("alpha", "beta"):
        GOOD.deliver(config, silo, state, {n: torch.full_like(v, 3e38) for n, v in state.parameters.items()})
    with pytest.raises(RefusedError, match=r"^[^\n]*fp32[^\n]*$"):
        one_round(aggregator, state)
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
    message = one_line_error(start, tiny_config(tmp_path, outer={"num_fragments": 1000}))
    assert message.startswith("outer.num_fragments: 1000 given; allowed: 1 to ")


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
