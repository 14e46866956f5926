"""Run by torchrun: private steps at ZeRO 0, 1 and 2; leaves what they made of the parameters in a directory.

    private_worker.py DIRECTORY [WAY]

With the name of a way to compute (`WAYS`) it makes the steps of AdamW and Muon in that way alone.
"""

import dataclasses
import itertools
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from pretrain.config.budgets import PrivateConfig
from pretrain.config.errors import ConfigError
from pretrain.config.keys import InnerConfig, ModelConfig, SiloConfig
from pretrain.silo.account import Plan
from pretrain.silo.batch import Batch
from pretrain.silo.checkpoint import Progress
from pretrain.silo.engine import Engine
from pretrain.silo.model import build_initial, token_losses
from pretrain.silo.noise import secret_key
from pretrain.silo.private import SECRET, Private
from pretrain.silo.ranks import Ranks

VOCAB_SIZE, NUM_SEQUENCES, CLIP_NORM = 97, 8, 0.5
MODEL = ModelConfig(
    config={
        "model_type": "llama",
        "hidden_size": 33,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "head_dim": 8,
        "intermediate_size": 51,
        "tie_word_embeddings": True,  # so that a gradient has two parts, whose norms do not add up
    }
)
INNER = InnerConfig(optimizer="sgd", lr=1.0, clip_norm=0.0, weight_decay=0.0, schedule="constant")
SEQUENCES = torch.randint(0, VOCAB_SIZE, (NUM_SEQUENCES, 13), generator=torch.Generator().manual_seed(1))
SEQUENCES[1] = 5  # one word alone: its gradient is by far the longest of them
NEARLY_NONE = 1e-9
TRAINED = InnerConfig(lr=0.01, muon_lr=0.02, clip_norm=0.1, weight_decay=0.1, schedule="constant")
NUM_STEPS, LR = 2, 0.005
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layers": {"activation_checkpointing": "layers"},
    "selective": {"activation_checkpointing": "selective"},
    "offload": {"deepspeed": OFFLOAD},
    "compiled": {"compile": True},
}
"""Changes of a silo that come to the same steps."""


def brute_force() -> tuple[dict[str, Tensor], list[float]]:
    """The sum of clipped gradients by a plain model, one sequence after another, and their norms before."""
    model = build_initial(MODEL, VOCAB_SIZE)
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    norms = []
    for row in SEQUENCES.split(1):
        model.zero_grad()
        token_losses(model, row[:, :-1], row[:, 1:]).mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM).item())
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad
    return total, norms


@dataclass
class Case:
    """A silo that starts anew from the initial parameters, and what it leaves."""

    directory: Path
    ranks: Ranks
    stage: int
    precision: str = "fp32"
    noise: float = 1.0
    most_epochs: int = 100
    inner: InnerConfig = field(default_factory=lambda: INNER)
    changes: dict[str, Any] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    def start(self) -> None:
        """Build all of it, as after a kill; the account and the secret in the directory stay."""
        num_micro_batches = 2
        settings = PrivateConfig(epsilon=1.0, clip_norm=CLIP_NORM)
        zero = {"stage": self.stage} | self.changes.get("deepspeed", {}).get("zero_optimization", {})
        silo = SiloConfig(
            global_batch_sequences=NUM_SEQUENCES,
            micro_batch_sequences=NUM_SEQUENCES // num_micro_batches // self.ranks.num_ranks,
            precision=self.precision,
            private=settings,
            **self.changes | {"deepspeed": {"zero_optimization": zero}},
        )
        self.engine = Engine(MODEL, silo, self.inner, vocab_size=VOCAB_SIZE, ranks=self.ranks)
        initial = build_initial(MODEL, VOCAB_SIZE).named_parameters()
        self.engine.write(((name, p.detach()) for name, p in initial) if self.ranks.is_leader else None)
        plan = Plan(
            noise_multiplier=self.noise,
            delta=1e-6,
            batch_sequences=NUM_SEQUENCES,
            epoch_sequences=2 * NUM_SEQUENCES,
            most_epochs=self.most_epochs,
        )
        self.private = Private(settings, plan, self.ranks, silo="law", directory=self.directory, data={})

    def step(self, *, position: int = 0, lr: float = 1.0) -> None:
        """One inner step on this rank's part of the sequences."""
        self.progress.position = position
        part = SEQUENCES.chunk(self.ranks.num_ranks)[self.ranks.rank]
        self.private.step(self.engine, [Batch(one[:, :-1], one[:, 1:]) for one in part.chunk(2)], lr, self.progress)

    def trained(self) -> dict[str, Tensor]:
        """Parameters after some steps, and the gradient that each of them was given."""
        given, along = [], self.engine.step_along

        def step_along(gradients: Iterable[Tensor], lr: float) -> float:
            given.append([gradient.clone() for gradient in gradients])
            return along(iter(given[-1]), lr)

        self.engine.step_along = step_along  # type: ignore[method-assign]
        for number in range(NUM_STEPS):
            self.step(position=number * NUM_SEQUENCES, lr=LR)
        names = list(self.engine.shapes)
        found = {f"parameter/{name}": self.engine.read(name).clone() for name in names}
        for number, gradients in enumerate(given):
            found |= {f"gradient {number}/{name}": one for name, one in zip(names, gradients, strict=True)}
        return found | {"epsilon": torch.tensor(self.progress.epsilon)}

    def way(self) -> dict[str, Tensor]:
        """How far the parameters have come, times the sequences of a batch: with SGD the sums of gradients."""
        initial = dict(build_initial(MODEL, VOCAB_SIZE).named_parameters())
        return {name: (initial[name].detach() - self.engine.read(name)) * NUM_SEQUENCES for name in initial}


def trained(directory: Path, ranks: Ranks, way: str, stages: Iterable[int]) -> dict[str, dict[str, Tensor]]:
    """What AdamW and Muon come to, computed in one of `WAYS`, at some stages: with noise, all by one secret."""
    found = {}
    for stage, optimizer in itertools.product(stages, ("adamw", "muon")):
        own = directory / f"{optimizer}-{stage}-{way}"
        if ranks.is_leader:
            shutil.copytree(directory / "secret", own)
        inner = dataclasses.replace(TRAINED, optimizer=optimizer)
        case = Case(own, ranks, stage, inner=inner, changes=WAYS[way])
        case.start()
        found[own.name] = case.trained()
    return found


def main() -> None:
    """Everything, one engine after another."""
    directory, ranks = Path(sys.argv[1]), Ranks()
    found: dict[str, dict[str, Tensor]] = {}
    if ranks.is_leader:
        secret_key(directory / "secret" / SECRET)
    dist.barrier()
    for way in sys.argv[2:]:
        found |= trained(directory, ranks, way, (1, 2) if way == "offload" else (0, 2))
    if not found:
        found = everything(directory, ranks)
    if ranks.is_leader:
        for name, tensors in found.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, directory / f"{name}.safetensors")
    ranks.close()


def everything(directory: Path, ranks: Ranks) -> dict[str, dict[str, Tensor]]:
    """All cases but those ways to compute that take long."""
    found = trained(directory, ranks, "plain", (0, 1, 2))
    found |= trained(directory, ranks, "layers", (0,)) | trained(directory, ranks, "selective", (2,))
    spent: dict[str, Tensor] = {}
    for stage, precision in itertools.product((0, 1, 2), ("fp32", "bf16")):
        case = Case(directory / f"clean-{stage}-{precision}", ranks, stage, precision, NEARLY_NONE)
        case.start()
        case.step()
        found[f"clean-{stage}-{precision}"] = case.way()

    case = Case(directory / "noisy", ranks, 1)
    for name, position in (("noisy", 0), ("again", 0), ("elsewhere", NUM_SEQUENCES)):
        case.start()
        case.step(position=position)
        found[name], spent[name] = case.way(), torch.tensor(case.progress.epsilon)
    case.step(position=NUM_SEQUENCES)  # other parameters, the same place: as after a rollback
    spent["rolled back"] = torch.tensor(case.progress.epsilon)
    case.directory = directory / "other"
    case.start()
    case.step()
    found["other secret"] = case.way()
    case.directory = directory / "lost"
    case.start()
    try:
        case.step(position=NUM_SEQUENCES)
    except ConfigError as error:
        (directory / "lost.txt").write_text(str(error))
    return found | {"spent": spent}


if __name__ == "__main__":
    main()
