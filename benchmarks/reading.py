"""What reading costs: the demo's inner steps with batches read from packed shards against the same batches in memory.

    python -m benchmarks.reading [--turns 60]

One process and one thread, as a silo of the demo has. Each turn does the same inner steps three ways, in other orders:
from memory, read ahead as a silo does by default, and read when asked for. Ratios are of each turn, of the time on the
clock and of the processor time of all threads, which other programs on the machine disturb less; shown are the median
and the interval that holds it with 95 % (bootstrap). Then: the reader alone, the price of keeping documents apart, and
the time to open a corpus of 10 GB and draw a batch.
"""

import argparse
import dataclasses
import itertools
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.silo_overhead import configuration, make_text
from pretrain.config.keys import RunConfig
from pretrain.silo.attention import DOCUMENTS
from pretrain.silo.batch import Batch
from pretrain.silo.data import Batches, Mixture, PackedTokens, Prefetch
from pretrain.silo.model import build_initial, token_losses
from pretrain.silo.ranks import Ranks
from pretrain.silo.shards import read_manifest, write_manifest
from pretrain.train import Silo, prepare

CPU = torch.device("cpu")
DOCUMENT_TOKENS = 100


def median_and_interval(values: list[float]) -> str:
    """The median, and where it lies with 95 % by resampling the values 2,000 times."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return f"{statistics.median(values):.4f} ({medians[50]:.4f} to {medians[-50]:.4f})"


def take_turns(ways: dict[str, Callable[[], None]], num_turns: int) -> dict[str, list[tuple[float, float]]]:
    """Way to its seconds in each turn, on the clock and of the processor; the order changes, and one turn warms up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    orders = itertools.cycle(itertools.permutations(ways))
    for _ in range(num_turns + 1):
        for name in next(orders):
            began = time.perf_counter(), time.process_time()
            ways[name]()
            seconds[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return {name: values[1:] for name, values in seconds.items()}


def ratios(measured: list[tuple[float, float]], reference: list[tuple[float, float]]) -> str:
    """The ratios of both times, turn by turn."""
    clock, processor = ([a[i] / b[i] for a, b in zip(measured, reference, strict=True)] for i in (0, 1))
    return f"clock {median_and_interval(clock)}, processor {median_and_interval(processor)}"


def milliseconds(measured: list[tuple[float, float]]) -> float:
    """Median time on the clock."""
    return statistics.median(clock for clock, _ in measured) * 1000


def one_rank_environment() -> None:
    """What torchrun would say to the only rank of a silo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in one.items()}
    torch.set_num_threads(1)


def reading_cost(silo: Silo, *, num_turns: int, num_steps: int) -> None:
    """Print the ratios of the inner steps' time."""
    settings = silo.config.silos[silo.name]

    def reader(num_batches: int) -> Prefetch:
        batches = Batches(
            silo.mixture,
            micro_batch_sequences=settings.micro_batch_sequences,
            accumulation_steps=1,
            rank=0,
            num_ranks=1,
        )
        return Prefetch(batches, num_batches=num_batches, device=CPU)

    def steps(batches: Iterator[Batch]) -> Callable[[], None]:
        def turn() -> None:
            for _ in range(num_steps):
                silo.engine.step([next(batches)], 1e-3)

        return turn

    in_memory = list(itertools.islice(reader(0), num_steps))
    ways = {"memory": itertools.cycle(in_memory), "ahead": reader(settings.prefetch_batches), "asked": reader(0)}
    seconds = take_turns({name: steps(batches) for name, batches in ways.items()}, num_turns)
    step_ms = milliseconds(seconds["memory"]) / num_steps
    print(f"inner step with batches in memory: {step_ms:.2f} ms ({num_turns} turns of {num_steps} steps)")
    for name, shown in (("ahead", "read ahead"), ("asked", "read when asked for")):
        print(f"RESULT step time, {shown}, over in memory: {ratios(seconds[name], seconds['memory'])}")


def reader_alone(split: Path, sequence_tokens: int) -> None:
    """Print microseconds a sequence, of one corpus and of three mixed by weight."""
    for num_corpora in (1, 3):
        corpora = [PackedTokens([split], sequence_tokens=sequence_tokens) for _ in range(num_corpora)]
        mixture = Mixture(corpora, weights=[0.2, 0.3, 0.5][:num_corpora], seed=0, silo="bench")
        batches = Batches(mixture, micro_batch_sequences=16, accumulation_steps=1, rank=0, num_ranks=1)
        times = []
        for _ in range(500):
            began = time.perf_counter()
            next(batches)
            times.append((time.perf_counter() - began) / 16 * 1e6)
        print(f"RESULT reader alone, {num_corpora} corpora: {statistics.median(times):.1f} µs a sequence")


def masking_cost(config: RunConfig, vocab_size: int, *, num_sequences: int, sequence_tokens: int) -> None:
    """Print the ratio of a plain loop's step time with documents kept apart and without."""
    model = build_initial(config.model, vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.randint(1, vocab_size, (num_sequences * sequence_tokens + 1,))
    text[torch.rand(len(text)) < 1 / DOCUMENT_TOKENS] = 0
    inputs, targets = (part.view(num_sequences, sequence_tokens) for part in (text[:-1], text[1:]))

    def step(mask_at: int | None, attention: str = "sdpa") -> None:
        model.set_attn_implementation(attention)  # type: ignore[operator]
        token_losses(model, inputs, targets, mask_at).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    ways = {"a mask": lambda: step(0), "each by itself": lambda: step(0, DOCUMENTS)}
    seconds = take_turns({"open": lambda: step(None), **ways}, 40)
    for way in ways:
        cost = ratios(seconds[way], seconds["open"])
        print(
            f"RESULT step time, documents of {DOCUMENT_TOKENS} tokens kept apart, {way}, over not, {num_sequences} "
            f"sequences of {sequence_tokens} tokens ({milliseconds(seconds['open']):.0f} ms): {cost}"
        )


def cold_start(split: Path, num_tokens: int) -> None:
    """Print the time from a directory's name to the first batch; the split becomes a sparse one of so many tokens."""
    manifest = read_manifest(split)
    shard = dataclasses.replace(manifest.shards[0], num_tokens=num_tokens)
    os.truncate(split / shard.file, manifest.dtype.itemsize * num_tokens)
    write_manifest(split, dataclasses.replace(manifest, num_tokens=num_tokens, shards=(shard,)))
    times = []
    for _ in range(11):
        began = time.perf_counter()
        mixture = Mixture([PackedTokens([split], sequence_tokens=2048)], seed=0, silo="bench")
        reader = Prefetch(
            Batches(mixture, micro_batch_sequences=8, accumulation_steps=1, rank=0, num_ranks=1),
            num_batches=2,
            device=CPU,
        )
        next(reader)
        times.append((time.perf_counter() - began) * 1000)
        reader.close()
    size = manifest.dtype.itemsize * num_tokens
    print(
        f"RESULT cold start on a sparse shard of {size / 1e9:.0f} GB: first {times[0]:.1f} ms, "
        f"median {statistics.median(times):.1f} ms"
    )


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--steps", type=int, default=10, help="inner steps of one turn")
    arguments = parser.parse_args()
    one_rank_environment()
    ranks = Ranks()
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text"
        make_text(text)
        config = configuration(Path(scratch) / "run", text, 0, 1, [])
        split = text / "packed" / "train"
        reading_cost(prepare(config, "bench", ranks, None), num_turns=arguments.turns, num_steps=arguments.steps)
        reader_alone(split, config.sequence_tokens)
        vocab_size = read_manifest(split).vocab_size
        for num_sequences, sequence_tokens in ((16, 64), (8, 512)):
            masking_cost(config, vocab_size, num_sequences=num_sequences, sequence_tokens=sequence_tokens)
        cold_start(text / "packed" / "valid", 5 * 10**9)
    ranks.close()


if __name__ == "__main__":
    main()
