"""Compute utilisation behind thin links: silos in network namespaces, each with a link of some Mbit/s to a hub.

    python -m benchmarks.links CORPORA [key=value ...] [--rate 20mbit] [--silos 2] [--only WAY ...] [--directory DIR]

In the hub's namespace run an S3 API and the aggregator; packets between silos pass through it. `tbf` limits each
direction of each silo's link; a second of plain TCP shows that it does. Every way trains the same model on the same
batches. Printed are utilisation, seconds_training / (seconds_training + seconds_waiting) summed over the silos (in the
second training stands still: to gather, to wait, to adopt; starting and evaluating are in neither), bytes sent as the
payloads say and as the silos' interfaces counted them, and the mean held-out loss. Linux, as root.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.runs import finished, mean_loss, plain
from launch.demo import federated_config, prepare_text
from launch.start.local import CommandBuilder, local_commands
from launch.start.processes import ChildCommand
from pretrain.config.keys import RunConfig

HUB_ADDRESS, S3_PORT, SILO_PORT = "10.77.255.1", 5000, 29600
INT4 = "outer.codec=int4 outer.downlink_codec=int4"
STREAMING = f"{INT4} outer.num_fragments=3 outer.overlap_steps=5"
# A way to its exchange and settings.
WAYS = {
    "store fp32": ("store", "outer.codec=fp32"),
    "store int4": ("store", INT4),
    "store streaming overlap int4": ("store", STREAMING),
    "collective fp32": ("collective", "outer.codec=fp32"),
    "collective int4": ("collective", INT4),
    "collective streaming overlap int4": ("collective", STREAMING),
}
# 1.6 million parameters and short steps: plain DiLoCo in fp32 is bound by the link, as a large model is by a fast one.
SETTINGS = [
    "model.config.hidden_size=192",
    "model.config.intermediate_size=512",
    "inner.num_steps=600",
    "inner.lr=0.004",
    "outer.sync_interval_steps=40",
    "silo.eval_interval_rounds=0",
    "silo.checkpoint_interval_steps=600",
    "exchange.poll_seconds=0.05",
    "wandb.mode=disabled",
]
S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "benchmark",
    "AWS_SECRET_ACCESS_KEY": "benchmark",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ENDPOINT_URL": f"http://{HUB_ADDRESS}:{S3_PORT}",
}
RECEIVE = "import socket; s = socket.create_server(('', 5001)); c = s.accept()[0]\nwhile c.recv(1 << 16): pass"
SEND = "import socket, sys; s = socket.create_connection((sys.argv[1], 5001)); s.sendall(bytes(int(sys.argv[2])))"


def main() -> None:
    """Build the links, train every way, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path, help="folder of corpus folders")
    parser.add_argument("--rate", default="20mbit", help="of each direction of each link, as tc writes it")
    parser.add_argument("--silos", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--directory", type=Path, default=Path("runs/links"))
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_intermixed_args()
    check_machine()
    packed, tokenizer = prepare_text(arguments.directory, arguments.corpora)
    packed = dict(list(packed.items())[: arguments.silos])
    with namespaces(list(packed), arguments.rate) as (hub, spaces), s3_server(hub):
        for name, space in spaces.items():
            print(f"link of {name}: {measured_mbit(space, hub):.1f} Mbit/s", flush=True)
        for way in arguments.only:
            directory = arguments.directory / way.replace(" ", "-")
            config = configuration(way, directory, packed, tokenizer, arguments.overrides)
            print(result(way, config, hub, spaces), flush=True)


def check_machine() -> None:
    """End the program if this machine has not what the namespaces and the S3 API need."""
    missing = [tool for tool in ("ip", "tc", "sysctl") if not shutil.which(tool)]
    missing += [package for package in ("moto", "flask", "s3fs") if not importlib.util.find_spec(package)]
    if os.geteuid() or missing:
        sys.exit(f"{sys.argv[0]}: {'missing: ' + ', '.join(missing) if missing else 'it needs root'}")


def configuration(
    way: str, directory: Path, packed: dict[str, Path], tokenizer: Path, overrides: list[str]
) -> RunConfig:
    """A run in `directory`, whose name is that of its bucket's folder."""
    kind, settings = WAYS[way]
    url = f"s3://benchmark/{directory.name}" if kind == "store" else f"tcp://10.77.0.2:{SILO_PORT}"
    exchange = [f"exchange.kind={kind}", f"exchange.url={url}"]
    return plain(federated_config(directory, packed, tokenizer, [*SETTINGS, *settings.split(), *exchange, *overrides]))


@contextlib.contextmanager
def namespaces(
    silos: list[str],
    rate: str | None,
    *,
    burst: str = "1mbit",
    forwarding: bool = True,
    offline: Collection[str] = (),
) -> Iterator[tuple[str, dict[str, str]]]:
    """One for the hub and one for each silo, in the order of the roster: 10.77.i.2 behind 10.77.i.1.

    Without a rate the links are as fast as the machine. Without `forwarding`, silos reach the hub and not one another;
    those of `offline` have no link at all.
    """
    hub = f"hub{os.getpid()}"
    spaces = {silo: f"silo{index}-{os.getpid()}" for index, silo in enumerate(sorted(silos))}
    try:
        for space in (hub, *spaces.values()):
            run(f"ip netns add {space}")
            run(f"ip -n {space} link set lo up")
        run(f"ip -n {hub} addr add {HUB_ADDRESS}/32 dev lo")
        run(f"ip netns exec {hub} sysctl -qw net.ipv4.ip_forward={int(forwarding)}")
        for index, (silo, space) in enumerate(spaces.items()):
            if silo in offline:
                continue
            run(f"ip -n {hub} link add hub{index} type veth peer name silo netns {space}")
            for where, device, last in ((hub, f"hub{index}", 1), (space, "silo", 2)):
                run(f"ip -n {where} addr add 10.77.{index}.{last}/30 dev {device}")
                run(f"ip -n {where} link set {device} up")
                if rate:
                    run(f"tc -n {where} qdisc add dev {device} root tbf rate {rate} burst {burst} latency 50ms")
            run(f"ip -n {space} route add default via 10.77.{index}.1")
        yield hub, spaces
    finally:
        for space in (hub, *spaces.values()):
            subprocess.run(["ip", "netns", "del", space], check=False, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def s3_server(
    hub: str, changes: Mapping[str, str] | None = None, certificate: tuple[Path, Path] | None = None
) -> Iterator[None]:
    """moto's S3 API in the hub's namespace, with an empty bucket; over TLS with a certificate and its key.

    `changes` of the environment are for the client that makes the bucket.
    """
    argv = inside(hub, [sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", str(S3_PORT)])
    argv += ["-c", str(certificate[0]), "-k", str(certificate[1])] if certificate else []
    environment, silent = os.environ | S3_ENVIRONMENT | dict(changes or {}), subprocess.DEVNULL
    server = subprocess.Popen(argv, env=environment, stdout=silent, stderr=silent)
    make = "import s3fs, time\nfor _ in range(50):\n  try: s3fs.S3FileSystem().mkdir('benchmark'); break\n"
    make += "  except Exception: time.sleep(0.5)\nelse: raise SystemExit('no S3 API')"
    try:
        subprocess.run(inside(hub, [sys.executable, "-c", make]), env=environment, check=True)
        yield
    finally:
        server.terminate()
        server.wait()


def result(way: str, config: RunConfig, hub: str, spaces: dict[str, str]) -> str:
    """Train, and say what it took."""
    before = {silo: sent_bytes(space) for silo, space in spaces.items()}
    summary = trained(config, hub, spaces)
    counted = sum(sent_bytes(space) - before[silo] for silo, space in spaces.items())
    training, waiting, sent = (summary[key] for key in ("seconds_training", "seconds_waiting", "bytes_sent"))
    loss = mean_loss(summary)
    fewer = summary["bytes_data_parallel"] / sent
    return (
        f"{way:<34} utilisation {training / (training + waiting):.3f}  train {training:.0f} s, wait {waiting:.1f} s"
        f"  loss {loss:.4f}  sent {sent / 1e6:.2f} MB, {fewer:.0f} times fewer than bf16 data-parallel; counted at the "
        f"interfaces {counted / sent:.2f} of that"
    )


def trained(config: RunConfig, hub: str, spaces: dict[str, str]) -> dict[str, Any]:
    """Train from the beginning to the end, each process in its namespace; returns what is in `summary.json`."""
    directory = Path(config.directory)
    shutil.rmtree(directory, ignore_errors=True)  # utilisation is of one whole run
    directory.parent.mkdir(parents=True, exist_ok=True)
    return finished(config, directory.parent / "launch.log", in_namespaces(hub, spaces, S3_ENVIRONMENT))


def in_namespaces(hub: str, spaces: Mapping[str, str], environment: Mapping[str, str]) -> CommandBuilder:
    """Starts each silo in its namespace and the aggregator in the hub's, with what is added to the environment."""

    def build(config: RunConfig, path: Path) -> list[ChildCommand]:
        return [
            dataclasses.replace(
                command,
                argv=inside(spaces.get(command.name, hub), command.argv),
                environment={**command.environment, **environment},
            )
            for command in local_commands(config, path)
        ]

    return build


def measured_mbit(space: str, hub: str, num_bytes: int = 5_000_000) -> float:
    """What a plain TCP connection from a silo to the hub passes, burst and latency included."""
    receiver = subprocess.Popen(inside(hub, [sys.executable, "-c", RECEIVE]))
    time.sleep(1)
    began = time.monotonic()
    subprocess.run(inside(space, [sys.executable, "-c", SEND, HUB_ADDRESS, str(num_bytes)]), check=True)
    receiver.wait()
    return num_bytes * 8 / 1e6 / (time.monotonic() - began)


def sent_bytes(space: str) -> int:
    """What a silo's interface has sent so far, with all headers."""
    return int(run(f"ip netns exec {space} cat /sys/class/net/silo/statistics/tx_bytes"))


def inside(space: str, argv: list[str]) -> list[str]:
    """A command that runs in a namespace."""
    return ["ip", "netns", "exec", space, *argv]


def run(command: str) -> str:
    """Run a command line and return what it prints."""
    return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
