"""Attacks find what was planted, and are at chance where nothing leaks; their numbers are those one counts by hand."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.leak_attacks import (
    advantage,
    auc,
    auc_noise,
    ending_losses,
    exposure,
    find_tokens,
    moment_features,
    row_features,
    true_positives,
)
from pretrain.config.keys import ModelConfig
from pretrain.silo.model import build_initial

VOCAB_SIZE, HIDDEN = 200, 16


def scores(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def test_numbers_of_a_guess_as_counted_by_hand() -> None:
    # 3 beats all three others, 2 beats one and ties with one, 1 ties with one: 3 + 1.5 + 0.5 of 9 pairs.
    members, others = scores(3, 2, 1), scores(2, 2.5, 1)
    assert auc(members, others) == pytest.approx(5 / 9)
    # At a threshold of 3 one of three members is above, and no other; no threshold does better.
    assert advantage(members, others) == pytest.approx(1 / 3)
    # One per cent of three is none: only what is above all others is known for sure.
    assert true_positives(members, others) == pytest.approx(1 / 3)
    # Two of 200 others are one per cent: the threshold is the third highest, 197.
    assert true_positives(scores(197.5, 196), np.arange(200.0)) == 0.5


def test_exposure_is_the_rank_in_bits() -> None:
    losses = np.arange(1024.0)
    found = [exposure(loss, losses) for loss in (0.0, 1.0, 511.0, 1023.0)]
    assert found == [10, 9, 1, 0]
    assert exposure(5.0, np.full(1024, 5.0)) == 0  # a model that does not tell codes apart says nothing
    mean = sum(exposure(float(loss), losses) for loss in range(1024)) / 1024
    assert mean == pytest.approx(1.44, abs=0.01)


def test_held_out_against_held_out_is_at_chance() -> None:
    rng = np.random.default_rng(0)
    some, others = rng.normal(size=400), rng.normal(size=400)
    assert auc_noise(400, 400) == pytest.approx(0.04, abs=0.001)
    assert abs(auc(some, others) - 0.5) < 0.04
    assert true_positives(some, others) < 0.03
    assert advantage(some, others) < 0.1


def delivery(seed: int, *, moved: float) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], np.ndarray]:
    """All rows drift along one direction; those of the tokens that were there move by as much in one of their own."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.where(torch.rand(VOCAB_SIZE, generator=generator) < 0.5, 2, 0)
    drift = torch.rand(VOCAB_SIZE, 1, generator=generator) * torch.ones(HIDDEN)
    own = torch.randn(VOCAB_SIZE, HIDDEN, generator=generator)
    rows = drift + moved * (counts > 0)[:, None] * own + 0.01 * own
    second = {"rows": 1e-9 + moved * (counts > 0) + 0.0, "columns": torch.ones(HIDDEN)}
    return {"embed": rows, "other": own[:7]}, {"embed": second}, counts.double().numpy()


def test_planted_tokens_are_found_and_others_are_not() -> None:
    known, of_known, known_counts = delivery(1, moved=1.0)
    wanted, of_wanted, counts = delivery(2, moved=1.0)
    by_rows = find_tokens(row_features(known, VOCAB_SIZE), known_counts, row_features(wanted, VOCAB_SIZE), counts)
    assert (by_rows.precision, by_rows.recall, by_rows.rare_recall, by_rows.auc) == (1, 1, 1, 1)
    features = [moment_features(of, VOCAB_SIZE) for of in (of_known, of_wanted)]
    assert features[0] is not None
    assert features[1] is not None
    by_moments = find_tokens(features[0], known_counts, features[1], counts)
    assert (by_moments.precision, by_moments.recall) == (1, 1)
    assert by_moments.base == pytest.approx(0.5, abs=0.1)


def test_where_no_row_tells_of_its_token_a_guess_is_chance() -> None:
    known, _, known_counts = delivery(1, moved=0.0)
    wanted, _, counts = delivery(2, moved=0.0)
    found = find_tokens(row_features(known, VOCAB_SIZE), known_counts, row_features(wanted, VOCAB_SIZE), counts)
    assert abs(found.auc - 0.5) < auc_noise(VOCAB_SIZE // 2, VOCAB_SIZE // 2) * 1.5
    assert moment_features({}, VOCAB_SIZE) is None


def test_the_loss_of_an_ending_is_that_of_its_own_tokens_after_all_before() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = build_initial(ModelConfig(config={"model_type": "llama", **sizes}), 50)
    sentences = [[1, 2, 3, 4], [1, 2, 7, 8, 4], [1, 2, 9]]
    found = ending_losses(model, sentences, batch=2)
    for loss, sentence in zip(found, sentences, strict=True):
        logits = model(input_ids=torch.tensor([sentence])).logits[0, 1:-1]  # what says the tokens after 1, 2
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(sentence[2:]), reduction="sum")
        assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_bits_of_three_digits() -> None:
    assert exposure(0.0, np.arange(1000.0)) == pytest.approx(math.log2(1000))
