"""Fixtures for the unit tests: a real S3 API."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.support import free_port


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    """A bucket of moto's server, which speaks S3 over HTTP on a loopback port."""
    for package in ("moto", "flask", "s3fs"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'atoll[test,s3]' to test against an S3 API")
    import s3fs

    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(port, server)
            s3fs.S3FileSystem.clear_instance_cache()
            s3fs.S3FileSystem().mkdir("atoll")
            yield "s3://atoll"
        finally:
            server.terminate()
            server.wait()
            s3fs.S3FileSystem.clear_instance_cache()


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    """Until moto's server takes connections."""
    deadline = time.monotonic() + 60
    while True:
        assert server.poll() is None, "moto's server ended"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
