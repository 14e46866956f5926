"""Run by torchrun: one step on packed conversations in many shapes; the leader prints how far each gradient is off.

The gradient is what SGD with a learning rate of 1 takes away. What it should be is the sum over the conversations of
the step, each alone and unpadded in a plain transformers model with positions of its own, over the number of trained
tokens.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F

from pretrain.config.budgets import PrivateConfig
from pretrain.config.keys import SiloConfig
from pretrain.silo.account import Plan
from pretrain.silo.batch import IGNORED, Batch
from pretrain.silo.checkpoint import Progress
from pretrain.silo.data import Batches, Mixture, PackedTokens
from pretrain.silo.engine import Engine
from pretrain.silo.evaluate import held_out_loss
from pretrain.silo.model import build_initial
from pretrain.silo.private import Private
from pretrain.silo.ranks import Ranks
from tests.chats import END, conversations, packed_rows, write_chat
from tests.distributed.private_worker import INNER, MODEL, VOCAB_SIZE

ROW_TOKENS, NUM_ROWS = 24, 8
TOKENIZER = "a1" * 32
Gradients = dict[str, torch.Tensor]
# Conversations of very unlike lengths, so that micro batches have unlike numbers of trained tokens.
GIVEN = conversations(40, vocab_size=VOCAB_SIZE, shortest=2, longest=20)
for place in range(0, 60, 4):  # rows of which not one token is trained
    GIVEN.insert(place, ([5] * ROW_TOKENS, [0] * ROW_TOKENS))


@dataclass(kw_only=True)
class Case:
    """One shape of a step."""

    stage: int = 0
    micro: int = 1
    attention: str = ""
    chunk_tokens: int = 0
    activations: str = "none"
    private: PrivateConfig = field(default_factory=PrivateConfig)

    def silo(self) -> SiloConfig:
        return SiloConfig(
            global_batch_sequences=NUM_ROWS,
            micro_batch_sequences=self.micro,
            attention=self.attention,
            loss_chunk_tokens=self.chunk_tokens,
            activation_checkpointing=self.activations,
            private=self.private,
            deepspeed={"zero_optimization": {"stage": self.stage}},
        )


def cases(num_ranks: int) -> Iterator[Case]:
    shapes = itertools.product(range(4), (1, 4)) if num_ranks > 1 else [(0, 1), (0, 2), (2, 4)]
    for stage, micro in shapes:
        # By documents, which is what a CPU does, and by a mask from positions, which is what a GPU does.
        attention = ("documents", "sdpa")[(stage + micro) % 2]
        yield Case(stage=stage, micro=micro, attention=attention)
    yield Case(stage=3, micro=NUM_ROWS // num_ranks, chunk_tokens=7, activations="all")


def alone(rows: list[int]) -> tuple[float, Gradients, int]:
    """Loss and gradient of the conversations of some rows, one after another, per trained token; and how many."""
    model = build_initial(MODEL, VOCAB_SIZE)
    packed, total, number = packed_rows(GIVEN, ROW_TOKENS), torch.zeros(()), 0
    for tokens, bits in (one for row in rows for one in packed[row]):
        ids = torch.tensor([tokens])
        targets = torch.tensor([t if bit else IGNORED for t, bit in zip(tokens, bits, strict=True)])[1:]
        if not (targets != IGNORED).any():
            continue
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
        loss.backward()
        total, number = total + loss.detach(), number + int((targets != IGNORED).sum())
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad / number for name, p in model.named_parameters()
    }
    return (total / max(1, number)).item(), gradients, number


def engine_of(case: Case, ranks: Ranks) -> Engine:
    """At the initial parameters."""
    engine = Engine(MODEL, case.silo(), INNER, vocab_size=VOCAB_SIZE, ranks=ranks, mask_at=END)
    named = build_initial(MODEL, VOCAB_SIZE).named_parameters()
    engine.write(((name, p.detach()) for name, p in named) if ranks.is_leader else None)
    return engine


def off(engine: Engine, expected: Gradients) -> float:
    """How far an engine's step was from that along a gradient, at most."""
    initial = dict(build_initial(MODEL, VOCAB_SIZE).named_parameters())
    ways = {name: initial[name].detach() - engine.read(name).cpu() for name in initial}
    return max((ways[name] - expected[name]).abs().max().item() for name in initial)


def step_of(case: Case, ranks: Ranks, mixture: Mixture) -> tuple[Engine, float]:
    """An engine after the first step, and that step's loss over all ranks."""
    engine = engine_of(case, ranks)
    engine.check_sight()
    loss, _ = engine.step(micro_batches(case.micro, ranks, mixture), 1.0)
    return engine, ranks.sum([loss / ranks.num_ranks])[0]


def micro_batches(micro: int, ranks: Ranks, mixture: Mixture, *, num_rows: int = NUM_ROWS) -> Iterator[Batch]:
    """This rank's of the first step, of `micro` rows each."""
    num_micro = num_rows // ranks.num_ranks // micro
    batches = Batches(
        mixture,
        micro_batch_sequences=micro,
        accumulation_steps=num_micro,
        rank=ranks.rank,
        num_ranks=ranks.num_ranks,
    )
    return itertools.islice(batches, num_micro)


def private_step(directory: Path, ranks: Ranks, mixture: Mixture, rows: list[int]) -> dict[str, float]:
    """A private step that clips nothing and has next to no noise goes along the mean of the rows' own means."""
    case = Case(micro=2, private=PrivateConfig(epsilon=1.0, clip_norm=1000.0))
    plan = Plan(
        noise_multiplier=1e-12,
        delta=1e-6,
        batch_sequences=NUM_ROWS,
        epoch_sequences=2 * NUM_ROWS,
        most_epochs=1,
    )
    private = Private(case.private, plan, ranks, silo="law", directory=directory / "private", data={})
    engine = engine_of(case, ranks)
    loss, _ = private.step(engine, micro_batches(case.micro, ranks, mixture), 1.0, Progress())
    of_rows = [alone([row]) for row in rows]
    expected = {name: sum(found[name] for _, found, _ in of_rows) / NUM_ROWS for name in engine.shapes}
    return {
        "untrained_rows": sum(number == 0 for *_, number in of_rows),
        "off": off(engine, expected),  # type: ignore[arg-type]
        "loss": ranks.sum([loss / ranks.num_ranks])[0],
    }


def untrained(ranks: Ranks) -> dict[str, float]:
    """A step of which not one token is trained."""
    engine = engine_of(Case(micro=2), ranks)
    inputs, positions = torch.ones((2, 6), dtype=torch.long), torch.arange(6).repeat(2, 1)
    batch = Batch(inputs, torch.full_like(inputs, IGNORED), positions, 0)
    loss, norm = engine.step([batch] * (NUM_ROWS // ranks.num_ranks // 2), 1.0)
    nothing = {name: torch.zeros(shape) for name, shape in engine.shapes.items()}
    return {"loss": loss, "norm": norm, "off": off(engine, nothing)}


def main() -> None:
    """All shapes, one engine after another."""
    directory, ranks = Path(sys.argv[1]), Ranks()
    if ranks.is_leader:
        write_chat(directory / "chat", GIVEN, row_tokens=ROW_TOKENS, vocab_size=VOCAB_SIZE, tokenizer=TOKENIZER)
    ranks.barrier()
    tokens = PackedTokens([directory / "chat"], sequence_tokens=ROW_TOKENS)
    mixture = Mixture([tokens], seed=3, silo="law")
    rows = [mixture.locate(position)[1] for position in range(NUM_ROWS)]
    expected_loss, expected, number = alone(rows)
    found = []
    for case in cases(ranks.num_ranks):
        engine, loss = step_of(case, ranks, mixture)
        shape = {"stage": case.stage, "micro": case.micro, "attention": case.attention}
        found.append({**shape, "off": off(engine, expected), "loss": loss})
    engine = engine_of(Case(stage=3), ranks)
    engine.evaluating(True)
    options = {"num_sequences": 0, "micro_batch_sequences": 3, "ranks": ranks}
    evaluated = held_out_loss(engine.token_losses, {"chat": tokens}, **options)["chat"]  # type: ignore[arg-type]
    result = {
        "cases": found,
        "expected_loss": expected_loss,
        "num_trained": [number, mixture.num_trained(range(NUM_ROWS))],
        "largest": max(gradient.abs().max().item() for gradient in expected.values()),
        "untrained": untrained(ranks),
        "private": private_step(directory, ranks, mixture, rows),
        "evaluated": [evaluated, alone(list(range(tokens.num_sequences)))[0]],
    }
    if ranks.is_leader:
        print(f"RESULT{json.dumps(result)}", flush=True)
    ranks.close()


if __name__ == "__main__":
    main()
