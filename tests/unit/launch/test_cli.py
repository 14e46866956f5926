"""A user's mistake at the `atoll` command is one line on stderr, exit code 2, and nothing on the disk."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from launch import cli
from pretrain.config.load import load_config, save_config
from pretrain.exchange.store import StoreExchange
from pretrain.federation.preflight import announce_store
from pretrain.trust.contract import build_contract, contract_bytes
from tests.support import ROOT, TinyText, write_corpus, write_settings

MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown key": (["inner.lrr=1"], "inner.lrr: unknown key given"),
    "wrong type": (["inner.lr=fast"], "inner.lr: "),
    "H of 0": (["outer.sync_interval_steps=0"], "outer.sync_interval_steps: 0 given; allowed: 1 or more"),
    "batch sizes": (
        ["silos.alpha.global_batch_sequences=9", "silos.alpha.processes_per_node=2"],
        "silos.alpha.global_batch_sequences: 9 given with 2 ranks and micro_batch_sequences 4; "
        "allowed: a multiple of 8",
    ),
    "no key=value": (["fast"], "command line: 'fast' given; allowed: key=value"),
}


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and stderr of the console entry point, in this process."""
    monkeypatch.setattr(sys, "argv", ["atoll", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.err


def one_line(error: str) -> str:
    assert error.startswith("atoll: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    return error


@pytest.fixture
def settings(tmp_path: Path, tiny_text: TinyText, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny settings in an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)
    return write_settings(tmp_path, tiny_text)


@pytest.mark.parametrize("case", MISTAKES)
@pytest.mark.parametrize("command", [["launch", "local"], ["train", "--silo", "alpha"], ["aggregate"]], ids=" ".join)
def test_a_mistake_is_one_line_and_touches_nothing(
    settings: Path, command: list[str], case: str, monkeypatch: Any, capsys: Any
) -> None:
    overrides, expected = MISTAKES[case]
    code, error = run([*command, "--config", str(settings), *overrides], monkeypatch, capsys)
    assert code == 2
    assert expected in one_line(error)
    assert list(settings.parent.iterdir()) == [settings]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["launch", "local", "--config", "none.yaml"], "--config: 'none.yaml' given; there is no such file"),
        (["aggregate", "--config", "."], "--config "),
        (["train", "--config", "tiny.yaml", "--silo", "gamma"], "--silo: 'gamma' given; allowed: alpha, beta"),
        (
            [
                *["train", "--config", "tiny.yaml", "--silo", "alpha"],
                *["silos.alpha.num_nodes=2", "silos.alpha.micro_batch_sequences=2"],
            ],
            "silos.alpha.num_nodes: 2 given; allowed: 1 with atoll train",
        ),
        (["launch", "join", "nowhere", "--config", "tiny.yaml"], "there is no run in it (no contract.json)"),
        (["status", "nowhere"], "nowhere"),
        (["status", "s3:/bucket/run"], "store: 's3:/bucket/run' given; allowed: s3://..., or a directory"),
        (["launch", "join", "memory://run", "--config", "tiny.yaml"], "a store that other processes see, too"),
        (["relay", "--config", "tiny.yaml", "--remote", "s3:/bucket"], "--remote: 's3:/bucket' given; allowed: s3://"),
        (["export", "nowhere", "--output", "~no-such-user/x"], "--output: '~no-such-user/x' given; allowed: a ~ that"),
        (["report", "nowhere"], "nowhere"),
        (["export", "nowhere", "--output", "model"], "run directory: 'nowhere' given; there is no config.yaml in it"),
        (["eval", "nowhere", "--data", "nowhere"], "model: 'nowhere' given"),
        (["demo", "--corpora", "nowhere"], "--corpora: 'nowhere' given"),
        (["data", "prepare", "nowhere", "--tokenizer", "none", "--output", "packed"], "--tokenizer: 'none' given"),
        (["data", "tokenizer", "nowhere", "--output", "tokenizer"], "'nowhere' given"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_what_is_not_there_is_one_line_and_touches_nothing(
    settings: Path, arguments: list[str], expected: str, monkeypatch: Any, capsys: Any
) -> None:
    code, error = run(arguments, monkeypatch, capsys)
    assert code == 2
    assert expected in one_line(error)
    assert list(settings.parent.iterdir()) == [settings]


def test_a_mistake_in_the_demo_is_found_before_any_text_is_made(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    for name in ("one", "two"):
        write_corpus(tmp_path / "corpora" / name, name, num_characters=30_000)
    arguments = ["demo", "--directory", str(tmp_path / "run"), "--corpora", str(tmp_path / "corpora"), "inner.lrr=1"]
    code, error = run(arguments, monkeypatch, capsys)
    assert code == 2
    assert "inner.lrr: unknown key given" in one_line(error)
    assert not (tmp_path / "run").exists()


def test_the_directory_that_cannot_be_made_is_one_line(settings: Path, monkeypatch: Any, capsys: Any) -> None:
    for command in (["aggregate"], ["launch", "local"], ["train", "--silo", "alpha"]):
        arguments = [*command, "--config", str(settings), f"directory={settings}/run"]
        code, error = run(arguments, monkeypatch, capsys)
        assert code == 2
        assert "tiny.yaml/run" in one_line(error)


@pytest.mark.parametrize("module", ["launch.cli aggregate", "pretrain.aggregate"])
def test_the_real_program(module: str, settings: Path) -> None:
    command = [sys.executable, "-m", *module.split(), "--config", str(settings), "outer.sync_interval_steps=0"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert one_line(ended.stderr) == "atoll: outer.sync_interval_steps: 0 given; allowed: 1 or more\n"
    assert list(settings.parent.iterdir()) == [settings]


# ---- help


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


COMMANDS = sorted(commands(typer.main.get_command(cli.app)))


def test_the_commands_are_there() -> None:
    expected = {("demo",), ("train",), ("aggregate",), ("status",), ("report",), ("export",), ("eval",)}
    assert expected | {("launch", "local"), ("data", "prepare")} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert f"Example: atoll {' '.join(command)} " in " ".join(shown.output.split())


def test_a_paragraph_of_help_breaks_where_the_terminal_ends() -> None:
    def all_of(command: Any) -> Iterator[Any]:
        yield command
        for inner in getattr(command, "commands", {}).values():
            yield from all_of(inner)

    for command in all_of(cli.flowing(typer.main.get_command(cli.app))):
        assert not re.search(r"[^\n]\n[^\n]", command.help), command.name


def test_the_command_line_starts_without_torch() -> None:
    """Nor what else takes its time."""
    heavy = ("torch", "transformers", "deepspeed", "numpy", "fsspec", "omegaconf", "yaml", "jinja2", "cryptography")
    code = f"import sys, launch.cli; print([m for m in {heavy} if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


def test_a_store_elsewhere_is_found_from_the_run_directory_and_a_new_one_is_announced(
    settings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config([settings], ["directory=runs/x", "exchange.url=shared"])
    announce_store(config)
    assert capsys.readouterr().out == "exchange.url: a new run begins in shared, a directory of this machine\n".replace(
        "shared", str(settings.parent / "shared")
    )
    StoreExchange(config.store_url).write_contract(contract_bytes(build_contract(config)))
    announce_store(config)
    assert capsys.readouterr().out == ""
    save_config(config, Path(config.directory) / "config.yaml")
    (settings.parent / "elsewhere").mkdir()
    monkeypatch.chdir(settings.parent / "elsewhere")
    found = CliRunner().invoke(cli.app, ["status", "../runs/x"])
    assert found.exit_code == 0, found.output
    assert "shared: no version yet" in found.output
