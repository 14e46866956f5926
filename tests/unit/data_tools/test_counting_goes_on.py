"""Counting the words of files: what is exported is the same however often the work was stopped or killed."""

import io
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from data_tools import pretokens, sources
from data_tools.counts import export_counts, export_parts
from data_tools.formats import Part
from data_tools.pack import Recipe, prepare
from data_tools.report import print_report
from data_tools.sources import Source, find_text, read_parts
from data_tools.tokenizer import train_tokenizer
from data_tools.workers import StoppedError
from launch import cli
from tests.support import one_line_error, pseudo_text
from tests.text_files import write, write_jsonl
from tests.waiting import wait_for

COUNT = """
import sys
from pathlib import Path
from rich.console import Console
from data_tools.counts import export_parts
from data_tools.sources import Source, find_text

parts = find_text(Source(path=sys.argv[1])).parts
export_parts(parts, output=Path(sys.argv[2]), console=Console(stderr=True), commit_seconds=0.0, num_workers=2)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 MB in files of three formats, and held-out text that is not counted."""
    folder = tmp_path_factory.mktemp("text")
    some = pseudo_text("counts", 50_000)
    documents = [f"{text} w{number % 500}x" for number, text in enumerate(some * 40)]
    third = len(documents) // 3
    write_jsonl(folder / "a.jsonl", documents[:third])
    write(folder / "b.txt.gz", "\n<|endoftext|>\n".join(documents[third : 2 * third]).encode())
    write_jsonl(folder / "c.jsonl.zst", documents[2 * third :])
    write_jsonl(folder / "valid.jsonl", ["heldout heldout heldout"] * 10)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> bytes:
    """The export of the texts, counted in memory."""
    output = folder.parent / f"{folder.name}.tsv"
    export_counts(read_parts(find_text(Source(path=str(folder))).parts), output=output, num_workers=0)
    assert output.read_bytes().count(b"\n") > 600
    return output.read_bytes()


def count(parts: list[Part], output: Path, **options: Any) -> str:
    """What is said of how far it is."""
    console = Console(file=io.StringIO(), width=200)
    export_parts(parts, output=output, console=console, **{"num_workers": 0} | options)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_stopped_after_every_block(
    folder: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretokens, "MAX_RUNS", 3)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 200_000)
    parts, output = find_text(Source(path=str(folder))).parts, tmp_path / "counts.tsv"
    partial = tmp_path / "counts.tsv.partial"
    num_stops = most_runs = 0
    while not output.exists():
        try:  # in the end, of adding up, it is not asked again
            count(parts, output, asked_to_stop=lambda: True)
        except StoppedError:
            num_stops += 1
            most_runs = max(most_runs, len(list(partial.glob("*.run"))))
            assert stat.S_IMODE(partial.stat().st_mode) == 0o700
    assert num_stops >= 10
    assert most_runs == 3
    assert output.read_bytes() == expected
    assert not partial.exists()


def test_killed_and_started_again(folder: Path, expected: bytes, tmp_path: Path) -> None:
    output = tmp_path / "counts.tsv"
    process = subprocess.Popen([sys.executable, "-c", COUNT, str(folder), str(output)])
    wait_for((tmp_path / "counts.tsv.partial" / "state.json").exists)
    process.kill()
    process.wait()
    assert not output.exists()
    assert "--output: " in one_line_error(
        count, find_text(Source(path=str(folder / "a.jsonl"))).parts, output
    )  # other text is not mixed
    write(tmp_path / "counts.tsv.partial" / "999.run", b"half a li")
    count(find_text(Source(path=str(folder))).parts, output)
    assert output.read_bytes() == expected
    assert os.listdir(tmp_path) == ["counts.tsv"]


def test_bad_records_stop_or_are_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As prepare does, and the same however often the work is stopped."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 200)
    lines = [b'{"text": "' + b"word " * 9 + b'"}'] * 20
    good = write(tmp_path / "good" / "text.jsonl", b"\n".join(lines))
    bad = write(tmp_path / "bad" / "text.jsonl", b"\n".join([*lines[:10], b"broken", b'{"txt": "a"}', *lines[10:]]))
    recipe = Recipe(
        sources=(Source(path=str(bad)),),
        tokenizer=train_tokenizer(["word"], vocab_size=257, output=tmp_path),
        held_out=0.0,
    )
    parts, output = find_text(Source(path=str(bad))).parts, tmp_path / "bad.tsv"
    count(find_text(Source(path=str(good))).parts, tmp_path / "good.tsv")
    assert one_line_error(count, parts, output) == one_line_error(prepare, recipe, tmp_path / "packed")
    assert one_line_error(count, parts, output, on_bad="guess") == "--on-bad: 'guess' given; allowed: stop, skip"
    num_stops = 0
    while not output.exists():
        try:
            done = export_parts(
                parts, output=output, console=Console(stderr=True), on_bad="skip", asked_to_stop=lambda: True
            )
        except StoppedError:
            num_stops += 1
    assert num_stops >= 5
    assert output.read_bytes() == (tmp_path / "good.tsv").read_bytes()
    prepare(recipe, tmp_path / "packed", on_bad="skip")
    report = json.loads((tmp_path / "packed" / "report.json").read_text())
    (counted,) = report["sources"].values()
    assert done.skipped["bad"] == counted["bad"] == {"not JSON": 1, "no text": 1}
    assert done.skipped["bad_examples"] == counted["bad_examples"]
    capsys.readouterr()
    print_report(report, Console(width=200))
    of_prepare = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    command = ["data", "counts", str(bad), "--output", str(tmp_path / "again.tsv"), "--on-bad", "skip"]
    said = CliRunner().invoke(cli.app, command)
    assert said.exit_code == 0
    *table, last = [" ".join(line.split()) for line in said.stdout.splitlines()]
    assert len(table) == 8
    assert {*table} <= {*of_prepare}
    assert last.endswith("; read it before you send it")


def test_the_command_stops_on_a_signal_and_goes_on(folder: Path, expected: bytes, tmp_path: Path) -> None:
    output = tmp_path / "counts.tsv"
    command = [sys.executable, "-m", "launch.cli", "data", "counts", str(folder), "--output", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "counts.tsv.partial").exists)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75
    assert said.endswith(f"stopped on request; all is saved in {output}.partial, the same command goes on\n")
    subprocess.run(command, check=True)
    assert output.read_bytes() == expected


def test_mistakes_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, output = write(tmp_path / "text.jsonl", b'{"text": "a"}\nbroken\n'), tmp_path / "out" / "counts.tsv"
    parts = find_text(Source(path=str(text))).parts
    assert "text.jsonl, line 2: not JSON" in one_line_error(count, parts, output)
    assert one_line_error(count, parts, output, min_count=0) == "--min-count: 0 given; allowed: 1 or more"
    assert not list(output.parent.iterdir())


def test_how_far_it_is_in_a_log(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.progress.SECONDS_BETWEEN_LINES", 0.0)
    said = count(find_text(Source(path=str(folder))).parts, tmp_path / "counts.tsv").splitlines()
    assert len(said) == 3
    assert all(line.startswith("counting  ") and line.endswith("MB/s") for line in said)
    assert " s left  " in said[1]
