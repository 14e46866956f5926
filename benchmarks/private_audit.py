"""What one step of a private silo gives away, beside what it promised: the least epsilon that an attacker proves.

    python -m benchmarks.private_audit [--epsilon 8 4 2 1000] [--delta 1e-5] [--sequences 128] [--steps 8]

The attacker has more than anybody in a federation but whoever sees each step of a silo that trains with plain SGD: the
noised mean gradient of one batch, which is an epoch, and the model before it. The batch is of canaries alone, each with
a token of its own (benchmarks/leak_audit.py), half of those that there are, drawn anew for each step. A canary's score
is how far the gradient goes along the canary's own, less what all of them have in common. The steps are those of
pretrain/silo/private.py, each with a secret of its own. 1000 is there to show what the attack finds where it can.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from dp_accounting import get_sigma_gaussian
from torch import Tensor

from benchmarks.leak_attacks import auc, true_positives
from benchmarks.leak_audit import EVERY, Scores, epsilon_bound, most_provable, pooled
from pretrain.config.keys import InnerConfig, ModelConfig, PrivateConfig, SiloConfig
from pretrain.silo.account import Plan
from pretrain.silo.batch import Batch
from pretrain.silo.checkpoint import Progress
from pretrain.silo.engine import Engine
from pretrain.silo.model import build_initial
from pretrain.silo.private import Private
from pretrain.silo.ranks import Ranks

SEQUENCE_TOKENS, WORDS = 32, 512
CLIP_NORM = 0.1  # all gradients are longer, so that each canary does as much as it may
MODEL = ModelConfig(
    config={
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "tie_word_embeddings": True,
    }
)


class Audited:
    """A silo whose steps all begin with the same model."""

    def __init__(self, num: int, *, seed: int = 0) -> None:
        """`num` canaries are in, and as many are out."""
        self.num, vocab_size = num, WORDS + 2 * num
        rng = np.random.default_rng(seed)
        made = rng.integers(WORDS, size=(2 * num, SEQUENCE_TOKENS + 1))
        made[:, ::EVERY] = WORDS + np.arange(2 * num)[:, None]
        self._tokens, self._rng = torch.from_numpy(made), rng
        self._ranks, self._settings = Ranks(), PrivateConfig(epsilon=1.0, clip_norm=CLIP_NORM)
        silo = SiloConfig(global_batch_sequences=num, micro_batch_sequences=num, private=self._settings)
        inner = InnerConfig(optimizer="sgd", betas=[0.0, 0.0], weight_decay=0.0, clip_norm=1e9)
        self._engine = Engine(MODEL, silo, inner, vocab_size=vocab_size, ranks=self._ranks)
        self._initial = {
            name: value.detach().clone() for name, value in build_initial(MODEL, vocab_size).named_parameters()
        }
        self._engine.write(iter(self._initial.items()))
        self._directions = self._own_directions()

    def _own_directions(self) -> Tensor:
        """Unit gradients of all canaries, less their mean. # (2 num, values)"""
        found = []
        for _, gradients in self._engine.sequence_gradients(Batch(self._tokens[:, :-1], self._tokens[:, 1:])):
            flat = torch.cat([gradient.flatten() for gradient in gradients]).float()
            found.append(flat / flat.norm())
        units = torch.stack(found)
        own = units - units.mean(0)
        return own / own.norm(dim=1, keepdim=True)

    def scores(self, noise_multiplier: float, steps: int) -> Scores:
        """Of so many steps, each from the same model, with other canaries in it and a secret of its own."""
        return pooled(self._step(noise_multiplier) for _ in range(steps))

    def _step(self, noise_multiplier: float) -> Scores:
        order = self._rng.permutation(2 * self.num)
        inside, outside = order[: self.num], order[self.num :]
        some = self._tokens[torch.from_numpy(np.sort(inside))]
        plan = Plan(
            noise_multiplier=noise_multiplier,
            delta=1e-5,
            batch_sequences=self.num,
            epoch_sequences=self.num,
            most_epochs=1,
        )
        self._engine.write(iter(self._initial.items()))
        with tempfile.TemporaryDirectory() as directory:
            private = Private(self._settings, plan, self._ranks, silo="own", directory=Path(directory), data={})
            private.step(self._engine, [Batch(some[:, :-1], some[:, 1:])], 1.0, Progress())
        after = dict(self._engine.module.named_parameters())
        moved = torch.cat([(value - after[name].detach()).flatten() for name, value in self._initial.items()])
        along = (self._directions @ moved).double().numpy()
        return Scores(inside=along[inside], outside=along[outside])


def main() -> None:
    """A row for each budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0, 4.0, 2.0, 1000.0])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--sequences", type=int, default=128, help="in each step")
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    audited = Audited(given.sequences)
    num = given.sequences * given.steps
    print(f"{num:,} in, {num:,} out; all told apart would show epsilon {most_provable(num, given.delta):.2f}")
    print("| promised epsilon | noise_multiplier | AUC | found at 1 % false | epsilon is at least |")
    print(f"|{'---|' * 5}")
    for epsilon in given.epsilon:
        noise = float(get_sigma_gaussian(epsilon, given.delta))
        found = audited.scores(noise, given.steps)
        rates = f"{auc(found.inside, found.outside):.3f} | {true_positives(found.inside, found.outside):.1%}"
        print(f"| {epsilon:g} | {noise:.3f} | {rates} | {epsilon_bound(found, given.delta):.2f} |", flush=True)


if __name__ == "__main__":
    main()
