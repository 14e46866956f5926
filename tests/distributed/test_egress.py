"""What leaves a silo's network interface is what its egress ledger says, and goes to the store alone."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.links import HUB_ADDRESS, S3_ENVIRONMENT, S3_PORT, in_namespaces, inside, namespaces, run, s3_server
from launch.egress import totals
from pretrain.trust.egress import egress_file, read_lines
from pretrain.trust.ledger import Manifest
from tests.conftest import TinyConfig
from tests.distributed.federation import federate, launched
from tests.support import TinyText, tiny_silo

MISSING = [tool for tool in ("ip", "tc", "sysctl") if not shutil.which(tool)]
MISSING += [package for package in ("moto", "flask", "s3fs") if not importlib.util.find_spec(package)]
# Ethernet, IPv4, and TCP with time stamps: IEEE 802.3, RFC 791, RFC 9293 and RFC 7323, section 3.
PACKET_BYTES = 14 + 20 + 20 + 12
# Of a request to S3 that botocore has signed (version 4), with its line and all its headers: the sniffer below counted
# 749 (HEAD) to 934 (PUT), 815 in the mean.
REQUEST_BYTES = 815
TOLERANCE = 0.02  # a packet that is sent again has up to 64 KiB
STORE = f"{HUB_ADDRESS}/6/{S3_PORT}"
MULTICAST = "86dd ff02::"  # IPv6 asks its own link for routers and listeners
ARP = "0806 "
# Says, at the end of its input, where the packets went that left by the interface.
SNIFF = """
import json, socket, struct, sys, threading
ALL, OUTGOING, STATISTICS = 3, 4, 6
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL))
s.setsockopt(socket.SOL_SOCKET, 33, 256 << 20)  # SO_RCVBUFFORCE
s.bind(("silo", ALL))
found, sizes, over = {}, [0, 0], threading.Event()
def listen():
    s.settimeout(0.2)
    while not over.is_set():
        try:
            packet, address = s.recvfrom(1 << 17)
        except TimeoutError:
            continue
        if address[2] != OUTGOING:
            continue
        sizes[0] += len(packet); sizes[1] += 1
        kind = struct.unpack("!H", packet[12:14])[0]
        if kind == 0x0800:
            to = socket.inet_ntoa(packet[30:34])
            begin = 14 + 4 * (packet[14] & 15)
            to += f"/{packet[23]}"
            if packet[23] == 6:
                to += f"/{struct.unpack('!H', packet[begin + 2:begin + 4])[0]}"
        else:
            to = f"{kind:04x} " + (socket.inet_ntop(socket.AF_INET6, packet[38:54]) if kind == 0x86DD else "")
        found[to] = found.get(to, 0) + 1
thread = threading.Thread(target=listen); thread.start()
print(flush=True)
sys.stdin.read()
over.set(); thread.join()
lost = struct.unpack("II", s.getsockopt(263, STATISTICS, 8))[1]
print(json.dumps({"to": found, "bytes": sizes[0], "packets": sizes[1], "lost": lost}))
"""


@contextmanager
def sniffed(spaces: dict[str, str]) -> Iterator[dict[str, dict[str, Any]]]:
    """By silo, what was seen at its interface, once the block has ended."""
    found: dict[str, dict[str, Any]] = {}
    pipe = subprocess.PIPE
    sniffers = {
        silo: subprocess.Popen(inside(space, [sys.executable, "-c", SNIFF]), stdin=pipe, stdout=pipe, text=True)
        for silo, space in spaces.items()
    }
    try:
        for sniffer in sniffers.values():
            assert sniffer.stdout
            sniffer.stdout.readline()
        yield found
        for silo, sniffer in sniffers.items():
            found[silo] = json.loads(sniffer.communicate("", timeout=60)[0])
    finally:
        for sniffer in sniffers.values():
            sniffer.kill()
            sniffer.wait()


def counted(space: str, what: str) -> int:
    return int(run(f"ip netns exec {space} cat /sys/class/net/silo/statistics/tx_{what}"))


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(MISSING) or os.geteuid() != 0, reason=f"namespaces with an S3 API need root, and {MISSING}")
def test_the_interface_sends_what_the_ledger_says(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> None:
    """Three silos of 1.9 million parameters, in fp32, each in a namespace from which it reaches the store."""
    silos = ("alpha", "beta", "gamma")
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"hosts: [{HUB_ADDRESS}]\nwandb: offline\ncodecs: [fp32]\nleast_silos: 3\n")
    config = tiny_config(
        tmp_path,
        model={"config": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}},
        exchange={
            "url": "s3://benchmark/run",
            "poll_seconds": 0.5,
            "options": {"endpoint_url": S3_ENVIRONMENT["AWS_ENDPOINT_URL"]},
        },
        silos={name: tiny_silo(tiny_text, name) for name in silos},
        trust={"policy": str(policy)},
        wandb={"mode": "offline"},
    )
    with namespaces(list(silos), None, forwarding=False) as (hub, spaces), s3_server(hub):
        before = {silo: (counted(space, "bytes"), counted(space, "packets")) for silo, space in spaces.items()}
        with sniffed(spaces) as seen:
            federate(config, build_commands=in_namespaces(hub, spaces, S3_ENVIRONMENT))
        for silo, space in spaces.items():
            num_bytes, packets = counted(space, "bytes") - before[silo][0], counted(space, "packets") - before[silo][1]
            check(silo, num_bytes, packets, totals(egress_file(config.directory, silo)), seen[silo])
        command = [sys.executable, "-m", "launch.cli", "egress", "verify", config.directory, "--json"]
        verified = subprocess.run(
            inside(hub, command), env=os.environ | S3_ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert verified.returncode == 0, verified.stdout + verified.stderr
        found = json.loads(verified.stdout)
        assert not found["notes"]
        assert found["num_objects"] > 3 * 2 * len(silos)


def check(silo: str, num_bytes: int, packets: int, ledger: dict[str, Any], seen: dict[str, Any]) -> None:
    """Bytes and packets of an interface against a ledger, and where each packet went."""
    objects, requests = ledger["bytes"], sum(ledger["requests"].values())
    expected = objects + requests * REQUEST_BYTES + packets * PACKET_BYTES
    print(
        f"RESULT {silo}: the interface sent {num_bytes:,} bytes in {packets:,} packets; the ledger has {objects:,}, "
        f"with {requests} requests and headers {expected:,}: {num_bytes / expected - 1:+.4%}"
    )
    assert ledger["kind"]["payload"][1] > 0.95 * objects
    assert num_bytes >= objects
    assert abs(num_bytes / expected - 1) < TOLERANCE
    assert seen["lost"] == 0
    assert seen["bytes"] == pytest.approx(num_bytes, abs=1000)  # the kernel itself may ask for routers meanwhile
    elsewhere = {to for to in seen["to"] if to not in (STORE, ARP) and not to.startswith(MULTICAST)}
    assert not elsewhere
    assert seen["to"][STORE] > 100


def test_a_pseudo_gradient_that_is_too_long_stays(tmp_path: Path, tiny_config: TinyConfig) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("max_norm: 1.0e-6\nmetrics: [loss]\n")
    config = tiny_config(tmp_path, trust={"policy": str(policy)}, silos={"beta": None})
    code, said = launched(config)
    assert code == 2
    line = (
        f"trust.policy: {policy} given; its max_norm is 1e-06, and the pseudo-gradient of silo alpha for version 1 is "
    )
    assert line in said
    assert "Traceback" not in said
    kinds = {line.kind for line, _ in read_lines(egress_file(config.directory, "alpha")) if line}
    assert kinds == {"agreement", "claim", "beat", "requests"}
    assert not (Path(config.store_url) / "silos" / "alpha" / "000001").exists()
    policy.write_text("max_norm: 10\nmetrics: [loss]\n")  # allowed by now: the same command goes on
    manifest = federate(config).exchange.delivery("alpha", 3)
    assert manifest
    assert Manifest.from_bytes(manifest).metrics.keys() == {"loss"}
    rules = {line.rule for line, _ in read_lines(egress_file(config.directory, "alpha")) if line}
    sha256 = hashlib.sha256(policy.read_bytes()).hexdigest()
    assert {f"{sha256}: max_norm", f"{sha256}: metrics", f"{sha256}: no key"} <= rules
