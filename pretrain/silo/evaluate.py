"""Loss on held-out text, in nats per token."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.config.errors import ConfigError
from pretrain.silo.batch import Batch
from pretrain.silo.data import PackedTokens, held_out_batches, num_held_out
from pretrain.silo.preference import num_counted

OF_PAIRS = ((1, "val_margin"), (2, "val_right"))  # where they are among the values of pairs

if TYPE_CHECKING:  # evaluating an exported model needs no DeepSpeed
    from pretrain.silo.ranks import Ranks


@torch.no_grad()
def summed(
    values_of: Callable[[Batch], tuple[Tensor, ...]],
    batches: Iterable[tuple[Batch, Tensor]],
    tell: Callable[[int], None] = lambda num_done: None,
) -> list[float]:
    """The sum of each value over all targets, and last the number of these, over batches and their sequences' weights.

    `values_of` gives one or more values of every target, as its loss, each 0 of IGNORED ones, which do not count, or of
    every place for a preference pair; weights: (num_sequences,). `tell` is called after each batch, with how many
    sequences are done.
    """
    totals, num_done = list[float](), 0
    for batch, weights in batches:
        values = [*values_of(batch), num_counted(batch)]
        found = [(value.double().cpu() * weights[:, None]).sum().item() for value in values]
        totals = [before + one for before, one in zip(totals or [0.0] * len(found), found, strict=True)]
        num_done += int(weights.sum().item())
        tell(num_done)
    return totals


def held_out_loss(
    token_losses: Callable[[Batch], Tensor], corpora: dict[str, PackedTokens], **options: Any
) -> dict[str, float]:
    """Corpus name to mean loss per trained token; `options` are those of `held_out_sums`, which raises what this does.

    `token_losses` gives the loss of every target.
    """
    sums = held_out_sums(lambda batch: (token_losses(batch),), corpora, **options)
    return {corpus: total / num_tokens for corpus, (total, num_tokens) in sums.items()}


def held_out_means(
    values_of: Callable[[Batch], tuple[Tensor, ...]], corpora: dict[str, PackedTokens], **options: Any
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Corpus name to mean loss; and of preference pairs what a record has of them besides, by corpus, too."""
    sums = held_out_sums(values_of, corpora, **options)
    means = {corpus: [total / found[-1] for total in found[:-1]] for corpus, found in sums.items()}
    losses = {corpus: found[0] for corpus, found in means.items()}
    pairs = {corpus: found for corpus, found in means.items() if len(found) > 1}
    if not pairs:
        return losses, {}
    return losses, {name: {corpus: found[place] for corpus, found in pairs.items()} for place, name in OF_PAIRS}


def held_out_sums(
    values_of: Callable[[Batch], tuple[Tensor, ...]],
    corpora: dict[str, PackedTokens],
    *,
    num_sequences: int,
    micro_batch_sequences: int,
    ranks: "Ranks | None" = None,
    tell: Callable[[str, int], None] = lambda corpus, num_done: None,
) -> dict[str, list[float]]:
    """Corpus name to what `summed` gives of `num_sequences` (0: all) spread over it, shared out over the ranks.

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
        sums = summed(values_of, batches, partial(tell, corpus))
        if ranks:
            sums = ranks.sum(sums)
        if not sums[-1]:
            raise ConfigError(
                f"{tokens.key}: of the sequences that are evaluated not one token is trained; allowed: more of them "
                "(silo.eval_sequences), or all (0)"
            )
        result[corpus] = sums
    return result


def sequences_evaluated(corpora: dict[str, PackedTokens], num_sequences: int) -> dict[str, list[int]]:
    """Corpus name to how many of its sequences an evaluation takes, and of how many."""
    return {name: [num_held_out(tokens, num_sequences), tokens.num_sequences] for name, tokens in corpora.items()}


def losses_in_words(
    losses: dict[str, float], sequences: dict[str, list[int]], of_pairs: dict[str, dict[str, float]] | None = None
) -> str:
    """For a silo's log: each corpus, its loss, of how many of its sequences, and what else there is of pairs."""
    pairs = {
        c: f", margin {of_pairs['val_margin'][c]:.3f}, {of_pairs['val_right'][c]:.0%} right"
        for c in (of_pairs or {}).get("val_right", {})
        if of_pairs
    }
    return "  ".join(
        f"{c} {loss:.4f}{pairs.get(c, '')} ({sequences[c][0]} of {sequences[c][1]})" for c, loss in losses.items()
    )
