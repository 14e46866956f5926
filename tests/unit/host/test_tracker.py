"""Weights & Biases out of reach: one line, and the run goes on, recorded on disk.

Its library keeps state of its own in a process, so each case has one.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.support import ROOT

# What the library asks a server at the start of a run.
ANSWER = {
    "viewer": {"id": "1", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}},
    "serverInfo": {"features": []},
    "upsertBucket": {
        "inserted": True,
        "bucket": {
            **{"id": "x", "name": "abc", "displayName": "abc", "description": "", "config": "{}"},
            "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}},
        },
    },
}

# Trains a while; the server, if there is one, is gone before the end.
RUN = """
import sys
from pathlib import Path
from pretrain.config.keys import RunConfig, WandbConfig
from pretrain.host import tracker
tracker.TIMEOUT_SECONDS = 1.0
config = RunConfig(directory=sys.argv[1], wandb=WandbConfig(mode="online"))
Path(sys.argv[1], "silos/law").mkdir(parents=True)
tracking = tracker.Tracker(config, "silos/law", silo="law")
tracking.log("step", {"loss": 1.0, "note": "x"})
print("training", flush=True)
sys.stdin.readline()
tracking.log("eval", {"val_loss": {"law": 2.0}})
tracking.close()
print("ended")
"""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        answer = json.dumps({"data": ANSWER}).encode()
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def server(kind: str) -> Iterator[str]:
    """Address of a server that is none, says nothing, or answers."""
    if kind == "answers":
        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
            Thread(target=serving.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{serving.server_address[1]}"
            serving.shutdown()
        return
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        if kind == "none":
            silent.close()
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("kind", "key", "said"),
    [
        ("none", "", "no login was found (wandb login, or WANDB_API_KEY)"),
        pytest.param("none", "0" * 40, "", marks=pytest.mark.soak),
        ("silent", "0" * 40, ""),
        ("answers", "0" * 40, None),
    ],
    ids=["no login", "no server", "silent server", "server that goes away"],
)
def test_a_tracker_out_of_reach_stops_nobody(kind: str, key: str, said: str | None, tmp_path: Path) -> None:
    with server(kind) as address:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "WANDB_BASE_URL": address}
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path / "run")],
            env=environment | ({"WANDB_API_KEY": key} if key else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin
        assert process.stdout
        lines = []
        while (line := process.stdout.readline()) and line != "training\n":
            lines.append(line)
    rest, _ = process.communicate("\n")
    assert (process.returncode, rest) == (0, "ended\n")
    kept = [path.name.split("-")[0] for path in (tmp_path / "run/silos/law/wandb").glob("*run-*")]
    if said is None:
        assert lines == []
        assert kept.count("run") == 1
        return
    (line,) = lines
    assert line.startswith(f"wandb.mode: 'online' given; {said}")
    assert line.endswith(f"; recorded offline in {tmp_path}/run/silos/law/wandb, which wandb sync sends\n")
    assert "offline" in kept
