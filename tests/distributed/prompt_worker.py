"""Run by torchrun: a prompt at ZeRO stages beside vectors put in front by hand; prints a JSON object per case.

prompt_worker.py DIRECTORY CASES     CASES: 0-fp32,3-bf16, ...
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from pretrain.config.adapter import AdapterConfig
from pretrain.config.keys import ModelConfig, SiloConfig
from pretrain.silo.batch import IGNORED, Batch
from pretrain.silo.checkpoint import Checkpoints
from pretrain.silo.data import Batches, Mixture, PackedTokens
from pretrain.silo.engine import Engine
from pretrain.silo.model import build_initial
from pretrain.silo.ranks import Ranks
from tests.chats import END, Conversation, conversations, packed_rows, write_chat
from tests.distributed.adapter_worker import INNER, by_deepspeed, print_each, silo_of, synced_and_resumed
from tests.distributed.engine_worker import BATCHES, MODEL, VOCAB_SIZE, read_all
from tests.distributed.private_worker import INNER as SGD

NUM_TOKENS, NAME = 5, "model.embed_tokens.prompt.weight"
ROW_TOKENS, NUM_ROWS = 30, 8
PROMPT = torch.arange(-1, -NUM_TOKENS - 1, -1)
INITIAL = {NAME: torch.randn(NUM_TOKENS, 33, generator=torch.Generator().manual_seed(5)) * 0.05}
GIVEN = conversations(40, vocab_size=VOCAB_SIZE, shortest=2, longest=20)


class InFront(torch.nn.Module):
    """A plain model behind a matrix of vectors."""

    def __init__(self, base: Path, dtype: torch.dtype) -> None:
        super().__init__()
        self.plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).requires_grad_(False)
        self.rows = torch.nn.Embedding(NUM_TOKENS, 33, dtype=dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of all positions, those of the vectors, too."""
        places = torch.arange(NUM_TOKENS).expand(len(ids), -1)
        embedded = torch.cat([self.rows(places), self.plain.get_input_embeddings()(ids)], 1)
        logits: torch.Tensor = self.plain(inputs_embeds=embedded, use_cache=False).logits
        return logits


def after_prompt(one: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of sequences of text with the prompt before each."""
    ignored = torch.full((len(one), NUM_TOKENS), IGNORED)
    return torch.cat([PROMPT.expand(len(one), -1), one[:, :-1]], 1), torch.cat([ignored, one[:, 1:]], 1)


def steps(engine: Engine, ranks: Ranks, numbers: range) -> list[float]:
    """Inner steps on this rank's part of the batches, in two micro batches."""
    losses = []
    for number in numbers:
        batch = BATCHES[number]
        parts = batch.chunk(ranks.num_ranks)[ranks.rank].chunk(2)
        num_trained = batch[:, 1:].numel()
        loss, _ = engine.step([Batch(*after_prompt(one), None, num_trained) for one in parts], INNER.lr)
        losses.append(ranks.sum([loss / ranks.num_ranks])[0])
    return losses


def check_training(model: ModelConfig, stage: int, precision: str, ranks: Ranks, directory: Path) -> dict[str, Any]:
    """Steps of AdamW on text, a sync and a resume in the middle of them, beside DeepSpeed alone."""
    assert model.checkpoint
    silo, dtype = silo_of(stage, precision, ranks)
    initial = {name: value.to(dtype).float() for name, value in INITIAL.items()}
    by_hand, num_parts = InFront(Path(model.checkpoint), dtype), 2 * ranks.num_ranks

    def loss_of(engine: Any, one: torch.Tensor) -> torch.Tensor:
        targets = after_prompt(one)[1].flatten()
        losses = F.cross_entropy(engine(one[:, :-1]).float().flatten(0, 1), targets, reduction="none")
        return losses.sum() * (num_parts / BATCHES[0][:, 1:].numel())

    trained, terms = {NAME: by_hand.rows.weight}, {"stage": stage, "dtype": dtype, "ranks": ranks}
    expected_losses, expected = by_deepspeed(by_hand, trained, loss_of, **terms, initial=initial)  # type: ignore[arg-type]

    def build() -> Engine:
        return Engine(model, silo, INNER, vocab_size=VOCAB_SIZE, ranks=ranks)

    engine = build()
    engine.write(iter(initial.items()) if ranks.is_leader else None)
    engine.check_sight()
    checkpoints = Checkpoints(directory / f"{stage}-{precision}", keep=1, contract_sha256="c")
    losses, resumed, again = synced_and_resumed(engine, build, steps, ranks, checkpoints)
    found = read_all(engine)
    rounded = {name: value.to(dtype).float() if stage == 0 else value for name, value in found.items()}
    newest = checkpoints.newest
    assert newest
    return {
        "stage": stage,
        "losses": losses,
        "expected_losses": expected_losses,
        "names": sorted(found),
        "same_prompt": torch.equal(rounded[NAME], expected[NAME].cpu()),
        "way": (found[NAME] - initial[NAME]).abs().max().item(),
        "resumed": again == losses[3:] and torch.equal(read_all(resumed)[NAME], found[NAME]),
        "checkpoint_bytes": sum(file.stat().st_size for file in newest.rglob("*.safetensors")),
    }


def alone(base: Path, given: list[Conversation]) -> tuple[float, torch.Tensor, int]:
    """Loss and gradient of conversations, one after another, each behind the prompt, per trained token; how many."""
    by_hand, total, number = InFront(base, torch.float32), torch.zeros(()), 0
    by_hand.rows.weight.data.copy_(INITIAL[NAME])
    for tokens, bits in given:
        targets = torch.tensor([t if bit else IGNORED for t, bit in zip(tokens, bits, strict=True)])[1:]
        if not (targets != IGNORED).any():
            continue
        logits = by_hand(torch.tensor([tokens]))[0, NUM_TOKENS:-1]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        loss.backward()
        total, number = total + loss.detach(), number + int((targets != IGNORED).sum())
    gradient = by_hand.rows.weight.grad
    assert gradient is not None
    return (total / number).item(), gradient / number, number


def check_packed(
    model: ModelConfig, stage: int, ranks: Ranks, mixture: Mixture, expected: torch.Tensor
) -> dict[str, Any]:
    """A step on packed conversations, by documents or by a mask: how far it is from that along the mean gradient."""
    num_micro, micro = (2, NUM_ROWS // ranks.num_ranks // 2) if stage % 2 else (NUM_ROWS // ranks.num_ranks, 1)
    silo = SiloConfig(
        global_batch_sequences=NUM_ROWS,
        micro_batch_sequences=micro,
        attention="documents" if stage in (0, 3) else "sdpa",
        loss_chunk_tokens=7 if stage == 3 else 0,
        deepspeed={"zero_optimization": {"stage": stage}},
    )
    engine = Engine(model, silo, SGD, vocab_size=VOCAB_SIZE, ranks=ranks, mask_at=END)
    engine.write(iter(INITIAL.items()) if ranks.is_leader else None)
    engine.check_sight()
    options = {"micro_batch_sequences": micro, "accumulation_steps": num_micro}
    batches = Batches(mixture, **options, rank=ranks.rank, num_ranks=ranks.num_ranks)
    of_step = list(itertools.islice(batches, num_micro))
    one_by_one = expected if stage == 3 else by_sequence(engine, ranks, of_step)  # which private steps are made of
    loss, _ = engine.step(of_step, 1.0)
    off = (INITIAL[NAME] - engine.read(NAME).cpu() - expected).abs().max().item()
    sequences_off = (one_by_one - expected).abs().max().item()
    return {
        "packed_off": off,
        "sequences_off": sequences_off,
        "packed_loss": ranks.sum([loss / ranks.num_ranks])[0],
    }


def by_sequence(engine: Engine, ranks: Ranks, batches: list[Batch]) -> torch.Tensor:
    """The same gradient, from those of the means of one sequence after another."""
    total = torch.zeros(NUM_TOKENS, 33)
    for batch in batches:
        numbers = [number for number in (batch.targets != IGNORED).sum(1).tolist() if number]
        for number, (_, (gradient,)) in zip(numbers, engine.sequence_gradients(batch), strict=True):
            total += gradient * (number / batch.num_trained)
    return torch.tensor(ranks.sum(total.flatten().tolist())).view_as(total)


def main() -> None:
    """Stages and precisions of the command line; conversations in fp32."""
    ranks, directory = Ranks(), Path(sys.argv[1])
    base = directory / "base"
    if ranks.is_leader:
        build_initial(MODEL, VOCAB_SIZE).save_pretrained(base)  # type: ignore[operator]
        options = {"row_tokens": ROW_TOKENS, "vocab_size": VOCAB_SIZE, "tokenizer": "a1" * 32}
        write_chat(directory / "chat", GIVEN, prompt_tokens=NUM_TOKENS, **options)  # type: ignore[arg-type]
    ranks.barrier()
    model = ModelConfig(checkpoint=str(base), adapter=AdapterConfig(kind="prompt", tokens=NUM_TOKENS, text="a"))
    packed = PackedTokens([directory / "chat"], sequence_tokens=ROW_TOKENS, prompt_tokens=NUM_TOKENS)
    mixture = Mixture([packed], seed=3, silo="law")
    longer = [([END] * NUM_TOKENS + tokens, [0] * NUM_TOKENS + bits) for tokens, bits in GIVEN]
    rows = packed_rows(longer, ROW_TOKENS)
    chosen = [one for position in range(NUM_ROWS) for one in rows[mixture.locate(position)[1]]]
    expected_loss, gradient, number = alone(base, [(t[NUM_TOKENS:], b[NUM_TOKENS:]) for t, b in chosen])

    def check(stage: int, precision: str) -> dict[str, Any]:
        row = check_training(model, stage, precision, ranks, directory)
        if precision == "fp32":
            row |= check_packed(model, stage, ranks, mixture, gradient)
            row |= {"expected_loss": expected_loss, "largest": gradient.abs().max().item()}
            row |= {"num_trained": [number, mixture.num_trained(range(NUM_ROWS))]}
        return row

    print_each(ranks, check)


if __name__ == "__main__":
    main()
