"""Fixtures for the unit tests: a real S3 API."""

import importlib.util
import os
import socket
import socketserver
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest

from pretrain.config.keys import RunConfig
from pretrain.trust.members import with_keys
from tests.conftest import TinyConfig
from tests.support import free_port
from tests.waiting import wait_for

Line = TypeVar("Line", bound=socketserver.ThreadingTCPServer)

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server(*options: str, **environment: str) -> Iterator[int]:
    """moto's server, which speaks S3 over HTTP on a loopback port; yields the port, and skips where moto is not.

    Until the block ends the environment has credentials for it and `environment`, and nothing that leads elsewhere.
    """
    for package in ("moto", "flask", "s3fs"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'atoll[test,s3]' to test against an S3 API")
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("AWS_") or n.lower().endswith("_proxy")]:
            patch.delenv(name)
        for name, value in (CREDENTIALS | environment).items():
            patch.setenv(name, value)
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port), *options]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def answers() -> bool:
            assert server.poll() is None, "moto's server ended"
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False

        try:
            wait_for(answers, seconds=60, poll_seconds=0.1)
            yield port
        finally:
            server.terminate()
            server.wait()


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    """A bucket of moto's server."""
    with s3_server() as port, pytest.MonkeyPatch.context() as patch, fresh_clients():
        import s3fs

        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        s3fs.S3FileSystem().mkdir("atoll")
        yield "s3://atoll"


@contextmanager
def fresh_clients() -> Iterator[None]:
    """s3fs keeps its clients, with the settings that they were made with."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def in_front_of_s3(kind: Callable[[tuple[str, int]], Line]) -> Iterator[Line]:
    """A line to the server of `s3_url`, through which all that goes to its bucket goes until the block ends."""
    host, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")
    with kind((host, int(port))) as line, pytest.MonkeyPatch.context() as patch, fresh_clients():
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{line.server_address[1]}")
        try:
            yield line
        finally:
            line.shutdown()


@pytest.fixture
def signed_config(tiny_config: TinyConfig, tmp_path: Path) -> RunConfig:
    """A run of two silos with keys of its own, which are in its run directory."""
    return with_keys(tiny_config(tmp_path, exchange={"snapshot_versions": 1}, trust={"directory": ""}), make=True)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """All that this test has printed so far."""
    parts: list[str] = []

    def said() -> str:
        parts.append(capsys.readouterr().out)
        return "".join(parts)

    return said


@pytest.fixture
def make(tiny_config: TinyConfig, tmp_path: Path) -> Callable[..., RunConfig]:
    """A configuration of four versions with all keys in the run directory."""

    def make(*, trust: dict[str, str] | None = None, **changes: object) -> RunConfig:
        settings = {"inner": {"num_steps": 16}, "outer": {"lr": 0.5}, "exchange": {"snapshot_versions": 4}} | changes
        return with_keys(tiny_config(tmp_path, trust={"directory": ""} | (trust or {}), **settings), make=True)

    return make
