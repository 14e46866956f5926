"""`atoll keys`: what it prints, where the private key is, and that nothing is overwritten."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch import cli
from pretrain.trust.keys import PublicKey, load_signer
from tests.support import ROOT


def atoll(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The real program."""
    command = [sys.executable, "-m", "launch.cli", "keys", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)


def test_a_new_key_is_shown_and_never_overwritten(tmp_path: Path) -> None:
    made = atoll("new", "law", "--directory", str(tmp_path))
    assert made.returncode == 0, made.stderr
    line, fingerprint, private, advice = made.stdout.splitlines()
    public = PublicKey.parse(line)
    path = tmp_path / "law.key"
    assert load_signer(path).public == public
    assert fingerprint == f"fingerprint  {public.fingerprint}"
    assert private == f"private key  {path}"
    assert advice.startswith("Send the first line to the others and compare the fingerprint by phone")

    before = path.read_bytes()
    again = atoll("new", "law", "--directory", str(tmp_path))
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"atoll: {path}: is there already; a key is never overwritten: give another name or place\n"
    assert path.read_bytes() == before

    shown = f"{line}\nfingerprint  {public.fingerprint}\n"
    (tmp_path / "law.pub").write_text(line + "\n")
    for key, expected in ((str(path), f"{shown}name         law\n"), (str(tmp_path / "law.pub"), shown), (line, shown)):
        found = CliRunner().invoke(cli.app, ["keys", "show", key])
        assert found.output == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["law.key", "law.pub"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["new", "../law"], "name: '../law' given; allowed: "),
        (["new", "law", "--directory", "/nowhere"], "/nowhere/law.key: cannot be made: No such file or directory"),
        (["new", "law", "--directory", "~no-such-user/x"], "--directory: '~no-such-user/x' given; allowed: a ~ that"),
        (["show", "/nowhere"], "/nowhere: cannot be read: No such file or directory"),
        (["show", "/dev/null"], "/dev/null: no file given; allowed: a key file of atoll keys new"),
        (["show", "atoll-key-1:AAAA"], "public key: 'atoll-key-1:AAAA' given; allowed: atoll-key-1: and 86 characters"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments: list[str], expected: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["atoll", "keys", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(f"atoll: {expected}")
    assert said.count("\n") == 1


def test_a_key_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    limited = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", sys.executable, "-m", "launch.cli"]
    command = [*limited, "keys", "new", "law", "--directory", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert ended.returncode == 2
    assert ended.stderr == f"atoll: {tmp_path / 'law.key'}: cannot be written: File too large\n"
    assert list(tmp_path.iterdir()) == []
