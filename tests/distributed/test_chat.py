"""Fine-tuning on packed conversations: each trained token of a step weighs the same, wherever it lies."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.silo.batch import IGNORED
from pretrain.silo.model import build_initial, token_losses
from pretrain.silo.shards import tokenizer_sha256
from pretrain.silo.texts import open_data
from tests.chats import packer
from tests.conftest import TinyConfig
from tests.distributed.federation import assert_same_bits, federate
from tests.faults.scripted import federate_with
from tests.support import VOCAB_SIZE, TinyText, torchrun

WORKER = Path(__file__).parent / "chat_worker.py"


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_a_packed_step_is_the_sum_of_its_conversations_alone(tmp_path: Path, num_ranks: int) -> None:
    (line,) = torchrun(WORKER, tmp_path, num_ranks=num_ranks, timeout=200).splitlines()[-1:]
    result = json.loads(line.removeprefix("RESULT"))
    assert result["num_trained"][0] == result["num_trained"][1] > 40
    assert result["largest"] > 0.05
    for case in result["cases"]:
        assert case["off"] < 1e-6, case
        assert case["loss"] == pytest.approx(result["expected_loss"], rel=1e-6), case
    assert {case["stage"] for case in result["cases"]} == ({0, 1, 2, 3} if num_ranks > 1 else {0, 2, 3})
    private = result["private"]
    assert private["untrained_rows"] > 0
    assert private["off"] < 1e-6
    assert private["loss"] == pytest.approx(result["expected_loss"], rel=1e-6)
    assert result["untrained"] == {"loss": 0, "norm": 0, "off": 0}
    assert result["evaluated"][0] == pytest.approx(result["evaluated"][1], rel=1e-6)


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory, tiny_text: TinyText) -> dict[str, Any]:
    """Sections of a run: alpha has conversations alone, beta text, too."""
    directory = tmp_path_factory.mktemp("chat")
    packed = packer(directory, vocab_size=VOCAB_SIZE, tokenizer=tokenizer_sha256(tiny_text.tokenizer))
    short, long = packed("short", 60, 1, 3, 6), packed("long", 40, 2, 9, 16)
    beta = {"data": [long, str(tiny_text.packed["beta"] / "train")], "data_weights": [0.5, 0.5]}
    return {
        "chat_template": str(directory),
        "document_masking": True,
        "silo": {"eval_sequences": 0},
        "silos": {
            "alpha": {"data": [short], "valid": {"long": long}},
            "beta": beta | {"micro_batch_sequences": 2, "valid": {"short": short}},
        },
    }


@pytest.mark.soak
def test_silos_weigh_by_their_trained_tokens_and_go_on_after_a_kill_bit_by_bit(
    tmp_path: Path, tiny_config: TinyConfig, silos: dict[str, Any]
) -> None:
    config = tiny_config(tmp_path / "whole", **silos)
    run = federate(config)
    mixtures = {name: open_data(config, name)[0] for name in config.silos}
    for version in (1, 2, 3):
        of_round = range(16 * (version - 1), 16 * version)
        expected = {name: mixture.num_trained(of_round) for name, mixture in mixtures.items()}
        assert 0 < expected["alpha"] < expected["beta"] < 16 * 16
        commit = run.commit(version)
        assert {one.silo: (one.tokens, one.weight) for one in commit.contributors} == {
            name: (tokens, tokens) for name, tokens in expected.items()
        }
        assert {one.tokens_total for one in commit.contributors} == {16 * 16 * version}  # which a position follows from
    assert run.by_step("alpha", "trained_tokens")[12] == mixtures["alpha"].num_trained(range(48))

    model = build_initial(config.model, VOCAB_SIZE)
    parameters = run.parameters(3)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(parameters[name])
    split = open_data(config, "alpha")[1]["long"]
    batch = split.batch(range(split.num_sequences))
    with torch.no_grad():
        losses = token_losses(model, *batch[:2], 0, positions=batch.positions)
    num_trained = (batch.targets != IGNORED).sum().item()
    assert num_trained == split.manifests[0].num_trained_tokens
    assert run.held_out("alpha")[3]["long"] == pytest.approx(losses.sum().item() / num_trained, rel=1e-5)

    killed = federate_with(
        {"alpha": [("step", 6)], "beta": [("sending", 2)]},
        tiny_config(tmp_path / "killed", **silos),
        tmp_path / "fired",
        max_restarts=4,
    )
    assert_same_bits(killed.parameters(3), run.parameters(3))
    for name in ("alpha", "beta"):
        assert killed.by_step(name, "loss") == run.by_step(name, "loss")
        assert killed.by_step(name, "trained_tokens") == run.by_step(name, "trained_tokens")
