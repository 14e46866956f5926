"""A silo's loop against what users would write instead, at equal model, batch and text, in tokens a second.

    python -m benchmarks.loop --sizes 0.5M 20M 120M --precision fp32
    python -m benchmarks.loop --sizes 20M --precision bf16 --ways silo trainer --turns 9
    python -m benchmarks.loop --sizes 20M --ways silo deepspeed --adapter 16    # LoRA of rank 16; by peft in the others

Each way is a process of its own, with all cores, that trains when it is told to; they take turns, so that a busy
machine slows all alike, and ratios are of each turn. The ways: the silo's loop with its defaults (`silo`) and with
`silo.compile=true` (`compiled`); DeepSpeed around a plain `transformers` model (`deepspeed`); `transformers.Trainer`
(`trainer`) and a loop of torch alone (`torch`), both compiled, with torch's fused AdamW. All see whole sequences of
the same packed text from memory, but for the silo, which reads its shards, keeps documents apart, and logs.
"""

import argparse
import itertools
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reading import one_rank_environment
from benchmarks.silo_overhead import configuration, make_text, turn_of_ours
from launch.start.workers import KEEP_FREED_MEMORY
from pretrain.config.adapter import AdapterConfig
from pretrain.config.keys import ModelConfig, RunConfig
from pretrain.silo.data import Batches, Mixture, PackedTokens
from pretrain.silo.model import build_initial
from pretrain.silo.ranks import Ranks
from pretrain.train import prepare

VOCAB = 2048
# hidden size, intermediate size, layers, heads, key-value heads, tokens of a sequence, sequences, steps of a turn
SIZES = {
    "0.5M": (96, 256, 3, 4, 2, 64, 16, 40),
    "20M": (512, 1408, 6, 8, 8, 512, 4, 2),
    "120M": (1024, 2816, 9, 16, 16, 1024, 1, 1),
}
Turn = Callable[[int], None]


def model_settings(size: str) -> dict[str, Any]:
    """What `transformers` builds of a size."""
    hidden, intermediate, layers, heads, key_value_heads, tokens, *_ = SIZES[size]
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": tokens,
        "tie_word_embeddings": True,
    }


def run_config(size: str, precision: str, directory: Path, text: Path, overrides: list[str], *, rank: int) -> RunConfig:
    """The silo's run: AdamW, no warm-up to speak of, nothing but training; of an adapter, if it has a rank."""
    tokens, sequences, num_steps = SIZES[size][5:]
    config = configuration(
        directory,
        text,
        0,
        1,
        [
            f"sequence_tokens={tokens}",
            *(f"model.config.{key}={value}" for key, value in model_settings(size).items()),
            "inner.optimizer=adamw",
            "outer.control_variates=0",
            "inner.lr=1e-4",
            f"silo.global_batch_sequences={sequences}",
            f"silo.micro_batch_sequences={sequences}",
            f"silo.precision={precision}",
            f"silo.num_threads={os.cpu_count()}",
            f"silo.log_interval_steps={num_steps}",  # at which a turn can end
            *overrides,
        ],
    )
    if rank:
        base = directory.with_name("base")
        if not base.exists():
            build_initial(config.model, VOCAB).save_pretrained(base)  # type: ignore[operator]
        adapter = AdapterConfig(kind="lora", rank=rank)
        config.model = ModelConfig(checkpoint=str(base), adapter=adapter)
    return config


def in_memory(config: RunConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """The silo's batches, some of them, round and round."""
    settings = config.silos["bench"]
    mixture = Mixture([PackedTokens(settings.data, sequence_tokens=config.sequence_tokens)], seed=0, silo="bench")
    size = settings.micro_batch_sequences
    batches = Batches(mixture, micro_batch_sequences=size, accumulation_steps=1, rank=0, num_ranks=1)
    return itertools.cycle([batch[:2] for batch in itertools.islice(batches, 16)])


def plain_model(config: RunConfig) -> nn.Module:
    """The model as `transformers` makes it, fp32, in training mode; peft puts an adapter beside it."""
    model: Any = build_initial(config.model, VOCAB).train()
    if config.model.adapter.is_on:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=config.model.adapter.rank, lora_alpha=16, target_modules="all-linear")
        return get_peft_model(model, settings, autocast_adapter_dtype=False).train()
    return model


def silo(config: RunConfig) -> Turn:
    """The loop of `pretrain.train`."""
    ready = prepare(config, "bench", Ranks(), None)

    def turn(num_steps: int) -> None:
        turn_of_ours(ready, num_steps)

    return turn


def deepspeed(config: RunConfig) -> Turn:
    """DeepSpeed's engine at ZeRO 0, as its documentation has it."""
    import deepspeed as ds

    settings, model = config.silos["bench"], plain_model(config)
    options = {
        "train_batch_size": settings.global_batch_sequences,
        "gradient_clipping": config.inner.clip_norm,
        "bf16": {"enabled": settings.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    engine, *_ = ds.initialize(model=model, optimizer=optimizer, config=options)
    batches = in_memory(config)

    def turn(num_steps: int) -> None:
        for input_ids, targets in itertools.islice(batches, num_steps):
            engine.backward(_loss(engine, input_ids, targets))
            engine.step()

    return turn


def _loss(model: Callable[..., Any], input_ids: Tensor, targets: Tensor) -> Tensor:
    logits = model(input_ids=input_ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def plain_torch(config: RunConfig) -> Turn:
    """A loop of torch: the model compiled whole, automatic mixed precision for bf16, fused AdamW."""
    model = plain_model(config)
    compiled, batches = torch.compile(model, dynamic=False), in_memory(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    low = config.silos["bench"].precision == "bf16"

    def turn(num_steps: int) -> None:
        for input_ids, targets in itertools.islice(batches, num_steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = _loss(compiled, input_ids, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.inner.clip_norm)
            optimizer.step()
            optimizer.zero_grad()

    return turn


def trainer(config: RunConfig, told: Connection) -> None:
    """`transformers.Trainer`, which holds its loop: between two turns a callback waits inside of it."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    settings, batches = config.silos["bench"], in_memory(config)
    rows = [
        pair for input_ids, targets in itertools.islice(batches, 16) for pair in zip(input_ids, targets, strict=True)
    ]
    # `transformers` shifts labels by itself: a sequence is one token longer than what is predicted.
    sequences = [torch.cat([inputs, targets[-1:]]) for inputs, targets in rows]
    dataset = [{"input_ids": sequence, "labels": sequence} for sequence in sequences] * 1000

    class Turns(TrainerCallback):
        left = 0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not self.left:
                self.left = told.recv()
                self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.left -= 1
            if not self.left:
                told.send(time.perf_counter() - self.began)

    arguments = TrainingArguments(
        output_dir=config.directory,
        max_steps=1_000_000,
        per_device_train_batch_size=settings.micro_batch_sequences,
        bf16=settings.precision == "bf16",
        use_cpu=True,
        torch_compile=True,
        optim="adamw_torch_fused",
        max_grad_norm=config.inner.clip_norm,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model=plain_model(config), args=arguments, train_dataset=dataset, callbacks=[Turns()]).train()  # type: ignore[arg-type]


LOOPS: dict[str, Callable[[RunConfig], Turn]] = {
    "silo": silo,
    "compiled": silo,
    "deepspeed": deepspeed,
    "torch": plain_torch,
}


def process(way: str, config: RunConfig, told: Connection) -> None:
    """One way: wait for a number of steps, train, answer with the seconds."""
    if way in ("silo", "compiled", "deepspeed"):
        one_rank_environment()
    torch.set_num_threads(os.cpu_count() or 1)
    if way == "trainer":
        trainer(config, told)
        return
    turn = LOOPS[way](config)
    while num_steps := told.recv():
        began = time.perf_counter()
        turn(num_steps)
        told.send(time.perf_counter() - began)


def measure(size: str, precision: str, ways: list[str], num_turns: int, text: Path, *, rank: int) -> None:
    """Let the ways take turns at one size, and print a line for each."""
    tokens, sequences, num_steps = SIZES[size][5:]
    spawn, rng = multiprocessing.get_context("spawn"), random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        running = {}
        for way in ways:
            ours, theirs = spawn.Pipe()
            options = ["silo.compile=true"] if way == "compiled" else []
            config = run_config(size, precision, Path(scratch) / way, text, options, rank=rank)
            one = spawn.Process(target=process, args=(way, config, theirs), daemon=True)
            one.start()
            theirs.close()  # so that a process that fails is noticed
            running[way] = (one, ours)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(num_turns + 2):  # the first two warm up
            for way in rng.sample(ways, len(ways)):
                running[way][1].send(num_steps)
                took = running[way][1].recv()
                if turn >= 2:
                    seconds[way].append(took)
        for one, _ in running.values():
            one.terminate()
    best = min(
        (way for way in ways if way not in ("silo", "compiled")), key=lambda way: statistics.median(seconds[way])
    )
    for way in ways:
        rate = tokens * sequences * num_steps / statistics.median(seconds[way])
        against = sorted(b / a for a, b in zip(seconds[way], seconds[best], strict=True))
        print(
            f"RESULT {size} {precision} {way:9s} {rate:9,.0f} tokens/s, {statistics.median(against):.3f} of {best} "
            f"({against[0]:.3f} to {against[-1]:.3f})",
            flush=True,
        )


def main() -> None:
    """Measure the sizes asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--ways", nargs="+", default=[*LOOPS, "trainer"], choices=[*LOOPS, "trainer"])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--adapter", type=int, default=0, metavar="RANK", help="train an adapter (LoRA) of this rank")
    arguments = parser.parse_args()
    os.environ |= KEEP_FREED_MEMORY | {"OMP_NUM_THREADS": str(os.cpu_count())}
    with tempfile.TemporaryDirectory() as scratch:
        make_text(Path(scratch))
        for size, precision in itertools.product(arguments.sizes, arguments.precision):
            measure(size, precision, arguments.ways, arguments.turns, Path(scratch), rank=arguments.adapter)


if __name__ == "__main__":
    main()
