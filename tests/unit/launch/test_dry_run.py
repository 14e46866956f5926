"""`--dry-run` on all that starts or submits: it checks, says what would start, and leaves nothing behind."""

import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from launch import cli
from pretrain.host.software import VERSION
from tests.support import TinyText, write_settings
from tests.unit.launch.test_cli import COMMANDS, commands, one_line, run

STARTS = [
    *(("demo",), ("train",), ("aggregate",), ("relay",), ("compare",)),
    *(("launch", "local"), ("launch", "slurm"), ("launch", "torchrun"), ("launch", "join")),
]
TEXT = "1 process, batch 4 x 1 x 1 = 4 sequences of 16; reads its "


@pytest.fixture
def settings(tmp_path: Path, tiny_text: TinyText, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_settings(tmp_path, tiny_text)


def test_all_that_starts_something_has_it() -> None:
    found = typer.main.get_command(cli.app)
    having = []
    for path in commands(found):
        command: Any = found
        for name in path:
            command = command.commands[name]
        having += [path] if any("--dry-run" in parameter.opts for parameter in command.params) else []
    assert set(STARTS) <= set(having) <= set(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["launch", "local"], ["aggregator: 3 rounds of H = 4, 2 silos, in ", f"alpha: {TEXT}", f"beta: {TEXT}"]),
        (["train", "--silo", "beta"], [f"beta: {TEXT}"]),
        (["launch", "torchrun", "--silo", "alpha", "--host", "127.0.0.1"], [f"alpha: {TEXT}"]),
        (["aggregate"], ["aggregator: 3 rounds of H = 4, 2 silos, in "]),
        (["relay", "exchange.url=here", "--remote", "there"], ["there is reached; there is no contract in it yet"]),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_it_says_what_would_start_and_leaves_nothing(
    settings: Path, arguments: list[str], expected: list[str], monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["atoll", *arguments, "--config", str(settings), "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line[: len(start)] for line, start in zip(shown, expected, strict=False)] == expected
    assert shown[-1] == "dry run: nothing was started"
    assert list(settings.parent.iterdir()) == [settings]


def test_the_demo_too(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code, error = run(["demo", "--dry-run", "inner.lr=fast"], monkeypatch, capsys)
    assert (code, one_line(error)[:17]) == (2, "atoll: inner.lr: ")


OF_A_MODEL = [("eval",), ("export",), ("generate",), ("chat",), ("rollout",)]
"""Their --version is one of the global parameters."""


@pytest.mark.parametrize("command", [(), ("launch",), *sorted({*COMMANDS}.difference(OF_A_MODEL))], ids=" ".join)
def test_every_command_has_a_version(command: tuple[str, ...], monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["atoll", *command, "--version"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.splitlines()[0] == f"atoll {VERSION}"


@pytest.mark.parametrize("command", [("export", "--output", "model"), ("generate", "--prompt", "ba"), ("chat",)])
def test_a_version_of_a_model_is_no_question_for_ours(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    code, error = run([*command, str(tmp_path / "none"), "--version", "12"], monkeypatch, capsys)
    assert (code, str(tmp_path / "none") in one_line(error)) == (2, True)
