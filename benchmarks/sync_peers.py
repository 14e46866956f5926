"""How long training stands still for one sync of all parameters, and the memory of it: Atoll against torchft.

    python -m venv torchft && torchft/bin/pip install torch==2.13.0 torchft
    python -m benchmarks.sync_peers torchft/bin/python [--layers 5] [--turns 3] [--only WAY ...]

Two silos on this machine, one process and `--threads` threads each, one fragment, no overlap, two inner steps from sync
to sync. Both have the same tensors, AdamW inside and Nesterov outside. All ways take turns. Of each turn counts the
median over silos and syncs, without the first one; printed are the median of the turns, torchft's divided by it turn by
turn, and the peak of the anonymous memory of a silo (the larger one; with torchft a replica) and of the aggregator. A
silo's memory holds more than a replica's: a real model with its activations, and DeepSpeed.
"""

import argparse
import json
import socket
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.memory import MIB, SAMPLE_SECONDS, Peak, measure
from benchmarks.silo_overhead import make_text
from launch.show.metrics import MetricsReader
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config
from pretrain.silo.model import build_empty

TORCHFT = "torchft"
BOTH = "outer.codec={0} outer.downlink_codec={0}"
WAYS = {
    f"{kind} {codec}": f"exchange.kind={kind} {BOTH.format(codec)}"
    for kind in ("collective", "store")
    for codec in ("fp32", "int4")
}
STEPS = 2  # from sync to sync
PEER = Path(__file__).parent / "torchft_peer.py"


@dataclass(kw_only=True)
class Turn:
    """What one run measured."""

    seconds: float
    """Of a sync: the median over silos and syncs but the first."""
    silo_bytes: int
    aggregator_bytes: int = 0


def main() -> None:
    """Take turns and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("torchft", type=Path, help="a Python that has torchft")
    parser.add_argument("--layers", type=int, default=5, help="of 12.8 million parameters each (width 1024)")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--syncs", type=int, default=6, help="of a run, the first of which is not counted")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[TORCHFT, *WAYS], choices=[TORCHFT, *WAYS])
    parser.add_argument("--directory", type=Path, help="where runs lie (default: the system's temporary one)")
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_intermixed_args()
    turns: dict[str, list[Turn]] = {way: [] for way in arguments.only}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        make_text(text := Path(scratch) / "text")
        for turn in range(arguments.turns):
            for way in arguments.only:
                folder = Path(scratch) / f"{turn}-{way.replace(' ', '-')}"
                config = configuration(folder, text, way, arguments)
                found = of_torchft(config, arguments) if way == TORCHFT else of_atoll(config)
                turns[way].append(found)
                print(f"turn {turn}  {way:<16} {found.seconds:7.3f} s", flush=True)
        sizes = shapes(config)
    num_parameters = sum(rows * columns for rows, columns in (([*shape, 1])[:2] for shape in sizes))
    print(f"\nRESULT {num_parameters:,} parameters, {arguments.threads} threads a silo, {arguments.turns} turns")
    for way, found_turns in turns.items():
        print(f"RESULT {row(way, found_turns, turns.get(TORCHFT, []))}", flush=True)


def row(way: str, turns: list[Turn], references: list[Turn]) -> str:
    """One line of the table."""
    ratios = [theirs.seconds / ours.seconds for ours, theirs in zip(turns, references, strict=bool(references))]
    against = f"torchft takes {statistics.median(ratios):5.2f} times as long ({min(ratios):.2f} to {max(ratios):.2f})"
    return (
        f"{way:<16} {statistics.median(turn.seconds for turn in turns):7.3f} s  {against if ratios else ''}  "
        f"a silo {max(turn.silo_bytes for turn in turns) / MIB:5.0f} MiB, "
        f"aggregator {max(turn.aggregator_bytes for turn in turns) / MIB:5.0f} MiB"
    )


def configuration(directory: Path, text: Path, way: str, arguments: argparse.Namespace) -> RunConfig:
    """Two equal silos that never save or evaluate between two syncs."""
    width = arguments.width
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "directory": directory,
        "tokenizer": text / "tokenizer",
        "sequence_tokens": 32,
        "model.config": f"{{model_type: llama, hidden_size: {width}, intermediate_size: {width * 11 // 4}, "
        f"num_hidden_layers: {arguments.layers}, num_attention_heads: 8, num_key_value_heads: 8}}",
        "inner.num_steps": STEPS * arguments.syncs,
        "outer.sync_interval_steps": STEPS,
        "outer.optimizer": "nesterov",
        "exchange.poll_seconds": 0.02,
        "wandb.mode": "disabled",
        "silo.global_batch_sequences": 1,
        "silo.micro_batch_sequences": 1,
        "silo.checkpoint_interval_steps": 1_000_000,
        "silo.eval_interval_rounds": 0,
        "silo.num_threads": arguments.threads,
        "silo.data": f"[{text / 'packed' / 'train'}]",
    }
    given = [f"{key}={value}" for key, value in settings.items()] + [f"silos.silo{index}={{}}" for index in range(2)]
    if way.startswith("collective"):
        given.append(f"exchange.url=tcp://127.0.0.1:{port}")
    return load_config([], given + WAYS.get(way, "").split() + arguments.overrides)


def shapes(config: RunConfig) -> list[list[int]]:
    """Of all parameters of the configuration's model."""
    return [list(parameter.shape) for parameter in build_empty(config.model, 2048, dtype=torch.float32).parameters()]


def of_atoll(config: RunConfig) -> Turn:
    """Run a federation to its end."""
    peaks, _ = measure(config)
    records = MetricsReader(Path(config.directory) / "metrics.jsonl").read_new()
    seconds = [record["wait_seconds"] for record in records if record["kind"] == "sync" and record["version"] > 1]
    silo_bytes = max(peak.anonymous_bytes for name, peak in peaks.items() if name in config.silos)
    aggregator_bytes = peaks["aggregator"].anonymous_bytes if "aggregator" in peaks else 0
    return Turn(seconds=statistics.median(seconds), silo_bytes=silo_bytes, aggregator_bytes=aggregator_bytes)


def of_torchft(config: RunConfig, arguments: argparse.Namespace) -> Turn:
    """Run two replicas to their end. Raises SystemExit if one fails."""
    directory, python = Path(config.directory), str(arguments.torchft)
    directory.mkdir(parents=True)
    with (directory / "lighthouse.log").open("wb") as log:
        argv = [python, str(PEER), "lighthouse"]
        lighthouse = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True)
    assert lighthouse.stdout
    try:
        address = lighthouse.stdout.readline().strip()
        peaks = []
        for index in range(2):
            facts = [address, json.dumps(shapes(config)), str(arguments.syncs), str(arguments.threads)]
            with (directory / f"{index}.out").open("wb") as out, (directory / f"{index}.log").open("wb") as log:
                argv = [python, str(PEER), "replica", str(index), *facts]
                environment = {**psutil.Process().environ(), "OMP_NUM_THREADS": str(arguments.threads)}
                process = subprocess.Popen(argv, stdout=out, stderr=log, env=environment)
            peaks.append(Peak(process=process, tree=[psutil.Process(process.pid)]))
        while any(peak.process.poll() is None for peak in peaks):
            for peak in peaks:
                peak.sample()
            time.sleep(SAMPLE_SECONDS)
    finally:
        lighthouse.kill()
        lighthouse.wait()
    if any(peak.process.returncode for peak in peaks):
        raise SystemExit(f"torchft failed:\n{(directory / '0.log').read_text()[-2000:]}")
    found = [json.loads((directory / f"{index}.out").read_text().splitlines()[-1]) for index in range(2)]
    seconds = [one for of_replica in found for one in of_replica[1:]]
    return Turn(seconds=statistics.median(seconds), silo_bytes=max(peak.anonymous_bytes for peak in peaks))


if __name__ == "__main__":
    main()
