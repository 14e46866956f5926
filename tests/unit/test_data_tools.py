"""Corpora, tokenizer, packing and their commands."""

import ast
import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

from data_tools import corpora as corpora_module
from data_tools.cli import app
from data_tools.corpora import read_documents, split_file, training_file, write_python_corpora
from data_tools.pack import prepare, prepare_corpus
from data_tools.tokenizer import load_tokenizer, train_tokenizer
from pretrain.config import ConfigError
from pretrain.silo.data import PackedTokens
from pretrain.silo.shards import tokenizer_sha256, verify_shards

TEXTS = [
    "The court finds that the appeal is allowed. The court finds that costs follow the event.\n" * 3,
    "Der Patient klagt über Schmerzen; 日本語 and an emoji 🙂 too.",
    "A text that says <|endoftext|> in its middle has no token there.",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(TEXTS, vocab_size=280, output=tmp_path_factory.mktemp("tokenizer"))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = "".join(json.dumps({"text": text, "source": 1}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def error_of(function: Callable[..., Any], *arguments: object, **named: object) -> str:
    with pytest.raises(ConfigError) as caught:
        list(function(*arguments, **named))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- reading ---


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_json_lines_are_read_in_order_without_blank_ones(tmp_path: Path, name: str) -> None:
    file = write_jsonl(tmp_path / name, [*TEXTS, "", "  \n"])
    assert list(read_documents(file)) == TEXTS
    assert split_file(tmp_path, "train") == training_file(tmp_path) == training_file(file) == file


def test_text_files_are_cut_at_separators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "all.txt"
    file.write_text("one\ntwo\n<|endoftext|>\n\n<|endoftext|>\nthree\n")
    assert list(read_documents(file)) == ["one\ntwo\n", "three\n"]
    monkeypatch.setattr(corpora_module, "MAX_TEXT_DOCUMENT_CHARACTERS", 4)
    assert list(read_documents(file)) == ["one\n", "two\n", "three\n"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "a"', "line 2: not JSON"),
        (b'{"txt": "a"}', 'line 2: no text; allowed: {"text": "..."}: mend or drop the line'),
        (b'{"text": 3}', "line 2: no text"),
        (b'["text"]', "line 2: no text"),
        (b'{"text": "\\ud800"}', "line 2: half of a surrogate pair in text"),
        (b'{"text": "\xff"}', "line 2: not UTF-8"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, expected: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    assert error_of(read_documents, file).startswith(f"{file}, {expected}")


def test_unreadable_corpora_are_named(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "train.jsonl.gz", ["word " * i for i in range(1, 300)])
    file.write_bytes(file.read_bytes()[:-20])
    assert "damaged archive" in error_of(read_documents, file)
    assert (
        error_of(read_documents, tmp_path / "no.jsonl")
        == f"corpus: '{tmp_path}/no.jsonl' given; No such file or directory"
    )
    assert "allowed: a folder or a file of .jsonl.gz .jsonl" in error_of(read_documents, tmp_path / "x.parquet")
    assert f"corpus: {tmp_path} has none; allowed: one of valid.jsonl.gz" in error_of(split_file, tmp_path, "valid")
    write_jsonl(tmp_path / "train.jsonl", TEXTS)
    assert f"corpus: {tmp_path} has train.jsonl.gz, train.jsonl; allowed" in error_of(split_file, tmp_path, "train")


# --- the tokenizer ---


def test_training_is_deterministic_over_processes(tokenizer: Path, tmp_path: Path) -> None:
    assert train_tokenizer(TEXTS, vocab_size=280, output=tokenizer.parent) == tokenizer  # equal: no complaint
    code = (
        "import sys, json, pathlib; from data_tools.tokenizer import train_tokenizer;"
        "train_tokenizer(json.loads(sys.argv[1]), vocab_size=280, output=pathlib.Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(TEXTS), str(tmp_path)], check=True)
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_tokenizer_hash_is_of_the_content_not_the_layout(tokenizer: Path, tmp_path: Path) -> None:
    loaded = json.loads(tokenizer.read_text())
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(dict(reversed(loaded.items())), indent=7))
    assert tokenizer_sha256(other) == tokenizer_sha256(tokenizer)
    other.write_text(json.dumps(loaded | {"version": "2"}))
    assert tokenizer_sha256(other) != tokenizer_sha256(tokenizer)


def test_tokenizer_errors(tokenizer: Path, tmp_path: Path) -> None:
    assert "--vocab-size: 256 given; allowed: 257" in error_of(train_tokenizer, TEXTS, vocab_size=256, output=tmp_path)
    assert "the text is enough for 2" in error_of(train_tokenizer, ["aa bb"], vocab_size=9_000, output=tmp_path)
    assert f"{tokenizer} is another tokenizer: delete it" in error_of(
        train_tokenizer, TEXTS, vocab_size=281, output=tokenizer.parent
    )
    assert "--tokenizer: " in error_of(load_tokenizer, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "is not a tokenizer" in error_of(load_tokenizer, tmp_path / "tokenizer.json")


# --- packing ---


def decoded(split: Path, tokenizer: Path) -> list[str]:
    """The documents of a packed split, read through memory maps and decoded."""
    encoder, manifest = Tokenizer.from_file(str(tokenizer)), verify_shards(split)
    tokens = PackedTokens([split], sequence_tokens=manifest.num_tokens - 1).sequence(0)
    ends = np.flatnonzero(tokens == manifest.end_of_text_id)
    assert len(ends) == manifest.num_documents
    assert ends[-1] == manifest.num_tokens - 1
    return [encoder.decode(part[part != manifest.end_of_text_id]) for part in np.split(tokens, ends[:-1])]


@pytest.mark.parametrize("shard_tokens", [7, 1_000_000])
def test_packing_round_trip(tokenizer: Path, tmp_path: Path, shard_tokens: int) -> None:
    source = write_jsonl(tmp_path / "text.jsonl.gz", TEXTS)
    manifest = prepare(source, tokenizer=tokenizer, output=tmp_path / "packed", shard_tokens=shard_tokens)
    assert manifest == verify_shards(tmp_path / "packed", tokenizer_sha256=tokenizer_sha256(tokenizer))
    assert decoded(tmp_path / "packed", tokenizer) == TEXTS
    assert manifest.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert manifest.token_type == "uint16"
    assert all(shard.num_tokens <= shard_tokens for shard in manifest.shards)
    assert len(manifest.shards) == -(-manifest.num_tokens // shard_tokens)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "text.jsonl.gz"]


def test_a_tokenizer_that_truncates_does_not_truncate_documents(tokenizer: Path, tmp_path: Path) -> None:
    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.enable_truncation(3)
    encoder.enable_padding(length=999)
    encoder.save(str(tmp_path / "tokenizer.json"))
    source = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    prepare(source, tokenizer=tmp_path, output=tmp_path / "packed")
    assert decoded(tmp_path / "packed", tokenizer) == TEXTS


def test_packing_again_keeps_the_same_and_refuses_another(tokenizer: Path, tmp_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "text.jsonl", TEXTS), tmp_path / "packed"
    first = prepare(source, tokenizer=tokenizer, output=output)
    written = (output / "manifest.json").stat().st_mtime_ns
    assert prepare(source, tokenizer=tokenizer.parent, output=output) == first
    assert (output / "manifest.json").stat().st_mtime_ns == written
    write_jsonl(source, TEXTS[:1])
    assert "holds other text or another tokenizer's tokens: delete it" in error_of(
        prepare, source, tokenizer=tokenizer, output=output
    )
    assert decoded(output, tokenizer) == TEXTS
    assert "exists and is no packed split" in error_of(prepare, source, tokenizer=tokenizer, output=source)


def test_a_failure_half_way_leaves_nothing(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "text.jsonl"
    source.write_text('{"text": "good"}\n{"text"\n')
    assert "line 2" in error_of(prepare, source, tokenizer=tokenizer, output=tmp_path / "packed")
    source.write_text("\n")
    assert "holds no documents" in error_of(prepare, source, tokenizer=tokenizer, output=tmp_path / "packed")
    assert "--shard-tokens: 0" in error_of(prepare, source, tokenizer=tokenizer, output=tmp_path, shard_tokens=0)
    assert list(tmp_path.iterdir()) == [source]


def test_prepare_corpus_packs_train_and_valid(tokenizer: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus" / "train.jsonl.gz", TEXTS)
    write_jsonl(tmp_path / "corpus" / "valid.jsonl", TEXTS[:1])
    manifests = prepare_corpus(tmp_path / "corpus", tokenizer=tokenizer, output=tmp_path / "packed")
    assert {path.name: manifest.num_documents for path, manifest in manifests.items()} == {"train": 3, "valid": 1}
    assert verify_shards(tmp_path / "packed" / "valid").num_documents == 1


# --- the Python corpora ---


def test_python_corpora_are_deterministic_disjoint_and_of_three_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora_module, "MAX_BYTES", {"train": 200_000, "valid": 20_000})
    folders = write_python_corpora(tmp_path / "one")
    again = write_python_corpora(tmp_path / "two")
    assert list(folders) == ["library", "tests", "prose"]
    seen: set[str] = set()
    code_share = {}
    for name, folder in folders.items():
        documents: list[str] = []
        for split in ("train", "valid"):
            file = split_file(folder, split)
            assert file.read_bytes() == split_file(again[name], split).read_bytes()
            documents += read_documents(file)
        assert seen.isdisjoint(documents)
        assert len(set(documents)) == len(documents)
        assert all(200 <= len(document) <= 9_000 for document in documents)
        assert sum(len(document.encode()) for document in documents) > 150_000
        seen.update(documents)
        text = "".join(documents)
        code_share[name] = text.count("self.") / len(text)
    assert 4 * code_share["prose"] < min(code_share["library"], code_share["tests"])
    before = split_file(folders["prose"], "train").stat().st_mtime_ns
    assert write_python_corpora(tmp_path / "one") == folders
    assert split_file(folders["prose"], "train").stat().st_mtime_ns == before


def test_python_source_is_split_into_code_and_docstrings(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text('"""What it is."""\n\nx = 1\n\n\ndef f():\n    """What\n    it does."""\n    return 2\n')
    code, docstrings = corpora_module._code_and_docstrings(file)
    assert code == "\nx = 1\n\n\ndef f():\n    return 2\n"
    assert docstrings == "What it is.\n\nWhat\nit does.\n"
    ast.parse(code)


def test_prose_has_no_code_lines() -> None:
    text = "A sentence about numbers.\n>>> print(1)\n[![badge](https://x.y/z.svg)]\n| 1 | 2 |\n\n\n\n\nAnother one.\n"
    assert corpora_module._prose_lines(text) == "A sentence about numbers.\n\nAnother one.\n"


# --- the commands ---


def test_commands_from_text_to_shards(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for split in ("train", "valid"):
        write_jsonl(corpus / f"{split}.jsonl.gz", TEXTS)
    run = CliRunner()
    arguments = ["tokenizer", str(corpus), "--vocab-size", "270", "--output", str(tmp_path / "tokenizer")]
    result = run.invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "vocabulary 270" in result.stdout
    arguments = ["prepare", str(corpus), "--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "out")]
    result = run.invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "3 documents" in result.stdout
    assert verify_shards(tmp_path / "out" / "train").num_documents == 3
    with pytest.raises(ConfigError, match="there is no such file"):
        run.invoke(app, ["prepare", str(tmp_path / "no"), *arguments[2:]], catch_exceptions=False)
    for command in ("corpora", "tokenizer", "prepare"):
        help_text = run.invoke(app, [command, "--help"]).stdout
        assert "Example:" in help_text
        assert f"atoll data {command}" in help_text


def test_preparing_imports_no_torch() -> None:
    code = "import sys, data_tools.cli, data_tools.pack; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
