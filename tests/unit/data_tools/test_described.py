"""Reports of languages and quality: numbers to check by hand, and the same however the work is done or stopped."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from data_tools import languages
from data_tools.clean import Cleaning
from data_tools.pack import Recipe, prepare
from data_tools.quality import MEASURES, RULES, measured, quantile, rounded
from data_tools.report import print_report
from data_tools.sources import Source
from data_tools.tokenizer import train_tokenizer
from data_tools.workers import StoppedError
from launch import cli
from pretrain.silo.shards import read_manifest
from tests.support import one_line_error, packed_hashes
from tests.text_files import write_jsonl

pytest.importorskip("py3langid", reason="pip install 'atoll[languages]'")

# Article 1 of the Universal Declaration of Human Rights.
ARTICLE = {
    "en": "All human beings are born free and equal in dignity and rights.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "ar": "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    languages.TOO_SHORT: "12 of 34",
    languages.UNCLEAR: "def f(x): return [y**2 for y in range(x)]\nimport os, sys",
    languages.NO_LANGUAGE: "zzkk qwpoeiru xmcnvb alskdjf qpwoeiruty zmxncbv",
}
# 16 words of 47 characters, 63 characters with what is between them; 4 lines, 2 paragraphs.
TEXT = "the cat sat on the mat.\nthe cat ran...\nthe cat ran...\n\n- # 42 {"


@pytest.mark.parametrize("language", ARTICLE)
def test_languages(language: str) -> None:
    assert languages.language_of(ARTICLE[language]) == language
    assert languages.language_of(ARTICLE[language] + "\n" + "x" * 10**6) == languages.language_of(
        ARTICLE[language] + "\n" + "x" * 10**3
    )


def test_quality_by_hand() -> None:
    found = measured(TEXT)
    assert {name: found[name] for name in MEASURES} == {
        "words": 16,
        "mean word length": 47 / 16,
        "lines that end in punctuation": 3 / 4,
        "lines below 30 characters": 4 / 4,
        "lines that begin with a bullet": 1 / 4,
        "lines that end in an ellipsis": 2 / 4,
        "repeated lines": 1 / 4,
        "characters in repeated lines": 14 / 63,  # the cat ran...
        "repeated paragraphs": 0,
        "characters in repeated paragraphs": 0,
        "symbols (# and ...) a word": 2 / 16,  # two ellipses, which are more than one #
        "words with a letter": 12 / 16,
        "characters in the top 2-gram": 3 * 7 / 63,  # the cat
        "characters in the top 3-gram": 2 * 14 / 63,  # the cat ran...
        "characters in the top 4-gram": 0,  # none comes twice
    }
    assert [name for name, drops in RULES.items() if drops(found)] == [
        "Gopher: words below 50",
        "Gopher: mean word length below 3",
        "Gopher: symbols a word above 0.1",
        "Gopher: ellipsis lines above 0.3",
        "Gopher: words with a letter below 0.8",
        "Gopher: stop words (English) below 2",
        "Gopher: repeated lines' characters above 0.2",
        "Gopher: top 2-gram above 0.2",
        "Gopher: top 3-gram above 0.18",
        "C4: a curly bracket",
        "FineWeb: repeated lines' characters from 0.1",
        "FineWeb: short lines from 0.67",
    ]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a " * 100_001, "Gopher: words above 100,000"),
        ("Rechtsschutzversicherung " * 60, "Gopher: mean word length above 10"),
        ("- one\n" * 60, "Gopher: bullet lines above 0.9"),
        ("one two\n" * 60, "Gopher: repeated lines above 0.3"),
        ("one two\n\n" * 60, "Gopher: repeated paragraphs above 0.3"),
        ("one two\n\n" * 60, "Gopher: repeated paragraphs' characters above 0.2"),
        ("one two three four " * 60, "Gopher: top 4-gram above 0.16"),
        ("Lorem Ipsum dolor", "C4: lorem ipsum"),
        ("no end\n" * 60, "FineWeb: punctuated lines at most 0.12"),
    ],
)
def test_each_other_rule_drops_something(text: str, rule: str) -> None:
    assert RULES[rule](measured(text))
    assert not RULES[rule](measured(TEXT))


def test_distributions_are_small_and_say_quantiles() -> None:
    assert [rounded(value) for value in (0.0, 0.123, 1.0, 4.321, 98_765.0)] == [0.0, 0.12, 1.0, 4.3, 99_000.0]
    distribution = {"10": 5, "9": 90, "0.5": 5}
    assert [quantile(distribution, share) for share in (0.05, 0.5, 0.95, 1.0)] == [0.5, 9.0, 9.0, 10.0]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Each article ten times, with a number, and one document twice that is then dropped."""
    folder = tmp_path_factory.mktemp("described")
    texts = [f"{text} {number}" for number in range(10) for text in ARTICLE.values()]
    source = Source(path=str(write_jsonl(folder / "law.jsonl", [*texts, texts[0]])))
    tokenizer = train_tokenizer([*ARTICLE.values()], vocab_size=300, output=folder)
    cleaning = Cleaning(language_report=True, quality_report=True, drop_duplicates=True)
    return Recipe(sources=(source,), tokenizer=tokenizer, cleaning=cleaning, held_out=0.0)


def packed(
    recipe: Recipe, output: Path, *, stop: bool = False, num_workers: int = 0, **cleaning: Any
) -> dict[str, Any]:
    """What the report says of the source."""
    changed = Recipe(**vars(recipe) | {"cleaning": Cleaning(**vars(recipe.cleaning) | cleaning)})
    while not output.exists():
        with contextlib.suppress(StoppedError):  # after every block
            prepare(changed, output, num_workers=num_workers, asked_to_stop=lambda: stop)
    found: dict[str, Any] = json.loads((output / "report.json").read_text())["sources"]["law"]
    return found


def test_counted_the_same_after_stops_and_shown(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = packed(recipe, tmp_path / "packed", num_workers=2)
    assert {name: of["documents"] for name, of in found["languages"].items()} == dict.fromkeys(ARTICLE, 10)
    for unit in ("tokens", "bytes"):
        assert sum(of[unit] for of in found["languages"].values()) == found["kept"]["train"][unit]
    assert found["quality"]["measures"]["words"]["13"] == 10  # of the English article, and its number
    assert {name: sum(values.values()) for name, values in found["quality"]["measures"].items()} == dict.fromkeys(
        MEASURES, 80
    )
    assert found["quality"]["would_drop"] | {"Gopher: words below 50": 80} == found["quality"]["would_drop"]
    monkeypatch.setattr("data_tools.sources.BLOCK_BYTES", 1000)
    stopped = packed(recipe, tmp_path / "stopped", stop=True)
    assert stopped == found
    assert packed_hashes(tmp_path / "stopped") == packed_hashes(tmp_path / "packed")
    plain = packed(recipe, tmp_path / "plain", language_report=False, quality_report=False)
    assert (plain["languages"], plain["quality"]) == ({}, {})
    shards = [read_manifest(tmp_path / name / "train", key="").shards for name in ("plain", "packed")]
    assert shards[0] == shards[1]
    console = Console(file=io.StringIO(), width=100)
    print_report(json.loads((tmp_path / "packed" / "report.json").read_text()), console)
    inspected = CliRunner().invoke(cli.app, ["data", "inspect", str(tmp_path / "packed")])
    for said in (console.file.getvalue(), inspected.stdout):  # type: ignore[attr-defined]
        lines = [" ".join(line.split()) for line in said.splitlines()]
        (german,) = (line for line in lines if line.startswith("de "))
        share = 100 * found["languages"]["de"]["tokens"] / found["kept"]["train"]["tokens"]
        assert german == f"de 10 {share:.1f} %"
        assert {"Gopher: words below 50 80 100.0 %", "words 2 9 14"} <= {*lines}
    (tmp_path / "packed" / "report.json").write_text('{"recipe": {}, "sources": 3}')
    damaged = CliRunner().invoke(cli.app, ["data", "inspect", str(tmp_path / "packed")])
    assert "report.json is no whole report of atoll data prepare: delete it, or " in str(damaged.exception)


def test_languages_are_kept_or_dropped(recipe: Recipe, tmp_path: Path) -> None:
    found = packed(recipe, tmp_path / "packed", language_report=False, keep_language="de, en")
    assert {name: of["documents"] for name, of in found["languages"].items()} == {"de": 10, "en": 10}
    assert {reason: of["documents"] for reason, of in found["dropped"].items()} == {"language": 60, "duplicate": 1}


def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = one_line_error(Cleaning(keep_language="de,english").check)
    assert unknown.startswith(
        "--keep-language: 'english' given; allowed: codes of ISO 639 with commas between them, of ace af "
    )
    monkeypatch.setitem(sys.modules, "py3langid", None)
    needs = "given; it needs a package that is not installed: type pip install 'atoll[languages]'"
    assert one_line_error(Cleaning(keep_language="de").check) == f"--keep-language: 'de' {needs}"
    assert one_line_error(Cleaning(language_report=True).check) == f"--language-report: {needs}"
