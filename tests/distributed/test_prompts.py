"""Prompts: the same bits as vectors put in front by hand and DeepSpeed alone, and in a federation as anything else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.federation.export import load_global_model
from pretrain.silo.model import token_losses
from pretrain.silo.shards import tokenizer_sha256
from pretrain.silo.texts import open_data
from tests.adapters import prompt_model, save_base
from tests.chats import packer
from tests.conftest import TinyConfig
from tests.distributed.federation import assert_same_bits, federate
from tests.faults.scripted import Faults, federate_with
from tests.faults.test_kills import check_same
from tests.support import CORPORA, TWO_RANKS, VOCAB_SIZE, TinyText, free_port, tiny_silo, torchrun, zero
from tests.unit.summing import SECURE, TIERS

WORKER = Path(__file__).parent / "prompt_worker.py"
NAME = "model.embed_tokens.prompt.weight"


def check_engines(directory: Path, cases: str, num_ranks: int = 2) -> None:
    """One torchrun for stages and precisions, as 0-fp32,3-bf16."""
    lines = torchrun(WORKER, directory, cases, num_ranks=num_ranks, timeout=300).splitlines()
    rows: list[dict[str, Any]] = [json.loads(line[6:]) for line in lines if line.startswith("RESULT")]
    assert len(rows) == len(cases.split(","))
    for row in rows:
        assert row["names"] == [NAME]
        assert row["losses"] == row["expected_losses"]
        assert row["same_prompt"]
        assert row["way"] > 0.01
        assert row["resumed"]
        # Three times 660 bytes, and of each rank 5 kB of random state: no base is in it.
        assert row["checkpoint_bytes"] < 3 * 660 + num_ranks * 12_000
        if "packed_off" in row:
            assert row["num_trained"][0] == row["num_trained"][1] > 40
            assert row["largest"] > 0.01
            assert row["packed_off"] < 1e-7
            assert row["sequences_off"] < 1e-7
            assert row["packed_loss"] == pytest.approx(row["expected_loss"], rel=1e-6)


@pytest.mark.soak
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_training_is_that_of_vectors_in_front_at_every_stage_and_precision(tmp_path: Path, num_ranks: int) -> None:
    check_engines(tmp_path, ",".join(f"{s}-{of}" for of in ("fp32", "bf16") for s in range(4)), num_ranks)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory, tiny_text: TinyText) -> dict[str, Any]:
    """Sections of a run: two unlike silos with conversations of their own, and a prompt before each."""
    directory = tmp_path_factory.mktemp("chat")
    base = save_base(directory / "base", tiny_text)
    tokenizer = tokenizer_sha256(tiny_text.tokenizer)
    packed = packer(directory, vocab_size=VOCAB_SIZE, tokenizer=tokenizer, prompt_tokens=3)
    short, long = packed("short", 60, 1, 3, 6), packed("long", 60, 2, 7, 13)
    return {
        "model": prompt_model(base),
        "chat_template": str(directory),
        "document_masking": True,
        "silo": {"eval_sequences": 0, "checkpoint_interval_steps": 3},
        "exchange": {"keep_versions": 100},
        "silos": {
            "alpha": {"data": [short], "valid": {"alpha": None, "long": long}} | TWO_RANKS | zero(3),
            "beta": {"data": [long], "valid": {"beta": None, "short": short}, "precision": "bf16"},
        },
    }


AVERAGING = {"optimizer": "sgd", "lr": 1.0}
STREAMING = {"overlap_steps": 1, "mixing": 0.25, "codec": "int4", "downlink_codec": "int8", "second_moments": "shared"}
DEATHS: Faults = {
    "alpha": [("step", 5), ("after_manifest", 2)],
    "beta": [("step", 8)],
    "aggregator": [("after_merge", 2)],
}


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("outer", [{}, STREAMING], ids=["plain", "streaming"])
def test_two_silos_and_kills_change_nothing(
    tmp_path: Path, tiny_config: TinyConfig, talking: dict[str, Any], outer: dict[str, Any]
) -> None:
    undisturbed = federate(tiny_config(tmp_path / "undisturbed", **talking, outer=outer))
    last = undisturbed.config.schedule.num_versions
    first, final = undisturbed.parameters(0), undisturbed.parameters(last)
    assert [*final] == [NAME]
    assert not (final[NAME] == first[NAME]).any()
    model, split = load_global_model(undisturbed.config)[0], open_data(undisturbed.config, "alpha")[1]["long"]
    batch = split.batch(range(split.num_sequences))
    with torch.no_grad():
        losses = token_losses(model, *batch[:2], 0, positions=batch.positions)
    expected = losses.sum().item() / split.manifests[0].num_trained_tokens
    assert undisturbed.held_out("alpha")[3]["long"] == pytest.approx(expected, rel=1e-5)
    killed = tiny_config(tmp_path / "killed", **talking, outer=outer)
    check_same(federate_with(DEATHS, killed, tmp_path / "fired", max_restarts=20), undisturbed)


@pytest.mark.soak
def test_one_silo_with_outer_sgd_is_plain_training_on_text(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    settings = {"model": prompt_model(save_base(tmp_path / "base", tiny_text)), "silos": {"beta": None}}
    alone = federate(tiny_config(tmp_path / "alone", **settings, exchange={"kind": "none"}))
    run = federate(tiny_config(tmp_path / "federated", **settings, outer=AVERAGING))
    assert_same_bits(run.parameters(3), alone.alone("alpha"))
    assert run.by_step("alpha", "loss") == alone.by_step("alpha", "loss")
    assert run.by_step("alpha", "trained_tokens")[12] == 12 * 4 * (16 - 3)
    assert {one.tokens for one in run.commit(1).contributors} == {4 * 4 * (16 - 3)}


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_in_a_secure_sum_and_among_silos_it_is_merged_as_in_the_store(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    settings: dict[str, Any] = {
        "model": prompt_model(save_base(tmp_path / "base", tiny_text)),
        "silos": {name: tiny_silo(tiny_text, name) for name in CORPORA},
        "inner": {"num_steps": 8},
    }
    plain = federate(tiny_config(tmp_path / "plain", **settings, outer=AVERAGING, exchange={"keep_versions": 100}))
    trust, exchange = {"metrics": TIERS}, {"kind": "collective", "url": f"tcp://127.0.0.1:{free_port()}"}
    among = federate(tiny_config(tmp_path / "among", **settings, outer=AVERAGING, exchange=exchange))
    assert_same_bits(among.parameters(2), plain.parameters(2))
    summed = federate(tiny_config(tmp_path / "sum", **settings, outer=SECURE | AVERAGING, trust=trust))
    way = plain.parameters(2)[NAME] - plain.parameters(0)[NAME]
    assert (summed.parameters(2)[NAME] - plain.parameters(2)[NAME]).norm() < 1e-2 * way.norm()
