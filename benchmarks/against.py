"""What this version costs where nothing new is asked for, against an older one: processor seconds, and bits.

    git worktree add ../before COMMIT
    python -m benchmarks.against ../before [--turns 20] [--size 65M] [--codecs fp32 int4]

Both checkouts run with the same settings, the same text and all that protects privacy off, each in a process of its own
that does a turn when it is told to. They take turns, one first and then the other, so that a busy machine slows both
alike; what counts are the processor seconds of all threads. `sync`: one version of a silo with parameters that no
training changes, from copying them to having adopted the commit, through a directory; and what its aggregator takes for
it. `step`: inner steps of the demo's model in the silo's loop. Printed are medians, this version's seconds divided by
the other's, turn by turn (median and range) and of each one's fastest turn, which what else runs disturbs least, and
whether parameters have the same digest after the last version. Last, `run`: two real silos and an aggregator, which
train for some rounds; the digests of their last commits are compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

Turn = Callable[[], dict[str, Any]]
"""Does a turn; returns processor seconds by what they were for, and digests."""
STEPS = 4  # of a turn
MANY = 100_000  # steps or versions that no measurement comes to


# ---- what either version does; names are imported here from that version


def sync_turns(directory: Path, size: str, codec: str) -> Turn:
    """Versions of one silo."""
    import torch

    from benchmarks.merge import SIZES, VOCAB_SIZE, configuration, one_version
    from benchmarks.reading import one_rank_environment
    from pretrain.aggregate import Aggregator
    from pretrain.exchange.store import delivery_path
    from pretrain.host.journal import Journal
    from pretrain.silo.checkpoint import Progress
    from pretrain.silo.copies import HostCopies
    from pretrain.silo.ranks import Ranks
    from pretrain.sync.silo_sync import SiloSync
    from pretrain.sync.through_store import ThroughStore

    class Still:
        """In an engine's place."""

        def __init__(self, shapes: dict[str, torch.Size]) -> None:
            self.copies = HostCopies(torch.device("cpu"), of_gathered=False)
            self.values: dict[str, torch.Tensor] = {}
            self.shapes, self.noise = shapes, 0.0

        def write(self, values: Iterator[tuple[str, torch.Tensor]], names: list[str]) -> None:
            self.values |= {name: value.clone() for name, value in values}

        def read(self, name: str) -> torch.Tensor:
            return self.values[name].mul(1 + self.noise)

    one_rank_environment()
    model = SIZES[size] | {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": VOCAB_SIZE}
    codecs = [f"outer.{key}={codec}" for key in ("codec", "downlink_codec")]
    config = configuration(directory, model, ["alpha"], [f"inner.num_steps={MANY}", *codecs])
    aggregator = Aggregator(config, Journal(config, "aggregator", silo=None))
    state, progress = aggregator.start(), Progress()
    engine = Still({name: value.shape for name, value in state.parameters.items()})
    journal, through = Journal(config, "silos/alpha", silo="alpha"), ThroughStore(config, "alpha")
    sync: Any = SiloSync(config, "alpha", Ranks(), journal, through, asked_to_stop=lambda: False)
    sync.join()
    sync.start(engine, progress)

    def turn() -> dict[str, Any]:
        version, began = progress.version + 1, time.process_time()
        engine.noise, progress.step = 1e-3, version
        progress.position += config.silos["alpha"].global_batch_sequences
        sync.deliver(engine, progress, version)
        engine.noise = 0.0
        while not (Path(config.store_url) / delivery_path("alpha", version) / "manifest.json").exists():
            time.sleep(0.01)
        delivered = time.process_time()
        one_version(aggregator, state)
        aggregator.finish()
        committed = time.process_time()
        sync.wait(progress, version)
        sync.adopt(engine, progress, version)
        silo = time.process_time() - committed + delivered - began
        return {"silo": silo, "aggregator": committed - delivered, "digest": state.parameters_digest}

    return turn


def step_turns(directory: Path) -> Turn:
    """Inner steps of the demo's model."""
    from benchmarks.reading import one_rank_environment
    from benchmarks.silo_overhead import configuration, make_text, turn_of_ours
    from pretrain.host.journal import Journal
    from pretrain.silo.ranks import Ranks
    from pretrain.train import prepare

    one_rank_environment()
    make_text(text := directory / "text")
    config = configuration(directory, text, 0, 1, ["silo.micro_batch_sequences=16"])
    silo = prepare(config, "bench", Ranks(), Journal(config, "silos/bench", silo="bench"))

    def turn() -> dict[str, Any]:
        began = time.process_time()
        turn_of_ours(silo, STEPS)
        return {"step": (time.process_time() - began) / STEPS, "digest": repr(silo.progress.loss)}

    return turn


def run_turns(directory: Path) -> Turn:
    """A run of two silos."""
    from benchmarks.silo_overhead import make_text
    from benchmarks.size import configuration, run

    make_text(text := directory / "text")
    overrides = ["silo.checkpoint_interval_steps=1000", "silo.num_threads=1", "inner.optimizer=adamw"]
    config = configuration(directory / "run", text, "small", "store", overrides)
    return lambda: {"digest": run(config).digest}


def work(what: str, codec: str, size: str) -> None:
    """Do a turn for every line that comes, and say what it took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed goes where errors go
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        turns = {"sync": lambda: sync_turns(directory, size, codec), "step": lambda: step_turns(directory)}
        turn = (turns | {"run": lambda: run_turns(directory)})[what]()
        for _ in sys.stdin:
            answers.write(json.dumps(turn()) + "\n")
            answers.flush()
    os._exit(0)  # whatever still waits for a next version


# ---- turns


@contextmanager
def worker(checkout: Path, argv: list[str], log: IO[bytes]) -> Iterator[Turn]:
    """A process of one version."""
    argv = [sys.executable, "-P", str(Path(__file__).resolve()), str(checkout), *argv]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    process = subprocess.Popen(
        argv, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
    )
    assert process.stdin
    assert process.stdout
    asked, answers = process.stdin, process.stdout

    def turn() -> dict[str, Any]:
        asked.write("go\n")
        asked.flush()
        if not (answer := answers.readline()):
            raise SystemExit(f"{checkout}: it ended; see {log.name}")
        return dict(json.loads(answer))

    try:
        yield turn
    finally:
        asked.close()
        process.wait()


def compare(checkouts: list[Path], argv: list[str], num_turns: int, log: IO[bytes]) -> None:
    """Print a line for each thing that is measured."""
    with ExitStack() as open_ones:
        both = [open_ones.enter_context(worker(checkout, argv, log)) for checkout in checkouts]
        warm_ups = min(1, num_turns - 1)
        turns = []
        for number in range(warm_ups + num_turns):
            order = (0, 1) if number % 2 else (1, 0)
            found = {place: both[place]() for place in order}
            turns.append([found[0], found[1]])
    same = "the same" if turns[-1][0].pop("digest") == turns[-1][1].pop("digest") else "OTHER"
    name = " ".join(argv[1::2])
    print(f"RESULT {name}: {same} bits after {len(turns)} turns", flush=True)
    for part in turns[-1][0]:
        ours, others = ([turn[place][part] for turn in turns[warm_ups:]] for place in (0, 1))
        ratios = [our / other for our, other in zip(ours, others, strict=True)]
        print(
            f"RESULT {name}: {part} {statistics.median(ours):.4f} s, before {statistics.median(others):.4f} s of "
            f"processors, now / before {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), "
            f"of the least {min(ours) / min(others):.3f}",
            flush=True,
        )


def main() -> None:
    """Compare all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the older version")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--size", default="65M", help="of benchmarks.merge")
    parser.add_argument("--codecs", nargs="+", default=["fp32", "int4"])
    parser.add_argument("--only", nargs="+", default=["sync", "step", "run"], choices=["sync", "step", "run"])
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return work(arguments.work, arguments.codecs[0], arguments.size)
    checkouts = [Path(__file__).parent.parent, arguments.before]
    with tempfile.NamedTemporaryFile(delete=False, suffix=".log") as log:
        for what in arguments.only:
            for codec in arguments.codecs if what == "sync" else [""]:
                argv = ["--work", what, *(["--codecs", codec, "--size", arguments.size] if codec else [])]
                compare(checkouts, argv, 1 if what == "run" else arguments.turns, log)


if __name__ == "__main__":
    main()
