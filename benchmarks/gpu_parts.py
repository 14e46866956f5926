"""What `benchmarks.gpu` measures on one card: each part in a process of its own, which writes a row at a time.

    python -m benchmarks.gpu_parts 124M --seconds 100 --output 124M.json

A row is a JSON object; what does not fit into the time or the memory that there is says so in `error`.
"""

import argparse
import gc
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from benchmarks.device_memory import measure
from benchmarks.merge import SIZES as LLAMAS
from benchmarks.plain_loops import WARM_UP_STEPS, PlainLoop, Size, drawn, model_section, trainer_step_seconds
from benchmarks.silo_overhead import turn_of_bare, turn_of_ours
from data_tools.tokenizer import train_tokenizer
from pretrain.config.keys import ModelConfig, RunConfig
from pretrain.config.load import load_config
from pretrain.host.journal import Journal
from pretrain.silo.cards import card_name, peak_flops
from pretrain.silo.engine import Engine
from pretrain.silo.flops import flops_per_token
from pretrain.silo.model import build_without_memory
from pretrain.silo.ranks import Ranks
from pretrain.silo.shards import tokenizer_sha256
from pretrain.silo.writer import SplitWriter
from pretrain.sync.elastic import ElasticSync
from pretrain.train import prepare

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
GPT2S = {
    "124M": Size(layers=12, heads=12, width=768, sequence_tokens=1024, micro_batch_sequences=32, accumulation_steps=4),
    "350M": Size(layers=24, heads=16, width=1024, sequence_tokens=1024, micro_batch_sequences=16, accumulation_steps=4),
    "1.3B": Size(layers=24, heads=16, width=2048, sequence_tokens=2048, micro_batch_sequences=8, accumulation_steps=4),
}
TOY = Size(
    layers=2,
    heads=2,
    width=64,
    sequence_tokens=64,
    micro_batch_sequences=2,
    accumulation_steps=2,
    vocab_size=512,
    precision="fp32",
)
TOY_LLAMA = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
# Each measure that a silo may take, taken away or added; first all as we would have it.
MEASURES: dict[str, dict[str, Any]] = {
    "silo": {"compile": True},
    "silo, not compiled": {"compile": False},
    "silo, attention eager": {"compile": True, "attention": "eager"},
    "silo, loss in chunks of 4,096": {"compile": True, "loss_chunk_tokens": 4096},
    "silo, activations recomputed": {"compile": True, "activation_checkpointing": "layers"},
}
FULL_CARD_BYTES = 75e9  # a smaller one has a smaller micro batch, and more of them
MEASURE_SECONDS, TOY_SECONDS = 4.0, 0.2
GIB = 1 << 30


class Part:
    """Rows, written as they come, until the time is over."""

    def __init__(self, output: Path, seconds: float) -> None:
        self._output, self._until = output, time.monotonic() + seconds
        self.rows: list[Row] = []

    def add(self, **row: Any) -> None:
        """Keep a row, and show it."""
        self.rows.append(row)
        temporary = self._output.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.rows, indent=1))
        temporary.replace(self._output)
        print("ROW", json.dumps(row), flush=True)

    def way(self, name: str, measured: Callable[[], Row]) -> None:
        """Measure one way, unless there is no time, or too little memory."""
        if time.monotonic() > self._until:
            self.add(way=name, error="no time was left")
            return
        began = time.monotonic()
        try:
            reset_memory()
            row = measured()
        except torch.OutOfMemoryError:
            row = {"error": "out of memory"}
        except Exception as error:  # the other ways are still worth their time
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        self.add(way=name, **row, seconds=round(time.monotonic() - began, 1))


def reset_memory() -> None:
    """Give back what nobody holds, and count the peak anew; of a layer torch compiles but so many variants."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    """The most that the device held."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


# ---- tokens a second


def write_text(directory: Path, vocab_size: int, num_tokens: int) -> None:
    """A tokenizer, and a packed split of random tokens, few of which are frequent, as words are."""
    file = train_tokenizer(iter(["a silo, and another"] * 50), vocab_size=260, output=directory / "tokenizer")
    generator = np.random.default_rng(0)
    tokens = (vocab_size ** generator.random(num_tokens)).astype(np.int64).clip(1, vocab_size - 1)
    tokens[-1] = 0
    writer = SplitWriter(directory / "train", vocab_size=vocab_size, end_of_text_id=0, shard_tokens=num_tokens)
    writer.write(tokens, np.array([num_tokens]), num_tokens)
    writer.finish(tokenizer_sha256=tokenizer_sha256(file), recipe_sha256="0" * 64)


def configuration(directory: Path, section: dict[str, Any], overrides: dict[str, Any]) -> RunConfig:
    """A silo that trains on `write_text`'s tokens; it neither saves nor ends, unless it is told to."""
    settings = {
        "directory": directory / "run",
        "tokenizer": directory / "tokenizer",
        "model.config": json.dumps(section),
        "inner.num_steps": 1_000_000,
        "outer.sync_interval_steps": 1_000_000,
        "silo.checkpoint_interval_steps": 1_000_000,
        "silo.eval_interval_rounds": 0,
        "wandb.mode": "disabled",
        "silos.bench.data": f"[{directory / 'train'}]",
        **overrides,
    }
    return load_config([], [f"{key}={value}" for key, value in settings.items()])


def settled(run: Callable[[int], None], step_tokens: int, seconds: float) -> Row:
    """Tokens a second of `run`, which makes so many steps: the median of three turns, after a warm-up."""
    run(WARM_UP_STEPS)

    def timed(number: int) -> float:
        get_accelerator().synchronize()
        began = time.perf_counter()
        run(number)
        get_accelerator().synchronize()
        return (time.perf_counter() - began) / number

    number = max(1, math.ceil(seconds / 3 / timed(1)))
    return speeds([timed(number) for _ in range(3)], step_tokens)


def speeds(step_seconds: list[float], step_tokens: int) -> Row:
    """A row of them."""
    tokens = sorted(step_tokens / seconds for seconds in step_seconds)
    return {
        "tokens_per_second": statistics.median(tokens),
        "range": [tokens[0], tokens[-1]],
        "peak_bytes": peak_bytes(),
    }


def fitted(size: Size, device: torch.device) -> Size:
    """With a micro batch for the memory that the card has, and the same global batch."""
    if device.type == "cpu":
        return size
    has, shrink = torch.cuda.get_device_properties(device).total_memory, 1
    while has * shrink < FULL_CARD_BYTES and size.micro_batch_sequences > shrink:
        shrink *= 2
    micro, accumulation = size.micro_batch_sequences // shrink, size.accumulation_steps * shrink
    return replace(size, micro_batch_sequences=micro, accumulation_steps=accumulation)


def speed_part(part: Part, size: Size, ranks: Ranks, scratch: Path, seconds: float) -> None:
    """A silo's loop and bare DeepSpeed on one engine, a plain loop, `Trainer`, and the silo's measures one by one."""
    size = fitted(size, ranks.device)
    section, batch = model_section(size), size.micro_batch_sequences * size.accumulation_steps
    operations = flops_per_token(
        build_without_memory(ModelConfig(config=section), size.vocab_size), size.sequence_tokens
    )
    part.add(
        way="",
        card=card_name(ranks.device) or "CPU",
        peak_tflops=(peak_flops(ranks.device) or 0) / 1e12 or None,
        flops_per_token=operations,
        batch=f"{size.micro_batch_sequences} x {size.accumulation_steps} x {size.sequence_tokens} tokens",
        precision=size.precision,
        torch=torch.__version__,
    )
    write_text(scratch, size.vocab_size, 100 * size.step_tokens)

    def config(measures: dict[str, Any]) -> RunConfig:
        base = {
            "exchange.kind": "none",
            "sequence_tokens": size.sequence_tokens,
            "silo.precision": size.precision,
            "silo.micro_batch_sequences": size.micro_batch_sequences,
            "silo.global_batch_sequences": batch,
        }
        return configuration(scratch, section, base | {f"silo.{key}": value for key, value in measures.items()})

    part.way("silo", lambda: silo_and_bare(part, config(MEASURES["silo"]), ranks, size, seconds))
    part.way("plain loop", lambda: settled(PlainLoop(size, ranks.device).steps, size.step_tokens, seconds))
    part.way(
        "transformers.Trainer",
        lambda: speeds(trainer_step_seconds(size, ranks.device, scratch / "trainer", seconds), size.step_tokens),
    )
    for name, measures in MEASURES.items():
        if name != "silo":
            part.way(name, lambda measures=measures: engine_alone(config(measures), ranks, size, seconds))  # type: ignore[misc]


def silo_and_bare(part: Part, config: RunConfig, ranks: Ranks, size: Size, seconds: float) -> Row:
    """`pretrain.train`'s loop and DeepSpeed's alone take turns; the latter's row is added here."""
    silo = prepare(config, "bench", ranks, Journal(config, "silos/bench", silo="bench"))
    try:
        turn_of_ours(silo, WARM_UP_STEPS)
        number = max(1, math.ceil(seconds / 5 * turn_of_ours(silo, 1)))
        pairs = [(1 / turn_of_ours(silo, number), 1 / turn_of_bare(silo, number)) for _ in range(5)]
    finally:
        silo.batches.close()
        silo.engine._deepspeed.destroy()
    ours, bare = zip(*pairs, strict=True)
    part.add(way="bare DeepSpeed", **speeds(list(bare), size.step_tokens))
    return speeds(list(ours), size.step_tokens) | {"of_bare": statistics.median(b / a for a, b in pairs)}


def engine_alone(config: RunConfig, ranks: Ranks, size: Size, seconds: float) -> Row:
    """A silo's engine with tokens in memory."""
    settings = config.silos["bench"]
    settings.accumulation_steps = size.accumulation_steps
    engine = Engine(config.model, settings, config.inner, vocab_size=size.vocab_size, ranks=ranks)
    engine.write((name, small(shape, ranks.device)) for name, shape in engine.shapes.items())
    batches = drawn(size, ranks.device)

    def steps(number: int) -> None:
        for _ in range(number):
            engine.step((next(batches) for _ in range(size.accumulation_steps)), config.inner.lr)

    try:
        return settled(steps, size.step_tokens, seconds)
    finally:
        engine._deepspeed.destroy()


def small(shape: torch.Size, device: torch.device) -> Tensor:
    """Parameters with which a model trains: matrices as at their start, vectors of norms and biases near 0."""
    return torch.randn(shape, device=device) * 0.02


# ---- a sync


def sync_part(part: Part, ranks: Ranks, scratch: Path, *, is_toy: bool) -> None:
    """Copies between device and host, and a federation of one silo, which syncs three times through a directory."""
    part.way("copies", lambda: copies(ranks.device, (1 << 20) if is_toy else GIB))
    llama = TOY_LLAMA if is_toy else LLAMAS["1B"]
    section = llama | {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8192}
    write_text(scratch, 8192, 1 << 18)
    layout = {
        "exchange.kind": "store",
        "exchange.poll_seconds": 0.05,
        "sequence_tokens": 256,
        "inner.num_steps": 12,
        "outer.sync_interval_steps": 4,
        "outer.codec": "int4",
        "outer.downlink_codec": "int4",
        "silo.precision": "fp32" if is_toy else "bf16",
        "silo.num_threads": torch.get_num_threads(),
    }
    part.way("sync", lambda: synced(part, configuration(scratch, section, layout), ranks))


def copies(device: torch.device, num_bytes: int) -> Row:
    """GB/s out of the device and into it, of memory that may be swapped and of such that is pinned."""
    on_device, found = torch.zeros(num_bytes, dtype=torch.uint8, device=device), Row()
    for is_pinned in (False, True) if device.type == "cuda" else (False,):
        host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        for name, target, source in (("out", host, on_device), ("in", on_device, host)):
            times = []
            for _ in range(4):
                began = time.perf_counter()
                target.copy_(source, non_blocking=is_pinned)
                get_accelerator().synchronize()
                times.append(time.perf_counter() - began)
            found[f"{name}_{'pinned' if is_pinned else 'pageable'}_gb_per_second"] = num_bytes / min(times[1:]) / 1e9
    return found


def synced(part: Part, config: RunConfig, ranks: Ranks) -> Row:
    """Device memory beyond training's; a row before, as a last checkpoint follows, says for how long training stands
    still in a sync, by what for.
    """
    seconds: dict[str, list[float]] = {"deliver": [], "wait": [], "adopt": []}

    def watch(sync: ElasticSync) -> None:
        for name in seconds:
            setattr(sync, name, timed(name, getattr(sync, name)))

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = method(*arguments)
            get_accelerator().synchronize()
            seconds[name].append(time.perf_counter() - began)
            if len(seconds["adopt"]) == config.schedule.num_versions:
                medians = {f"{name}_seconds": statistics.median(of[1:]) for name, of in seconds.items()}
                part.add(way="standing still", **medians)  # without the first, which compiles
            return result

        return call

    (beyond_peak, beyond_left), fragment_bytes = measure(config, ranks, watch)
    return {
        "parameters": fragment_bytes // 4,
        "beyond_training_bytes": beyond_peak,
        "beyond_between_steps_bytes": beyond_left,
    }


# ---- the tests


def test_part(part: Part, seconds: float) -> None:
    """All tests that are marked for a card."""
    files = [str(file) for file in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in file.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *files]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        part.add(way="tests", error=f"not done in {seconds:.0f} s")
        return
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", found.stdout)}
    failed = [line for line in found.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    part.add(way="tests", **counts, exit_code=found.returncode, failed=failed)


def main() -> None:
    """One part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*GPT2S, "sync", "tests"))
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    part, is_toy = Part(arguments.output, arguments.seconds), arguments.toy
    if arguments.part == "tests":
        test_part(part, arguments.seconds)
        return
    ranks = Ranks()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.part == "sync":
            sync_part(part, ranks, Path(scratch), is_toy=is_toy)
        else:
            size, seconds = (TOY, TOY_SECONDS) if is_toy else (GPT2S[arguments.part], MEASURE_SECONDS)
            speed_part(part, size, ranks, Path(scratch), seconds)
    ranks.close()


if __name__ == "__main__":
    main()
