"""Adapters: the same bits as peft and DeepSpeed alone, and in a federation as any other parameters."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.keys import RunConfig
from tests.adapters import adapter_model, save_base
from tests.conftest import TinyConfig
from tests.distributed.federation import assert_same_bits, federate
from tests.support import TinyText, torchrun

WORKER = Path(__file__).parent / "adapter_worker.py"
KEEP_ALL = {"keep_versions": 100}
PLAIN_AVERAGING = {"optimizer": "sgd", "lr": 1.0}


def engines(directory: Path, cases: str) -> list[dict[str, Any]]:
    """One torchrun of two ranks for stages and precisions, as 0-fp32,3-bf16."""
    lines = torchrun(WORKER, directory, cases, num_ranks=2, timeout=200).splitlines()
    rows = [json.loads(line.removeprefix("RESULT")) for line in lines if line.startswith("RESULT")]
    assert len(rows) == len(cases.split(","))
    return rows


def check_engine(row: dict[str, Any]) -> None:
    """What holds at every stage and precision."""
    assert row["names"]
    assert row["moved"]
    assert row["losses"] == row["expected_losses"]
    assert row["same_factors"]
    assert row["resumed"]
    # Three times the factors (fp32, with two moments) and, for a rank, 5 kB of random state: no base is in it.
    assert row["checkpoint_bytes"] < 3 * 4 * row["factor_elements"] + 2 * 12_000
    assert row["checkpoint_bytes"] < row["base_bytes"]
    assert row["rested"]
    assert row["turns_norms"] == pytest.approx(row["all_norm"], rel=1e-4 if row["precision"] == "fp32" else 1e-2)


def test_training_is_that_of_peft_and_deepspeed_alone_to_the_last_bit(tmp_path: Path) -> None:
    for row in engines(tmp_path, "2-fp32,3-bf16"):
        check_engine(row)


@pytest.mark.soak
def test_the_same_at_every_stage_and_precision(tmp_path: Path) -> None:
    for row in engines(tmp_path, ",".join(f"{stage}-{of}" for of in ("fp32", "bf16") for stage in range(4))):
        check_engine(row)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_text: TinyText) -> Path:
    """The frozen model."""
    return save_base(tmp_path_factory.mktemp("base"), tiny_text)


def one_silo(tiny_config: TinyConfig, directory: Path, base: Path, **changes: Any) -> RunConfig:
    """Silo alpha only."""
    return tiny_config(directory, silos={"beta": None}, **{"model": adapter_model(base)} | changes)


def test_one_silo_with_outer_sgd_is_plain_training(tmp_path: Path, tiny_config: TinyConfig, base: Path) -> None:
    alone = federate(one_silo(tiny_config, tmp_path / "alone", base, exchange={"kind": "none"}))
    run = federate(one_silo(tiny_config, tmp_path / "federated", base, outer=PLAIN_AVERAGING))
    assert_same_bits(run.parameters(3), alone.alone("alpha"))
    assert all(".lora_" in name for name in run.parameters(3))
    assert run.by_step("alpha", "loss") == alone.by_step("alpha", "loss")


def test_turns(tmp_path: Path, tiny_config: TinyConfig, base: Path) -> None:
    outer = PLAIN_AVERAGING | {"num_fragments": 2}
    run = federate(tiny_config(tmp_path, model=adapter_model(base, merge="alternate"), outer=outer, exchange=KEEP_ALL))
    assert run.config.schedule.num_versions == 6
