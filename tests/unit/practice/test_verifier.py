"""Whatever a verifier does costs one trajectory: these run real ones, in real processes."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.practice.verifier import Limits, Verifier
from tests.support import ROOT, one_line_error

NAUGHTY = "tests.unit.practice.naughty"
LIMITS = Limits(seconds=1.5)


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    os.environ["ATOLL_SECRET"] = "of a store"
    with Verifier(f"{NAUGHTY}:behaves_as_told", LIMITS) as found:
        yield found
    del os.environ["ATOLL_SECRET"]


def still_run(word: str) -> list[int]:
    """Processes whose command line has a word, but this one."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if word.encode() in Path(f"/proc/{name}/cmdline").read_bytes() and int(name) != os.getpid():
                found.append(int(name))
        except OSError:
            continue
    return found


WHAT = {
    "right": ("right", ""),
    "wrong": ("wrong", ""),
    "number": ("no truth value", "it returned int, and not True or False"),
    "nothing": ("no truth value", "it returned NoneType, and not True or False"),
    "hang": ("hung", "not done after 1.5 seconds"),
    "raise": ("raised", "RuntimeError: two lines"),
    "exit": ("raised", "SystemExit: 3"),
    "print": ("raised", "OSError: [Errno 27] File too large"),
    "large": ("raised", "OSError: [Errno 27] File too large"),
    "memory": ("raised", "MemoryError:"),
    "secret": ("wrong", ""),  # the environment is not handed on
    "scratch": ("right", ""),
}


@pytest.mark.parametrize("does", WHAT)
def test_it_costs_one_trajectory(verifier: Verifier, does: str) -> None:
    found = verifier.verdict({"does": does}, [])
    assert (found.kind, found.why) == WHAT[does]
    assert verifier.verdict({"does": "right"}, []).is_right


def test_one_that_crashes(verifier: Verifier) -> None:
    found = verifier.verdict({"does": "crash"}, [])
    assert found.kind == "died"
    assert found.why.startswith("it ended with signal SIG")


def test_what_it_starts_ends_with_it(verifier: Verifier, tmp_path: Path) -> None:
    assert verifier.verdict({"does": "fork", "file": str(tmp_path / "x")}, []).kind == "right"
    assert not still_run("time.sleep(3600)")


def test_it_writes_nowhere_else(verifier: Verifier, tmp_path: Path) -> None:
    if not verifier.held["landlock"]:
        assert any(line.startswith("writes: NOT held") for line in verifier.words())
        pytest.skip("this kernel has no Landlock, which is said")
    found = verifier.verdict({"does": "write", "file": str(tmp_path / "x")}, [])
    assert (found.kind, found.why.split(":")[0]) == ("raised", "PermissionError")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("network", [False, True])
def test_it_reaches_a_network_only_if_it_may(network: bool) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        Verifier(f"{NAUGHTY}:behaves_as_told", Limits(seconds=5, network=network)) as verifier,
    ):
        if not network and not verifier.held["network"] and verifier.held["landlock"] < 4:
            pytest.skip("this kernel holds nothing of a network, which is said")
        found = verifier.verdict({"does": "connect", "port": server.getsockname()[1]}, [])
        assert found.kind == ("right" if network else "raised")
        assert any(line.startswith("network: " + ("allowed" if network else "no")) for line in verifier.words())


def test_one_that_takes_its_process_with_it(verifier: Verifier) -> None:
    assert verifier._process  # the one that has it imported, killed from outside
    verifier._process.kill()
    assert verifier.verdict({"does": "right"}, []).kind == "died"
    assert verifier.verdict({"does": "right"}, []).is_right


REFUSED = """
import os
from pathlib import Path
from pretrain.practice.verifier import Limits, Verifier
with Verifier("tests.unit.practice.naughty:behaves_as_told", Limits(seconds=2)) as verifier:
    assert not (verifier.held["network"] or verifier.held["processes"] or verifier.held["scratch"]), verifier.held
    print(verifier.words()[0])
    for does in ("hang", "fork", "write", "print", "right"):
        print(does, verifier.verdict({"does": does, "file": "FILE"}, []).kind)
"""


def test_a_kernel_that_refuses_namespaces_is_said_and_the_rest_holds(tmp_path: Path) -> None:
    # In a user namespace of its own anybody may say how many namespaces there are to be in it.
    none = "; ".join(f"echo 0 > /proc/sys/user/max_{kind}_namespaces" for kind in ("user", "net", "pid", "mnt", "ipc"))
    script = REFUSED.replace("FILE", str(tmp_path / "x"))
    if not shutil.which("unshare") or subprocess.run(["unshare", "-r", "true"], check=False).returncode:
        pytest.skip("namespaces are refused here already")
    found = subprocess.run(
        ["unshare", "-r", "sh", "-c", f'{none}; exec "$0" -c "$1"', sys.executable, script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert found.returncode == 0, found.stderr
    network, *kinds = found.stdout.splitlines()
    assert network.endswith(("so UDP is NOT held", "has no Landlock for TCP"))
    writes = "raised" if "so UDP" in network else "right"
    assert kinds == ["hang hung", "fork right", f"write {writes}", "print raised", "right right"]
    assert not still_run("time.sleep(3600)")


def test_what_is_no_verifier_is_said_before_anything_is_tried() -> None:
    allowed = "allowed: verify(task, messages) -> bool"
    for name, why in {
        "checks": "allowed: package.module:function",
        "no_such_module:verify": "it cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
        f"{NAUGHTY}:nope": f"{NAUGHTY} has no nope",
        f"{NAUGHTY}:not_callable": "it is int; allowed: a function verify(task, messages) -> bool",
        f"{NAUGHTY}:without_messages": f"its signature is (task: dict[str, typing.Any]) -> bool; {allowed}",
    }.items():
        assert one_line_error(Verifier, name) == f"--verifier: {name!r} given; {why}"
