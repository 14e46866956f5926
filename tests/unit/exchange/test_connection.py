"""A store in a network: an authority of one's own, a proxy, options of fsspec, and no secrets in a configuration."""

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from launch.show.status_reader import store_status
from pretrain.config.keys import ExchangeConfig, RunConfig
from pretrain.config.load import load_config
from pretrain.exchange.options import store_options
from pretrain.exchange.store import StoreExchange
from pretrain.federation.preflight import check_store
from pretrain.trust.contract import build_contract
from tests.authority import Authority
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.conftest import fresh_clients, s3_server

SECRET = "put it into the environment or a file that the store's library reads, as AWS_SHARED_CREDENTIALS_FILE names"


class Tunnel(socketserver.StreamRequestHandler):
    """One connection through the proxy: CONNECT host:port, then whatever bytes there are."""

    def handle(self) -> None:
        assert isinstance(self.server, Proxy)
        verb, target, _ = self.rfile.readline().decode().split()
        while self.rfile.readline().strip():
            pass
        self.server.asked.append((verb, target))
        host, port = target.rsplit(":", 1)
        with socket.create_connection((host, int(port))) as far:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            threading.Thread(target=_pass_on, args=(far, self.connection), daemon=True).start()
            _pass_on(self.connection, far)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


class Proxy(socketserver.ThreadingTCPServer):
    """An HTTP proxy as institutions have them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.asked: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def endpoint(authority: Authority) -> Iterator[str]:
    """An S3 API over TLS on loopback, with a bucket in it."""
    certificate, key = authority.certify("127.0.0.1")
    # botocore tries certificates again, too, for some twenty seconds
    with s3_server("-c", str(certificate), "-k", str(key), AWS_MAX_ATTEMPTS="1") as port, fresh_clients():
        import s3fs

        url = f"https://127.0.0.1:{port}"
        s3fs.S3FileSystem(endpoint_url=url, client_kwargs={"verify": str(authority.file)}).mkdir("atoll")
        yield url


@pytest.fixture
def config(endpoint: str, authority: Authority, tmp_path: Path, tiny_config: TinyConfig) -> Iterator[RunConfig]:
    """A run whose store is there."""
    exchange = {
        "url": f"s3://atoll/{tmp_path.name}",
        "options": {"endpoint_url": endpoint},
        "ca_file": str(authority.file),
        "retry_seconds": 3600,
    }
    with fresh_clients():
        yield tiny_config(tmp_path, exchange=exchange)


def test_an_authority_of_ones_own(config: RunConfig, monkeypatch: pytest.MonkeyPatch, authority: Authority) -> None:
    check_store(config)
    exchange = StoreExchange.of_run(config)
    exchange.objects.write("one", b"1")
    assert exchange.objects.read("one") == b"1"
    # What is not given a configuration takes the same from the environment.
    monkeypatch.setenv("AWS_ENDPOINT_URL", config.exchange.options["endpoint_url"])
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.file))
    assert one_line_error(store_status, config.store_url).endswith("there is no run in it (no contract.json)")


@pytest.mark.parametrize("whose", ["another", "the public ones"])
def test_a_certificate_that_is_not_trusted_is_not_tried_again(
    whose: str, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.exchange.ca_file = str(Authority(tmp_path, "other").file) if whose == "another" else ""
    for said in (one_line_error(check_store, config), one_line_error(StoreExchange.of_run(config).read_contract)):
        assert said.startswith(f"exchange.url: {config.store_url} given; ")
        assert said.endswith(
            "its certificate is not trusted: unable to get local issuer certificate (exchange.ca_file)"
        )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("way", ["environment", "options"])
def test_through_a_proxy(way: str, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy() as proxy:
        if way == "environment":
            monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        else:
            config.exchange.options["config_kwargs"] = {"proxies": {"https": proxy.url}}
        objects = StoreExchange.of_run(config).objects
        objects.write("one", b"1")
        assert objects.read("one") == b"1"
        proxy.shutdown()
    target = config.exchange.options["endpoint_url"].removeprefix("https://")
    assert set(proxy.asked) == {("CONNECT", target)}


def test_what_fsspec_is_told(tmp_path: Path, authority: Authority) -> None:
    file = str(authority.file)
    exchange = ExchangeConfig(options={"anon": True, "client_kwargs": {"region_name": "x"}}, ca_file=file)
    told = {"anon": True, "client_kwargs": {"region_name": "x", "verify": file}}
    assert store_options(exchange, "s3://bucket/run") == store_options(exchange, "s3a://bucket/run") == told
    assert store_options(exchange, "/scratch/run") == store_options(exchange, "file:///scratch/run") == {}
    assert store_options(ExchangeConfig(options={"anon": True}), "gs://bucket/run") == {"anon": True}


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    def said(file: Path, url: str = "s3://bucket/run") -> str:
        return one_line_error(store_options, ExchangeConfig(ca_file=str(file)), url)

    (tmp_path / "empty.pem").touch()
    given = f"exchange.ca_file: '{tmp_path}"
    assert said(tmp_path / "none.pem") == f"{given}/none.pem' given; allowed: a PEM file; No such file or directory"
    assert said(tmp_path / "empty.pem") == f"{given}/empty.pem' given; allowed: a PEM file; it holds no certificates"
    assert said(tmp_path) == f"{given}' given; allowed: a PEM file; Is a directory"
    assert said(tmp_path / "empty.pem", "gs://bucket/run") == (
        f"{given}/empty.pem' given with gs://bucket/run; allowed: with s3://; for other kinds set SSL_CERT_FILE and "
        "REQUESTS_CA_BUNDLE in the environment"
    )


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("key: AKIA", "key"),
        ("secret: xyzzy", "secret"),
        ("token: xyzzy", "token"),
        ("password: xyzzy", "password"),
        ("account_key: xyzzy", "account_key"),
        ("connection_string: xyzzy", "connection_string"),
        ("client_kwargs: {aws_secret_access_key: xyzzy}", "client_kwargs.aws_secret_access_key"),
        ("client_kwargs: {aws_access_key_id: AKIA}", "client_kwargs.aws_access_key_id"),
        ("client_kwargs: {headers: {Authorization: xyzzy}}", "client_kwargs.headers.Authorization"),
        ("s3_additional_kwargs: {SSECustomerKey: xyzzy}", "s3_additional_kwargs.SSECustomerKey"),
        (
            "config_kwargs: {proxies: {https: 'http://me:xyzzy@proxy.example:3128'}}",
            "config_kwargs.proxies.https",
        ),
    ],
)
def test_secrets_are_refused_and_not_shown(given: str, key: str, tmp_path: Path, tiny_config: TinyConfig) -> None:
    tiny_config(tmp_path)
    message = one_line_error(load_config, [tmp_path / "tiny.yaml"], [f"exchange.options={{{given}}}"])
    assert message == f"exchange.options.{key}: a secret given; allowed: none in a configuration; {SECRET}"


def test_options_are_no_part_of_the_contract(tmp_path: Path, tiny_config: TinyConfig) -> None:
    changes = {
        "options": {
            "endpoint_url": "https://s3.example:9000",
            "anon": False,
            "s3_additional_kwargs": {"SSEKMSKeyId": "alias/atoll"},
            "config_kwargs": {"proxies": {"https": "http://proxy.example:3128"}},
        },
        "ca_file": "ca.pem",
    }
    config = tiny_config(tmp_path, exchange=changes)
    assert config.exchange.options == changes["options"]
    assert build_contract(config) == build_contract(tiny_config(tmp_path))
    message = one_line_error(tiny_config, tmp_path, exchange={"options": {"client_kwargs": 3}})
    assert message == "exchange.options.client_kwargs: 3 given; allowed: a mapping"
