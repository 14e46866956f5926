"""Chaos: a federation whose processes are killed at random instants comes to the bits of an undisturbed one.

    python -m benchmarks.chaos [--silos 3] [--rounds 30] [--kills 60] [--seed 0] [--streaming] [--directory DIR]

Runs a small federation twice with `atoll launch local`. The second time SIGKILL strikes again and again: the
aggregator, what starts a silo's ranks if there are several, or any rank; the launcher starts again what died
(`--max-restarts`). Compared are the final global parameters, every commit's bytes, each silo's loss, learning rate,
tokens and gradient norm at every step, its held-out losses, and its last checkpoint.

A kill waits for its share of the run's steps, then an exponential time of `MEAN_SECONDS` on average, or until the share
of the next one is done. So all fall inside the run, the last before `KILLING_SHARE` of it, and many into the starts,
resumes and waits that the one before has caused. Kinds of process take turns in shuffled order. One start of a silo or
the aggregator is struck only once, and after two strikes without a step or a commit between them it is spared until it
has made one, so that the run goes on.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from launch.show.display import AGGREGATOR
from launch.show.metrics import MetricsReader, Record, read_status
from launch.start.local import process_directory
from launch.start.processes import MARK
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config, save_config
from pretrain.exchange.history import History
from pretrain.exchange.store import StoreExchange

SYNC_INTERVAL_STEPS = 10
MEAN_SECONDS = 1.0
KILLING_SHARE = 0.85
STRIKES_WITHOUT_PROGRESS = 2
STANDSTILL_SECONDS = 300.0
WATCH_SECONDS = 0.05

# How the silos differ; more silos than rows start again from the first.
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"processes_per_node": 2, "micro_batch_sequences": 2, "deepspeed": {"zero_optimization": {"stage": 2}}},
    {"deepspeed": {"zero_optimization": {"stage": 3}}},
    {},
)
MODEL = "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 3, num_attention_heads: 2, "
MODEL += "num_key_value_heads: 2}"
STREAMING = {
    "num_fragments": 3,
    "overlap_steps": 2,
    "mixing": 0.25,
    "codec": "int4",
    "downlink_codec": "int4",
    "error_feedback": 0.9,
}


def configuration(
    directory: Path, tokenizer: Path, packed: Sequence[Path], *, num_silos: int, num_rounds: int, streaming: bool
) -> RunConfig:
    """Small silos; checkpoints at steps that are no multiple of H, so that resumes start in the middle of a round.

    `packed` are folders with packed `train` and `valid`; the silos take them in turn, each in an order of its own.
    """
    settings: dict[str, Any] = {
        "name": "chaos",
        "run_id": "chaos",  # the two runs' commits are compared byte by byte
        "directory": directory,
        "trust.directory": directory.parent / "keys",  # for the same reason one for both
        "tokenizer": tokenizer,
        "sequence_tokens": 16,
        "model.config": MODEL,
        "inner.num_steps": num_rounds * SYNC_INTERVAL_STEPS,
        "inner.lr": 0.003,
        "outer.sync_interval_steps": SYNC_INTERVAL_STEPS,
        "outer.optimizer": "nesterov",
        "exchange.poll_seconds": 0.1,
        "silo.global_batch_sequences": 4,
        "silo.micro_batch_sequences": 4,
        "silo.checkpoint_interval_steps": 4,
        "silo.eval_sequences": 8,
        "wandb.mode": "disabled",
    }
    settings |= {f"outer.{key}": value for key, value in STREAMING.items()} if streaming else {}
    for index in range(num_silos):
        text = packed[index % len(packed)]
        silo = LAYOUTS[index % len(LAYOUTS)] | {"data": [str(text / "train")], "valid": {"text": str(text / "valid")}}
        settings[f"silos.silo{index}"] = json.dumps(silo)
    return load_config([], [f"{key}={value}" for key, value in settings.items()])


# ---- running and killing


class Watch:
    """How far a run is, from its metrics.jsonl."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.steps = dict.fromkeys(config.silos, 0)
        """Silo to the largest inner step that it has done."""
        self.version = -1
        self.records: list[Record] = []
        self._reader = MetricsReader(Path(config.directory) / "metrics.jsonl")
        self._last_seconds = time.monotonic()

    @property
    def share(self) -> float:
        """Part of all silos' steps that are done."""
        return sum(self.steps.values()) / (self.config.inner.num_steps * len(self.steps))

    def update(self) -> set[str]:
        """Read what is new; returns who has done a step or a commit. Raises SystemExit if nothing goes on any more."""
        new, went_on = self._reader.read_new(), set[str]()
        for record in new:
            if record["kind"] == "step":
                self.steps[record["silo"]] = max(self.steps[record["silo"]], record["step"])
                went_on.add(record["silo"])
            elif record["kind"] == "commit":
                self.version = record["version"]
                went_on.add(AGGREGATOR)
        self.records += new
        now = time.monotonic()
        if new:
            self._last_seconds = now
        elif now - self._last_seconds > STANDSTILL_SECONDS:
            raise SystemExit(f"nothing goes on for {STANDSTILL_SECONDS:.0f} s; see {self.config.directory}")
        return went_on


@dataclass(frozen=True, kw_only=True)
class Target:
    """A living process of the run."""

    child: str
    """A silo's name, or `aggregator`."""
    kind: str
    """aggregator, starter, or rank and its number."""
    start: str
    """Names the start of the child that the process belongs to."""
    process: psutil.Process


def kinds(config: RunConfig) -> set[str]:
    """The kinds of process that a run has."""
    ranks = {rank for silo in config.silos.values() for rank in range(silo.processes_per_node)}
    return {AGGREGATOR, *({"starter"} if len(ranks) > 1 else ()), *(f"rank {rank}" for rank in ranks)}


def living(launcher: psutil.Process) -> Iterator[Target]:
    """The launcher's own children, and those of the starters of several ranks: by parent, never by name."""
    for leader in launcher.children():
        with contextlib.suppress(psutil.Error, KeyError):  # it has just ended, or is between fork and exec
            start, rank = leader.environ()[MARK], leader.environ().get("RANK")
            child = start.rsplit("-", 1)[0]
            for process in leader.children() if child != AGGREGATOR and rank is None else ():
                with contextlib.suppress(psutil.Error, KeyError):
                    yield Target(child=child, kind=f"rank {process.environ()['RANK']}", start=start, process=process)
            if leader.status() != psutil.STATUS_ZOMBIE:
                kind = AGGREGATOR if child == AGGREGATOR else "starter" if rank is None else f"rank {rank}"
                yield Target(child=child, kind=kind, start=start, process=leader)


@dataclass(kw_only=True)
class Killer:
    """Strikes a run's processes at random instants."""

    watch: Watch
    launcher: subprocess.Popen[bytes]
    num_kills: int
    rng: random.Random
    kills: list[tuple[str, str]] = field(default_factory=list)
    """Child and kind of process of each that was struck."""

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._struck_starts: set[str] = set()
        self._without_progress: Counter[str] = Counter()
        self._turns: list[str] = []

    def run(self) -> None:
        """Kill until the number is reached or the run has ended."""
        while len(self.kills) < self.num_kills and self._goes_on():
            if self._num_due() < 0:
                time.sleep(WATCH_SECONDS)
                continue
            until = time.monotonic() + self.rng.expovariate(1 / MEAN_SECONDS)
            while time.monotonic() < until and self._num_due() < 1 and self._goes_on():
                time.sleep(WATCH_SECONDS * self.rng.random())
            if self._goes_on() and not self._strike():
                time.sleep(MEAN_SECONDS * self.rng.random())

    def _num_due(self) -> float:
        return self.watch.share / KILLING_SHARE * self.num_kills - len(self.kills)

    def _goes_on(self) -> bool:
        for child in self.watch.update():
            self._without_progress[child] = 0
        return self.launcher.poll() is None

    def _strike(self) -> bool:
        """Kill a process of the kind whose turn it is; False if there is none that may be struck."""
        if not self._turns:
            self._turns = sorted(kinds(self.watch.config))
            self.rng.shuffle(self._turns)
        with contextlib.suppress(psutil.Error):  # what has just ended by itself
            targets = [target for target in living(psutil.Process(self.launcher.pid)) if self._may_strike(target)]
            if not targets:
                return False
            target = self.rng.choice(sorted(targets, key=lambda target: target.child))
            status = process_directory(self.watch.config, target.child) / "status.json"
            phase = read_status(status).phase
            target.process.kill()  # which compares the time of creation: never another of the same pid
            self._turns.pop()
            self._struck_starts.add(target.start)
            self._without_progress[target.child] += 1
            self.kills.append((target.child, target.kind))
            self._say(target, phase)
            return True
        return False

    def _may_strike(self, target: Target) -> bool:
        return (
            target.kind == self._turns[-1]
            and target.start not in self._struck_starts
            and self._without_progress[target.child] < STRIKES_WITHOUT_PROGRESS
        )

    def _say(self, target: Target, phase: str) -> None:
        watch = self.watch
        where = f"step {watch.steps[target.child]:4d}, " if target.child in watch.steps else ""
        print(
            f"kill {len(self.kills):3d} of {self.num_kills}  {time.monotonic() - self._began:7.1f} s  "
            f"{target.child:<10} {target.kind:<10}  {phase:<10}  {where}version {max(watch.version, 0)}",
            flush=True,
        )


def launch(config: RunConfig, *, num_kills: int = 0, seed: int = 0) -> Killer:
    """Run a federation to its end, killing; its output is in DIRECTORY.console. Raises SystemExit if it fails."""
    directory = Path(config.directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    settings, console = directory.with_suffix(".yaml"), directory.with_suffix(".console")
    save_config(config, settings)
    command = [sys.executable, "-m", "launch.cli", "launch", "local", "--config", str(settings)]
    with console.open("wb") as output:
        launcher = subprocess.Popen(
            [*command, "--max-restarts", str(num_kills)],
            stdout=output,
            stderr=output,
            env=os.environ | {"COLUMNS": "200"},
        )
    killer = Killer(watch=Watch(config), launcher=launcher, num_kills=num_kills, rng=random.Random(seed))
    try:
        killer.run()
        while launcher.poll() is None:
            killer.watch.update()
            time.sleep(WATCH_SECONDS)
        killer.watch.update()
    finally:
        if launcher.poll() is None:
            launcher.terminate()
            launcher.wait()
    if launcher.returncode:
        raise SystemExit(f"the launcher ended with {launcher.returncode}:\n{console.read_text()[-4000:]}")
    return killer


# ---- comparing


def check_kills(killer: Killer) -> list[str]:
    """Every kill struck a start of its own, which the launcher then replaced; none else failed."""
    problems, config = [], killer.watch.config
    if len(killer.kills) < killer.num_kills:
        problems.append(f"only {len(killer.kills)} of {killer.num_kills} kills fell inside the run")
    kills = Counter(child for child, _ in killer.kills)
    for child in (AGGREGATOR, *config.silos):
        log = Path(config.directory) / "logs" / "latest" / f"{child}.log"
        num_restarts = log.read_bytes().count(b"\n--- start ")
        if num_restarts != kills[child]:
            problems.append(f"{child} was struck {kills[child]} times and started again {num_restarts} times")
    missed = sorted(kinds(config) - {kind for _, kind in killer.kills})
    if missed:
        problems.append(f"never struck: {', '.join(missed)}")
    return problems


def compare_ledgers(run: RunConfig, undisturbed: RunConfig) -> list[str]:
    """Contract, commits and the tensors of the last version, byte by byte."""
    problems, last = [], run.schedule.num_versions
    stores = [StoreExchange(config.store_url) for config in (run, undisturbed)]
    if stores[0].read_contract() != stores[1].read_contract():
        problems.append("the contracts differ")
    for store in stores:
        if store.objects.names("global") != [f"{version:06d}" for version in range(last + 1)]:
            problems.append(f"{store.objects.url} has not just the versions 0 to {last}")
    for version in range(last + 1):
        if stores[0].commit_bytes(version) != stores[1].commit_bytes(version):
            problems.append(f"commit {version} differs")
    for folder, payload in History(stores[1], run.outer.num_fragments).made_of(last):
        name = f"{folder}/{payload.file}"
        first, second = (store.objects.read(name, limit_bytes=payload.num_bytes) for store in stores)
        if first != second:
            problems.append(f"{name} differs")
    return problems


def curves(records: Sequence[Record]) -> dict[tuple[str, str, int], set[str]]:
    """(silo, what, step or round) to what was recorded there; more than one value if it was done again otherwise."""
    found: dict[tuple[str, str, int], set[str]] = defaultdict(set)
    for record in records:
        if record["kind"] == "step":
            values = {key: record[key] for key in ("loss", "lr", "tokens", "grad_norm")}
            found[record["silo"], "step", record["step"]].add(json.dumps(values))
        elif record["kind"] == "eval":
            found[record["silo"], "round", record["round"]].add(json.dumps(record["val_loss"]))
    return found


def compare_curves(run: Watch, undisturbed: Watch) -> list[str]:
    """Every step's loss, learning rate, tokens and gradient norm, and held-out losses: one value each, and the same."""
    problems, config = [], run.config
    ours, theirs = curves(run.records), curves(undisturbed.records)
    for place in sorted(ours.keys() | theirs.keys()):
        if ours.get(place) != theirs.get(place):
            problems.append(f"{' '.join(map(str, place))}: {ours.get(place)}, undisturbed {theirs.get(place)}")
    for silo, settings in config.silos.items():
        step_tokens = settings.global_batch_sequences * config.sequence_tokens
        for step in range(1, config.inner.num_steps + 1):
            values = [json.loads(value)["tokens"] for value in ours.get((silo, "step", step), ())]
            if values != [step * step_tokens]:
                problems.append(f"{silo} step {step}: tokens {values}, not {step * step_tokens}")
    return problems


def compare_last_checkpoints(run: RunConfig, undisturbed: RunConfig) -> list[str]:
    """Step, versions and position of every silo at its end, its global parameters and what it has not sent yet."""
    problems = []
    for silo, settings in run.silos.items():
        newest = [sorted((c.silo_directory(silo) / "checkpoints").glob("step-*"))[-1] for c in (run, undisturbed)]
        states = [json.loads((directory / "state.json").read_text()) for directory in newest]
        states = [{key: value for key, value in state.items() if not key.startswith("seconds_")} for state in states]
        position = run.inner.num_steps * settings.global_batch_sequences
        if states[0] != states[1] or states[0]["position"] != position:
            problems.append(f"{silo} ended with {states[0]}, undisturbed {states[1]}; position {position} is right")
        for file in sorted(path.name for path in newest[1].glob("*.safetensors")):
            if (newest[0] / file).read_bytes() != (newest[1] / file).read_bytes():
                problems.append(f"{silo}: {file} in the last checkpoint differs")
    return problems


def chaos(
    directory: Path,
    tokenizer: Path,
    packed: Sequence[Path],
    *,
    num_silos: int,
    num_rounds: int,
    num_kills: int,
    seed: int,
    streaming: bool,
) -> list[str]:
    """Run undisturbed and disturbed, print every kill and a summary; returns what is not as it should be."""
    runs, seconds = [], []
    for name, kills in (("undisturbed", 0), ("killed", num_kills)):
        config = configuration(
            directory / name, tokenizer, packed, num_silos=num_silos, num_rounds=num_rounds, streaming=streaming
        )
        began = time.monotonic()
        runs.append(launch(config, num_kills=kills, seed=seed))
        seconds.append(time.monotonic() - began)
    undisturbed, killed = (run.watch for run in runs)
    problems = [
        *check_kills(runs[1]),
        *compare_ledgers(killed.config, undisturbed.config),
        *compare_curves(killed, undisturbed),
        *compare_last_checkpoints(killed.config, undisturbed.config),
    ]
    struck = Counter(kind for _, kind in runs[1].kills)
    num_steps = [sum(record["kind"] == "step" for record in watch.records) for watch in (undisturbed, killed)]
    print(
        f"RESULT {num_silos} silos, {num_rounds} rounds{', streaming' if streaming else ''}, seed {seed}: "
        f"{len(runs[1].kills)} SIGKILLs ({', '.join(f'{kind} {struck[kind]}' for kind in sorted(struck))}) in "
        f"{seconds[1]:.0f} s, undisturbed {seconds[0]:.0f} s; {num_steps[1] - num_steps[0]} of {num_steps[0]:,} steps "
        f"done again; parameters, {killed.config.schedule.num_versions + 1} commits, curves and checkpoints: "
        f"{f'{len(problems)} differences' if problems else 'the same bits'}",
        flush=True,
    )
    return problems


def main() -> int:
    """Prepare text, run, compare; returns the exit code, 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silos", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streaming", action="store_true", help="3 fragments, overlap, mixing, int4 both ways")
    parser.add_argument("--directory", type=Path, help="a new folder that is kept (default: one that is not)")
    arguments = parser.parse_args()
    if arguments.directory and arguments.directory.exists():
        parser.error(f"--directory: {str(arguments.directory)!r} given; it exists; allowed: a new folder")
    from benchmarks.silo_overhead import make_text

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what ends the launcher
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.directory or Path(scratch)
        make_text(directory / "text")
        problems = chaos(
            directory,
            directory / "text" / "tokenizer",
            [directory / "text" / "packed"],
            num_silos=arguments.silos,
            num_rounds=arguments.rounds,
            num_kills=arguments.kills,
            seed=arguments.seed,
            streaming=arguments.streaming,
        )
    for problem in problems:
        print(f"DIFFERENCE {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
