"""The report of preparing: counts made by hand in, JSON, a picture and a table out."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_tools.report import (
    REASONS,
    format_bytes,
    format_count,
    format_ratio,
    print_report,
    printable,
    write_report,
)


def source(**changes: Any) -> dict[str, Any]:
    """200 documents: 150 for training, 10 held out, 30 too short, 10 for a reason that only this report has."""
    return {
        "documents": 200,
        "bytes": 4_130_000,
        "kept": {
            "valid": {"documents": 10, "bytes": 300, "tokens": 100},
            "train": {"documents": 150, "bytes": 4_000_000, "tokens": 1_234_567},
        },
        "dropped": {"[b]odd": {"documents": 10, "bytes": 90}, "short": {"documents": 30, "bytes": 60}},
        "bad": {"not JSON": 6, "no text": 1},
        "bad_examples": [f"raw/a[0].jsonl, line {line}: not JSON" for line in range(1, 8)],
        "lengths_kept": [0] * 10 + [60, 100] + [0] * 20,
        "lengths_dropped": [0, 30, 0, 10] + [0] * 28,
        **changes,
    }


def report_of(**sources: dict[str, Any]) -> dict[str, Any]:
    speed = {"seconds": 12.34, "bytes_per_second": 4_150_000.0, "tokens_per_second": 1_000_250.4}
    return {"format": 1, "sources": sources, "recipe": {"held_out": 0.01}, **speed}


def printed(report: dict[str, Any], width: int = 100) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    print_report(report, console)
    return console.export_text().splitlines()


def row(lines: list[str], label: str) -> list[str]:
    """The values of the only row with this label."""
    (line,) = (line for line in lines if line.strip().startswith(f"{label}  "))
    return line.strip().removeprefix(label).split()


def test_one_source_in_a_table() -> None:
    lines = printed(report_of(law=source()))
    assert lines[0].split() == ["law"]
    assert row(lines, "documents read") == ["200"]
    assert row(lines, "text read") == ["4.13", "MB"]
    assert row(lines, "kept") == ["160", "80.0", "%"]
    assert row(lines, "train") == ["150", "75.0", "%"]
    assert row(lines, "valid") == ["10", "5.0", "%"]
    assert row(lines, "dropped") == ["40", "20.0", "%"]
    assert row(lines, "short") == ["30", "15.0", "%"]
    assert row(lines, "[b]odd") == ["10", "5.0", "%"]
    assert row(lines, "tokens, train") == ["1,234,567"]
    ratios = [line.split()[-1] for line in lines if "bytes per token" in line]
    assert ratios == ["3.24", "3.00"]
    assert row(lines, "bad records") == ["7"]
    assert row(lines, "not JSON") == ["6"]
    assert "12.3 s, 4.2 MB/s, 1,000,250 tokens/s" in lines
    assert lines[-6] == "bad records of law, the first 5 of 7:"
    assert lines[-5:] == [f"  raw/a[0].jsonl, line {line}: not JSON" for line in range(1, 6)]


def test_sources_are_added_up() -> None:
    kept = {"train": {"documents": 50, "bytes": 600, "tokens": 100}}
    dropped = {"duplicate": {"documents": 50, "bytes": 1}}
    other = source(documents=100, bytes=1_000, kept=kept, dropped=dropped, bad={}, bad_examples=[])
    report = report_of(law=source(), prose=other)
    before = copy.deepcopy(report)
    lines = printed(report)
    assert report == before
    assert lines[0].split() == ["law", "prose", "all"]
    assert row(lines, "documents read") == ["200", "100", "300"]
    assert row(lines, "valid") == ["10", "5.0", "%", "0", "0.0", "%", "10", "3.3", "%"]
    assert row(lines, "duplicate") == ["0", "0.0", "%", "50", "50.0", "%", "50", "16.7", "%"]
    assert row(lines, "tokens, train") == ["1,234,567", "100", "1,234,667"]
    assert row(lines, "not JSON") == ["6", "0", "6"]
    assert [line.split()[-3:] for line in lines if "bytes per token" in line] == [
        ["3.24", "6.00", "3.24"],
        ["3.00", "-", "3.00"],
    ]
    assert not any("bad records of prose" in line for line in lines)


def test_a_source_may_be_called_all() -> None:
    assert "all sources" in printed(report_of(all=source(), prose=source()))[0]


def test_tables_fit_into_a_hundred_columns() -> None:
    many = {"documents": 99_999_999_999, "bytes": 999_999_999_999_999, "tokens": 999_999_999_999_999}
    large = source(documents=99_999_999_999, kept={"train": many}, dropped={"near duplicate": {"documents": 0}})
    names = ["a-name-without-any-place-to-break-it", "b", "c", "d", "e"]
    three = printed(report_of(**dict.fromkeys(names[:3], large)), width=200)
    table = three[: three.index("")]
    assert max(len(line.rstrip()) for line in table) <= 100
    assert row(table, "train")[:4] == ["100.00", "G", "100.0", "%"]
    five = printed(report_of(**dict.fromkeys(names, large)), width=200)
    assert len([line for line in five if line.startswith("documents read")]) == 2


def test_what_was_read_is_kept_or_dropped(tmp_path: Path) -> None:
    report = report_of(law=source(documents=201))
    with pytest.raises(AssertionError, match="law: read 201, kept 160, dropped 40"):
        write_report(report, tmp_path)
    with pytest.raises(AssertionError, match="law: read 201"):
        printed(report)
    assert list(tmp_path.iterdir()) == []


def test_a_written_report_is_the_same_when_read(tmp_path: Path) -> None:
    report = report_of(law=source(), prose=source())
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert printed(json.loads((tmp_path / "report.json").read_text())) == printed(report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.png"]


def test_equal_counts_give_equal_pictures(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_report(report_of(**{"$law$": source()}), one)
    write_report({**report_of(**{"$law$": source()}), "seconds": 99.0}, two)
    raw = (one / "report.png").read_bytes()
    assert raw.startswith(b"\x89PNG")
    assert not any(word in raw for word in (b"Software", b"tIME", b"tEXt"))
    assert raw == (two / "report.png").read_bytes()
    changed = source()
    changed["lengths_kept"][10:12] = [61, 99]
    write_report(report_of(**{"$law$": changed}), two)
    assert raw != (two / "report.png").read_bytes()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "changes",
    [
        {"dropped": {}, "documents": 160, "lengths_dropped": [0] * 32},
        {"documents": 0, "bytes": 0, "kept": {}, "dropped": {}, "lengths_kept": [0] * 32, "lengths_dropped": [0] * 32},
        {"documents": 10 * len(REASONS), "kept": {}, "dropped": {reason: {"documents": 10} for reason in REASONS}},
    ],
    ids=["nothing dropped", "nothing read", "all dropped"],
)
def test_extremes_are_drawn_and_printed(tmp_path: Path, changes: dict[str, Any]) -> None:
    report = report_of(law=source(**changes), prose=source(**changes))
    write_report(report, tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 1_000
    assert row(printed(report), "documents read")[0] == str(changes["documents"])


def test_numbers_are_short() -> None:
    counts = (0, 99_999_999, 123_456_789, 12_345_678_901, 1_234_567_890_123)
    assert [format_count(count) for count in counts] == ["0", "99,999,999", "123.46 M", "12.35 G", "1.23 T"]
    assert [format_bytes(size) for size in (0, 999, 1_000, 4_130_000, 2e18)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "4.13 MB",
        "2,000.00 PB",
    ]
    assert [format_bytes(size, base=1024) for size in (512, 1 << 12, 1 << 31)] == ["512 B", "4 KiB", "2 GiB"]
    assert [format_ratio(9, 4), format_ratio(9, 0)] == ["2.25", "-"]


def test_no_text_commands_the_terminal() -> None:
    assert printable("Ärzte\n\t日本 \x1b[31m\x07\r\u202e") == "Ärzte\n\t日本 \\x1b[31m\\x07\\r\\u202e"
