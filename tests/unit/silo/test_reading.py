"""Reading as a silo does it: corpora mixed by weight, read ahead, resumed in any shape; and documents kept apart."""

import dataclasses
import itertools
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pretrain.config.errors import ConfigError
from pretrain.config.keys import ModelConfig
from pretrain.silo.attention import DOCUMENTS, document_lengths
from pretrain.silo.checkpoint import other_data
from pretrain.silo.data import BadTokenError, Batches, Mixture, Order, PackedTokens, Prefetch, held_out_batches
from pretrain.silo.evaluate import summed
from pretrain.silo.model import (
    build_initial,
    check_document_masking,
    document_positions,
    go_by_documents,
    token_losses,
)
from pretrain.silo.shards import read_manifest, write_manifest
from tests.unit.silo.test_data import write_split
from tests.waiting import wait_for

CPU = torch.device("cpu")
END = 0  # the end-of-text token of `write_split`


def corpus_of_documents(directory: Path, document_tokens: list[int], first: int) -> tuple[Path, np.ndarray]:
    """A split and its text: first, first + 1, ..., but for each document's last token, the end of text."""
    tokens = np.arange(first, first + sum(document_tokens))
    tokens[np.cumsum(document_tokens) - 1] = END
    split = write_split(directory, tokens, vocab_size=90_000, shard_tokens=37, document_tokens=document_tokens)
    return split, tokens


# --- corpora by weight ---

weights_of_corpora = st.lists(
    st.integers(1, 1_000) | st.decimals("0.001", "10", places=3).map(float), min_size=1, max_size=5
)


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> list[PackedTokens]:
    """Five corpora of 7 to 51 sequences of four tokens."""
    folder = tmp_path_factory.mktemp("five")
    splits = [corpus_of_documents(folder / str(i), [10 + 30 * i, 11 * i + 20], 1) for i in range(5)]
    return [PackedTokens([split], sequence_tokens=4) for split, _ in splits]


@given(weights=weights_of_corpora, position=st.integers(0, 10**15))
@settings(deadline=None)
def test_every_corpus_has_its_share_at_any_position(
    five: list[PackedTokens], weights: list[float], position: int
) -> None:
    mixture = Mixture(five[: len(weights)], weights=weights, seed=0, silo="court")
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [position * weight / sum(exact) for weight in exact]
    draws = mixture.draws(position)
    assert sum(draws) == position
    assert all(abs(n - share) < max(1, len(weights) - 1) for n, share in zip(draws, shares, strict=True))
    corpus, sequence = mixture.locate(position)
    after = mixture.draws(position + 1)
    assert [n - (i == corpus) for i, n in enumerate(after)] == draws  # exactly one corpus has its turn
    assert 0 <= sequence < five[corpus].num_sequences


@given(weights=st.lists(st.integers(1, 30), min_size=1, max_size=5), block=st.integers(0, 10**9))
@settings(deadline=None)
def test_shares_are_exact_in_every_block(five: list[PackedTokens], weights: list[int], block: int) -> None:
    mixture = Mixture(five[: len(weights)], weights=weights, seed=0, silo="court")
    begin, end = (mixture.draws(n * sum(weights)) for n in (block, block + 1))
    assert [b - a for a, b in zip(begin, end, strict=True)] == weights


def test_a_corpus_hands_out_its_own_order_whatever_stands_beside_it(five: list[PackedTokens]) -> None:
    mixture = Mixture(five[:3], weights=[0.2, 0.5, 0.3], seed=7, silo="court")
    read: list[list[int]] = [[], [], []]
    for corpus, sequence in map(mixture.locate, range(300)):
        read[corpus].append(sequence)
    assert [len(sequences) for sequences in read] == [60, 150, 90]
    for corpus, sequences in enumerate(read):
        order = Order(seed=7, silo="court", corpus=corpus, num_sequences=five[corpus].num_sequences)
        assert sequences == list(map(order.index, range(len(sequences))))
    # A change here breaks the resumption of every run that is under way.
    assert [mixture.locate(position)[0] for position in range(10)] == [2, 1, 2, 1, 0, 1, 2, 1, 1, 0]


def test_what_a_position_means_is_told_apart(five: list[PackedTokens]) -> None:
    def terms(
        corpora: list[PackedTokens], weights: list[float], *, seed: int = 0, silo: str = "court"
    ) -> dict[str, Any]:
        return Mixture(corpora, weights=weights, seed=seed, silo="court").terms

    ours = terms(five[:2], [1, 3])
    assert json.loads(json.dumps(ours)) == ours == terms(five[:2], [0.5, 1.5])
    assert not other_data(ours, ours)
    assert not other_data(None, ours)  # a checkpoint of before
    assert other_data(ours, terms(five[:2], [1, 2])) == "data_weights"
    assert other_data(ours, terms(five[1::-1], [1, 3])) == "data"
    assert other_data(ours, terms(five[:1], [1])) == "data, data_weights"
    assert other_data(ours, terms(five[:2], [1, 3], seed=1)) == "data_seed"


def test_a_corpus_alone_is_its_order(five: list[PackedTokens]) -> None:
    mixture = Mixture(five[4:], seed=0, silo="hospital")
    order = Order(seed=0, silo="hospital", num_sequences=five[4].num_sequences)
    assert [mixture.locate(p) for p in range(200)] == [(0, order.index(p)) for p in range(200)]


def test_a_corpus_shorter_than_a_sequence_is_said(tmp_path: Path, five: list[PackedTokens]) -> None:
    short = PackedTokens([write_split(tmp_path / "s", np.arange(4))], sequence_tokens=4, key="silos.court.data")
    with pytest.raises(ConfigError) as caught:
        Mixture([five[0], short], weights=[1, 1], seed=0, silo="court")
    assert str(caught.value) == (
        "silos.court.data: 4 tokens given; allowed: more than sequence_tokens=4: add text or lower sequence_tokens"
    )


def test_two_silos_and_two_corpora_of_one_have_independent_orders() -> None:
    num_sequences = 400
    orders = [
        Order(seed=0, silo=silo, corpus=corpus, num_sequences=num_sequences)
        for silo in ("court", "hospital", "lab", "library", "press")
        for corpus in range(3)
    ]
    epochs = [np.array([order.index(p) for p in range(num_sequences)]) for order in orders]
    pairs = list(itertools.combinations(epochs, 2))
    # Of two independent permutations one place agrees on average (Poisson), and sqrt(n - 1) * correlation is normal.
    num_equal = [(one == other).sum() for one, other in pairs]
    normal = [np.corrcoef(one, other)[0, 1] * (num_sequences - 1) ** 0.5 for one, other in pairs]
    assert len(pairs) == 105
    assert np.mean(num_equal) == pytest.approx(1, abs=0.3)
    assert max(num_equal) < 7
    assert np.mean(normal) == pytest.approx(0, abs=0.3)
    assert np.std(normal) == pytest.approx(1, abs=0.25)


# --- every token once an epoch, in any shape, across any resume ---


@dataclasses.dataclass(frozen=True)
class Leg:
    """What a run is between two resumes."""

    micro: int
    accumulation: int
    num_ranks: int
    prefetch: int
    num_steps: int


legs = st.builds(
    Leg,
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    num_ranks=st.integers(1, 3),
    prefetch=st.integers(0, 3),
    num_steps=st.integers(1, 9),
)
documents = st.lists(st.integers(1, 60), max_size=8).map(lambda rest: [140, *rest])


def rows_of_leg(mixture: Mixture, leg: Leg, position: int) -> Iterator[np.ndarray]:
    """The sequences of a leg over all ranks, in order, each (sequence_tokens + 1,)."""
    ranks = [
        Prefetch(
            Batches(
                mixture,
                micro_batch_sequences=leg.micro,
                accumulation_steps=leg.accumulation,
                rank=rank,
                num_ranks=leg.num_ranks,
                position=position,
            ),
            num_batches=leg.prefetch,
            device=CPU,
        )
        for rank in range(leg.num_ranks)
    ]
    for _ in range(leg.num_steps * leg.accumulation):
        for inputs, targets, *_ in map(next, ranks):
            yield from torch.cat([inputs, targets[:, -1:]], dim=1).numpy()
    for rank in ranks:
        assert rank.state() == position + leg.num_steps * leg.micro * leg.accumulation * leg.num_ranks
        rank.close()


@given(
    corpora=st.lists(documents, min_size=1, max_size=3),
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    sequence_tokens=st.integers(2, 5),
    run=st.lists(legs, min_size=1, max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_every_token_is_a_target_once_an_epoch_in_any_shape_across_any_resume(
    tmp_path_factory: pytest.TempPathFactory,
    corpora: list[list[int]],
    weights: list[int],
    sequence_tokens: int,
    run: list[Leg],
) -> None:
    folder = tmp_path_factory.mktemp("corpora")
    splits = [corpus_of_documents(folder / str(i), lengths, 10_000 * i + 1) for i, lengths in enumerate(corpora)]
    packed = [PackedTokens([split], sequence_tokens=sequence_tokens) for split, _ in splits]
    mixture = Mixture(packed, weights=weights[: len(packed)], seed=5, silo="court")
    read: list[list[np.ndarray]] = [[] for _ in packed]
    position = 0
    for leg in run:
        for row in rows_of_leg(mixture, leg, position):
            corpus, sequence = mixture.locate(position)
            assert np.array_equal(row, packed[corpus].sequence(sequence))
            read[corpus].append(row)
            position += 1
    assert [len(rows) for rows in read] == mixture.draws(position)
    for (_, text), tokens, rows in zip(splits, packed, read, strict=True):
        # Never a target: the first token, which nothing precedes, and at the end what is less than a whole sequence.
        num_left_over = (len(text) - 1) % sequence_tokens
        predicted = np.sort(text[1 : len(text) - num_left_over])
        for begin in range(0, len(rows), tokens.num_sequences):
            epoch = rows[begin : begin + tokens.num_sequences]
            targets = np.sort(np.concatenate([row[1:] for row in epoch]))
            if len(epoch) == tokens.num_sequences:
                assert np.array_equal(targets, predicted)
            else:  # the run ended before the epoch: nothing twice
                assert set(Counter(targets.tolist()) - Counter(predicted.tolist())) == set()


# --- read ahead ---


def batches_of(tokens: PackedTokens, **changes: int) -> Batches:
    """One rank, two sequences a micro batch, three micro batches a step."""
    sizes = {"micro_batch_sequences": 2, "accumulation_steps": 3, "rank": 0, "num_ranks": 1} | changes
    return Batches(Mixture([tokens], seed=0, silo="court"), **sizes)


@pytest.mark.parametrize("num_batches", [0, 1, 4])
def test_reading_ahead_changes_neither_batches_nor_state(five: list[PackedTokens], num_batches: int) -> None:
    plain, ahead = batches_of(five[4]), Prefetch(batches_of(five[4]), num_batches=num_batches, device=CPU)
    for restore_at in (None, 6, 42):
        if restore_at is not None:
            plain.restore(restore_at)
            ahead.restore(restore_at)
        for _ in range(7):
            for expected, given_ in zip(next(plain)[:2], next(ahead)[:2], strict=True):
                assert torch.equal(expected, given_)
            assert ahead.state() == plain.state()
    ahead.close()


def test_so_many_batches_are_read_ahead_and_the_thread_ends(five: list[PackedTokens]) -> None:
    before = set(threading.enumerate())
    batches = batches_of(five[4], accumulation_steps=1)
    ahead = Prefetch(batches, num_batches=3, device=CPU)
    next(ahead)
    (thread,) = set(threading.enumerate()) - before
    wait_for(lambda: batches.state() >= 8)
    assert (ahead.state(), batches.state()) == (2, 8)
    ahead.close()
    assert not thread.is_alive()


def test_what_reading_raises_comes_with_the_batch_that_it_belongs_to(tmp_path: Path) -> None:
    split = write_split(tmp_path / "s", np.arange(41), vocab_size=41)
    write_manifest(split, dataclasses.replace(read_manifest(split), vocab_size=30))
    tokens = PackedTokens([split], sequence_tokens=4)
    order = Order(seed=0, silo="court", num_sequences=10)
    first_bad = next(position for position in range(10) if order.index(position) >= 7)
    assert first_bad > 0
    ahead = Prefetch(batches_of(tokens, micro_batch_sequences=1), num_batches=9, device=CPU)
    for _ in range(first_bad):
        next(ahead)
    with pytest.raises(BadTokenError, match=r"shard-00000.bin holds token \d\d, its vocab_size is 30: copy or prepare"):
        next(ahead)
    ahead.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_batches_arrive_on_the_gpu(five: list[PackedTokens]) -> None:
    plain, ahead = batches_of(five[4]), Prefetch(batches_of(five[4]), num_batches=2, device=torch.device("cuda:0"))
    for _ in range(20):
        for expected, given_ in zip(next(plain)[:2], next(ahead)[:2], strict=True):
            assert given_.is_cuda
            assert torch.equal(expected, given_.cpu())
    ahead.close()


# --- a large corpus ---


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_ten_gigabytes_are_opened_and_drawn_from_without_reading_them(tmp_path: Path) -> None:
    def bytes_read_and_resident() -> tuple[int, int]:
        read = int(Path("/proc/self/io").read_text().split()[1])
        return read, int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    split, num_tokens = write_split(tmp_path / "split", np.zeros(1)), 5 * 10**9
    manifest = read_manifest(split)
    shard = dataclasses.replace(manifest.shards[0], num_tokens=num_tokens)
    os.truncate(split / shard.file, 2 * num_tokens)  # sparse: the disk holds nothing of it
    write_manifest(split, dataclasses.replace(manifest, num_tokens=num_tokens, shards=(shard,)))
    before = bytes_read_and_resident()
    batches = batches_of(PackedTokens([split], sequence_tokens=2048), micro_batch_sequences=8)
    assert next(batches)[0].shape == (8, 2048)
    after = bytes_read_and_resident()
    assert after[0] - before[0] < 1e6
    assert after[1] - before[1] < 50e6


# --- documents kept apart ---

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.3,  # so that what a token sees makes a difference
}
FULL = "full_attention"
KINDS: list[dict[str, Any]] = [
    SMALL | {"model_type": "llama"},
    SMALL | {"model_type": "llama", "attn_implementation": "eager"},
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3},
    SMALL | {"model_type": "gpt_neox"},
    SMALL | {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 5},
    SMALL | {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 16},
]


def small_model(kind: dict[str, Any]) -> nn.Module:
    return build_initial(ModelConfig(config=kind), vocab_size=90).eval()


def test_positions_count_from_each_end_of_text() -> None:
    rows = torch.tensor([[5, 6, END, 7, 8, END, END, 9], [END, 1, 2, 3, 4, 5, 6, END]])
    assert document_positions(rows, END).tolist() == [[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0]]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(map(str, list(kind.values())[-2:])))
@torch.no_grad()
def test_a_document_in_a_packed_sequence_has_its_loss_alone(tmp_path: Path, kind: dict[str, Any]) -> None:
    model, rng = small_model(kind), np.random.default_rng(0)
    lengths = rng.integers(2, 15, 12).tolist()
    text = rng.integers(1, 90, sum(lengths))
    text[np.cumsum(lengths) - 1] = END
    tokens = PackedTokens(
        [write_split(tmp_path / "s", text, vocab_size=90, document_tokens=lengths)], sequence_tokens=24
    )
    inputs, targets, *_ = tokens.batch(range(3))
    packed, open_ = (token_losses(model, inputs, targets, at) for at in (END, None))

    alone = torch.zeros_like(packed)
    for row, column in itertools.product(range(3), range(24)):
        if column == 0 or inputs[row, column] == END:  # here a document begins, up to the next end or the sequence's
            end = next((i for i in range(column + 1, 24) if inputs[row, i] == END), 24)
            part = slice(row, row + 1), slice(column, end)
            alone[part] = token_losses(model, inputs[part], targets[part])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert (packed - open_).abs().max() > 0.01
    batches = held_out_batches(tokens, num_sequences=3, micro_batch_sequences=2, rank=0, num_ranks=1)
    total, num_tokens = summed(lambda batch: (token_losses(model, *batch[:2], END),), batches)
    assert (total, num_tokens) == (pytest.approx(alone.sum().item(), rel=1e-5), 3 * 24)
    check_document_masking(model, END, CPU)


def test_lengths_are_those_between_ends_of_text() -> None:
    rows = torch.tensor([[5, 6, END, 7, 8, END, END, 9], [END, 1, 2, 3, 4, 5, 6, END], [1, 2, 3, 4, 5, 6, 7, 8]])
    assert document_lengths(document_positions(rows, END)).lengths == [[2, 3, 1, 2], [7, 1], [8]]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(map(str, list(kind.values())[-2:])))
def test_each_document_by_itself_has_the_losses_and_gradients_of_a_mask(kind: dict[str, Any]) -> None:
    model: Any = small_model(kind)
    rows = torch.randint(0, 90, (3, 40), generator=torch.Generator().manual_seed(0))
    rows[torch.rand(rows.shape, generator=torch.Generator().manual_seed(1)) < 0.15] = END

    def found(attention: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.set_attn_implementation(attention)
        model.zero_grad()
        losses = token_losses(model, rows, rows.roll(-1, 1), END)
        losses.mean().backward()
        return losses.detach(), [p.grad.clone() for p in model.parameters()]

    before = model.config._attn_implementation
    if "sliding_window" in kind:
        assert go_by_documents(model, END, CPU) == "its attention reaches back a window of tokens"
        assert model.config._attn_implementation == before
        return
    assert not go_by_documents(model, END, CPU)
    assert model.config._attn_implementation == DOCUMENTS
    (masked, gradients), (alone, own) = found("sdpa"), found(DOCUMENTS)
    torch.testing.assert_close(alone, masked, rtol=1e-5, atol=1e-5)
    for one, other in zip(own, gradients, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


GEMMA2 = SMALL | {"model_type": "gemma2", "num_key_value_heads": 1, "head_dim": 16}


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2}, "its attention is another"),
        (GEMMA2, "its attention reaches back a window of tokens"),
        (GEMMA2 | {"layer_types": 2 * [FULL]}, "its attention asks for softcap"),
    ],
    ids=["bloom", "gemma2", "gemma2 in full"],
)
def test_a_model_that_asks_attention_for_more_keeps_its_mask(kind: dict[str, Any], why: str) -> None:
    model: Any = small_model(kind)
    before = model.config._attn_implementation
    assert go_by_documents(model, END, CPU) == why
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    "kind",
    [
        {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2},  # passes over position_ids
        {"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48}
        | {"word_embed_proj_dim": 32, "init_std": 0.3},  # no mask from them
        SMALL | {"model_type": "qwen3_next", "num_hidden_layers": 4, "head_dim": 16},  # not in every layer
    ],
    ids=lambda kind: kind["model_type"],
)
def test_a_model_that_does_not_keep_documents_apart_is_refused(kind: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_document_masking(small_model(kind), 3, CPU)
    assert str(caught.value) == (
        "document_masking: true given; this type of model lets a document see the one before it even so; allowed: "
        "false, or a model whose attention follows position_ids (llama, mistral, qwen3, gpt2, gpt_neox, ...)"
    )
