"""What listens while a run trains: gloo, between the processes of one silo, and a collective's board; on loopback."""

import fcntl
import json
import os
import pty
import signal
import socket
import ssl
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.show.logs import read_logs
from launch.show.metrics import read_status
from launch.start.local import process_directory
from launch.start.processes import MARK
from pretrain.config.load import load_run
from pretrain.exchange.board import FarBoard
from pretrain.exchange.channel import BrokenError, Channel, Credentials
from pretrain.trust.members import Members, public_keys
from tests.conftest import TinyConfig
from tests.distributed.federation import left_behind
from tests.support import free_port
from tests.unit.exchange.members import private_key
from tests.waiting import PATIENCE_SECONDS, wait_for

RANKS = ("alpha rank 0", "beta rank 0", "beta rank 1")
ATOLL = [sys.executable, "-m", "launch.cli"]
LOOPBACK = "127.0.0.1"


def listening(launcher: int) -> dict[str, set[str]]:
    """Role of each process that a launcher has started, and of itself, to the addresses at which it listens, or takes
    datagrams.
    """
    found: dict[str, set[str]] = {}
    for process in [psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)]:
        variables = process.environ()
        role = variables.get(MARK, "launcher").rsplit("-", 1)[0]
        if "pretrain.train" in process.cmdline() and "RANK" in variables:
            role += f" rank {variables['RANK']}"
        sockets = process.net_connections(kind="inet")
        found.setdefault(role, set()).update(
            socket.laddr.ip
            for socket in sockets
            if socket.status == psutil.CONN_LISTEN or (not socket.raddr and socket.status != psutil.CONN_CLOSE)
        )
    return found


def rubbish(port: int) -> Iterator[socket.socket]:
    """Connections of strangers, which say something or nothing, and stay."""
    for data in (b"", bytes(100), b"GET / HTTP/1.1\r\n\r\n", bytes.fromhex("1603010200010001fc0303") + bytes(500)) * 30:
        connection = socket.create_connection((LOOPBACK, port), 10)
        with suppress(OSError):
            connection.sendall(data)
        yield connection


def spoken(port: int, directory: Path) -> list[str]:
    """What a stranger is told who speaks the collective's own protocol over TLS, with keys of its own, for beta."""
    members = Members(keys=public_keys(load_run(directory)), signer=private_key("stranger"))

    def attempt(silo: str, run: str) -> str:
        stranger = Credentials(members, run=run, silo=silo)
        try:
            FarBoard(stranger.dial(LOOPBACK, port, "alpha", purpose="words"), seconds=5).set(f"left/{silo}", "hacked")
        except BrokenError as error:
            return str(error)
        return "welcome"

    run = attempt("beta", "mine").removeprefix("a passport of run ").removesuffix(" was shown, and this is mine")
    said = [attempt(silo, run) for silo in ("beta", "alpha", "delta")]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(socket.create_connection((LOOPBACK, port), 10)) as connection:
        channel = Channel(connection)
        try:
            for words in (["set", "left/beta", "hacked"], ["claim", "member/beta", "mine"]):
                channel.send_frame(json.dumps(words).encode(), 10)
            while channel.receive_frame(1 << 20, 10) != b"welcome":
                pass
        except BrokenError as error:
            said.append(str(error))
    return said


@pytest.mark.soak
def test_a_collective_does_not_notice_strangers(tmp_path: Path, tiny_config: TinyConfig) -> None:
    port = free_port()
    exchange = {"kind": "collective", "url": f"tcp://{LOOPBACK}:{port}", "dead_seconds": 10.0}
    config = tiny_config(tmp_path, exchange=exchange, inner={"num_steps": 100_000})
    command = [*ATOLL, "launch", "local", "--config", str(tmp_path / "tiny.yaml")]
    statuses = [process_directory(config, silo) / "status.json" for silo in config.silos]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:

        def trained(steps: int) -> None:
            before = read_status(statuses[0]).step
            wait_for(
                lambda: all(read_status(status).step > before + steps for status in statuses),
                seconds=150,
                meanwhile=lambda: process.poll() is None,
            )

        try:
            trained(8)
            found = listening(process.pid)
            told = spoken(port, Path(config.directory))
            held = list(rubbish(port))
            trained(20)
        finally:
            process.terminate()
            said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    for connection in held:
        connection.close()
    assert process.returncode == 128 + signal.SIGTERM, said
    whose = "alpha says: refused: signature of the passport: not of these bytes"
    no_member = "alpha says: refused: delta is no member: the contract has no key of it"
    gone = "the connection was closed at the other end"
    assert [line.partition(" by the key ")[0] for line in told] == [whose, whose, no_member, gone]
    silos = {f"{silo} rank 0": {LOOPBACK} for silo in config.silos}
    assert found == {"launcher": set(), **silos}  # beta has gloo of its own process alone
    lines = list(read_logs(Path(config.directory), ["alpha"], num_lines=1000, follow=False))
    assert len([line for line in lines if f"a connection from {LOOPBACK} was dropped: " in line]) == 1
    assert not [line for line in lines if "Traceback" in line]


def test_nothing_listens_but_on_loopback(tmp_path: Path, tiny_config: TinyConfig) -> None:
    with socket.create_server(("", 0)):
        (seen,) = listening(psutil.Process().pid).values()
    assert seen & {"0.0.0.0", "::"}, "the test would see it"
    two = {"processes_per_node": 2, "micro_batch_sequences": 2}
    config = tiny_config(tmp_path, inner={"num_steps": 100_000}, silos={"beta": two})
    command = [*ATOLL, "launch", "local", "--config", str(tmp_path / "tiny.yaml")]
    statuses = [process_directory(config, silo) / "status.json" for silo in config.silos]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            wait_for(
                lambda: all(read_status(status).step > 4 for status in statuses),
                seconds=150,
                meanwhile=lambda: process.poll() is None,
            )
            found = listening(process.pid)
        finally:
            process.terminate()
            said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM, said
    nowhere: dict[str, set[str]] = {name: set() for name in ("launcher", "aggregator", "beta")}
    assert found == nowhere | {rank: {"127.0.0.1"} for rank in RANKS}


def test_a_silo_by_itself_is_watched_saved_and_started_once(tmp_path: Path, tiny_config: TinyConfig) -> None:
    changes: dict[str, Any] = {"inner": {"num_steps": 100_000}, "silo": {"checkpoint_interval_steps": 100_000}}
    config = tiny_config(tmp_path, exchange={"kind": "none"}, **changes)
    status = process_directory(config, "alpha") / "status.json"
    command = [*ATOLL, "train", "--config", str(tmp_path / "tiny.yaml"), "--silo", "alpha"]
    terminal, ours = pty.openpty()
    prepare = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # noqa: E731 - a new session's terminal, whose end is SIGHUP
    process = subprocess.Popen(
        command,
        stdin=ours,
        stdout=ours,
        stderr=ours,
        start_new_session=True,
        preexec_fn=prepare,  # noqa: PLW1509
    )
    os.close(ours)
    threading.Thread(target=drain, args=(terminal,), daemon=True).start()
    try:
        wait_for(lambda: read_status(status).step > 4, seconds=150, meanwhile=lambda: process.poll() is None)
        assert listening(process.pid) == {"launcher": set(), "alpha rank 0": {"127.0.0.1"}}
        began = time.monotonic()
        again = subprocess.run(command, capture_output=True, text=True, check=False)
        assert time.monotonic() - began < 10
        holder = psutil.Process(process.pid).children()[0].pid
        assert (again.returncode, again.stdout) == (2, "")
        assert again.stderr == (
            f"atoll: directory: '{config.directory}' given; silo alpha runs there already (process {holder}); stop it, "
            "or name another directory\n"
        )
        os.close(terminal)  # as when its window is closed
        process.wait(PATIENCE_SECONDS)
    finally:
        process.terminate()
    assert process.returncode == 128 + signal.SIGHUP
    assert read_status(status).phase == "stopped"
    (checkpoint,) = (process_directory(config, "alpha") / "checkpoints").glob("step-*/state.json")
    *_, last = read_logs(Path(config.directory), ["alpha"], num_lines=20, follow=False)
    step = int(checkpoint.parent.name.removeprefix("step-"))
    assert last == f"alpha | stopped after step {step}: on request; all is saved, start again to go on"
    assert not left_behind(str(tmp_path))


def drain(terminal: int) -> None:
    """Read what is drawn, so that nobody waits to be read."""
    with suppress(OSError):
        while os.read(terminal, 4096):
            pass
