"""Processes of the product that start warm: forked from one that has imported torch, transformers and DeepSpeed.

Importing takes most of a tiny run's time. A warm process is a process of its own, forked before anything of a run
exists, with the arguments, environment, directory, open files, signals and exit status of one that was started; only
what has been imported is shared. `python` is an interpreter's stand-in for `python -m MODULE ARGUMENT ...`; whatever
it cannot do it leaves to the real one. Tests of what starts processes use the real one throughout.
"""

import atexit
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from launch.start.workers import KEEP_FREED_MEMORY
from tests.support import ROOT
from tests.waiting import wait_for


@cache
def python() -> str:
    """The stand-in's path; the server behind it starts at the first call, and ends with this process."""
    directory = Path(tempfile.mkdtemp(prefix="warm-"))
    stand_in, socket = directory / "python", directory / "socket"
    source = Path(__file__).with_name("client.py").read_text()
    stand_in.write_text(f"#!{sys.executable} -IS\nPYTHON, SOCKET = {sys.executable!r}, {str(socket)!r}\n{source}")
    stand_in.chmod(0o755)
    environment = os.environ | KEEP_FREED_MEMORY | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.warm.server", str(socket)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,  # its end tells the server that we are gone
        start_new_session=True,
    )

    def end() -> None:
        assert server.stdin
        server.stdin.close()
        server.wait()
        for left in (stand_in, socket):
            left.unlink(missing_ok=True)
        directory.rmdir()

    atexit.register(end)
    wait_for(socket.exists, seconds=100, meanwhile=lambda: server.poll() is None, tells=lambda: "the server's start")
    return str(stand_in)
