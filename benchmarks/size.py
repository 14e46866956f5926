"""A federation of a size that matters, on one machine: peak memory and seconds of a sync, against `atoll plan`.

    python -m benchmarks.size --size 350M [--ways store collective] [--kill] [--directory DIR] [key=value ...]
    python -m benchmarks.size --size 1B [--kill] [--anyway]

350M (and 300M, 200M, and small, to try it): two silos with AdamW, through a store and among themselves. 1B: one silo
with SGD, and an aggregator with `outer.state: disk`. All: Llama, fp32, sequences of 16, micro batch 1, int4 both ways,
H 2, three rounds. Memory is the most anonymous memory that a process has had (RssAnon in /proc) from its beginning to
its end. The plan is told the tokens a second of this run and a link that takes no time; a sync is the median of all but
the first. What this machine has not the memory for, by the plan, is not begun, unless `--anyway` is said: the plan is
on the safe side.

With `--kill` the run is made once more: the first silo is killed (SIGKILL) after step 3, in the second round, whoever
has stopped then is started again, and the last commit must have the digest that it has without.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.merge import SIZES, VOCAB_SIZE
from benchmarks.proc import status_bytes
from benchmarks.silo_overhead import make_text
from launch.show.metrics import MetricsReader
from launch.start.local import local_commands
from launch.start.processes import ChildCommand
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config, save_config
from pretrain.plan.plan import Plan, make_plan
from pretrain.plan.seconds import Given

SAMPLE_SECONDS, POLL_SECONDS = 0.05, 0.1
KILLED_AFTER_STEP, MOST_STARTS = 3, 4
MODELS = {
    "small": SIZES["65M"] | {"num_hidden_layers": 3},
    "200M": SIZES["350M"] | {"num_hidden_layers": 14},
    "300M": SIZES["350M"] | {"num_hidden_layers": 22},
    "350M": SIZES["350M"],
    "1B": SIZES["1B"],
}
SETTINGS: dict[str, Any] = {
    "sequence_tokens": 16,
    "inner.num_steps": 6,
    "outer.sync_interval_steps": 2,
    "outer.optimizer": "nesterov",
    "outer.codec": "int4",
    "outer.downlink_codec": "int4",
    "exchange.poll_seconds": 0.05,
    "wandb.mode": "disabled",
    "silo.global_batch_sequences": 1,
    "silo.micro_batch_sequences": 1,
    "silo.eval_interval_rounds": 0,
    "silo.keep_checkpoints": 1,
}
ALONE = {"inner.optimizer": "sgd", "outer.state": "disk"}  # what a billion parameters take to fit 24 GB
MIB, GIB = 1 << 20, 1 << 30


@dataclass(kw_only=True)
class Child:
    """One process of a run, started as often as it takes."""

    command: ChildCommand
    log: Path
    process: subprocess.Popen[bytes] | None = None
    num_starts: int = 0
    peak_bytes: int = 0

    def start(self) -> None:
        """Start it, or start it again."""
        self.num_starts += 1
        with self.log.open("ab") as log:
            environment = os.environ | self.command.environment
            self.process = subprocess.Popen(self.command.argv, env=environment, stdout=log, stderr=log)

    def watch(self) -> None:
        """Read its anonymous memory once."""
        if self.process:
            self.peak_bytes = max(self.peak_bytes, status_bytes(self.process.pid).get("RssAnon", 0))


@dataclass(kw_only=True)
class Found:
    """What came of a run."""

    config: RunConfig
    records: list[dict[str, Any]] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)
    num_starts: dict[str, int] = field(default_factory=dict)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Its records of a kind."""
        return [record for record in self.records if record["kind"] == kind]

    @property
    def digest(self) -> str:
        """Of the parameters of the last commit."""
        last = self.config.schedule.num_versions
        digests = {record["digest"] for record in self.of("commit") if record["version"] == last}
        if len(digests) != 1:
            raise SystemExit(f"version {last} has {len(digests)} digests in {self.config.directory}/metrics.jsonl")
        return str(digests.pop())


def run(config: RunConfig, *, kill: str = "") -> Found:
    """Run to the end; `kill` names the silo that is killed. Raises SystemExit if a process fails otherwise."""
    directory, found = Path(config.directory), Found(config=config)
    path = directory / "config.yaml"
    save_config(config, path)
    commands = local_commands(config, path)
    children = {one.name: Child(command=one, log=directory / f"{one.name}.log") for one in commands}
    done, may_restart = threading.Event(), False
    watcher = threading.Thread(target=watch, args=(list(children.values()), done))
    reader = MetricsReader(directory / "metrics.jsonl")
    try:
        for child in children.values():
            child.start()
        watcher.start()
        while any(child.process and child.process.poll() != 0 for child in children.values()):
            found.records += reader.read_new()
            steps = {record["silo"]: record["step"] for record in found.of("step")}
            if kill and all(steps.get(silo, 0) >= KILLED_AFTER_STEP for silo in config.silos):
                victim = children[kill].process
                assert victim
                victim.kill()
                victim.wait()
                print(f"killed silo {kill}", flush=True)
                kill, may_restart = "", True
            restart(children, may=may_restart)
            time.sleep(POLL_SECONDS)
    finally:
        done.set()
        for child in children.values():
            if child.process:
                child.process.kill()
                child.process.wait()
    watcher.join()
    found.records += reader.read_new()
    found.peaks = {name: child.peak_bytes for name, child in children.items()}
    found.num_starts = {name: child.num_starts for name, child in children.items()}
    return found


def restart(children: dict[str, Child], *, may: bool) -> None:
    """Start those again that have ended before their time. Raises SystemExit if they may not, or too often did."""
    for name, child in children.items():
        assert child.process
        code = child.process.poll()
        if code:
            if not may or child.num_starts >= MOST_STARTS:
                tail = child.log.read_text(errors="replace").splitlines()[-5:]
                raise SystemExit(f"{name} ended with {code}:\n" + "\n".join(tail))
            child.start()


def watch(children: list[Child], done: threading.Event) -> None:
    """Read all children's memory again and again."""
    while not done.wait(SAMPLE_SECONDS):
        for child in children:
            child.watch()


def configuration(directory: Path, text: Path, size: str, way: str, overrides: list[str]) -> RunConfig:
    """A run of a size by a way; the run of a billion parameters has one silo."""
    model = MODELS[size] | {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": VOCAB_SIZE}
    settings = SETTINGS | {
        "directory": directory,
        "run_id": "size",  # two runs are compared
        "tokenizer": text / "tokenizer",
        "model.config": json.dumps(model | {"model_type": "llama"}),
        "silo.data": f"[{text / 'packed' / 'train'}]",
        "exchange.kind": way,
        **({"exchange.url": f"tcp://127.0.0.1:{29_500 + os.getpid() % 500}"} if way == "collective" else {}),
        **(ALONE if size == "1B" else {}),
    }
    names = ["alpha"] if size == "1B" else ["alpha", "beta"]
    given = [*(f"{key}={value}" for key, value in settings.items()), *(f"silos.{name}={{}}" for name in names)]
    return load_config([], given + overrides)


def planned(config: RunConfig, tokens_per_second: dict[str, float]) -> Plan:
    """What `atoll plan` says of it on a link that takes no time."""
    return make_plan(config, Given(link_bits_per_second=1e13, latency_seconds=0.0, tokens_per_second=tokens_per_second))


def check_memory(config: RunConfig, *, anyway: bool) -> None:
    """Refuse what this machine has not the memory for, by the plan, unless it is to run `anyway`."""
    plan = planned(config, dict.fromkeys(config.silos, 1.0))
    needed = sum(memory.cpu_bytes for memory in plan.memory.values()) + plan.aggregator_memory_bytes
    free = psutil.virtual_memory().available
    each = {name: memory.cpu_bytes for name, memory in plan.memory.items()} | {
        "aggregator": plan.aggregator_memory_bytes
    }
    words = ", ".join(f"{name} {number / GIB:.1f}" for name, number in each.items() if number)
    print(
        f"{plan.num_parameters:,} parameters: {needed / GIB:.1f} GiB planned ({words}), {free / GIB:.1f} free",
        flush=True,
    )
    if needed > free and not anyway:
        raise SystemExit("too little memory; try a smaller --size, outer.state=disk, inner.optimizer=sgd, or --anyway")


def compared(found: Found) -> list[str]:
    """Lines of planned / measured = ratio."""
    config, steps = found.config, found.of("step")
    speeds = {
        silo: statistics.harmonic_mean([s["tokens_per_second"] for s in steps if s["silo"] == silo][1:])
        for silo in config.silos
    }
    plan = planned(config, speeds)
    expected = {name: memory.cpu_bytes for name, memory in plan.memory.items()}
    expected |= {"aggregator": plan.aggregator_memory_bytes} if "aggregator" in found.peaks else {}
    lines = [
        f"{name}: peak {peak / MIB:.0f} MiB ({peak / plan.num_parameters:.1f} bytes a parameter), "
        f"planned / measured {expected[name] / peak:.2f}"
        for name, peak in found.peaks.items()
    ]
    waits = [record["wait_seconds"] for record in found.of("sync") if record["version"] > 1]
    sync = statistics.median(waits)
    lines.append(
        f"a sync: {sync:.2f} s ({min(waits):.2f} to {max(waits):.2f}), planned {plan.pace.sync_seconds:.2f} s, "
        f"planned / measured {plan.pace.sync_seconds / sync:.2f}; an inner step "
        f"{statistics.median(config.sequence_tokens / speed for speed in speeds.values()):.2f} s"
    )
    return lines


def main() -> None:
    """Run all that is asked for, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=MODELS, default="small")
    parser.add_argument("--ways", nargs="+", choices=("store", "collective"), help="default: both; of 1B the store")
    parser.add_argument("--kill", action="store_true", help="once more, with a silo that is killed")
    parser.add_argument("--anyway", action="store_true", help="also where the plan says that memory is too little")
    parser.add_argument("--directory", type=Path, help="where runs lie (default: the system's temporary one)")
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # with all cleaned up
    size, ways = arguments.size, arguments.ways or (["store"] if arguments.size == "1B" else ["store", "collective"])
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        make_text(text := Path(scratch) / "text")
        for way in ways:
            never = [*arguments.overrides, "silo.checkpoint_interval_steps=1000"]
            config = configuration(Path(scratch) / way, text, size, way, never)
            check_memory(config, anyway=arguments.anyway)
            found = run(config)
            for line in compared(found):
                print(f"RESULT {size}, {way}: {line}", flush=True)
            if not arguments.kill:
                continue
            # Every round is saved: a killed silo goes on from there, bit by bit.
            saved = [*arguments.overrides, "silo.checkpoint_interval_steps=2"]
            again = run(
                configuration(Path(scratch) / f"{way}-killed", text, size, way, saved), kill=next(iter(config.silos))
            )
            same = "the same digest as" if again.digest == found.digest else "ANOTHER DIGEST THAN"
            starts = ", ".join(f"{name} {number}" for name, number in again.num_starts.items())
            print(f"RESULT {size}, {way}, killed: {same} undisturbed; starts: {starts}", flush=True)
            if again.digest != found.digest:
                raise SystemExit(f"{again.digest} is not {found.digest}")


if __name__ == "__main__":
    main()
