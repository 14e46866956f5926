"""Attention in which each document of a packed sequence is computed by itself, from the documents' lengths.

A mask that keeps documents apart makes every token look at a whole sequence, most of which then counts nothing. Without
one, a document of 200 tokens in a sequence of 2,000 takes a hundredth of the products.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface

DOCUMENTS = "documents"  # how `transformers` knows it
# What a model may hand over that means nothing here; all else would be passed over.
WITHOUT_EFFECT = {
    *("position_ids", "position_embeddings", "cache_position", "past_key_values", "use_cache", "is_causal"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"),
}


class NotByDocumentsError(ValueError):
    """A model asks attention for more than this one does."""


class Documents:
    """Lengths of the documents of each sequence, as an object: what is compiled does not look into it."""

    def __init__(self, lengths: list[list[int]]) -> None:
        self.lengths = lengths


def document_lengths(positions: Tensor) -> Documents:
    """Of each sequence, lengths of the documents in it, each of which begins at position 0, or with the sequence."""
    ends = torch.full((1,), positions.shape[1])
    starts = [row.nonzero().flatten() for row in (positions.cpu() == 0)[:, 1:]]
    return Documents([torch.cat([torch.zeros(1).long(), found + 1, ends]).diff().tolist() for found in starts])


def check_type(config: PreTrainedConfig) -> None:
    """Raise NotByDocumentsError for a configuration in which a token does not see all of its document before it."""
    kinds = set(getattr(config, "layer_types", None) or [])
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if kinds != {"full_attention"} if kinds else windowed:
        raise NotByDocumentsError("its attention reaches back a window of tokens")


@torch.compiler.disable  # other lengths would be compiled anew; a compiled layer calls it between two parts
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    documents: Documents | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each document, (num_sequences, heads, tokens, head_dim), as `transformers` asks for it.

    Without `documents` a sequence is one. Raises NotByDocumentsError for what it would pass over.
    """
    unknown = [name for name, given in others.items() if given is not None and name not in WITHOUT_EFFECT]
    if unknown or attention_mask is not None:
        raise NotByDocumentsError(f"its attention asks for {', '.join(unknown) or 'a mask of its own'}")
    if (groups := getattr(module, "num_key_value_groups", 1)) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows = []
    for row, lengths in enumerate(documents.lengths if documents else [[query.shape[2]]] * len(query)):
        parts = (whole[row : row + 1].split(lengths, 2) for whole in (query, key, value))
        alone = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scaling)
            for q, k, v in zip(*parts, strict=True)
        ]
        rows.append(torch.cat(alone, 2))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


def no_mask(*_: Any, **__: Any) -> None:
    """What `transformers` hands over in place of a mask."""


AttentionInterface.register(DOCUMENTS, attend)
AttentionMaskInterface.register(DOCUMENTS, no_mask)
