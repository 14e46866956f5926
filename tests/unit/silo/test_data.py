"""Packed shards to batches: the order, the cursor, the boundaries, and what a user is told."""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.errors import ConfigError
from pretrain.silo.data import Batches, Mixture, Order, PackedTokens, held_out_batches
from pretrain.silo.shards import (
    MANIFEST_FILE,
    atomic_path,
    open_shard,
    read_manifest,
    verify_shards,
    write_manifest,
)
from pretrain.silo.writer import SplitWriter

TOKENIZER = "a1" * 32
OTHER_TOKENIZER = "b2" * 32


def write_split(
    directory: Path,
    tokens: np.ndarray,
    *,
    vocab_size: int = 50_000,
    shard_tokens: int = 1_000,
    tokenizer: str = TOKENIZER,
    document_tokens: Sequence[int] | None = None,
) -> Path:
    """A packed split of any tokens; `document_tokens` says how many each document has (None: all are one)."""
    writer = SplitWriter(directory, vocab_size=vocab_size, end_of_text_id=0, shard_tokens=shard_tokens)
    writer.write(tokens, np.array(document_tokens or [len(tokens)]), len(tokens))
    writer.finish(tokenizer_sha256=tokenizer, recipe_sha256="c3" * 32)
    return directory


def counting_tokens(directory: Path, *, num_tokens: int, sequence_tokens: int) -> PackedTokens:
    """Tokens 0, 1, 2, ...: a sequence's first token says which sequence it is."""
    return PackedTokens([write_split(directory, np.arange(num_tokens))], sequence_tokens=sequence_tokens)


# --- the order ---


@given(num_sequences=st.integers(1, 3_000), seed=st.integers(), epoch=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_every_epoch_is_a_permutation(num_sequences: int, seed: int, epoch: int) -> None:
    order = Order(seed=seed, silo="court", num_sequences=num_sequences)
    positions = range(epoch * num_sequences, (epoch + 1) * num_sequences)
    assert sorted(order.index(position) for position in positions) == list(range(num_sequences))


def test_every_small_size_is_a_permutation() -> None:
    for num_sequences in range(1, 131):
        order = Order(seed=1, silo="court", num_sequences=num_sequences)
        assert sorted(map(order.index, range(num_sequences))) == list(range(num_sequences))


def test_golden_order() -> None:
    order = Order(seed=0, silo="hospital", num_sequences=10)
    # A change here breaks the resumption of every run that is under way.
    assert [order.index(position) for position in range(10)] == [9, 5, 3, 2, 4, 1, 6, 7, 8, 0]
    assert [order.index(position) for position in range(10, 20)] == [7, 9, 4, 2, 6, 3, 0, 1, 5, 8]


def test_order_differs_by_silo_seed_and_epoch_and_looks_random() -> None:
    def first_epoch(**changes: object) -> list[int]:
        order = Order(**{"seed": 0, "silo": "hospital", "num_sequences": 500} | changes)  # type: ignore[arg-type]
        return [order.index(position) for position in range(500)]

    orders = [first_epoch(), first_epoch(silo="court"), first_epoch(seed=1)]
    order = Order(seed=0, silo="hospital", num_sequences=500)
    orders.append([order.index(position) for position in range(500, 1000)])
    orders.append(list(range(500)))
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two independent permutations agree at one place on average.
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 10
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.2


def test_order_of_a_huge_corpus_needs_no_memory() -> None:
    order = Order(seed=0, silo="hospital", num_sequences=10**15 + 1)
    assert len({order.index(position) for position in range(100)}) == 100


# --- the batches ---


@given(
    num_sequences=st.integers(24, 60),
    shape=st.sampled_from([(1, 1, 1), (2, 3, 1), (1, 2, 4), (3, 1, 3), (6, 2, 2), (24, 1, 1)]),
)
@settings(max_examples=25, deadline=None)
def test_every_sequence_once_per_epoch(
    tmp_path_factory: pytest.TempPathFactory, num_sequences: int, shape: tuple[int, int, int]
) -> None:
    micro, accumulation, num_ranks = shape
    tokens = counting_tokens(tmp_path_factory.mktemp("data") / "s", num_tokens=num_sequences * 4 + 1, sequence_tokens=4)
    mixture = Mixture([tokens], seed=3, silo="court")
    drawn: Counter[int] = Counter()
    num_steps = 2 * num_sequences  # so many steps are whole epochs for any global batch
    ranks = [
        Batches(
            mixture,
            micro_batch_sequences=micro,
            accumulation_steps=accumulation,
            rank=rank,
            num_ranks=num_ranks,
        )
        for rank in range(num_ranks)
    ]
    for _ in range(num_steps):
        drawn.update(global_batch(ranks, accumulation))
    assert drawn == dict.fromkeys(range(num_sequences), num_steps * micro * accumulation * num_ranks // num_sequences)
    assert {rank.state() for rank in ranks} == {num_steps * micro * accumulation * num_ranks}


def global_batch(ranks: list[Batches], accumulation: int, sequence_tokens: int = 4) -> list[int]:
    """The sequences of one inner step over all ranks, in order."""
    drawn: list[int] = []
    for _ in range(accumulation):
        for rank in ranks:
            inputs, targets = next(rank)
            assert inputs.dtype == targets.dtype == torch.int64
            assert torch.equal(inputs + 1, targets)
            assert inputs.shape[1] == sequence_tokens
            drawn += (inputs[:, 0] // sequence_tokens).tolist()
    return drawn


def test_any_shape_draws_the_same_global_batches_and_resumes_with_any_other(tmp_path: Path) -> None:
    tokens = counting_tokens(tmp_path / "s", num_tokens=401, sequence_tokens=4)
    order = Order(seed=0, silo="court", num_sequences=tokens.num_sequences)

    def ranks(shape: tuple[int, int, int], position: int = 0) -> list[Batches]:
        micro, accumulation, num_ranks = shape
        sizes = {"micro_batch_sequences": micro, "accumulation_steps": accumulation, "num_ranks": num_ranks}
        return [
            Batches(Mixture([tokens], seed=0, silo="court"), **sizes, rank=rank, position=position)
            for rank in range(num_ranks)
        ]

    expected = [[order.index(12 * step + i) for i in range(12)] for step in range(20)]
    shapes = [(12, 1, 1), (1, 12, 1), (1, 1, 12), (2, 3, 2), (3, 2, 2), (2, 2, 3)]
    for shape in shapes:
        members = ranks(shape)
        assert [global_batch(members, shape[1]) for _ in range(20)] == expected
    position, resumed = 0, []
    for step in range(20):
        members = ranks(shapes[step % len(shapes)], position)
        resumed.append(global_batch(members, shapes[step % len(shapes)][1]))
        position = members[0].state()
    assert resumed == expected


def test_state_in_the_middle_of_a_step_is_its_beginning(tmp_path: Path) -> None:
    tokens = counting_tokens(tmp_path / "s", num_tokens=401, sequence_tokens=4)
    batches = Batches(
        Mixture([tokens], seed=0, silo="court"), micro_batch_sequences=2, accumulation_steps=3, rank=0, num_ranks=1
    )
    states, inputs = [], []
    for _ in range(6):
        states.append(batches.state())
        inputs.append(next(batches)[0])
    assert states == [0, 0, 0, 6, 6, 6]
    assert batches.state() == 12
    batches.restore(6)
    assert all(torch.equal(next(batches)[0], inputs[i]) for i in (3, 4, 5))


def test_corpus_smaller_than_a_global_batch_is_said_in_one_line(tmp_path: Path) -> None:
    tokens = counting_tokens(tmp_path / "s", num_tokens=30, sequence_tokens=4)
    mixture = Mixture([tokens], seed=0, silo="court")
    with pytest.raises(ConfigError) as caught:
        Batches(mixture, micro_batch_sequences=4, accumulation_steps=1, rank=0, num_ranks=2)
    assert str(caught.value) == (
        "silo.data: 30 tokens given, which are 7 sequences of sequence_tokens=4; allowed: at least one batch of "
        "global_batch_sequences=8: add text, or lower sequence_tokens or global_batch_sequences"
    )


# --- the packed tokens ---


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    shard_tokens=st.integers(1, 13),
    sequence_tokens=st.integers(2, 11),
)
@settings(max_examples=40, deadline=None)
def test_directories_and_shards_read_as_one_sequence(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_tokens: int, sequence_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("data")
    whole = np.random.default_rng(0).integers(0, 70_000, sum(lengths))
    parts = np.split(whole, np.cumsum(lengths)[:-1])
    directories = [
        write_split(folder / str(i), part, vocab_size=70_000, shard_tokens=shard_tokens) for i, part in enumerate(parts)
    ]
    tokens = PackedTokens(directories, sequence_tokens=sequence_tokens)
    assert tokens.num_tokens == len(whole)
    assert tokens.num_sequences == (len(whole) - 1) // sequence_tokens
    for index in range(tokens.num_sequences):
        begin = index * sequence_tokens
        assert np.array_equal(tokens.sequence(index), whole[begin : begin + sequence_tokens + 1])
    if tokens.num_sequences:
        inputs, targets = tokens.batch(range(tokens.num_sequences))
        assert np.array_equal(inputs.flatten(), whole[: inputs.numel()])
        assert np.array_equal(targets.flatten(), whole[1 : targets.numel() + 1])


def test_shards_are_little_endian_memory_maps_of_the_smallest_type(tmp_path: Path) -> None:
    for vocab_size, raw in ((65_536, b"\x01\x00\x02\x01"), (65_537, b"\x01\x00\x00\x00\x02\x01\x00\x00")):
        directory = write_split(tmp_path / str(vocab_size), np.array([1, 258]), vocab_size=vocab_size)
        manifest = verify_shards(directory)
        assert (directory / "shard-00000.bin").read_bytes() == raw
        mapped = open_shard(directory, manifest, manifest.shards[0])
        assert isinstance(mapped, np.memmap)
        assert not mapped.flags.writeable
        assert mapped.tolist() == [1, 258]


def test_broken_splits_are_said_in_one_line(tmp_path: Path) -> None:
    def message(directory: Path, **arguments: str) -> str:
        with pytest.raises(ConfigError) as caught:
            verify_shards(directory, **arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    split = write_split(tmp_path / "split", np.arange(2_500))
    assert verify_shards(split, tokenizer_sha256=TOKENIZER).num_tokens == 2_500
    assert message(split, tokenizer_sha256=OTHER_TOKENIZER, key="silos.court.data") == (
        f"silos.court.data: {split} was packed with tokenizer a1a1a1a1a1a1, the run uses b2b2b2b2b2b2: "
        "prepare it again or change tokenizer"
    )
    shard = split / "shard-00001.bin"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1] + b"\xff")
    assert read_manifest(split).num_tokens == 2_500  # same size: only the full check can see it
    assert message(split).startswith(f"silo.data: {shard} has sha256 ")
    shard.write_bytes(raw[:-2])
    assert message(split) == (
        f"silo.data: {shard} has 1998 bytes, manifest.json says 2000: copy or prepare the split again"
    )
    shard.unlink()
    assert f"{shard} is missing" in message(split)
    assert message(tmp_path / "nowhere") == (
        f"silo.data: '{tmp_path}/nowhere' given; it has no manifest.json: name a packed split (atoll data prepare)"
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": 1}, "format 1 given; allowed: 2: prepare the split again"),
        ({"num_tokens": "many"}, "num_tokens: 'many' given: prepare the split again"),
        ({"num_tokens": 7}, "its end_of_text_id, num_tokens or shards disagree: prepare it again"),
        ({"shards": [{"file": "../x.bin", "num_tokens": 9, "sha256": ""}]}, "disagree: prepare it again"),
        ({"shards": [{"file": "shard-0.bin"}]}, "not a manifest of format 2"),
        ({"surprise": 1}, "not a manifest of format 2"),
        (
            {"vocab_size": 70_000},
            "token_type: 'uint16' given; allowed for a vocab_size of 70000: uint32: prepare the split again",
        ),
    ],
)
def test_manifests_are_checked(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    file = write_split(tmp_path / "split", np.arange(9)) / MANIFEST_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError) as caught:
        read_manifest(file.parent)
    assert str(caught.value).startswith(f"{file}: ")
    assert expected in str(caught.value)


def test_a_manifest_that_is_not_json_is_said(tmp_path: Path) -> None:
    file = write_split(tmp_path / "split", np.arange(9)) / MANIFEST_FILE
    file.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_manifest(file.parent)


def test_token_outside_the_vocabulary_names_the_shard(tmp_path: Path) -> None:
    split = write_split(tmp_path / "split", np.arange(20), vocab_size=20, shard_tokens=10)
    write_manifest(split, dataclasses.replace(read_manifest(split), vocab_size=15))
    tokens = PackedTokens([split], sequence_tokens=9)
    assert tokens.sequence(0).max() == 9
    with pytest.raises(ConfigError, match=r"shard-00001.bin holds token 18, its vocab_size is 15: copy or prepare"):
        tokens.sequence(1)


def test_splits_of_different_tokenizers_do_not_mix(tmp_path: Path) -> None:
    one = write_split(tmp_path / "one", np.arange(9))
    other = write_split(tmp_path / "other", np.arange(9), tokenizer=OTHER_TOKENIZER)
    with pytest.raises(ConfigError, match="was packed with tokenizer b2b2b2b2b2b2"):
        PackedTokens([one, other], sequence_tokens=2)
    with pytest.raises(ConfigError, match=r"silos.court.data: nothing given; allowed: one or more directories"):
        PackedTokens([], sequence_tokens=2, key="silos.court.data")


# --- held-out text ---


@given(num_sequences=st.integers(0, 30), micro=st.integers(1, 7), num_ranks=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_held_out_batches_are_the_same_for_any_rank_count(
    tmp_path_factory: pytest.TempPathFactory, num_sequences: int, micro: int, num_ranks: int
) -> None:
    tokens = counting_tokens(tmp_path_factory.mktemp("data") / "s", num_tokens=23 * 3 + 2, sequence_tokens=3)
    parts = [
        list(
            held_out_batches(
                tokens, num_sequences=num_sequences, micro_batch_sequences=micro, rank=rank, num_ranks=num_ranks
            )
        )
        for rank in range(num_ranks)
    ]
    assert len({len(part) for part in parts}) == 1
    seen: list[int] = []
    for batches in zip(*parts, strict=True):
        for inputs, targets, weights in batches:
            assert inputs.shape == targets.shape == (micro, 3)
            assert weights.shape == (micro,)
            assert set(weights.tolist()) <= {0.0, 1.0}
            seen += (inputs[weights == 1.0, 0] // 3).tolist()
    total = min(num_sequences or 23, 23)
    assert seen == [number * 23 // total for number in range(total)]
    assert len(set(seen)) == total
    gaps = {after - before for before, after in itertools.pairwise([*seen, 23])}
    assert max(gaps) - min(gaps) <= 1, "evenly spread, from the first to the last part of the split"


def test_held_out_text_shorter_than_a_sequence_is_said(tmp_path: Path) -> None:
    tokens = PackedTokens([write_split(tmp_path / "s", np.arange(4))], sequence_tokens=4, key="silo.valid.law")
    with pytest.raises(ConfigError, match=r"silo.valid.law: 4 tokens given; allowed: more than sequence_tokens=4"):
        next(held_out_batches(tokens, num_sequences=1, micro_batch_sequences=1, rank=0, num_ranks=1))


# --- atomic writes ---


def test_atomic_path_leaves_the_old_or_the_new_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with atomic_path(file) as temporary:
        temporary.write_text("old")

    def fail_half_way() -> None:
        with atomic_path(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert file.read_text() == "old"
    with atomic_path(file) as temporary:
        temporary.write_text("new")
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
