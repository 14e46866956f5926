"""Canaries made to be remembered are found in a model that has, and in no other; what that proves, by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from benchmarks.leak_attacks import true_positives
from benchmarks.leak_audit import Designed, Ids, Scores, at_least, design, epsilon_bound, most_provable, plant, scores
from pretrain.silo.data import PackedTokens
from tests.support import VOCAB_SIZE, TinyText

SEQUENCE_TOKENS, NUM = 32, 40


class Rows(nn.Module):
    """A model that expects some tokens more than others, whatever was said before."""

    def __init__(self, expected: Tensor) -> None:
        super().__init__()
        self._expected = expected

    def forward(self, input_ids: Tensor, **_: object) -> CausalLMOutput:
        return CausalLMOutput(logits=self._expected.expand(*input_ids.shape, -1))


@pytest.fixture
def designed(tiny_text: TinyText) -> Designed:
    return design(split(tiny_text, "alpha"), split(tiny_text, "beta"), NUM, seed=1)


def split(tiny_text: TinyText, corpus: str) -> PackedTokens:
    return PackedTokens([tiny_text.packed[corpus] / "train"], sequence_tokens=SEQUENCE_TOKENS)


def guessed(designed: Designed, remembered: Ids) -> Scores:
    """Of a model that has remembered some canaries' own tokens, by how much less its loss is than a new one's."""
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(VOCAB_SIZE, generator=generator)
    trained = new.clone()
    trained[remembered[:, 0]] += 2.0
    return scores(designed, [(Rows(new), Rows(trained))])


def test_a_model_that_has_remembered_gives_all_away_and_one_that_has_not_none(designed: Designed) -> None:
    found = guessed(designed, designed.inside)
    assert true_positives(found.inside, found.outside) == 1
    assert epsilon_bound(found, delta=0.0) == pytest.approx(most_provable(NUM, 0.0))
    found = guessed(designed, designed.inside[:0])
    assert true_positives(found.inside, found.outside) == 0
    assert epsilon_bound(found, delta=0.0) == 0


def test_canaries_are_whole_sequences_of_tokens_that_the_text_hardly_says(
    tmp_path: Path, tiny_text: TinyText, designed: Designed
) -> None:
    text = split(tiny_text, "alpha")
    counts = np.bincount(np.concatenate([text.sequence(i)[:-1] for i in range(text.num_sequences)]))
    own = np.concatenate([designed.inside[:, 0], designed.outside[:, 0]])
    assert len({*own}) == 2 * NUM
    assert np.pad(counts, (0, VOCAB_SIZE))[own].max() <= np.sort(np.pad(counts, (0, VOCAB_SIZE - len(counts))))[2 * NUM]
    plant(designed.inside, text, tmp_path / "planted")
    both = PackedTokens(
        [tmp_path / "planted", tiny_text.packed["alpha"] / "train"],
        sequence_tokens=SEQUENCE_TOKENS,
    )
    assert np.array_equal(np.stack([both.sequence(i)[:-1] for i in range(NUM)]), designed.inside)
    assert np.array_equal(both.sequence(NUM), text.sequence(0))


def test_a_bound_is_what_clopper_and_pearson_leave_of_a_guess() -> None:
    # All of 20: the share is 0.025^(1/20) or more.
    assert at_least(20, 20) == pytest.approx(0.025 ** (1 / 20))
    assert at_least(0, 20) == 0
    # 100 of each, half of them measure: all 50 are found, none of 50 is taken for one.
    least = 0.025 ** (1 / 50)
    assert most_provable(100, delta=0.01) == pytest.approx(math.log((least - 0.01) / (1 - least)))
    rng = np.random.default_rng(0)
    same = Scores(inside=rng.normal(size=1000), outside=rng.normal(size=1000))
    assert epsilon_bound(same, delta=0.0) < 0.5


@pytest.mark.parametrize("epsilon", [1.0, 3.0])
def test_a_bound_holds_for_randomised_response(epsilon: float) -> None:
    """Whose epsilon is known: it tells truly with odds of e^epsilon."""
    rng, num = np.random.default_rng(0), 4000
    truth = 1 / (1 + math.exp(-epsilon))
    inside, outside = (rng.random(num) < share for share in (truth, 1 - truth))
    found = Scores(inside=inside + 0.0, outside=outside + 0.0)
    assert 0.8 * epsilon < epsilon_bound(found, delta=0.0) < epsilon
