"""Institutions that only share a store: namespaces that reach an S3 API in the hub, and nothing else."""

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.links import HUB_ADDRESS, S3_ENVIRONMENT, S3_PORT, in_namespaces, inside, namespaces, s3_server
from pretrain.config import RunConfig, save_config
from tests.authority import Authority
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, federate
from tests.faults.test_kills import check_same
from tests.support import TinyText, tiny_silo

MISSING = [tool for tool in ("ip", "tc", "sysctl") if not shutil.which(tool)]
MISSING += [package for package in ("moto", "flask", "s3fs") if not importlib.util.find_spec(package)]
pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        bool(MISSING) or os.geteuid() != 0, reason=f"namespaces with an S3 API need root, and {MISSING}"
    ),
]
SILOS = ("alpha", "beta", "gamma")
RATE = "100mbit"
ENDPOINT = f"https://{HUB_ADDRESS}:{S3_PORT}"
CREDENTIALS = {name: value for name, value in S3_ENVIRONMENT.items() if name != "AWS_ENDPOINT_URL"}
ANSWER = "import socket; s = socket.create_server(('', 5002)); print(flush=True)\nwhile True: s.accept()[0].close()"
ASK = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"
COPY = "import s3fs, sys; s3fs.S3FileSystem().get(sys.argv[1], sys.argv[2], recursive=True)"


@dataclass(frozen=True, kw_only=True)
class Institutions:
    """Namespaces, with a bucket behind TLS in the hub."""

    hub: str
    spaces: dict[str, str]
    authority: Authority

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs that has no configuration."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": ENDPOINT, "AWS_CA_BUNDLE": str(self.authority.file)}

    def reaches(self, space: str, address: str, port: int) -> bool:
        ask = inside(space, [sys.executable, "-c", ASK, address, str(port)])
        return subprocess.run(ask, capture_output=True, check=False).returncode == 0

    def outcome(self, config: RunConfig, url: str) -> Outcome:
        """A run that ended, with its store copied to where the test can read it."""
        copy = Path(config.directory) / "copied"
        command = inside(self.hub, [sys.executable, "-c", COPY, url.removeprefix("s3://"), str(copy)])
        subprocess.run(command, env=os.environ | self.environment, check=True)
        return Outcome(config=dataclasses.replace(config, exchange=dataclasses.replace(config.exchange, url=str(copy))))


@pytest.fixture
def institutions(tmp_path: Path) -> Iterator[Institutions]:
    authority = Authority(tmp_path / "authority")
    with namespaces(list(SILOS), RATE, forwarding=False) as (hub, spaces):
        found = Institutions(hub=hub, spaces=spaces, authority=authority)
        with s3_server(hub, found.environment, authority.certify(HUB_ADDRESS)):
            yield found


@contextmanager
def answering(space: str) -> Iterator[None]:
    """Somebody who takes connections at port 5002."""
    with subprocess.Popen(inside(space, [sys.executable, "-c", ANSWER]), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            yield
        finally:
            process.kill()


def three_silos(tiny_config: TinyConfig, tiny_text: TinyText, directory: Path, **exchange: object) -> RunConfig:
    return tiny_config(
        directory,
        outer={"optimizer": "nesterov", "codec": "int4", "downlink_codec": "bf16", "error_feedback": 0.9},
        silo={"checkpoint_interval_steps": 3},
        silos={name: tiny_silo(tiny_text, name) for name in SILOS},
        exchange=exchange,
    )


def test_three_silos_that_reach_only_the_store(
    institutions: Institutions, tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    hub, spaces = institutions.hub, institutions.spaces
    with answering(spaces["beta"]):
        assert institutions.reaches(hub, "10.77.1.2", 5002)
        assert institutions.reaches(spaces["alpha"], HUB_ADDRESS, S3_PORT)
        assert not institutions.reaches(spaces["alpha"], "10.77.1.2", 5002)
    url = "s3://benchmark/run"
    exchange = {"url": url, "options": {"endpoint_url": ENDPOINT}, "ca_file": str(institutions.authority.file)}
    config = three_silos(tiny_config, tiny_text, tmp_path / "apart", **exchange)

    path = tmp_path / "without.yaml"
    exchange_without = dataclasses.replace(config.exchange, ca_file="")
    save_config(dataclasses.replace(config, directory=str(tmp_path / "without"), exchange=exchange_without), path)
    command = [sys.executable, "-m", "launch.cli", "aggregate", "--config", str(path)]
    environment = os.environ | CREDENTIALS | {"AWS_MAX_ATTEMPTS": "1"}
    without = subprocess.run(inside(hub, command), env=environment, capture_output=True, text=True, check=False)
    assert without.returncode == 2
    assert without.stderr == (
        f"atoll: exchange.url: {url} given; aggregator cannot be listed: its certificate is not trusted: unable to get "
        "local issuer certificate (exchange.ca_file)\n"
    )

    federate(config, build_commands=in_namespaces(hub, spaces, CREDENTIALS))
    apart = institutions.outcome(config, url)
    check_same(apart, federate(three_silos(tiny_config, tiny_text, tmp_path / "local")))
