"""Direct preference optimisation (DPO, arXiv 2305.18290): the loss of pairs, made of the losses of their tokens.

Of a pair the loss is -log sigmoid(beta ((log p - log q)(chosen) - (log p - log q)(rejected))), with p the model, q the
reference model, and log-probabilities summed over the tokens that are trained. Both documents of a pair lie in one row,
one after the other, so that a micro batch has all of it.

Shapes: T = sequence_tokens; a row has up to T // 2 pairs, and values of pairs are (num_sequences, T // 2), 0 where the
row has no more.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.config.allowed import DPO
from pretrain.config.keys import InnerConfig
from pretrain.silo.batch import IGNORED, Batch


class PairValues(NamedTuple):
    """What there is of each pair. # (num_sequences, T // 2), each"""

    losses: Tensor
    """In nats."""
    margins: Tensor
    """How much more the chosen side is rewarded than the rejected: the log-odds against the reference, times beta."""
    right: Tensor
    """1 where it is more."""


def has_pair(positions: Tensor) -> Tensor:
    """Which of a row's places for pairs have one. positions: (num_sequences, T), each token's in its document."""
    num_documents = (positions == 0).sum(dim=1, keepdim=True)
    return torch.arange(positions.shape[1] // 2, device=positions.device) < num_documents // 2


def pair_values(losses: Tensor, positions: Tensor, reference: Tensor, beta: float) -> PairValues:
    """Of each pair, from the losses of all targets, 0 of those that are not trained. All: (num_sequences, T).

    `reference` has each document's log-probability by the reference model at its first token, and else 0. Sums are in
    fp64, so that their order is in no digit that counts.
    """
    document = (positions == 0).cumsum(dim=1) - 1
    ratios = -losses.double() - reference
    sums = torch.zeros_like(ratios).scatter_add(1, document, ratios)
    most = positions.shape[1] // 2
    there = has_pair(positions)
    margins = beta * (sums[:, 0 : 2 * most : 2] - sums[:, 1 : 2 * most : 2]) * there
    return PairValues(-F.logsigmoid(margins) * there, margins.detach(), ((margins > 0) & there).double())


def num_counted(batch: Batch) -> Tensor:
    """What values are means over: which targets have a loss, or which places a pair."""
    if batch.reference is None:
        return batch.targets != IGNORED
    assert batch.positions is not None
    return has_pair(batch.positions)


class Objective:
    """What a step minimises: the mean loss of all targets, or of all pairs."""

    def __init__(self, inner: InnerConfig) -> None:
        self._beta = inner.dpo_beta if inner.loss == DPO else None
        self._since: list[Tensor] = []

    def values(self, losses: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """The loss of every target; or of every place for a pair its loss, its margin, and whether it is right."""
        if self._beta is None or batch.reference is None:
            return (losses,)
        assert batch.positions is not None
        place = losses.device
        return pair_values(losses, batch.positions.to(place), batch.reference.to(place), self._beta)

    def of_step(self, losses: Tensor, batch: Batch) -> tuple[Tensor, int | None]:
        """What is summed up over a step, and how many of it there are in all of it; see Batch."""
        values = self.values(losses, batch)
        if len(values) == 1:
            return losses, batch.num_trained
        loss, margins, right = values
        assert batch.positions is not None
        counts = has_pair(batch.positions).sum().to(loss.device)
        self._since.append(torch.stack([counts, margins.sum(), right.sum()]).detach())
        return loss, batch.num_pairs

    def take(self) -> list[float]:
        """Of this rank since it was last asked: number of pairs, sums of their margins, of right ones; else nothing."""
        if self._beta is None:
            return []
        found = torch.stack(self._since).sum(dim=0).tolist() if self._since else [0.0, 0.0, 0.0]
        self._since.clear()
        return list(map(float, found))
