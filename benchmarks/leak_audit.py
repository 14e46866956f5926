"""Canaries that are made to be remembered, and the least epsilon that finding them proves: for benchmarks/leaks.py.

After "Privacy auditing of large language models" (Panda et al. 2025, https://arxiv.org/abs/2503.06808). Taken from it:
a canary says a token that is next to never in the silo's text, so that nothing else teaches a model to expect it;
whether a canary is in or stays out is chance; nobody needs shadow models or gradients of his own making. Not taken:
tokens that are new to the tokenizer, and a loss of the secret alone. Here a canary is one packed sequence, the unit of
a silo's budget, and says its token again and again, as the loss is that of all its tokens.

The bound is that of Jagielski et al. 2020 (https://arxiv.org/abs/2006.07709), by Clopper and Pearson's intervals; as
there are many canaries in one run instead of one in many runs, it takes them as independent of each other.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import beta
from torch import nn

from benchmarks.leak_attacks import Floats
from pretrain.silo.data import PackedTokens
from pretrain.silo.model import token_losses
from pretrain.silo.shards import MANIFEST_FILE
from pretrain.silo.writer import SplitWriter

Ids = npt.NDArray[np.int64]
EVERY = 2  # of a canary's tokens are its own one
CONFIDENCE = 0.95
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Designed:
    """A silo's canaries, and as many that might as well have been: each a packed sequence."""

    inside: Ids  # (num, sequence_tokens)
    outside: Ids  # (num, sequence_tokens)


def design(text: PackedTokens, passages: PackedTokens, num: int, *, seed: int) -> Designed:
    """Of the tokens that the text says least often each makes one canary, on a passage of somebody else's text."""
    rng, manifest = np.random.default_rng(seed), text.manifests[0]
    counts = np.bincount(_tokens(text), minlength=manifest.vocab_size)
    counts[manifest.end_of_text_id] = counts.max() + 1
    own = rng.permutation(np.argsort(counts, kind="stable")[: 2 * num])
    assert len(own) == 2 * num, "the vocabulary has not so many tokens"
    made = np.stack([passages.sequence(int(rng.integers(passages.num_sequences)))[:-1] for _ in own])
    made[:, ::EVERY] = own[:, None]
    made[:, -1] = manifest.end_of_text_id
    return Designed(inside=made[:num], outside=made[num:])


def _tokens(text: PackedTokens) -> Ids:
    return np.concatenate([text.sequence(index)[:-1] for index in range(text.num_sequences)])


def plant(canaries: Ids, like: PackedTokens, directory: Path) -> None:
    """A packed split of them alone, unless it is there: before a silo's text each is just one of its sequences."""
    if (directory / MANIFEST_FILE).is_file():
        return
    manifest = like.manifests[0]
    writer = SplitWriter(
        directory,
        vocab_size=manifest.vocab_size,
        end_of_text_id=manifest.end_of_text_id,
        shard_tokens=canaries.size,
    )
    writer.write(canaries.flatten(), np.full(len(canaries), canaries.shape[1]), num_bytes=canaries.size)
    writer.finish(tokenizer_sha256=manifest.tokenizer_sha256, recipe_sha256=manifest.recipe_sha256)


@torch.no_grad()
def losses(model: nn.Module, canaries: Ids) -> Floats:
    """Mean loss of each canary's own token where it is the target, in nats. # (num,)"""
    found = []
    for start in range(0, len(canaries), BATCH):
        tokens = torch.from_numpy(canaries[start : start + BATCH])
        of_targets = token_losses(model, tokens[:, :-1], tokens[:, 1:])  # target i is token i + 1
        found.append(of_targets[:, EVERY - 1 :: EVERY].double().mean(1).numpy())
    return np.concatenate(found)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """An attacker's of canaries that are in, and of others: in standard deviations of the latter."""

    inside: Floats
    outside: Floats


def scores(canaries: Designed, models: Sequence[tuple[nn.Module, nn.Module]]) -> Scores:
    """By how much the loss of each is less in the second of two models than in the first, in all pairs together."""
    inside, outside = (
        np.sum([losses(before, some) - losses(after, some) for before, after in models], axis=0)
        for some in (canaries.inside, canaries.outside)
    )
    centre, scale = outside.mean(), max(float(outside.std()), 1e-12)
    return Scores(inside=(inside - centre) / scale, outside=(outside - centre) / scale)


def pooled(several: Iterable[Scores]) -> Scores:
    """Those of several silos or runs as one."""
    every = list(several)
    return Scores(
        inside=np.concatenate([one.inside for one in every]), outside=np.concatenate([one.outside for one in every])
    )


# ---- what a guess proves


def epsilon_bound(found: Scores, delta: float) -> float:
    """The least epsilon of (epsilon, delta) privacy that the guesses of one attacker leave possible; at least 0.

    The threshold is the best one on every other canary; what counts is what it does on the rest, so that it was not
    chosen for what it is measured by. Right in `CONFIDENCE` of cases.
    """
    some = found.inside[::2], found.outside[::2]
    chosen = max(np.unique(some[1]), key=lambda threshold: _bound(*some, threshold, delta))
    return max(0.0, _bound(found.inside[1::2], found.outside[1::2], chosen, delta))


def _bound(inside: Floats, outside: Floats, threshold: float, delta: float) -> float:
    true = at_least(int((inside > threshold).sum()), len(inside))
    false = 1 - at_least(int((outside <= threshold).sum()), len(outside))
    return math.log((true - delta) / false) if true > delta else -math.inf


def at_least(successes: int, trials: int) -> float:
    """Clopper and Pearson's lower bound of a share; two of these hold together in `CONFIDENCE` of cases."""
    return float(beta.ppf((1 - CONFIDENCE) / 2, successes, trials - successes + 1)) if successes else 0.0


def most_provable(num: int, delta: float) -> float:
    """The bound where each of so many canaries is told from each of as many others."""
    return epsilon_bound(Scores(inside=np.ones(num), outside=np.zeros(num)), delta)
