"""What a silo's loop costs between syncs: its steps per second against a bare DeepSpeed loop, same model, same batch.

    python -m benchmarks.silo_overhead
    python -m launch.start.workers --num-processes 2 -- python -m benchmarks.silo_overhead --stage 2

Both loops drive the same engine in the same process and take turns, so that a busy machine slows both alike; the ratio
is that of the medians over the turns. The bare loop has its batches in memory and neither logs nor schedules.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config
from pretrain.host.journal import Journal
from pretrain.host.stopping import StopRequested
from pretrain.silo.model import token_losses
from pretrain.silo.ranks import Ranks
from pretrain.train import Silo, prepare, train

DEMO = Path(__file__).parent.parent / "configs" / "run" / "demo.yaml"


def configuration(directory: Path, packed: Path, stage: int, num_ranks: int, overrides: list[str]) -> RunConfig:
    """The demo's model and batch, training alone, never syncing or saving during the measurement."""
    config = load_config(
        [DEMO],
        [
            f"directory={directory}",
            f"tokenizer={packed / 'tokenizer'}",
            "exchange.kind=none",
            "wandb.mode=disabled",
            "inner.num_steps=1000000",
            "outer.sync_interval_steps=1000000",
            "silo.checkpoint_interval_steps=1000000",
            f"silos.bench.data=[{packed / 'packed' / 'train'}]",
            f"silos.bench.processes_per_node={num_ranks}",
            f"silos.bench.deepspeed.zero_optimization.stage={stage}",
            *overrides,
        ],
    )
    return config


def turn_of_ours(silo: Silo, num_steps: int) -> float:
    """Steps per second of pretrain.train's loop."""
    target = silo.progress.step + num_steps
    silo.asked_to_stop = lambda: silo.progress.step >= target
    began = time.perf_counter()
    try:
        train(silo)
    except StopRequested:
        return num_steps / (time.perf_counter() - began)
    raise AssertionError("the loop must have been stopped")


def turn_of_bare(silo: Silo, num_steps: int) -> float:
    """Steps per second of DeepSpeed alone."""
    engine, num_batches = silo.engine._deepspeed, silo.config.silos[silo.name].accumulation_steps
    batches = [next(silo.batches) for _ in range(num_steps * num_batches)]
    clip_norm = 0.0 if engine.gradient_clipping() else silo.config.inner.clip_norm
    get_accelerator().synchronize()
    began = time.perf_counter()
    for batch in batches:
        loss = token_losses(engine, batch.inputs, batch.targets).mean()
        engine.backward(loss)
        if clip_norm and engine.is_gradient_accumulation_boundary():  # plain fp32: a silo clips in DeepSpeed's stead
            torch.nn.utils.clip_grad_norm_(engine.module.parameters(), clip_norm)
        engine.step()
    get_accelerator().synchronize()
    return num_steps / (time.perf_counter() - began)


def main() -> None:
    """Take turns and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="inner steps of one turn")
    parser.add_argument(
        "--text", type=Path, help="folder with tokenizer/ and packed/train/ (default: made for this run)"
    )
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    ranks = Ranks()
    with tempfile.TemporaryDirectory() as scratch:
        text = arguments.text or Path(ranks.from_leader(scratch)) / "text"
        if ranks.is_leader and not arguments.text:
            make_text(text)
        ranks.barrier()
        global_batch = 16
        overrides = [f"silo.micro_batch_sequences={global_batch // ranks.num_ranks}", *arguments.overrides]
        config = configuration(Path(scratch), text, arguments.stage, ranks.num_ranks, overrides)
        journal = Journal(config, "silos/bench", silo="bench") if ranks.is_leader else None
        silo = prepare(config, "bench", ranks, journal)
        pairs = []
        for turn in range(arguments.turns + 1):  # the first warms up
            pair = turn_of_ours(silo, arguments.steps), turn_of_bare(silo, arguments.steps)
            if turn:
                pairs.append(pair)
        ours, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
    if ranks.is_leader:
        num_parameters = sum(shape.numel() for shape in silo.engine.shapes.values())
        print(
            f"RESULT {num_parameters:,} parameters, {ranks.num_ranks} ranks, ZeRO-{arguments.stage}: silo loop "
            f"{ours:.2f} steps/s, bare DeepSpeed {bare:.2f} steps/s, ratio {ratio:.3f}"
        )
    ranks.close()


def make_text(directory: Path) -> None:
    """A tokenizer and a packed corpus from the standard library's documentation strings."""
    from data_tools.corpora import write_python_corpora
    from data_tools.pack import Recipe, prepare
    from data_tools.sources import Source, read_documents, training_file
    from data_tools.tokenizer import train_tokenizer

    corpus = write_python_corpora(directory / "corpora")["prose"]
    file = train_tokenizer(read_documents(training_file(corpus)), vocab_size=2048, output=directory / "tokenizer")
    prepare(Recipe(sources=(Source(path=str(corpus)),), tokenizer=file), directory / "packed")


if __name__ == "__main__":
    main()
