"""Corpora, tokenizer, and the commands."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_tools import corpora as corpora_module
from data_tools.cli import app
from data_tools.corpora import write_python_corpora
from data_tools.sources import read_documents, split_file
from data_tools.tokenizer import load_tokenizer, train_tokenizer
from pretrain.config.errors import ConfigError
from pretrain.silo.shards import tokenizer_sha256, verify_shards
from tests.support import one_line_error
from tests.text_files import TEXTS, write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(TEXTS, vocab_size=280, output=tmp_path_factory.mktemp("tokenizer"))


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
    assert "--vocab-size: 256 given; allowed: 257" in one_line_error(
        train_tokenizer, TEXTS, vocab_size=256, output=tmp_path
    )
    assert "the text is enough for 2" in one_line_error(train_tokenizer, ["aa bb"], vocab_size=9_000, output=tmp_path)
    assert f"{tokenizer} is another tokenizer: delete it" in one_line_error(
        train_tokenizer, TEXTS, vocab_size=281, output=tokenizer.parent
    )
    assert "--tokenizer: " in one_line_error(load_tokenizer, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "is not a tokenizer" in one_line_error(load_tokenizer, tmp_path / "tokenizer.json")


# --- the Python corpora ---


@pytest.mark.soak
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


def atoll(*arguments: object) -> str:
    """What `atoll data ARGUMENTS` prints."""
    result = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_commands_from_text_to_shards(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for split in ("train", "valid"):
        write_jsonl(corpus / f"{split}.jsonl.gz", TEXTS)
    counts, tokenizer = tmp_path / "counts.tsv", tmp_path / "tokenizer"
    assert "read it before you send it" in atoll(
        "counts", corpus, "--output", counts, "--min-count", 1, "--min-documents", 1
    )
    assert "vocabulary 270" in atoll("tokenizer", "--counts", counts, "--vocab-size", 270, "--output", tokenizer)
    # The same tokenizer from the text itself: all that was counted was exported.
    assert "vocabulary 270" in atoll("tokenizer", corpus, "--vocab-size", 270, "--output", tokenizer)
    packed = tmp_path / "packed"
    assert "3 documents" in atoll("prepare", corpus, "--tokenizer", tokenizer, "--output", packed)
    assert verify_shards(packed / "train").num_documents == 3
    assert atoll("verify", packed, "--tokenizer", tokenizer).count("whole") == 2
    picture = tmp_path / "picture.png"
    shown = atoll("inspect", packed, "--tokenizer", tokenizer, "--samples", 1, "--picture", picture)
    assert "bytes per token" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="there is no such file"):
        atoll("prepare", tmp_path / "no", "--tokenizer", tokenizer, "--output", tmp_path / "other")
    with pytest.raises(ConfigError, match="allowed: text, or --counts of every silo"):
        atoll("tokenizer", corpus, "--counts", counts, "--output", tokenizer)
    assert "--normalize: 'x' given" in one_line_error(
        atoll, "prepare", corpus, "--normalize", "x", "--tokenizer", tokenizer, "--output", tmp_path / "other"
    )
    shard = packed / "train" / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\xff\x00")
    assert f"verify: {shard} has sha256" in one_line_error(atoll, "verify", packed)


@pytest.mark.parametrize("command", ["corpora", "counts", "tokenizer", "prepare", "verify", "inspect"])
def test_help_has_an_example(command: str) -> None:
    help_text = atoll(command, "--help")
    assert "Example:" in help_text
    assert f"atoll data {command}" in help_text


def test_preparing_imports_no_torch() -> None:
    code = "import sys, data_tools.cli, data_tools.pack; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
