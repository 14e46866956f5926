"""Inspecting packed splits: every figure against numpy on all tokens at once."""

import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer

from data_tools import inspect as inspect_module
from data_tools.inspect import Inspection, find_splits, inspect_splits, print_inspections
from data_tools.report import new_picture
from data_tools.tokenizer import end_of_text_id, train_tokenizer
from pretrain.silo.shards import tokenizer_sha256
from pretrain.silo.vocabulary import vocab_size_of
from pretrain.silo.writer import SplitWriter
from tests.support import one_line_error

TEXTS = [
    "The court finds that the appeal is allowed.\nCosts follow the event. " * 3,
    "Der Patient klagt über Schmerzen; 日本語 and an emoji 🙂 too.",
    "The \x1b[31mred\x1b[0m text that a [bold]terminal[/bold] must not obey.",
    "短",
]
SECRET = "🙂" * 1_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(TEXTS, vocab_size=300, output=tmp_path_factory.mktemp("tokenizer"))


def pack(directory: Path, texts: Sequence[str], tokenizer: Path, *, shard_tokens: int = 50) -> list[list[int]]:
    """Write a split; returns each document's tokens, with the end-of-text token."""
    encoder = Tokenizer.from_file(str(tokenizer))
    end = end_of_text_id(encoder)
    documents = [[*encoding.ids, end] for encoding in encoder.encode_batch(list(texts))]
    pack_tokens(
        directory,
        documents,
        sha256=tokenizer_sha256(tokenizer),
        vocab_size=vocab_size_of(encoder),
        end=end,
        shard_tokens=shard_tokens,
    )
    return documents


def pack_tokens(
    directory: Path,
    documents: list[list[int]],
    *,
    vocab_size: int,
    end: int = 0,
    sha256: str = "0" * 64,
    shard_tokens: int = 1_000,
) -> None:
    writer = SplitWriter(directory, vocab_size=vocab_size, end_of_text_id=end, shard_tokens=shard_tokens)
    num_bytes = 4 * sum(map(len, documents))
    writer.write(np.concatenate(documents), np.array([len(one) for one in documents]), num_bytes)
    writer.finish(tokenizer_sha256=sha256, recipe_sha256="0" * 64)


def printed(found: Sequence[Inspection]) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    print_inspections(found, console)
    return console.export_text()


def row(text: str, label: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{label}  "))
    return line.strip().removeprefix(label).split()


# --- which splits ---


def test_splits_are_found_at_any_depth_and_named_by_what_differs(tmp_path: Path) -> None:
    splits = {}
    for name in ("law/train", "law/valid", "medicine/deep/train", ".making.tmp/train"):
        splits[name] = tmp_path / "packed" / name
        splits[name].mkdir(parents=True)
        (splits[name] / "manifest.json").write_text("{}")
    hidden = splits.pop(".making.tmp/train")
    assert find_splits([tmp_path / "packed"]) == {path: name for name, path in splits.items()}
    assert find_splits([hidden, hidden]) == {hidden: "train"}
    law = {splits["law/train"]: "train", splits["law/valid"]: "valid"}
    assert find_splits([tmp_path / "packed/law"]) == law
    assert find_splits([splits["law/valid"], splits["law/train"], tmp_path / "packed/law"]) == law
    two = find_splits([splits["law/train"], tmp_path / "packed/medicine"])
    assert list(two.values()) == ["law/train", "medicine/deep/train"]


def test_errors_before_anything_is_counted(tokenizer: Path, tmp_path: Path) -> None:
    split = tmp_path / "split"
    pack(split, TEXTS, tokenizer)
    (tmp_path / "empty").mkdir()

    def error_of(*directories: Path, **named: object) -> str:
        return one_line_error(inspect_splits, list(directories), **named)

    no = tmp_path / "no"
    assert error_of(split, no) == f"splits: '{no}' given; there is no such folder: name a packed split"
    assert error_of(tmp_path / "empty") == (
        f"splits: '{tmp_path}/empty' given; there is no manifest.json in it or below: name a packed split, or a folder "
        "of some (atoll data prepare)"
    )
    assert error_of(split, num_samples=-1) == "--samples: -1 given; allowed: 0 or more"
    assert error_of(split, num_samples=3) == "--samples: 3 given, and no tokenizer to decode with: add --tokenizer"
    pdf = "--picture: 'a.pdf' given; allowed: a name that ends in .png"
    assert error_of(split, picture=Path("a.pdf")) == pdf
    other = train_tokenizer(TEXTS, vocab_size=290, output=tmp_path / "other")
    picture = tmp_path / "a.png"
    assert error_of(split, tokenizer=other.parent, picture=picture) == (
        f"--tokenizer: {other.parent} given, which is {tokenizer_sha256(other)[:12]}; {split} was packed with "
        f"{tokenizer_sha256(tokenizer)[:12]}: name the tokenizer.json that packed it"
    )
    assert not picture.exists()


def test_a_damaged_split_is_named(tokenizer: Path, tmp_path: Path) -> None:
    split = tmp_path / "split"
    documents = pack(split, TEXTS, tokenizer)
    ends = np.cumsum([len(one) for one in documents]).astype("<u8")
    num_tokens = int(ends[-1])
    for damaged in (ends[::-1], ends * 0, ends - np.uint64(1), ends + np.uint64(1 << 63)):
        (split / "documents.bin").write_bytes(damaged.astype("<u8").tobytes())
        assert one_line_error(inspect_splits, [split]) == (
            f"splits: {split}/documents.bin does not hold the ends of documents, rising to the {num_tokens} tokens of "
            "manifest.json: copy or prepare the split again"
        )
    (split / "documents.bin").write_bytes(ends.tobytes())
    shard = split / "shard-00001.bin"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    assert f"{shard} holds token 65535, its vocab_size is 300" in one_line_error(inspect_splits, [split])
    shard.unlink()
    assert f"splits: {shard} is missing" in one_line_error(inspect_splits, [split])


# --- what is in them ---


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    shard_tokens=st.integers(1, 300),
    piece=st.integers(1, 100),
    percent=st.sampled_from([1, 10, 50, 90, 99, 100]),
)
def test_counts_and_percentiles_are_exact_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_tokens: int, piece: int, percent: int
) -> None:
    random = np.random.default_rng(0)
    documents = [[*random.integers(1, 30, length - 1).tolist(), 0] for length in lengths]
    split = tmp_path_factory.mktemp("split")
    pack_tokens(split, documents, vocab_size=30, shard_tokens=shard_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect_module, "PIECE", piece)
        (found,) = inspect_splits([split])
    assert found.token_counts.tolist() == np.bincount(np.concatenate(documents), minlength=30).tolist()
    assert dict(zip(found.lengths.tolist(), found.length_counts.tolist(), strict=True)) == {
        length: lengths.count(length) for length in set(lengths)
    }
    assert found.length_percentile(percent) == np.percentile(lengths, percent, method="inverted_cdf")


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_of_a_large_split_evenly_spread_pieces_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int
) -> None:
    monkeypatch.setattr(inspect_module, "PIECE", 10)
    monkeypatch.setattr(inspect_module, "MAX_COUNTED_TOKENS", 30)
    # Token i stands at place i: what was counted says where it was read.
    pack_tokens(tmp_path / "split", [[*range(1, 200), 0]], vocab_size=vocab_size, shard_tokens=97)
    (found,) = inspect_splits([tmp_path / "split"])
    at = np.flatnonzero(found.token_counts)
    assert at.tolist() == [0, *range(1, 11), *range(96, 106), *range(191, 200)]
    assert found.num_counted_tokens == 30
    assert "split: tokens counted in pieces spread evenly, 30 of 200" in printed([found])
    assert row(printed([found]), "used") == [f"{100 * 30 / vocab_size:.1f}", "%"]
    monkeypatch.setattr(inspect_module, "MAX_COUNTED_TOKENS", 200)
    assert "spread" not in printed(inspect_splits([tmp_path / "split"]))


def test_splits_side_by_side(tokenizer: Path, tmp_path: Path) -> None:
    documents = pack(tmp_path / "law/train", TEXTS, tokenizer)
    pack(tmp_path / "one", [TEXTS[0]], tokenizer)
    found = inspect_splits([tmp_path], tokenizer=tokenizer)
    text = printed(found)
    num_tokens = [sum(map(len, documents)), len(documents[0])]
    assert text.splitlines()[0].split() == ["law/train", "one"]
    assert row(text, "documents") == ["4", "1"]
    assert row(text, "tokens") == [str(one) for one in num_tokens]
    assert row(text, "text") == [str(4 * num_tokens[0]), "B", str(4 * num_tokens[1]), "B"]
    assert row(text, "bytes per token") == ["4.00", "4.00"]
    assert row(text, "token type") == ["uint16", "uint16"]
    assert row(text, "mean") == [f"{num_tokens[0] / 4:.1f}", f"{num_tokens[1]:.1f}"]
    assert row(text, "median")[0] == str(sorted(map(len, documents))[1])
    assert row(text, "longest")[0] == str(max(map(len, documents)))
    used = [100 * len(set(itertools.chain(*part))) / 300 for part in (documents, documents[:1])]
    assert row(text, "used") == [f"{used[0]:.1f}", "%", f"{used[1]:.1f}", "%"]
    assert all(not one.samples for one in found)
    assert "court" not in text


def test_frequent_tokens_are_decoded_with_their_shares(tokenizer: Path, tmp_path: Path) -> None:
    encoder = Tokenizer.from_file(str(tokenizer))
    vocabulary, end = encoder.get_vocab(), end_of_text_id(encoder)
    letter = vocabulary["x"]
    tokens = [letter] * 5 + [vocabulary["ð"]] * 3 + [vocabulary["Ċ"]] * 2 + [end]
    sha256 = tokenizer_sha256(tokenizer)
    pack_tokens(tmp_path / "split", [tokens], vocab_size=vocab_size_of(encoder), end=end, sha256=sha256)
    (found,) = inspect_splits([tmp_path], tokenizer=tokenizer)
    shares = [5 / 11, 3 / 11, 2 / 11, 1 / 11]
    # Bytes that are no text alone are shown as the vocabulary writes them.
    assert found.frequent == tuple(zip(["'x'", "ð", r"'\n'", "'<|endoftext|>'"], shares, strict=True))
    assert row(printed([found]), "1") == ["'x'", "45.5", "%"]
    (found,) = inspect_splits([tmp_path])
    assert found.frequent[0] == (f"id {letter}", 5 / 11)


def test_samples_are_documents_cut_and_the_same_by_seed(tokenizer: Path, tmp_path: Path) -> None:
    documents = pack(tmp_path / "split", [*TEXTS, SECRET], tokenizer)

    def samples(num_samples: int, seed: int) -> dict[int, str]:
        (found,) = inspect_splits([tmp_path / "split"], tokenizer=tokenizer, num_samples=num_samples, seed=seed)
        assert [sample.num_tokens for sample in found.samples] == [len(documents[one.number]) for one in found.samples]
        return {sample.number: sample.text for sample in found.samples}

    assert samples(99, 0) == dict(enumerate([*TEXTS, "🙂" * 400 + "…"]))
    chosen = [tuple(samples(2, seed)) for seed in range(8)]
    assert chosen == [tuple(samples(2, seed)) for seed in range(8)]
    assert len(set(chosen)) > 1
    assert all(first < second for first, second in chosen)


def test_samples_go_to_the_terminal_as_they_are_and_nowhere_else(tokenizer: Path, tmp_path: Path) -> None:
    pack(tmp_path / "split", TEXTS, tokenizer)
    without, picture = tmp_path / "without.png", tmp_path / "made/with.png"
    inspect_splits([tmp_path / "split"], picture=without)
    found = inspect_splits([tmp_path / "split"], tokenizer=tokenizer, num_samples=4, picture=picture)
    text = printed(found)
    assert "split, document 2, " in text
    assert r"The \x1b[31mred\x1b[0m text that a [bold]terminal[/bold] must not obey." in text
    assert picture.read_bytes() == without.read_bytes()
    assert not any(word in picture.read_bytes() for word in (b"Software", b"tIME", b"tEXt"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "split", "without.png"]
    pack(tmp_path / "other/split", TEXTS[:3], tokenizer)
    inspect_splits([tmp_path / "other/split"], picture=picture)
    assert picture.read_bytes() != without.read_bytes()


@pytest.mark.filterwarnings("error")
def test_many_splits_and_tiny_ones_are_drawn_and_printed(tmp_path: Path) -> None:
    for number in range(10):
        pack_tokens(tmp_path / f"_corpus $x_{number}$", [[0]] * (number + 1), vocab_size=1)
    found = inspect_splits([tmp_path], picture=tmp_path / "a.png")
    assert row(printed(found).split("\n\n")[2], "documents") == ["9", "10"]
    assert (tmp_path / "a.png").stat().st_size > 1_000


def test_ticks_are_numbers_not_formulas(tmp_path: Path) -> None:
    pack_tokens(tmp_path / "split", [[1, 2, 3, 0], [1, 2, 3, 4, 0]], vocab_size=9)
    with new_picture(tmp_path / "a.png") as figure:
        inspect_module._draw(figure, inspect_splits([tmp_path]))
        figure.draw_without_rendering()
        axes = [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
        ticks = [label.get_text() for axis in axes for label in axis.get_ticklabels(which="both")]
    assert {"20", "4", "1"} <= set(ticks)
    assert not any(sign in tick for tick in ticks for sign in "$\\{")


def test_a_split_without_documents_is_damaged(tmp_path: Path) -> None:
    pack_tokens(tmp_path / "split", [[1, 0]], vocab_size=2)
    manifest = json.loads((tmp_path / "split/manifest.json").read_text())
    (tmp_path / "split/manifest.json").write_text(json.dumps(manifest | {"num_documents": 0}))
    (tmp_path / "split/documents.bin").write_bytes(b"")
    assert "does not hold the ends of documents" in one_line_error(inspect_splits, [tmp_path])
