"""Run by torchrun: one step on packed preference pairs in many shapes; the leader prints how far each gradient is off.

The gradient is what SGD with a learning rate of 1 takes away. What it should be is what trl's DPOTrainer makes of all
pairs of the step in one batch, with a reference model that is another than the one which is trained.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from data_tools.reference import log_probabilities
from pretrain.config.keys import ModelConfig, SiloConfig
from pretrain.silo.data import Mixture, PackedTokens
from pretrain.silo.engine import Engine
from pretrain.silo.evaluate import held_out_means
from pretrain.silo.model import build_initial
from pretrain.silo.ranks import Ranks
from pretrain.silo.reference import write_reference
from pretrain.silo.shards import open_documents
from tests.chats import END
from tests.distributed.chat_worker import micro_batches
from tests.distributed.private_worker import INNER, MODEL, VOCAB_SIZE
from tests.pairs import Pair, made_pairs, write_pairs

ROW_TOKENS, NUM_ROWS, BETA = 40, 8, 0.3
OTHER = replace(MODEL, seed=5)  # the reference
PREFERRED = replace(INNER, loss="dpo", dpo_beta=BETA)
GIVEN = made_pairs(40, vocab_size=VOCAB_SIZE)
Gradients = dict[str, torch.Tensor]


def shapes(num_ranks: int) -> Iterator[SiloConfig]:
    """Of a step, on so many ranks."""
    plain = [(0, 1), (1, 4), (2, 2), (3, 1)] if num_ranks > 1 else [(0, 1), (0, 4), (2, 2), (3, 4)]
    for stage, micro in plain:
        attention = ("documents", "sdpa")[(stage + micro) % 2]
        yield SiloConfig(
            global_batch_sequences=NUM_ROWS,
            micro_batch_sequences=micro,
            attention=attention,
            deepspeed={"zero_optimization": {"stage": stage}},
        )
    yield SiloConfig(
        global_batch_sequences=NUM_ROWS,
        micro_batch_sequences=NUM_ROWS // num_ranks,
        loss_chunk_tokens=7,
        activation_checkpointing="all",
        deepspeed={"zero_optimization": {"stage": 3}},
    )


def pairs_of(tokens: PackedTokens, row: int) -> list[Pair]:
    """The pairs that lie in a row, found again by where their documents end."""
    directory = Path(tokens.key)
    ends = open_documents(directory, tokens.manifests[0])[tokens.documents_of(row)].astype(int) - row * ROW_TOKENS
    documents = [part.tolist() for part in torch.tensor(tokens.sequence(row)).tensor_split(ends.tolist())][: len(ends)]
    known = {(*prompt, *chosen, *prompt, *rejected): (prompt, chosen, rejected) for prompt, chosen, rejected in GIVEN}
    return [known[tuple(first + second)] for first, second in zip(documents[::2], documents[1::2], strict=False)]


def theirs(given: list[Pair], scratch: Path) -> tuple[float, Gradients, dict[str, float]]:
    """Loss, gradient and metrics of trl's trainer of some pairs in one batch."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = {f"w{number}": number for number in range(VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), eos_token="w0", pad_token="w0"
    )
    trainer = DPOTrainer(
        model=build_initial(MODEL, VOCAB_SIZE),
        ref_model=build_initial(OTHER, VOCAB_SIZE),
        args=DPOConfig(output_dir=str(scratch), beta=BETA, use_cpu=True, report_to=[], max_length=None, bf16=False),
        train_dataset=Dataset.from_list([{"prompt": "w1", "chosen": "w2", "rejected": "w3"}]),
        processing_class=tokenizer,
    )
    examples = [{"prompt_ids": one[0], "chosen_ids": one[1], "rejected_ids": one[2]} for one in given]
    model: Any = trainer.model
    loss = trainer._compute_loss(model, trainer.data_collator(examples), False)
    loss.backward()
    metrics = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items() if values}
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}, metrics


def engine_of(silo: SiloConfig, ranks: Ranks, model: ModelConfig = MODEL) -> Engine:
    """At the initial parameters."""
    engine = Engine(model, silo, PREFERRED, vocab_size=VOCAB_SIZE, ranks=ranks, mask_at=END)
    named = build_initial(MODEL, VOCAB_SIZE).named_parameters()
    engine.write(((name, p.detach()) for name, p in named) if ranks.is_leader else None)
    engine.check_sight()
    return engine


def step_of(silo: SiloConfig, ranks: Ranks, mixture: Mixture) -> tuple[Gradients, float, list[float]]:
    """What the first step took away, its loss over all ranks, and the sums that it told of its pairs."""
    engine = engine_of(silo, ranks)
    batches = micro_batches(silo.micro_batch_sequences, ranks, mixture, num_rows=NUM_ROWS)
    loss, _ = engine.step(batches, 1.0)
    loss, *told = ranks.sum([loss / ranks.num_ranks, *engine.objective.take()])
    initial = dict(build_initial(MODEL, VOCAB_SIZE).named_parameters())
    return {name: initial[name].detach() - engine.read(name).cpu() for name in initial}, loss, told


def opened(directory: Path) -> tuple[PackedTokens, Mixture]:
    """The packed pairs, and the order in which a silo reads them."""
    tokens = PackedTokens(
        [directory / "pairs"], sequence_tokens=ROW_TOKENS, of_pairs=True, key=str(directory / "pairs")
    )
    return tokens, Mixture([tokens], seed=3, silo="law")


def write_expected(directory: Path) -> None:
    """Pack the pairs, and write what trl makes of those of the first step, and of all; in one process alone."""
    split = directory / "pairs"
    manifest = write_pairs(split, GIVEN, row_tokens=ROW_TOKENS, vocab_size=VOCAB_SIZE, tokenizer="a1" * 32)
    values = log_probabilities(build_initial(OTHER, VOCAB_SIZE).eval(), split, manifest, 3)  # type: ignore[arg-type]
    write_reference(split, manifest, values, {}, "fp32")
    tokens, mixture = opened(directory)
    rows = [mixture.locate(position)[1] for position in range(NUM_ROWS)]
    given = [pair for row in rows for pair in pairs_of(tokens, row)]
    loss, gradients, metrics = theirs(given, directory / "trl")
    every = [pair for row in range(tokens.num_sequences) for pair in pairs_of(tokens, row)]
    whole, _, of_all = theirs(every, directory / "trl")
    save_file(gradients, directory / "gradients.safetensors")
    assert manifest.chat
    told = {
        "loss": loss,
        "metrics": metrics,
        "num_pairs": [len(given), mixture.num_pairs(range(NUM_ROWS)), manifest.chat.num_pairs],
        "by_row": [tokens.num_pairs(row) for row in rows],
        "largest": max(gradient.abs().max().item() for gradient in gradients.values()),
        "evaluated": [whole, of_all["rewards/margins"], of_all["rewards/accuracies"]],
    }
    (directory / "expected.json").write_text(json.dumps(told))


def main() -> None:
    """All shapes, one engine after another."""
    directory, ranks = Path(sys.argv[1]), Ranks()
    tokens, mixture = opened(directory)
    expected, found = load_file(directory / "gradients.safetensors"), []
    for silo in shapes(ranks.num_ranks):
        ways, loss, told = step_of(silo, ranks, mixture)
        off = max((ways[name] - expected[name]).abs().max().item() for name in ways)
        found.append({"stage": silo.zero_stage, "off": off, "loss": loss, "told": told})
    zero = {"zero_optimization": {"stage": 3}}
    engine = engine_of(SiloConfig(micro_batch_sequences=1, deepspeed=zero), ranks)
    engine.evaluating(True)
    options: dict[str, Any] = {"num_sequences": 0, "micro_batch_sequences": 3, "ranks": ranks}
    losses, of_pairs = held_out_means(engine.values, {"pairs": tokens}, **options)
    result = {"cases": found, "evaluated": [losses["pairs"], *(one["pairs"] for one in of_pairs.values())]}
    if ranks.is_leader:
        print(f"RESULT{json.dumps(result)}", flush=True)
    ranks.close()


if __name__ == "__main__":
    main()
