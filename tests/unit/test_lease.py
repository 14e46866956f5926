"""One aggregator for one store."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.config import ConfigError
from pretrain.exchange.lease import Lease
from pretrain.exchange.objects import Objects
from tests.support import one_line_error

HOLD = """
import sys, time
from pretrain.exchange.lease import Lease
from pretrain.exchange.objects import Objects
lease = Lease(Objects(sys.argv[1]), seconds=1.0)
print("holds", flush=True)
sys.stdin.readline()
lease.check()
"""


def hold(url: Path) -> subprocess.Popen[str]:
    """Another process with the lease."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(url)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    while "holds" not in process.stdout.readline():
        assert process.poll() is None
    return process


def pretend_elsewhere(url: Path, term: int) -> None:
    """Make a term's holder a process of another machine, of which only signs of life can tell."""
    file = url / "aggregator" / f"{term:06d}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"machine": "elsewhere"}))


def test_terms_follow_one_another_and_leave_little_behind(tmp_path: Path) -> None:
    for term in range(1, 6):
        lease = Lease(Objects(str(tmp_path)), seconds=30)
        lease.check()
        lease.release()
        names = sorted(path.name for path in (tmp_path / "aggregator").iterdir())
        assert f"{term:06d}.json" in names
        assert {int(name[:6]) for name in names} == ({term - 1, term} - {0})


def test_the_second_says_who_holds_it(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    message = one_line_error(lambda: Lease(Objects(str(tmp_path)), seconds=1.0))
    assert f", process {holder.pid} works on this store; stop it first, or name another store" in message
    holder.communicate("go\n", timeout=20)
    assert holder.returncode == 0


def test_after_a_death_on_this_machine_the_next_starts_at_once(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    holder.kill()
    holder.communicate()
    began = time.monotonic()
    Lease(Objects(str(tmp_path)), seconds=30).release()
    assert time.monotonic() - began < 10


def test_a_silent_one_elsewhere_is_replaced_and_cannot_commit_any_more(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    holder = hold(tmp_path)
    pretend_elsewhere(tmp_path, 1)
    os.kill(holder.pid, signal.SIGSTOP)
    Lease(Objects(str(tmp_path)), seconds=1.0).release()
    assert f"process {holder.pid} has been silent for 1 s: taking over" in capfd.readouterr().out
    os.kill(holder.pid, signal.SIGCONT)
    _, error = holder.communicate("go\n", timeout=20)
    assert f"process {os.getpid()} has taken over here" in error
    assert holder.returncode == 1


def test_two_that_start_at_once_cannot_both_have_it(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    objects.write("aggregator/000001.json", json.dumps({"holder": "x", "machine": "elsewhere", "pid": 1}).encode())
    objects.write("aggregator/000001.ended", b"{}\n")
    first = Lease(objects, seconds=1.0)
    with pytest.raises(FileExistsError):
        objects.write("aggregator/000002.json", b"{}")
    first.check()
    objects.write("aggregator/000003.json", json.dumps({"holder": "y", "machine": "elsewhere", "pid": 1}).encode())
    with pytest.raises(ConfigError, match="the aggregator at y has taken over here"):
        first.check()
    first.release()
