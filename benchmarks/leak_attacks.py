"""Attacks of benchmarks/leaks.py, each a function of what an attacker has; how good a guess is, in numbers.

Scores are higher for what is more likely a member: of the tokens that a round was trained on, or of a silo's text.
Shapes: V = tokens of the vocabulary, H = hidden size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pretrain.outer.quantize import Parts
from pretrain.silo.model import target_losses, token_losses

Floats = npt.NDArray[np.float64]
RARE = 2  # a token that occurs so often or less in a round's text is rare there
RIDGE = 1.0  # of the logistic regression: it has thousands of rows


# ---- how good a guess is


def auc(members: Floats, others: Floats) -> float:
    """How often a member's score is above another's, ties being half: 0.5 is chance."""
    ordered = np.sort(others)
    below, not_above = (np.searchsorted(ordered, members, side) for side in ("left", "right"))
    return float((below + not_above).sum() / (2 * len(members) * len(others)))


def auc_noise(num_members: int, num_others: int) -> float:
    """How far from 0.5 the AUC of mere chance is in 19 of 20 cases (Mann and Whitney's variance)."""
    return 1.96 * math.sqrt((num_members + num_others + 1) / (12 * num_members * num_others))


def true_positives(members: Floats, others: Floats, *, false_positives: float = 0.01) -> float:
    """Share of members that are above all but so many of the others: what is known for sure (arXiv 2112.03570)."""
    threshold = np.sort(others)[::-1][int(false_positives * len(others))]
    return float((members > threshold).mean())


def advantage(members: Floats, others: Floats) -> float:
    """Largest difference, over all thresholds, between the shares of members and of others above it: 0 is chance."""
    thresholds = np.concatenate([members, others])
    above = [1 - np.searchsorted(np.sort(scores), thresholds, "left") / len(scores) for scores in (members, others)]
    return float(max(0.0, (above[0] - above[1]).max()))


def exposure(loss: float, all_losses: Floats) -> float:
    """log2 of how many codes there are, less log2 of the true one's rank: exact, as the loss of every one is known.

    With 1,000 codes 9.97 bits is a code that is the likeliest of all, 1.44 bits the mean of mere chance (Carlini et
    al. 2019, https://arxiv.org/abs/1802.08232). `all_losses` has the true one's, too; of equal ones it comes last.
    """
    return math.log2(len(all_losses)) - math.log2(int((all_losses <= loss).sum()))


# ---- which tokens a round was trained on


@dataclass(frozen=True, kw_only=True)
class TokensFound:
    """What a guess of a round's tokens comes to, of all tokens of the vocabulary."""

    auc: float
    precision: float
    """Share of the tokens guessed that were there ..."""
    recall: float
    """... and of those that were there that were guessed; ..."""
    rare_recall: float
    """... of those that occurred once or twice."""
    base: float
    """Share of the vocabulary that occurred: the precision of guessing all."""


def row_features(pseudo_gradient: Mapping[str, Tensor], vocab_size: int) -> Floats:
    """What the rows of embedding and output matrix tell of their tokens. # (V, 3 for each of the two)

    The softmax moves all rows along one direction, against the mean hidden state; a token that was there moves off it.
    So: how far a row moved, how far along their common direction, and how far off it.
    """
    columns = []
    for value in pseudo_gradient.values():
        if value.ndim != 2 or value.shape[0] != vocab_size:
            continue
        rows = value.double()
        common = rows.mean(0)
        direction = common / common.norm().clamp_min(1e-300)
        along = rows @ direction
        off = (rows - along[:, None] * direction).norm(dim=1)
        scale = rows.norm(dim=1).mean().clamp_min(1e-300)
        columns += [torch.log(rows.norm(dim=1) / scale + 1e-9), along / scale, torch.log(off / scale + 1e-9)]
    return torch.stack(columns, 1).numpy()


def moment_features(moments: Mapping[str, Parts], vocab_size: int) -> Floats | None:
    """What the rows of second moments tell; None where none travel. # (V, 1 for each of the two)"""
    rows = [parts["rows"].double() for parts in moments.values() if len(parts.get("rows", ())) == vocab_size]
    return torch.stack([torch.log(row + 1e-30) for row in rows], 1).numpy() if rows else None


def find_tokens(known: Floats, known_counts: Floats, wanted: Floats, counts: Floats) -> TokensFound:
    """Guess the tokens of one round by what those of another are like: features (V, F), occurrences (V,).

    A logistic regression learns from the round whose tokens the attacker knows, as its own text is behind it.
    """
    weights = fit_logistic(standard(known), known_counts > 0)
    score, there = with_one(standard(wanted)) @ weights, counts > 0
    guessed, rare = score > 0, there & (counts <= RARE)
    return TokensFound(
        auc=auc(score[there], score[~there]) if 0 < there.sum() < len(there) else math.nan,
        precision=float(there[guessed].mean()) if guessed.any() else math.nan,
        recall=float(guessed[there].mean()),
        rare_recall=float(guessed[rare].mean()) if rare.any() else math.nan,
        base=float(there.mean()),
    )


def standard(features: Floats) -> Floats:
    """Each column with mean 0 and standard deviation 1: two rounds' lengths differ."""
    return (features - features.mean(0)) / np.maximum(features.std(0), 1e-12)


def with_one(features: Floats) -> Floats:
    """A column of ones beside them."""
    return np.column_stack([features, np.ones(len(features))])


def fit_logistic(features: Floats, labels: npt.NDArray[np.bool_]) -> Floats:
    """Weights of a logistic regression, the last for a column of ones: Newton's method."""
    x = with_one(features)
    weights = np.zeros(x.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        slope = x.T @ (p - labels) + RIDGE * weights
        weights -= np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(x.shape[1]), slope)
    return weights


# ---- what a model says of a text


@torch.no_grad()
def mean_losses(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], mask_at: int | None = None) -> Floats:
    """Mean loss of each sequence, in nats per token; `mask_at` as of `token_losses`."""
    return np.concatenate([token_losses(model, *batch, mask_at).double().mean(1).numpy() for batch in batches])


@torch.no_grad()
def ending_losses(model: nn.Module, sentences: Sequence[Sequence[int]], *, batch: int = 250) -> Floats:
    """Summed loss, in nats, of what each of several sentences does not begin with in common, which is read once."""
    begin = [of[0] for of in takewhile(lambda of: len(set(of)) == 1, zip(*sentences, strict=False))]
    assert begin, "they have nothing in common"
    found = []
    for start in range(0, len(sentences), batch):
        endings = [torch.tensor(one[len(begin) :]) for one in sentences[start : start + batch]]
        ends = torch.tensor([len(ending) for ending in endings])
        targets = pad_sequence(endings, batch_first=True)  # what follows an ending is not seen by it
        read = model(input_ids=torch.tensor([begin]), use_cache=True)
        read.past_key_values.batch_repeat_interleave(len(endings))
        further = model(input_ids=targets, past_key_values=read.past_key_values, use_cache=True).logits[:, :-1]
        logits = torch.cat([read.logits[:, -1:].expand(len(endings), -1, -1), further], 1)
        losses = target_losses(logits.flatten(0, 1), targets.flatten()).view_as(targets).double()
        found.append((losses * (torch.arange(targets.shape[1]) < ends[:, None])).sum(1).numpy())
    return np.concatenate(found)
