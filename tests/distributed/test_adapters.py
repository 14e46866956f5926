"""Adapters: the same bits as peft and DeepSpeed alone, and in a federation as any other parameters."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config.keys import RunConfig
from pretrain.silo.named_state import SavedState
from tests.adapters import adapter_model, save_base
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_same_bits, federate
from tests.distributed.test_join import all_but_beta, check_joined, join
from tests.faults.scripted import Faults, federate_with
from tests.faults.test_kills import check_same
from tests.faults.test_silo_deaths import DEATHS as SILO_DEATHS
from tests.support import CORPORA, TWO_RANKS, TinyText, free_port, tiny_silo, torchrun, zero
from tests.unit.federation.test_verify import verified
from tests.unit.summing import SECURE, TIERS

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


@pytest.mark.soak
def test_training_is_that_of_peft_and_deepspeed_alone_to_the_last_bit(tmp_path: Path) -> None:
    for row in engines(tmp_path, "3-bf16"):
        check_engine(row)


@pytest.mark.soak
def test_the_same_at_every_stage_and_precision(tmp_path: Path) -> None:
    for row in engines(tmp_path, ",".join(f"{stage}-{of}" for of in ("fp32", "bf16") for stage in range(4))):
        check_engine(row)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_text: TinyText) -> Path:
    """The frozen model."""
    return save_base(tmp_path_factory.mktemp("base"), tiny_text)


def check_rested(run: Outcome) -> None:
    """Versions are of B and A in turns, and at every step what was not due has the bits of the last version."""
    schedule = run.config.schedule
    assert schedule.num_versions == 6
    versions = [run.parameters(version) for version in range(7)]
    for version in range(1, 7):
        due = [".lora_A.", ".lora_B."][version % 2]
        assert all(due in name for silo in run.config.silos for name in run.delivered(silo, version))
    num_looked_at = 0
    for silo in run.config.silos:
        for step in range(1, run.config.inner.num_steps + 1):
            checkpoint = run.config.silo_directory(silo) / "checkpoints" / f"step-{step:08d}"
            newest, turn = schedule.newest_sent(step), schedule.turn(step - 1)
            for name, value in versions[newest].items():
                found = SavedState(checkpoint / "engine").read("parameter", name, 0, value.numel())
                rests = (".lora_A.", ".lora_B.").index(name[name.index(".lora_") :][:8]) != turn
                if rests or schedule.sent(newest) == step:
                    assert torch.equal(found, value.flatten()), (silo, step, name)
                    num_looked_at += rests
                else:
                    assert not torch.equal(found, value.flatten())
    assert num_looked_at == 2 * 12 * len(versions[0]) // 2


IN_TURNS = {"optimizer": "nesterov", "num_fragments": 2}
DEATHS: Faults = {
    "alpha": [("after_manifest", 2), ("step", 5), ("adopting", 3)],
    "aggregator": [("after_merge", 3), ("before_commit", 4)],
}


@pytest.fixture(scope="module")
def in_turns(base: Path) -> dict[str, Any]:
    """Settings of two unlike silos whose checkpoints of every step are kept."""
    every_step = {"checkpoint_interval_steps": 1, "keep_checkpoints": 20, "eval_sequences": 2}
    return {
        "model": adapter_model(base, merge="alternate"),
        "outer": IN_TURNS,
        "exchange": KEEP_ALL,
        "silo": every_step,
        "silos": {"beta": {"precision": "bf16"} | zero(3)},
    }


@pytest.fixture(scope="module")
def rested(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig, in_turns: dict[str, Any]) -> Outcome:
    """An undisturbed run of them."""
    return federate(tiny_config(tmp_path_factory.mktemp("rested"), **in_turns))


def test_in_turns_one_factor_rests_to_the_last_bit_in_all_silos(rested: Outcome) -> None:
    check_rested(rested)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_in_turns_kills_change_nothing(
    tmp_path: Path, tiny_config: TinyConfig, rested: Outcome, in_turns: dict[str, Any]
) -> None:
    killed = tiny_config(tmp_path / "killed", **in_turns)
    check_same(federate_with(DEATHS, killed, tmp_path / "fired", max_restarts=20), rested)


def one_silo(tiny_config: TinyConfig, directory: Path, base: Path, **changes: Any) -> RunConfig:
    """Silo alpha only."""
    return tiny_config(directory, silos={"beta": None}, **{"model": adapter_model(base)} | changes)


@pytest.mark.soak
def test_one_silo_with_outer_sgd_is_plain_training(tmp_path: Path, tiny_config: TinyConfig, base: Path) -> None:
    alone = federate(one_silo(tiny_config, tmp_path / "alone", base, exchange={"kind": "none"}))
    run = federate(one_silo(tiny_config, tmp_path / "federated", base, outer=PLAIN_AVERAGING))
    assert_same_bits(run.parameters(3), alone.alone("alpha"))
    assert all(".lora_" in name for name in run.parameters(3))
    assert run.by_step("alpha", "loss") == alone.by_step("alpha", "loss")


STREAMING = {"num_fragments": 3, "overlap_steps": 1, "mixing": 0.25, "codec": "int4", "downlink_codec": "int4"}


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_streamed_in_int4_and_killed_at_every_point(tmp_path: Path, tiny_config: TinyConfig, base: Path) -> None:
    settings = {
        "model": adapter_model(base, dropout=0.1),
        "outer": STREAMING | {"second_moments": "shared"},
        "silo": {"checkpoint_interval_steps": 3},
        "silos": {"alpha": TWO_RANKS | {"activation_checkpointing": "layers"} | zero(3)},
    }
    undisturbed = federate(tiny_config(tmp_path / "undisturbed", **settings))
    killed = tiny_config(tmp_path / "killed", **settings)
    deaths = SILO_DEATHS | {"alpha": [*SILO_DEATHS["alpha"][:-1], ("marking", 4)]}  # which a checkpoint holds here
    check_same(federate_with(deaths, killed, tmp_path / "fired", max_restarts=20), undisturbed)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("merge", ["factors", "alternate"])
def test_signed_and_in_a_secure_sum(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, base: Path, merge: str
) -> None:
    silos = {name: tiny_silo(tiny_text, name) for name in CORPORA}
    outer = PLAIN_AVERAGING | ({"num_fragments": 2} if merge == "alternate" else {})
    settings = {"silos": silos, "model": adapter_model(base, merge=merge)}
    plain = federate(tiny_config(tmp_path / "plain", **settings, outer=outer, exchange=KEEP_ALL))
    trust = {"metrics": TIERS}
    run = federate(tiny_config(tmp_path / "sum", **settings, outer=SECURE | outer, trust=trust, exchange=KEEP_ALL))
    last = run.config.schedule.num_versions
    assert not verified(run.config, tmp_path / "scratch").findings
    summed, merged, initial = run.parameters(last), plain.parameters(last), plain.parameters(0)
    for name, value in merged.items():
        assert (summed[name] - value).norm() < 1e-2 * (value - initial[name]).norm()


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_among_silos_it_comes_to_the_bits_of_the_store(tmp_path: Path, tiny_config: TinyConfig, base: Path) -> None:
    settings = {"model": adapter_model(base, merge="alternate"), "outer": IN_TURNS}
    usual = federate(tiny_config(tmp_path / "store", **settings))
    exchange = {"kind": "collective", "url": f"tcp://127.0.0.1:{free_port()}"}
    run = federate(tiny_config(tmp_path / "collective", **settings, exchange=exchange))
    assert_same_bits(run.parameters(6), usual.parameters(6))


@pytest.mark.soak
def test_a_silo_joins_that_has_a_base_of_its_own(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, base: Path
) -> None:
    settings = {"model": adapter_model(base), "exchange": KEEP_ALL}
    usual = federate(tiny_config(tmp_path / "usual", **settings))
    config = tiny_config(tmp_path / "run", **settings)
    own = shutil.copytree(base, tmp_path / "own")
    with all_but_beta(config):
        here, _ = join(tmp_path / "beta", tiny_text, config.store_url, f"model.checkpoint={own}")
    check_joined(config, here, usual)
