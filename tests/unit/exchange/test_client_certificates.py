"""A store that wants a certificate of whoever asks, certificates of another time, and a clock that is another."""

import os
import select
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Protocol

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from launch.show.status_reader import store_status
from pretrain.config.keys import ExchangeConfig, RunConfig
from pretrain.config.load import load_config
from pretrain.exchange.options import store_options
from pretrain.exchange.store import StoreExchange
from pretrain.federation.preflight import check_store
from tests.authority import Authority
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.conftest import CREDENTIALS, fresh_clients

CERTIFICATE, KEY = "exchange.client_certificate", "exchange.client_key"


class Caller(socketserver.BaseRequestHandler):
    """One connection, until either end closes it."""

    def handle(self) -> None:
        assert isinstance(self.server, Door)
        near = self.server.tls.wrap_socket(self.request, server_side=True, do_handshake_on_connect=False)
        try:
            near.do_handshake()
        except OSError:  # what it has not read would have it reset, which may come before what it says
            with suppress(OSError), socket.socket(fileno=near.detach()) as ended:
                ended.settimeout(5)
                ended.shutdown(socket.SHUT_WR)
                while ended.recv(65536):
                    pass
            return
        with suppress(OSError), near:
            self.server.seen.append(near.getpeercert())
            with socket.create_connection(self.server.far_end) as far:
                while True:
                    ready = [near] if near.pending() else select.select([near, far], [], [])[0]
                    for source in ready:
                        if not (data := source.recv(65536)):
                            return
                        (far if source is near else near).sendall(data)


class Door(socketserver.ThreadingTCPServer):
    """TLS in front of an S3 server, for clients with a certificate of an authority alone."""

    daemon_threads = True

    def __init__(self, far_end: tuple[str, int], server: tuple[Path, Path], clients: Authority | None) -> None:
        super().__init__(("127.0.0.1", 0), Caller)
        self.far_end, self.seen = far_end, list[object]()
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(*server)
        if clients:
            self.tls.verify_mode = ssl.CERT_REQUIRED
            self.tls.load_verify_locations(clients.file)
        self.url = f"https://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


Opens = Callable[..., Door]


@pytest.fixture
def door(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opens]:
    """Opens one before the server of `s3_url`."""
    host, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    opened: list[Door] = []

    def opens(server: tuple[Path, Path], clients: Authority | None = None) -> Door:
        opened.append(Door((host, int(port)), server, clients))
        return opened[-1]

    with fresh_clients():
        yield opens
    for one in opened:
        one.shutdown()
        one.server_close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


class Configures(Protocol):
    """Makes a run with a store behind a door; `shows` is what this site shows it."""

    def __call__(self, door: Door, **shows: str) -> RunConfig: ...


@pytest.fixture
def configured(tmp_path: Path, tiny_config: TinyConfig, authority: Authority) -> Configures:
    def make(door: Door, **shows: str) -> RunConfig:
        exchange = {"url": f"s3://atoll/{tmp_path.name}", "options": {"endpoint_url": door.url}, "retry_seconds": 3600}
        return tiny_config(tmp_path, exchange=exchange | {"ca_file": str(authority.file)} | shows)

    return make


@pytest.mark.parametrize("in_one_file", [False, True])
def test_a_store_that_wants_to_know_who_asks(
    in_one_file: bool, door: Opens, authority: Authority, tmp_path: Path, configured: Configures
) -> None:
    opened = door(authority.certify("127.0.0.1"), authority)
    certificate, key = authority.certify("10.0.0.7")
    shows = {"client_certificate": str(certificate), "client_key": str(key)}
    if in_one_file:
        both = tmp_path / "both.pem"
        both.touch(mode=0o600)
        both.write_bytes(certificate.read_bytes() + key.read_bytes())
        shows = {"client_certificate": str(both)}
    config = configured(opened, **shows)
    check_store(config)
    objects = StoreExchange.of_run(config).objects
    objects.write("one", b"1")
    (tmp_path / "large").write_bytes(os.urandom(9 << 20))
    objects.upload(tmp_path / "large", "large")
    objects.download("large", tmp_path / "again", limit_bytes=10 << 20)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "large").read_bytes()
    assert opened.seen
    assert all("10.0.0.7" in str(found) for found in opened.seen)


@pytest.mark.parametrize("is_known", [False, True])
def test_one_line_where_the_store_does_not_know_who_asks(
    is_known: bool, door: Opens, authority: Authority, tmp_path: Path, configured: Configures
) -> None:
    opened = door(authority.certify("127.0.0.1"), authority)
    shows, reason = dict[str, str](), "it wants a certificate of whoever asks"
    if is_known:
        reason = "it does not know the authority of our certificate"
        certificate, key = Authority(tmp_path / "another", "another").certify("10.0.0.7")
        shows = {"client_certificate": str(certificate), "client_key": str(key)}
    config = configured(opened, **shows)
    reason = (
        "it wants a certificate of whoever asks" if not shows else "it does not know the authority of our certificate"
    )
    for said in (one_line_error(check_store, config), one_line_error(StoreExchange.of_run(config).read_contract)):
        assert said.startswith(f"exchange.url: {config.store_url} given; ")
        assert said.endswith(f": {reason} ({CERTIFICATE})"), "and was not tried again"


@pytest.mark.parametrize(("from_days", "reason"), [(36_500, "not yet valid"), (-18_000, "has expired")])
def test_a_stores_certificate_of_another_century(
    from_days: int, reason: str, door: Opens, authority: Authority, configured: Configures
) -> None:
    opened = door(authority.certify("127.0.0.1", from_days=from_days))
    config = configured(opened)
    said = one_line_error(check_store, config)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:")
    assert f"its certificate is not trusted: certificate {'is ' * (from_days > 0)}{reason}; by this machine's" in said
    assert f"clock it is {now}" in said
    assert said.endswith(" UTC (exchange.ca_file)")
    asked = one_line_error(store_status, config.store_url, store_options(config.exchange, config.store_url))
    assert f"it cannot be read: its certificate is not trusted: certificate {'is ' * (from_days > 0)}{reason}" in asked


class Skewed(BaseHTTPRequestHandler):
    """An S3 server to which all requests are of another time."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        said = "<Error><Code>RequestTimeTooSkewed</Code><Message>The difference is too large.</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else said.encode())

    do_GET = do_PUT = do_HEAD = do_POST = answer

    def log_message(self, format: str, *values: object) -> None:
        """Nothing."""


@contextmanager
def skewed_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Skewed)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    with pytest.MonkeyPatch.context() as patch, fresh_clients():
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_store_whose_clock_is_another_ends_in_one_line_that_names_ours(
    tmp_path: Path, tiny_config: TinyConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with skewed_server() as url:
        exchange = {"url": "s3://atoll/run", "options": {"endpoint_url": url}, "retry_seconds": 3600}
        said = one_line_error(check_store, tiny_config(tmp_path, exchange=exchange))
        asked = one_line_error(store_status, "s3://atoll/run", exchange["options"])
    assert "The difference is too large.; by this machine's clock it is 2" in said
    assert "The difference is too large.; by this machine's clock it is 2" in asked
    assert capsys.readouterr().out == ""


def test_mistakes_are_one_line(authority: Authority, tmp_path: Path, tiny_config: TinyConfig) -> None:
    certificate, key = authority.certify("10.0.0.7")

    def said(certificate: Path | str, key: Path | str = "", url: str = "s3://bucket/run") -> str:
        exchange = ExchangeConfig(client_certificate=str(certificate), client_key=str(key))
        return one_line_error(store_options, exchange, url)

    nothing, nowhere, other = tmp_path / "nothing.pem", tmp_path / "nowhere.pem", authority.certify("10.0.0.8")[1]
    nothing.touch(mode=0o600)
    assert said("", key) == f"{KEY}: '{key}' given; allowed: with {CERTIFICATE}"
    assert said(nowhere, key) == f"{CERTIFICATE}: '{nowhere}' given; allowed: a PEM file; No such file or directory"
    assert said(certificate, nowhere) == f"{KEY}: '{nowhere}' given; allowed: a PEM file; No such file or directory"
    assert said(nothing, key) == f"{CERTIFICATE}: '{nothing}' given; allowed: a PEM file; it holds no certificate"
    assert said(certificate, nothing) == f"{KEY}: '{nothing}' given; allowed: a PEM file; it holds no key"
    assert said(certificate, other) == (
        f"{KEY}: '{other}' given; allowed: a PEM file; it is not the key of '{certificate}'"
    )
    assert said(certificate, key, "gs://bucket/run") == (
        f"{CERTIFICATE}: '{certificate}' given with gs://bucket/run; allowed: with s3://"
    )
    locked = tmp_path / "locked.pem"
    locked.touch(mode=0o600)
    secret = load_pem_private_key(key.read_bytes(), None)
    locked.write_bytes(secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))
    assert said(certificate, locked) == f"{KEY}: '{locked}' given; allowed: a PEM file; its key has a password"
    for from_days in (-18_000, 36_500):
        old, own = authority.certify("10.0.0.9", from_days=from_days)
        year = datetime.fromtimestamp(time.time() + from_days * 86_400, UTC).year
        assert said(old, own).startswith(f"{CERTIFICATE}: '{old}' given; it is valid from {year}-")
        assert f" UTC, and by this machine's clock it is {datetime.now(UTC).year}-" in said(old, own)
    key.chmod(0o640)
    assert said(certificate, key) == f"{KEY}: '{key}' of mode 640 given; allowed: 600: chmod 600 {key}"
    assert store_options(ExchangeConfig(client_certificate=str(nowhere)), str(tmp_path)) == {}
    tiny_config(tmp_path)
    config = load_config([tmp_path / "tiny.yaml"], [f"{CERTIFICATE}=~/me.pem", f"{KEY}=~/me.key"])
    assert config.exchange.client_key == str(Path.home() / "me.key")
