"""Seconds of an optimizer's step at 20 and 120 million parameters: shared out, batched and fused, against one by one.

    python -m benchmarks.muon [--sizes 20M 120M] [--optimizers muon adamw] [--turns 5]
    python -m launch.start.workers --num-processes 2 -- python -m benchmarks.muon --stage 2

An engine's optimizer steps on random gradients that are in place, without forward and backward pass. `before` is the
way that it replaced, in the same process and in turns with it: every rank has every matrix all-reduced from the ranks'
pieces in fp32 and puts it alone through torch.optim.Muon; AdamW is not fused. Told are medians, also of the ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.config.keys import InnerConfig, ModelConfig, SiloConfig
from pretrain.silo.engine import Engine
from pretrain.silo.muon import MuonAdamW
from pretrain.silo.ranks import Ranks

VOCAB_SIZE = 8192
SIZES = {
    "0.5M": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 6, "num_attention_heads": 4},
    "20M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6},
    "120M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12},
}


def step_one_by_one(optimizer: MuonAdamW) -> None:
    """Muon's step of all matrices as it was before."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["muon"] else ():
            momentum = optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
            momentum.lerp_(parameter.grad, 1 - group["momentum"])
            direction = parameter.grad.lerp(momentum, group["momentum"])
            if parameter.ndim == 2:
                change = alone(direction)
            else:
                change = torch.zeros_like(direction)
                for piece in optimizer._pieces[parameter]:
                    matrix = torch.zeros(piece.shape.numel(), device=direction.device)
                    matrix[piece.in_matrix] = direction[piece.in_partition]
                    dist.all_reduce(matrix)
                    change[piece.in_partition] = alone(matrix.view(piece.shape)).flatten()[piece.in_matrix]
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=group["lr"])


def alone(direction: Tensor) -> Tensor:
    """What torch.optim.Muon adds to a matrix at learning rate 1."""
    matrix = nn.Parameter(torch.zeros_like(direction))
    matrix.grad = direction
    torch.optim.Muon([matrix], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    return matrix.detach()


def ways(optimizer: Any) -> dict[str, Callable[[], None]]:
    """Both ways to take a step; AdamW's state serves both."""
    adamw = optimizer._adamw if isinstance(optimizer, MuonAdamW) else optimizer

    def before() -> None:
        if isinstance(optimizer, MuonAdamW):
            step_one_by_one(optimizer)
            adamw.param_groups = [group for group in optimizer.param_groups if not group["muon"]]
            adamw.state = optimizer.state
        fused(adamw, on=False)
        adamw.step()
        fused(adamw, on=True)

    return {"before": before, "after": optimizer.step}


def fused(adamw: torch.optim.Optimizer, *, on: bool) -> None:
    """Switch AdamW's kernel."""
    for group in adamw.param_groups:
        group["fused"] = on


@torch.no_grad()
def measured(engine: Engine, ranks: Ranks, turns: int) -> dict[str, list[float]]:
    """Seconds of each way, after one step that warms up."""
    optimizer, generator = engine._optimizer, torch.Generator().manual_seed(ranks.rank if engine.stage else 0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
    found: dict[str, list[float]] = {way: [] for way in ways(optimizer)}
    for turn in range(turns + 1):
        for way, step in ways(optimizer).items():
            ranks.barrier()
            began = time.perf_counter()
            step()
            ranks.barrier()
            if turn:
                found[way].append(time.perf_counter() - began)
    return found


def main() -> None:
    """One line for each size and optimizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["20M", "120M"], choices=SIZES)
    parser.add_argument("--optimizers", nargs="+", default=["muon", "adamw"], choices=["muon", "adamw"])
    parser.add_argument("--stage", type=int, default=0, choices=[0, 1, 2])
    parser.add_argument("--turns", type=int, default=5)
    arguments, ranks = parser.parse_args(), Ranks()
    torch.set_num_threads(1)
    for size in arguments.sizes:
        for optimizer in arguments.optimizers:
            model = ModelConfig(config={"model_type": "llama", "tie_word_embeddings": True} | SIZES[size])
            zero = {"zero_optimization": {"stage": arguments.stage, "reduce_bucket_size": 1_000_000}}
            silo = SiloConfig(
                global_batch_sequences=ranks.num_ranks,
                micro_batch_sequences=1,
                deepspeed=zero if arguments.stage else {},
            )
            engine = Engine(model, silo, InnerConfig(optimizer=optimizer), vocab_size=VOCAB_SIZE, ranks=ranks)
            found = measured(engine, ranks, arguments.turns)
            before, after = found["before"], found["after"]
            number = sum(shape.numel() for shape in engine.shapes.values())
            ratio = statistics.median(new / old for old, new in zip(before, after, strict=True))
            if ranks.is_leader:
                print(
                    f"RESULT {optimizer:<5} {number / 1e6:6.1f} M, {ranks.num_ranks} ranks, ZeRO-{arguments.stage}: "
                    f"before {statistics.median(before):7.3f} s, after {statistics.median(after):7.3f} s, ratio "
                    f"{ratio:.3f}",
                    flush=True,
                )
            del engine
    ranks.close()


if __name__ == "__main__":
    main()
