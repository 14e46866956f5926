"""A process that is killed while it builds DeepSpeed's extensions does not stop the next one."""

import os
import select
import subprocess
import sys
from pathlib import Path

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
    second.communicate(timeout=60)
    assert second.returncode == 0
