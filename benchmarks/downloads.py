"""An object fetched in parts, against the same object read through the file that s3fs opens.

    python -m benchmarks.downloads [--megabytes 300] [--delay-ms 30] [--connection-megabytes 25]

A server on loopback answers every request late by the delay, and sends no faster than so many MB/s on one connection,
as object stores far away do; 0 is as fast as the machine. Both ways hash what comes and write it to a file. Printed:
MB/s in pairs one after the other, their median ratio, and by how much memory grew at most. No GPU.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from blake3 import blake3

from benchmarks.proc import status_bytes
from pretrain.exchange.objects import BLOCK_BYTES, Objects

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1"}


class Answer(BaseHTTPRequestHandler):
    """HEAD and GET of one file, or of a range of it, as S3 answers them."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        """What a client asks for first."""
        self._answer(with_body=False)

    def do_GET(self) -> None:
        """The bytes."""
        self._answer(with_body=True)

    def log_message(self, *words: object) -> None:
        """Nothing."""

    def _answer(self, *, with_body: bool) -> None:
        assert isinstance(self.server, Server)
        time.sleep(self.server.delay_seconds)
        size = self.server.file.stat().st_size
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(asked[1]), min(size, int(asked[2]) + 1)) if asked else (0, size)
        self.send_response(206 if asked else 200)
        for name, value in {
            "Content-Length": end - start,
            "Content-Range": f"bytes {start}-{end - 1}/{size}",
            "ETag": '"one"',
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if with_body:
            with self.server.file.open("rb") as file:
                due, rate = time.perf_counter(), self.server.bytes_per_second
                while start < end:
                    num_bytes = min(int(rate / 100) if rate else BLOCK_BYTES, end - start)
                    start += (sent := os.sendfile(self.connection.fileno(), file.fileno(), start, num_bytes))
                    if rate:
                        due += sent / rate
                        time.sleep(max(0.0, due - time.perf_counter()))


class Server(ThreadingHTTPServer):
    """The server, far away."""

    def __init__(self, file: Path, delay_seconds: float, bytes_per_second: float) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.file, self.delay_seconds, self.bytes_per_second = file, delay_seconds, bytes_per_second


def fetch(way: str, folder: Path, num_bytes: int) -> None:
    """Fetch the object once and print BLAKE3, seconds and by how many bytes memory grew; in a process of its own."""
    objects, copy = Objects("s3://benchmark/run"), folder / "copy"
    objects.exists("object")  # so that the client is there
    before, began = status_bytes()["VmHWM"], time.perf_counter()
    if way == "parts":
        found, _ = objects.download("object", copy, limit_bytes=num_bytes)
    else:
        digest = blake3()
        with objects._fs.open("benchmark/run/object", "rb") as source, copy.open("wb") as target:
            while block := source.read(BLOCK_BYTES):
                digest.update(block)
                target.write(block)
        found = digest.hexdigest()
    print(found, time.perf_counter() - began, status_bytes()["VmHWM"] - before)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--delay-ms", type=float, default=30)
    parser.add_argument("--connection-megabytes", type=float, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fetch", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    num_bytes = given.megabytes * 10**6
    if given.fetch:
        fetch(given.fetch[0], Path(given.fetch[1]), num_bytes)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "object"
        file.write_bytes(os.urandom(num_bytes))
        digest = blake3(file.read_bytes()).hexdigest()
        server = Server(file, given.delay_ms / 1000, given.connection_megabytes * 10**6)
        if (server_pid := os.fork()) == 0:
            server.serve_forever()
        environment = os.environ | ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}"}
        arguments = [sys.executable, "-m", "benchmarks.downloads", f"--megabytes={given.megabytes}", "--fetch"]
        ratios = []
        try:
            for _ in range(given.repeats):
                rates = {}
                for way in ("opened", "parts"):
                    printed = subprocess.check_output([*arguments, way, folder], env=environment, text=True).split()
                    assert printed[0] == digest
                    rates[way] = num_bytes / 1e6 / float(printed[1])
                    print(f"{way:8s} {rates[way]:7.1f} MB/s  +{int(printed[2]) / 1e6:.0f} MB", flush=True)
                ratios.append(rates["parts"] / rates["opened"])
        finally:
            os.kill(server_pid, 9)
            os.waitpid(server_pid, 0)
    print(f"parts / opened: {statistics.median(ratios):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
