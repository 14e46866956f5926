"""Several processes of a silo on one node: scripts play them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.launch.start.test_launch import PATIENT, is_alive, pids_of
from tests.waiting import PATIENCE_SECONDS

# Each leaves its environment behind; `then` is what it does.
WORKER = """
import os, signal, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
starts = len(list(folder.glob(f"{rank}-*")))
meeting = Path(os.environ["ATOLL_MEETING_FILE"])
assert meeting.parent.stat().st_mode & 0o777 == 0o700
assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"
(folder / f"{rank}-{starts}").write_text(str(meeting))
"""
WAITS = "time.sleep(600)"


def start(folder: Path, *then: str, max_restarts: int = 0) -> subprocess.Popen[str]:
    """One process for each of `then`."""
    script = folder / "worker.py"
    script.write_text(WORKER + "".join(f"if rank == {rank}: {what}\n" for rank, what in enumerate(then)))
    words = ["--num-processes", str(len(then)), "--max-restarts", str(max_restarts), "--"]
    command = [sys.executable, "-m", "launch.start.workers", *words, sys.executable, str(script), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(
    ("then", "code", "said"),
    [
        (("pass", "pass"), 0, ""),
        (("sys.exit(75)", "time.sleep(.3); sys.exit(75)"), 75, ""),
        (("sys.exit(2)", WAITS), 2, "failed with exit status 2"),
        ((WAITS, "sys.exit(3)"), 3, "failed with exit status 3"),
        ((WAITS, "os.kill(os.getpid(), signal.SIGKILL)"), 128 + signal.SIGKILL, "was ended by SIGKILL"),
    ],
    ids=["finished", "stopped", "mistake", "crash", "killed"],
)
def test_the_first_to_fail_ends_all_and_its_exit_code_tells(
    tmp_path: Path, then: tuple[str, ...], code: int, said: str
) -> None:
    process = start(tmp_path, *then)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == code, output
    assert output.count("\n") == bool(said)
    assert output.endswith(f"{said}\n" if said else "")


def test_a_crash_is_tried_again_where_they_meet_anew(tmp_path: Path) -> None:
    process = start(tmp_path, "pass", "sys.exit(starts == 0)", max_restarts=2)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, output
    assert "--- crashed (exit 1); start 2 of 3 ---" in output
    first, second = ((tmp_path / f"1-{number}").read_text() for number in range(2))
    assert first != second
    assert not Path(first).parent.exists()
    assert not Path(second).parent.exists()


def test_a_mistake_is_not_tried_again(tmp_path: Path) -> None:
    process = start(tmp_path, "sys.exit(2)", "sys.exit(2)", max_restarts=2)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2
    assert not (tmp_path / "0-1").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_whatever_asks_to_stop_reaches_all_as_the_same(tmp_path: Path, number: signal.Signals) -> None:
    patient = tmp_path / "patient.py"
    patient.write_text(
        PATIENT.replace("name, pids = sys.argv[1]", 'name, pids = sys.argv[1] + os.environ["RANK"]').replace(
            "sys.exit(1)", "sys.exit(75)"
        )
    )
    command = [sys.executable, "-m", "launch.start.workers", "--num-processes", "2", "--"]
    process = subprocess.Popen([*command, sys.executable, str(patient), "law", str(tmp_path)])
    pids = pids_of(tmp_path, "law0", "law1")
    process.send_signal(number)
    assert process.wait(PATIENCE_SECONDS) == 75
    assert (tmp_path / "law0.saved").exists()
    assert (tmp_path / "law1.saved").exists()
    time.sleep(0.1)
    assert not [pid for pid in pids if is_alive(pid)]
