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
from typing import Any

import pytest

from benchmarks.links import HUB_ADDRESS, S3_ENVIRONMENT, S3_PORT, in_namespaces, inside, namespaces, run, s3_server
from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config
from tests.authority import Authority
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, federate
from tests.faults.test_kills import check_same, make_config
from tests.faults.test_relay_deaths import behind_relay, relay_command
from tests.support import TinyText, tiny_silo
from tests.waiting import PATIENCE_SECONDS

MISSING = [tool for tool in ("ip", "tc", "sysctl") if not shutil.which(tool)]
MISSING += [package for package in ("moto", "flask", "s3fs") if not importlib.util.find_spec(package)]
pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        bool(MISSING) or os.geteuid() != 0, reason=f"namespaces with an S3 API need root, and {MISSING}"
    ),
]
RATE = "100mbit"
URL = "s3://benchmark/run"
OUTER = {"codec": "int4", "downlink_codec": "bf16", "error_feedback": 0.9}
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


@contextmanager
def institutions(directory: Path, silos: tuple[str, ...], *, offline: tuple[str, ...] = ()) -> Iterator[Institutions]:
    authority = Authority(directory / "authority")
    with namespaces(list(silos), RATE, forwarding=False, offline=offline) as (hub, spaces):
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


def in_bucket(found: Institutions) -> dict[str, Any]:
    return {"url": URL, "options": {"endpoint_url": ENDPOINT}, "ca_file": str(found.authority.file)}


def without_authority(config: RunConfig, space: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Start an aggregator that does not know the authority."""
    exchange = dataclasses.replace(config.exchange, ca_file="")
    save_config(dataclasses.replace(config, directory=str(directory), exchange=exchange), directory / "run.yaml")
    command = [sys.executable, "-m", "launch.cli", "aggregate", "--config", str(directory / "run.yaml")]
    environment = os.environ | CREDENTIALS | {"AWS_MAX_ATTEMPTS": "1"}
    return subprocess.run(inside(space, command), env=environment, capture_output=True, text=True, check=False)


def test_three_silos_that_reach_only_the_store(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> None:
    def configured(directory: Path, exchange: dict[str, Any]) -> RunConfig:
        silos = {name: tiny_silo(tiny_text, name) for name in ("alpha", "beta", "gamma")}
        return tiny_config(
            directory, outer=OUTER, silo={"checkpoint_interval_steps": 3}, silos=silos, exchange=exchange
        )

    with institutions(tmp_path, ("alpha", "beta", "gamma")) as found:
        hub, alpha, beta = found.hub, found.spaces["alpha"], found.spaces["beta"]
        with answering(beta):
            assert found.reaches(hub, "10.77.1.2", 5002)
            assert found.reaches(alpha, HUB_ADDRESS, S3_PORT)
            assert not found.reaches(alpha, "10.77.1.2", 5002)
        config = configured(tmp_path / "apart", in_bucket(found))
        refused = without_authority(config, hub, tmp_path / "without")
        assert refused.returncode == 2
        assert refused.stderr == (
            f"atoll: exchange.url: {URL} given; aggregator cannot be listed: its certificate is not trusted: unable to "
            "get local issuer certificate (exchange.ca_file)\n"
        )
        federate(config, build_commands=in_namespaces(hub, found.spaces, CREDENTIALS))
        apart = found.outcome(config, URL)
    check_same(apart, federate(configured(tmp_path / "local", {})))


def test_compute_nodes_without_a_route_train_through_a_relay(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Alpha sees a directory and nothing else; the relay runs where the store can be reached."""
    with institutions(tmp_path, ("alpha", "beta"), offline=("alpha",)) as found:
        assert not run(f"ip -n {found.spaces['alpha']} route")
        assert not found.reaches(found.spaces["alpha"], HUB_ADDRESS, S3_PORT)
        config = make_config(tiny_config, tmp_path / "apart", in_bucket(found), **OUTER)
        here, log = tmp_path / "site" / "store", tmp_path / "relay.log"
        build = behind_relay(in_namespaces(found.hub, found.spaces, CREDENTIALS), "alpha", here)
        command = inside(found.hub, relay_command(config, "alpha", here))
        with log.open("wb") as file:
            relay = subprocess.Popen(command, env=os.environ | CREDENTIALS, stdout=file, stderr=file)
        try:
            federate(config, build_commands=build)
            assert relay.wait(PATIENCE_SECONDS) == 0, log.read_text()
        finally:
            relay.kill()
            relay.wait()
        apart = found.outcome(config, URL)
    for version in range(1, config.schedule.num_versions + 1):
        assert f"version {version}: came, " in log.read_text()
        assert f"version {version}: the delivery of silo alpha went, " in log.read_text()
    assert apart.exchange.objects.names("silos/alpha/beats") == []  # it has ended, as seen from there
    check_same(apart, federate(make_config(tiny_config, tmp_path / "local", **OUTER)))
