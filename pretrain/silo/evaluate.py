"""Loss on held-out text, in nats per token."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.config.errors import ConfigError
from pretrain.silo.batch import IGNORED, Batch
from pretrain.silo.data import PackedTokens, held_out_batches, num_held_out

if TYPE_CHECKING:  # evaluating an exported model needs no DeepSpeed
    from pretrain.silo.ranks import Ranks


@torch.no_grad()
def summed_loss(
    token_losses: Callable[[Batch], Tensor],
    batches: Iterable[tuple[Batch, Tensor]],
    tell: Callable[[int], None] = lambda num_done: None,
) -> tuple[float, float]:
    """Sum of the losses of all targets and their number, over batches and the weights of their sequences.

    `token_losses` gives the loss of every target, 0 of IGNORED ones, which do not count; weights: (num_sequences,).
    `tell` is called after each batch, with how many sequences are done.
    """
    total, num_tokens, num_done = 0.0, 0.0, 0
    for batch, weights in batches:
        losses = token_losses(batch).double().cpu()
        total += (losses * weights[:, None]).sum().item()
        num_tokens += ((batch.targets != IGNORED).sum(1) * weights).sum().item()
        num_done += int(weights.sum().item())
        tell(num_done)
    return total, num_tokens


def held_out_loss(
    token_losses: Callable[[Batch], Tensor],
    corpora: dict[str, PackedTokens],
    *,
    num_sequences: int,
    micro_batch_sequences: int,
    ranks: "Ranks | None" = None,
    tell: Callable[[str, int], None] = lambda corpus, num_done: None,
) -> dict[str, float]:
    """Corpus name to mean loss per trained token of `num_sequences` (0: all) spread over it, shared out over the ranks.

    `tell` is called after each batch of this rank, with the corpus and how many of its sequences are done. Raises
    ConfigError, on all ranks alike, where not one token of them is trained.
    """
    rank, num_ranks = (ranks.rank, ranks.num_ranks) if ranks else (0, 1)
    result = {}
    for corpus, tokens in corpora.items():
        batches = held_out_batches(
            tokens,
            num_sequences=num_sequences,
            micro_batch_sequences=micro_batch_sequences,
            rank=rank,
            num_ranks=num_ranks,
        )
        total, num_tokens = summed_loss(token_losses, batches, partial(tell, corpus))
        if ranks:
            total, num_tokens = ranks.sum([total, num_tokens])
        if not num_tokens:
            raise ConfigError(
                f"{tokens.key}: of the sequences that are evaluated not one token is trained; allowed: more of them "
                "(silo.eval_sequences), or all (0)"
            )
        result[corpus] = total / num_tokens
    return result


def sequences_evaluated(corpora: dict[str, PackedTokens], num_sequences: int) -> dict[str, list[int]]:
    """Corpus name to how many of its sequences an evaluation takes, and of how many."""
    return {name: [num_held_out(tokens, num_sequences), tokens.num_sequences] for name, tokens in corpora.items()}


def losses_in_words(losses: dict[str, float], sequences: dict[str, list[int]]) -> str:
    """For a silo's log: each corpus, its loss, and of how many of its sequences that is."""
    return "  ".join(f"{c} {loss:.4f} ({sequences[c][0]} of {sequences[c][1]})" for c, loss in losses.items())
