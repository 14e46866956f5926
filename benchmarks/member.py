"""What a budget for all that a silo delivers costs: held-out loss of few silos with it, and without.

    python -m benchmarks.member TEXT DIRECTORY [--silos 4 10] [--epsilon 8] [--delta 1e-5] [--clip-norm 1 0.1 0.01]
        [--rounds 6] [--steps 10] [--batch 8] [--tokens 64] [--characters N]

TEXT as in benchmarks.private, dealt out to the silos sequence by sequence. They are in one process, one after another:
each trains the llama of that benchmark with AdamW from the global parameters for `--steps`, what it delivers is
clipped, noised and rounded as in a run (sync/noised.py, outer/fixed_point.py), and the mean is taken (outer SGD, lr 1).
Masks, which are gone in a sum, are left out.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from benchmarks.private import MODEL, packed
from pretrain.config.keys import ModelConfig, RunConfig
from pretrain.config.load import load_config
from pretrain.outer.fixed_point import code, scale
from pretrain.silo.data import PackedTokens
from pretrain.silo.model import build_initial, token_losses
from pretrain.silo.shards import read_manifest
from pretrain.sync.noised import Noised
from pretrain.trust.member import member_budget

RANGE, LR, HELD_OUT = 1e4, 0.01, 512


def config_of(given: argparse.Namespace, num_silos: int, private: dict[str, Any]) -> RunConfig:
    """A contract with which such a run would begin."""
    tiers = dict.fromkeys(("loss", "held_out", "pseudo_gradient_norm", "epochs"), "member")
    tiers |= {"seconds_per_step": "public", "tokens": "public"}
    settings: dict[str, Any] = {
        "model": {"config": MODEL},
        "inner": {"num_steps": given.rounds * given.steps},
        "outer": {
            "sync_interval_steps": given.steps,
            "secure_sum": True,
            "sum_range": RANGE,
            "max_batch_sequences": given.batch,
            "max_share": 1.0,
            "weight_power": 0.0,
            "member_privacy": private,
        },
        "trust": {"metrics": tiers},
        "silos": {f"silo-{number}": {"global_batch_sequences": given.batch} for number in range(num_silos)},
        "silo": {"micro_batch_sequences": given.batch},
    }
    (given.directory / "run.yaml").write_text(yaml.safe_dump(settings))
    return load_config([given.directory / "run.yaml"])


class Federation:
    """Silos in one process, and the global parameters."""

    def __init__(self, given: argparse.Namespace, config: RunConfig, shards: Path) -> None:
        self.given, self.config, self.budget = given, config, member_budget(config)
        self.train = PackedTokens([shards / "train"], sequence_tokens=given.tokens)
        self.valid = PackedTokens([shards / "valid"], sequence_tokens=given.tokens)
        torch.manual_seed(0)
        self.model = build_initial(ModelConfig(config=MODEL), read_manifest(shards / "train", key="text").vocab_size)
        self.parameters = [p for _, p in sorted(self.model.named_parameters())]
        self.optimizers = [torch.optim.AdamW(self.parameters, lr=LR, weight_decay=0.1) for _ in config.silos]
        self.noised = [
            Noised(config, self.budget, given.directory / f"secret-{number}") if self.budget else None
            for number in range(len(config.silos))
        ]

    def round(self, version: int) -> float:
        """All silos, one after another, and the outer step; returns the mean length of what they would deliver."""
        before = [p.detach().clone() for p in self.parameters]
        total, lengths = [np.zeros(p.numel()) for p in before], []
        factor = scale(len(self.optimizers), RANGE)
        for silo, (optimizer, noised) in enumerate(zip(self.optimizers, self.noised, strict=True)):
            for parameter, value in zip(self.parameters, before, strict=True):
                parameter.data.copy_(value)
            for step in range(self.given.steps):
                self._step(silo, optimizer, (version - 1) * self.given.steps + step)
            pairs = [(b, p.detach()) for b, p in zip(before, self.parameters, strict=True)]
            lengths.append(torch.cat([(b - p).flatten() for b, p in pairs]).norm().item())
            sent = noised.pairs(pairs, version, "", len(self.optimizers)) if noised else pairs
            for number, pair in enumerate(sent):
                total[number] += code([pair], factor, RANGE)[0]
        for parameter, value, whole in zip(self.parameters, before, total, strict=True):
            mean = torch.from_numpy(whole / factor / len(self.optimizers)).view(value.shape)
            parameter.data.copy_(value.double() - mean)
        return sum(lengths) / len(lengths)

    def _step(self, silo: int, optimizer: torch.optim.Optimizer, step: int) -> None:
        first = step * self.given.batch
        places = [(first + place) * len(self.optimizers) + silo for place in range(self.given.batch)]
        optimizer.zero_grad()
        self._loss(self.train, [place % self.train.num_sequences for place in places]).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        optimizer.step()

    def _loss(self, text: PackedTokens, places: list[int]) -> Tensor:
        batch = text.batch(places)
        return token_losses(self.model, batch.inputs, batch.targets).mean()

    @torch.no_grad()
    def held_out(self) -> float:
        """Loss of the global parameters."""
        number = min(HELD_OUT, self.valid.num_sequences)
        return self._loss(self.valid, [n * self.valid.num_sequences // number for n in range(number)]).item()


def main() -> None:
    """Train all of them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--silos", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--clip-norm", type=float, nargs="+", default=[1.0, 0.1, 0.01])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--characters", type=int)
    given = parser.parse_args()
    shards = packed(given.text, given.directory, given.characters)
    print(f"{'silos':>5} {'clip_norm':>9} {'noise':>6} {'delivered':>9} {'noise of mean':>13} {'held-out loss':>13}")
    for num_silos in given.silos:
        for clip_norm in [None, *given.clip_norm]:
            private = {"epsilon": given.epsilon, "delta": given.delta, "clip_norm": clip_norm} if clip_norm else {}
            found = Federation(given, config_of(given, num_silos, private), shards)
            first = found.held_out()
            lengths = [found.round(version) for version in range(1, given.rounds + 1)]
            budget, num_values = found.budget, sum(p.numel() for p in found.parameters)
            noise = budget.deviation(num_silos) * (num_values / num_silos) ** 0.5 if budget else 0.0
            multiplier = budget.noise_multiplier if budget else 0.0
            print(
                f"{num_silos:5d} {clip_norm or '-':>9} {multiplier:6.2f} {lengths[0]:9.3f} {noise:13.2f} "
                f"{found.held_out():13.3f}   (before: {first:.3f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
