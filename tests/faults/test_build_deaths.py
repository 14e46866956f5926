"""Building DeepSpeed's extensions: it is said, and a process that is killed at it does not stop the next one."""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.silo.extensions import building
from tests.waiting import PATIENCE_SECONDS

BUILD = """
import sys
from pretrain.silo.extensions import building
print("asks", flush=True)
with building() as directory:
    baton = directory / "cpu_adam" / "lock"
    print("builds after another" if baton.exists() else "builds", flush=True)
    baton.parent.mkdir(exist_ok=True)
    baton.open("x").close()
    sys.stdin.read()
"""


def start(root: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(root)}
    command = [sys.executable, "-c", BUILD]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen[str], what: str) -> str:
    assert process.stdout
    return next(line for line in process.stdout if line.startswith(what))


def test_a_build_waits_for_the_living_and_not_for_the_dead(tmp_path: Path) -> None:
    first = start(tmp_path)
    assert read_until(first, "builds") == "builds\n"
    second = start(tmp_path)
    read_until(second, "asks")
    assert select.select([second.stdout], [], [], 1.0)[0] == []
    first.kill()
    first.communicate()
    assert read_until(second, "builds") == "builds\n"
    second.communicate(timeout=PATIENCE_SECONDS)
    assert second.returncode == 0


def test_a_build_is_said_before_it_begins(tmp_path: Path) -> None:
    code = "from pretrain.silo.extensions import load_extension; "
    code += 'load_extension("CPUAdamBuilder", lambda what: print("waits for", what, flush=True))'
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        waits = read_until(process, "waits for")
        assert waits == "waits for DeepSpeed's extension cpu_adam to be compiled, once on this machine\n"
        said = read_until(process, "DeepSpeed's")
        where = f"{re.escape(str(tmp_path))}/atoll-torch[^ /]+"
        kept = "it takes a minute or more, and is kept for all later starts"
        assert re.fullmatch(f"DeepSpeed's extension cpu_adam is compiled into {where}: {kept}\n", said)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it has started
        process.communicate()


def test_the_same_ninja_builds_whatever_comes_first_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    (other / "ninja").write_text("#!/bin/sh\necho 1.0\n")
    (other / "ninja").chmod(0o755)
    used = set()
    for path in (str(other), f"{Path(sys.prefix) / 'bin'}:{other}", "/nowhere"):
        monkeypatch.setenv("PATH", path)
        with building() as directory:
            used.add((shutil.which("ninja"), directory))
        assert os.environ["PATH"] == path
    ((ninja, _),) = used
    assert ninja
    assert Path(ninja).is_relative_to(sys.prefix)


def test_what_only_inference_takes_is_not_compiled(tmp_path: Path) -> None:
    code = "from pretrain.silo.ranks import Ranks; print(Ranks().num_ranks)"
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "1"
    assert list(tmp_path.iterdir()) == []
