"""Tokenizers of others: text that spells a special token stays text, ids may have gaps, a broken one is one line."""

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_tools.pack import Recipe, prepare
from data_tools.sources import Source
from data_tools.tokenizer import PlainText, train_tokenizer
from pretrain.silo.shards import read_manifest, tokenizer_sha256
from pretrain.silo.verify import verify_tokens
from pretrain.silo.vocabulary import read_tokenizer, vocab_size_of, vocabulary_size
from tests.support import one_line_error, pseudo_text
from tests.text_files import write_jsonl

TEXTS = pseudo_text("tokenizers", 20_000)
SPELLED = [
    "one </s> two <|endoftext|> three",
    "</s></s>",
    "<|endoftext|>",
    "</s>a<s>b<unk>c<|endoftext|>",
    "na\u0378\u2603",
]


def unigram(**changes: Any) -> dict[str, Any]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    settings = {"vocab_size": 200, "special_tokens": ["<unk>", "<s>", "</s>"], "unk_token": "<unk>"} | changes
    letters = list(string.ascii_lowercase + "<>/|,.")
    tokenizer.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(show_progress=False, initial_alphabet=letters, **settings)
    )
    return json.loads(tokenizer.to_str())


def own(folder: Path) -> dict[str, Any]:
    return json.loads(train_tokenizer(TEXTS, vocab_size=300, output=folder).read_text())


def plain_added(folder: Path) -> dict[str, Any]:
    made = own(folder)
    for token in made["added_tokens"]:
        token["special"] = False
    return made


def saved(made: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("make", [own, plain_added, lambda folder: unigram()], ids=["bpe", "plain added", "unigram"])
def test_text_that_spells_the_end_of_text_stays_text(tmp_path: Path, make: Callable[[Path], dict[str, Any]]) -> None:
    file = saved(make(tmp_path / "own"), tmp_path / "tokenizer")
    source = write_jsonl(tmp_path / "text.jsonl", [*TEXTS, *SPELLED])
    recipe = Recipe(sources=(Source(path=str(source)),), tokenizer=file, held_out=0.0)
    manifest = prepare(recipe, tmp_path / "packed")["train"]
    assert manifest.num_documents == len(TEXTS) + len(SPELLED)
    verify_tokens(tmp_path / "packed" / "train", manifest)
    plain, decoder = PlainText(file), Tokenizer.from_file(str(file))
    special = {decoder.token_to_id(name) for name in ("</s>", "<s>", "<|endoftext|>")}
    for text, ids in zip(SPELLED, plain.encode(SPELLED), strict=True):
        assert not special & set(ids)
        if "\u0378" not in text and "<unk>" not in text:
            assert decoder.decode(ids).replace(" ", "") == text.replace(" ", "")
    # Other text is encoded as the library does it.
    assert list(plain.encode(TEXTS)) == [one.ids for one in decoder.encode_batch(TEXTS, add_special_tokens=False)]


def test_many_spelled_ends_are_one_document(tmp_path: Path) -> None:
    plain = PlainText(saved(unigram(), tmp_path))
    (ids,) = plain.encode(["</s>" * 20_000])
    assert plain.end_id not in ids


def test_a_tokenizer_that_ends_documents_at_what_it_does_not_know_is_refused(tmp_path: Path) -> None:
    file = saved(unigram(special_tokens=["<s>", "</s>"], unk_token="</s>"), tmp_path / "tokenizer")
    source = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    recipe = Recipe(sources=(Source(path=str(source)),), tokenizer=file)
    assert one_line_error(prepare, recipe, tmp_path / "packed") == (
        "--tokenizer: it makes '</s>', which ends documents, of '\\u0378' in their text; allowed: a tokenizer whose "
        "unknown token is another one"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.jsonl", "tokenizer"]


def test_the_vocabulary_reaches_to_the_largest_id(tmp_path: Path) -> None:
    made = own(tmp_path / "own")
    vocabulary = made["model"]["vocab"]
    for token, number in sorted(vocabulary.items(), key=lambda item: item[1])[-20:]:
        vocabulary[token] = number + 3
    file = saved(made, tmp_path / "gaps")
    assert read_tokenizer(file).get_vocab_size() == 300
    assert vocabulary_size(file) == 303
    source = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    prepare(Recipe(sources=(Source(path=str(source)),), tokenizer=file), tmp_path / "packed")
    assert read_manifest(tmp_path / "packed" / "train").vocab_size == 303
    assert vocab_size_of(Tokenizer(models.BPE())) == 0


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("[" * 100_000, "not JSON (JSON nested too deeply given; allowed: 32 levels): make it again"),
        ('{"a": ' * 100_000, "not JSON (JSON nested too deeply given; allowed: 32 levels): make it again"),
        ('{"a": 1e999}', "not JSON (1e999 given; allowed: finite numbers): make it again"),
        ("{}", "is not a tokenizer ("),
    ],
)
def test_a_broken_tokenizer_is_one_line(tmp_path: Path, raw: str, expected: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(raw)
    assert expected in one_line_error(read_tokenizer, file)
    (tmp_path / "manifest.json").write_text(raw)
    assert one_line_error(read_manifest, tmp_path).startswith(f"{tmp_path}/manifest.json: ")


def test_a_library_that_panics_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = own(tmp_path / "own")
    made["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    file = saved(made, tmp_path / "tokenizer")
    assert len(tokenizer_sha256(file)) == 64
    assert one_line_error(read_tokenizer, file).startswith(f"tokenizer: {file} is not a tokenizer (Precompiled: Error(")
    assert capfd.readouterr().err == ""
