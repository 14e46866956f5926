"""Run by torchrun: private steps at ZeRO 0, 1 and 2; leaves what they made of the parameters in a directory."""

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.config.errors import ConfigError
from pretrain.config.keys import InnerConfig, ModelConfig, PrivateConfig, SiloConfig
from pretrain.silo.account import Plan
from pretrain.silo.batch import Batch
from pretrain.silo.checkpoint import Progress
from pretrain.silo.engine import Engine
from pretrain.silo.model import build_initial, token_losses
from pretrain.silo.private import Private
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
    progress: Progress = field(default_factory=Progress)

    def start(self) -> None:
        """Build all of it, as after a kill; the account and the secret in the directory stay."""
        num_micro_batches = 2
        settings = PrivateConfig(epsilon=1.0, clip_norm=CLIP_NORM)
        silo = SiloConfig(
            global_batch_sequences=NUM_SEQUENCES,
            micro_batch_sequences=NUM_SEQUENCES // num_micro_batches // self.ranks.num_ranks,
            precision=self.precision,
            deepspeed={"zero_optimization": {"stage": self.stage}},
            private=settings,
        )
        self.engine = Engine(MODEL, silo, INNER, vocab_size=VOCAB_SIZE, ranks=self.ranks)
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

    def step(self, *, position: int = 0) -> None:
        """One inner step on this rank's part of the sequences."""
        self.progress.position = position
        part = SEQUENCES.chunk(self.ranks.num_ranks)[self.ranks.rank]
        self.private.step(self.engine, [Batch(one[:, :-1], one[:, 1:]) for one in part.chunk(2)], 1.0, self.progress)

    def way(self) -> dict[str, Tensor]:
        """How far the parameters have come, times the sequences of a batch: with SGD the sums of gradients."""
        initial = dict(build_initial(MODEL, VOCAB_SIZE).named_parameters())
        return {name: (initial[name].detach() - self.engine.read(name)) * NUM_SEQUENCES for name in initial}


def main() -> None:
    """Everything, one engine after another."""
    directory, ranks = Path(sys.argv[1]), Ranks()
    found: dict[str, dict[str, Tensor]] = {}
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
    if ranks.is_leader:
        for name, tensors in found.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, directory / f"{name}.safetensors")
        save_file(spent, directory / "spent.safetensors")
    ranks.close()


if __name__ == "__main__":
    main()
