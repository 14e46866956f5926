"""What an inner step costs with differential privacy, in CPU seconds, against one without in the same process.

    python -m benchmarks.private_steps

One thread, fp32, batches of 16 sequences, AdamW; models and sequences of several sizes. CPU seconds, as a machine that
does other things beside them tells little by its clock.
"""

import tempfile
import time
from pathlib import Path

import torch

from pretrain.config.budgets import PrivateConfig
from pretrain.config.keys import InnerConfig, ModelConfig, SiloConfig
from pretrain.silo.account import Plan
from pretrain.silo.batch import Batch
from pretrain.silo.checkpoint import Progress
from pretrain.silo.engine import Engine
from pretrain.silo.model import build_initial
from pretrain.silo.private import Private
from pretrain.silo.ranks import Ranks

NUM_SEQUENCES, NUM_STEPS = 16, 2
SIZES = ((64, 2, 1024, 64), (64, 2, 1024, 256), (128, 4, 2048, 128), (256, 4, 2048, 128), (384, 6, 4096, 256))
"""Width, layers, vocabulary, tokens of a sequence."""


def cpu_seconds(model: ModelConfig, vocab_size: int, sequence_tokens: int, ranks: Ranks, *, private: bool) -> float:
    """Of a step, after one that is not counted."""
    settings = PrivateConfig(epsilon=1.0 if private else None)
    silo = SiloConfig(global_batch_sequences=NUM_SEQUENCES, micro_batch_sequences=NUM_SEQUENCES, private=settings)
    engine = Engine(model, silo, InnerConfig(), vocab_size=vocab_size, ranks=ranks)
    engine.write((name, p.detach()) for name, p in build_initial(model, vocab_size).named_parameters())
    plan = Plan(
        noise_multiplier=1.0,
        delta=1e-6,
        batch_sequences=NUM_SEQUENCES,
        epoch_sequences=(1 + NUM_STEPS) * NUM_SEQUENCES,
        most_epochs=1,
    )
    tokens = torch.randint(0, vocab_size, (NUM_SEQUENCES, sequence_tokens + 1))
    batch, progress, began = [Batch(tokens[:, :-1], tokens[:, 1:])], Progress(), 0.0
    with tempfile.TemporaryDirectory() as directory:
        noised = Private(settings, plan, ranks, silo="own", directory=Path(directory), data={})
        for number in range(1 + NUM_STEPS):
            progress.position = number * NUM_SEQUENCES
            began = time.process_time() if number == 1 else began
            if private:
                noised.step(engine, batch, 1e-3, progress)
            else:
                engine.step(batch, 1e-3)
    return (time.process_time() - began) / NUM_STEPS


def main() -> None:
    """Print a row a size."""
    torch.set_num_threads(1)
    ranks = Ranks()
    print(f"{'parameters':>11} {'tokens':>6} {'plain':>8} {'private':>8} {'ratio':>6}")
    for width, num_layers, vocab_size, sequence_tokens in SIZES:
        model = ModelConfig(
            config={
                "model_type": "llama",
                "hidden_size": width,
                "num_hidden_layers": num_layers,
                "num_attention_heads": 4,
                "intermediate_size": width * 11 // 4,
                "tie_word_embeddings": True,
            }
        )
        plain, private = (
            cpu_seconds(model, vocab_size, sequence_tokens, ranks, private=private) for private in (False, True)
        )
        num_parameters = sum(p.numel() for p in build_initial(model, vocab_size).parameters())
        cells = (
            f"{num_parameters / 1e6:9.2f} M {sequence_tokens:6} {plain:6.3f} s {private:6.3f} s {private / plain:6.2f}"
        )
        print(cells, flush=True)
    ranks.close()


if __name__ == "__main__":
    main()
