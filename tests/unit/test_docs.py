"""The documents name tests: each of them is there, and kills where it is said to. Their commands can be typed."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests import typed
from tests.faults import test_aggregator_deaths, test_collective_deaths, test_silo_deaths
from tests.support import ROOT

LEDGER = (ROOT / "docs" / "ledger.md").read_text()
SECURITY = (ROOT / "docs" / "security.md").read_text()
NAMED = sorted({*re.findall(r"`(tests/[^`\s]+)`", LEDGER + SECURITY)})
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DEATHS = {
    "S": test_silo_deaths.DEATHS,
    "A": {"aggregator": test_aggregator_deaths.DEATHS["aggregator"]},
    "C": test_collective_deaths.DEATHS,
}


@cache
def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", NAMED)
def test_a_test_that_is_named_is_there(name: str) -> None:
    path, _, function = name.partition("::")
    assert (ROOT / path).exists()
    if function:
        assert function in functions_of(ROOT / path)


def test_every_row_of_the_tables_names_a_test_that_kills_there() -> None:
    found: dict[str, set[str]] = {letter: set() for letter in DEATHS}
    sections = [part for part in LEDGER.split("\n## ") if "killed by" in part]
    assert len(sections) == 3
    for section in sections:
        rows = [line for line in section.splitlines() if line.startswith("| ")]
        for row in rows[1:]:
            where = [cell.strip() for cell in row.split("|")][-2]
            letter, points = where[0], set(re.findall(r"`([a-z_]+)`", where))
            assert points, row
            found[letter] |= points
    for letter, deaths in DEATHS.items():
        assert found[letter] == {point for chain in deaths.values() for point, *_ in chain}, letter


def test_every_attack_in_the_security_page_has_a_test() -> None:
    table = SECURITY.split("## Who can do what")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    last = ""
    for row in rows:
        last = [cell.strip() for cell in row.split("|")][-2]
        assert "tests/" in last or "the same" in last, row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_can_be_typed(page: Path) -> None:
    text = page.read_text()
    for line in typed.in_blocks(text):
        typed.check_whole(line)
    for quoted in typed.in_sentences(text):
        typed.check_part(quoted)


def test_every_example_in_the_help_can_be_typed() -> None:
    examples = list(typed.in_help())
    assert len(examples) > 40
    for line in examples:
        typed.check_whole(line)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("atoll statsu runs/run", "no such command"),
        ("atoll status", "Missing parameter: where"),
        ("atoll stop runs/run law", "unexpected extra argument"),
        ("atoll watch runs/run --folow > log", "No such option"),
        ("atoll rollback runs/run --to twelve", "valid integer"),
        ("atoll launch local --config run.yaml inner.lr", "inner.lr"),
        ("atoll launch", "no such command"),
    ],
)
def test_a_command_that_is_none_is_found(line: str, expected: str) -> None:
    (found,) = typed.in_blocks(f"So:\n\n```sh\n{line}  # as ever\n```\n")
    with pytest.raises(Exception, match=expected):
        typed.check_whole(found)


@pytest.mark.parametrize("quoted", ["atoll statsu", "atoll launch locally", "atoll watch --folow", "atoll stop -x"])
def test_a_quotation_that_is_none_is_found(quoted: str) -> None:
    (found,) = typed.in_sentences(f"With `{quoted}`\nit ends.")
    with pytest.raises(AssertionError):
        typed.check_part(found)
