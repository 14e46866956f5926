"""The loss of preference pairs, and what cannot be trained on them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pretrain.config.keys import InnerConfig, RunConfig
from pretrain.silo.batch import Batch
from pretrain.silo.data import PackedTokens
from pretrain.silo.evaluate import summed
from pretrain.silo.preference import Objective, has_pair, pair_values
from pretrain.silo.reference import VALUE, VALUES_FILE
from pretrain.silo.verify import verify_tokens
from pretrain.trust.contract import agreed_settings
from tests.conftest import TinyConfig
from tests.pairs import made_pairs, write_pairs
from tests.support import one_line_error

BETA, TOKENIZER = 0.3, "a1" * 32


def packed(directory: Path) -> PackedTokens:
    """Rows of unlike numbers of pairs, with log-probabilities of a reference that are made up."""
    given = made_pairs(30, vocab_size=50)
    manifest = write_pairs(directory, given, row_tokens=33, vocab_size=50, tokenizer=TOKENIZER)
    values = -torch.rand(manifest.num_documents, generator=torch.Generator().manual_seed(0), dtype=torch.double) * 5
    (directory / VALUES_FILE).write_bytes(values.numpy().astype(VALUE).tobytes())
    verify_tokens(directory, manifest)
    return PackedTokens([directory], sequence_tokens=33, of_pairs=True)


def test_each_pair_is_what_it_is_alone(tmp_path: Path) -> None:
    tokens = packed(tmp_path / "pairs")
    batch = tokens.batch(range(tokens.num_sequences))
    assert batch.positions is not None
    assert batch.reference is not None
    losses = torch.rand(batch.targets.shape, generator=torch.Generator().manual_seed(1)) * (batch.targets >= 0)
    losses.requires_grad_()
    found = pair_values(losses, batch.positions, batch.reference, BETA)
    numbers = [tokens.num_pairs(row) for row in range(tokens.num_sequences)]
    assert has_pair(batch.positions).sum(dim=1).tolist() == numbers
    assert len(set(numbers)) > 1
    (gradient,) = torch.autograd.grad(found.losses.sum(), losses)
    expected = torch.zeros_like(gradient)
    for row, number in enumerate(numbers):
        begins = [*(batch.positions[row] == 0).nonzero().flatten().tolist(), 33]
        for pair in range(number):
            first, middle, last = begins[2 * pair : 2 * pair + 3]
            sides = [(first, middle), (middle, last)]
            ratios = [-losses[row, a:b].double().sum() - batch.reference[row, a] for a, b in sides]
            margin = BETA * (ratios[0] - ratios[1])
            loss = -F.logsigmoid(margin)
            assert found.losses[row, pair].item() == pytest.approx(loss.item(), rel=1e-12)
            assert found.margins[row, pair].item() == pytest.approx(margin.item(), rel=1e-12)
            assert found.right[row, pair].item() == (margin > 0)
            expected += torch.autograd.grad(loss, losses)[0]
        assert not found.losses[row, number:].any()
    assert torch.allclose(gradient, expected, atol=1e-7)
    assert gradient.abs().max() > 0.05


def test_values_of_pairs_are_summed_over_pairs_and_others_as_ever(tmp_path: Path) -> None:
    tokens = packed(tmp_path / "pairs")
    batch = tokens.batch(range(4))._replace(num_trained=7, num_pairs=9)
    losses = torch.ones(batch.targets.shape) * (batch.targets >= 0)
    objective = Objective(InnerConfig(loss="dpo", dpo_beta=BETA))
    sums = summed(lambda one: objective.values(losses, one), [(batch, torch.tensor([1.0, 1.0, 1.0, 0.0]))])
    assert sums[-1] == sum(tokens.num_pairs(row) for row in range(3))
    loss, number = objective.of_step(losses, batch)
    assert number == 9
    told = objective.take()
    assert told[0] == sum(tokens.num_pairs(row) for row in range(4))
    assert objective.take() == [0, 0, 0]
    assert loss.sum().item() == pytest.approx(pair_values(losses, batch.positions, batch.reference, BETA).losses.sum())  # type: ignore[arg-type]
    plain = Objective(InnerConfig())
    assert plain.take() == []
    for one in (batch, Batch(batch.inputs, batch.targets, batch.positions, 7)):
        assert plain.of_step(losses, one)[0] is losses
        assert plain.of_step(losses, one)[1] == 7


def test_a_contract_without_pairs_is_what_it_was() -> None:
    plain = agreed_settings(RunConfig())["inner"]
    assert "loss" not in plain
    assert "dpo_beta" not in plain
    preferring = RunConfig(inner=InnerConfig(loss="dpo", dpo_beta=0.2))
    assert agreed_settings(preferring)["inner"] == plain | {"loss": "dpo", "dpo_beta": 0.2}


def test_what_a_user_is_told_of_keys(tmp_path: Path, tiny_config: TinyConfig) -> None:
    def said(loss: str = "dpo", beta: float = 0.1, **changes: Any) -> str:
        return one_line_error(tiny_config, tmp_path, inner={"loss": loss, "dpo_beta": beta, "num_steps": 12}, **changes)

    base: dict[str, Any] = {"model": {"config": None, "checkpoint": str(tmp_path)}}
    chat: dict[str, Any] = base | {"chat_template": str(tmp_path), "document_masking": True}
    assert said("rlhf") == "inner.loss: 'rlhf' given; allowed: masked, dpo"
    assert said(beta=0) == "inner.dpo_beta: 0.0 given; allowed: above 0"
    assert said("masked", 0.2) == "inner.dpo_beta: 0.2 given; allowed: 0.1 with inner.loss=masked"
    assert said().startswith("model.checkpoint: None given; allowed: a transformers directory with inner.loss=dpo")
    assert said(**base).startswith("chat_template: '' given; allowed: the template that the pairs were prepared with")
    prompt = {"kind": "prompt", "tokens": 4, "text": "Hi"}
    told = said(**chat | {"model": base["model"] | {"adapter": prompt}})
    assert told.startswith("model.adapter.kind: 'prompt' given; allowed: none, lora with inner.loss=dpo")
    private = {"alpha": {"private": {"epsilon": 1.0}}}
    assert "alpha.private.epsilon: 1.0 given; allowed: null with inner.loss=dpo" in said(**chat, silos=private)
