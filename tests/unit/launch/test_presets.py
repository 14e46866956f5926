"""`atoll presets` lists them and shows one."""

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from launch import cli
from tests.support import ROOT
from tests.unit.launch.test_cli import one_line, run


def test_one_is_shown_as_it_is_and_a_name_that_is_none_is_one_line(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for choice in ("outer=recommended", "site=gpu"):
        shown = CliRunner().invoke(cli.app, ["presets", choice])
        assert shown.output == (ROOT / "configs" / f"{choice.replace('=', '/')}.yaml").read_text()
    listed = CliRunner().invoke(cli.app, ["presets"]).output.splitlines()
    assert "model=llama-20m      20.4 million parameters, sequences of 512 tokens." in listed
    assert max(map(len, listed)) <= 80
    sizes = [line.split()[0].removeprefix("model=llama-") for line in listed if line.startswith("model=")]
    assert sizes == ["5m", "20m", "150m", "350m", "1b"]
    for given, expected in {
        "outer": "outer: '' given; no preset is called so; allowed: averaging, diloco",
        "run=demo": "presets: 'run=demo' given; allowed: SECTION=NAME",
        "silo=zero3": "silo: 'zero3' given; no preset is called so; allowed: zero3-bf16",
    }.items():
        code, error = run(["presets", given], monkeypatch, capsys)
        assert code == 2
        assert one_line(error).startswith(f"atoll: {expected}"), error
