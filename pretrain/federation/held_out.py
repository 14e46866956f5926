"""The loss of a model on held-out text, and of conversations which tokens of the assistant it would have said."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config.errors import ConfigError
from pretrain.config.keys import SiloConfig
from pretrain.federation.export import PROMPT_TOKENS, PROVENANCE
from pretrain.silo.batch import Batch
from pretrain.silo.data import PackedTokens
from pretrain.silo.evaluate import held_out_sums, sequences_evaluated
from pretrain.silo.model import (
    check_causality,
    check_document_masking,
    go_by_documents,
    target_losses,
    token_losses,
)
from pretrain.silo.prompt import num_prompt_tokens
from pretrain.silo.shards import read_manifest


@dataclass(frozen=True, kw_only=True)
class SplitLoss:
    """Held-out loss of a model on one split."""

    loss: float
    """Nats per token."""
    num_sequences: int
    """Sequences that were evaluated, evenly spread over the split, ..."""
    of_sequences: int
    """... and how many it has."""
    num_tokens: int
    """Tokens of those sequences that have a loss; of conversations, what the assistant says."""
    num_right: int | None = None
    """Of conversations: how many of these tokens are the likeliest, after the true ones before them."""
    bytes_per_token: float | None = None
    """UTF-8 bytes of text a token, of the whole split; None of conversations, where some tokens have no loss."""

    @property
    def is_chat(self) -> bool:
        """Whether it is of conversations."""
        return self.num_right is not None

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers."""
        return self.loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None

    @property
    def accuracy(self) -> float | None:
        """Share of the tokens that greedy decoding gets right with the true ones before it; None of text."""
        return self.num_right / self.num_tokens if self.num_right is not None else None


def together(splits: Sequence[SplitLoss]) -> SplitLoss:
    """Of several splits of conversations as one: each token weighs the same."""
    num_tokens = sum(split.num_tokens for split in splits)
    return SplitLoss(
        loss=sum(split.loss * split.num_tokens for split in splits) / num_tokens,
        num_sequences=sum(split.num_sequences for split in splits),
        of_sequences=sum(split.of_sequences for split in splits),
        num_tokens=num_tokens,
        num_right=sum(split.num_right or 0 for split in splits),
    )


def evaluate_model(
    load: Callable[[], nn.Module],
    data: Mapping[str, Path],
    provenance: Mapping[str, Any],
    tokenizer: str,
    *,
    template: str | None = None,
    sequence_tokens: int | None = None,
    document_masking: bool | None = None,
    num_sequences: int | None = None,
    batch_sequences: int = 8,
    whole: Collection[str] = (),
    tell: Callable[[str, int, int], None] = lambda split, num_done, num_sequences: None,
) -> dict[str, SplitLoss]:
    """Loss of a model on packed splits by name, which are of the tokenizer with this sha256, and conversations of the
    template with that one (None: of any); on a GPU where there is one.

    `sequence_tokens`, `document_masking` and `num_sequences` (0: all) are those of the run that it is from, as
    `provenance` has them, unless they are given; of the splits in `whole` are all. `tell` is called after each batch:
    split, sequences done, and of how many. Conversations of one row are kept apart in any case. Raises ConfigError if
    the text was packed with another tokenizer, or conversations with another template.
    """
    sequence_tokens, prompt_tokens = _sizes(sequence_tokens, provenance, data.values())
    if document_masking is None:
        document_masking = provenance.get("document_masking", False)
    if num_sequences is None:
        num_sequences = int(provenance.get("eval_sequences", SiloConfig().eval_sequences))
    opened = partial(
        PackedTokens,
        sequence_tokens=sequence_tokens,
        tokenizer_sha256=tokenizer,
        template_sha256=template,
        prompt_tokens=prompt_tokens,
        keeps_apart=document_masking,
        key="--data",
    )
    corpora = {name: opened([path]) for name, path in data.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _loaded(load, prompt_tokens, device)
    mask_at = next(iter(corpora.values())).manifests[0].end_of_text_id
    if document_masking or any(tokens.is_chat for tokens in corpora.values()):
        if device.type == "cpu":
            go_by_documents(model, mask_at, device)  # where the type of model allows it; else there is a mask
        check_document_masking(model, mask_at, device)
    found = {}
    for name, tokens in corpora.items():
        values_of = partial(_values, model, device, mask_at if document_masking or tokens.is_chat else None)
        chosen = 0 if name in whole else num_sequences
        sequences = sequences_evaluated({name: tokens}, chosen)[name]
        sums = held_out_sums(
            values_of,
            {name: tokens},
            num_sequences=chosen,
            micro_batch_sequences=batch_sequences,
            tell=lambda split, num_done, of=sequences[0]: tell(split, num_done, of),  # type: ignore[misc]
        )
        found[name] = _split_loss(sums[name], tokens, sequences)
    return found


def _rows_of(data: Iterable[Path]) -> int:
    """The length of the first conversations' rows. Raises ConfigError where there are none to go by."""
    manifests = (read_manifest(path, key="--data") for path in data)
    found = next((manifest.chat.sequence_tokens for manifest in manifests if manifest.chat), None)
    if found is None:
        raise ConfigError("--sequence-tokens: none given; this model was not exported by atoll, so say how many")
    return found


def _values(model: nn.Module, device: torch.device, mask_at: int | None, batch: Batch) -> tuple[Tensor, ...]:
    """Of every target its loss and, of conversations, whether it is the likeliest token; documents are kept apart with
    `mask_at`."""
    placed, right = batch.placed(lambda tensor: tensor.to(device)), list[Tensor]()

    def compared(logits: Tensor, targets: Tensor) -> Tensor:
        right.append(logits.argmax(-1) == targets)  # never of an ignored one, which no token is
        return target_losses(logits, targets)

    is_chat = placed.positions is not None
    losses = token_losses(
        model,
        *placed[:2],
        mask_at,
        positions=placed.positions,
        cross_entropy=compared if is_chat else target_losses,
    )
    return losses, *(one.view_as(losses) for one in right)


def _sizes(sequence_tokens: int | None, provenance: Mapping[str, Any], data: Iterable[Path]) -> tuple[int, int]:
    """Tokens of a sequence, and of those the prompt's that stands before it. Raises ConfigError."""
    sequence_tokens = sequence_tokens or provenance.get("sequence_tokens") or _rows_of(data)
    prompt_tokens = int(provenance.get(PROMPT_TOKENS, 0))
    if sequence_tokens < prompt_tokens + 2:
        raise ConfigError(f"--sequence-tokens: {sequence_tokens} given; allowed: {prompt_tokens + 2} or more")
    return sequence_tokens, prompt_tokens


def _loaded(load: Callable[[], nn.Module], prompt_tokens: int, device: torch.device) -> nn.Module:
    """A model on a device, checked. Raises ConfigError."""
    model = load().eval().to(device)
    if num_prompt_tokens(model) != prompt_tokens:
        raise ConfigError(f"model: one without a prompt given, whose {PROVENANCE} names one; allowed: export it again")
    check_causality(model, device)
    return model


def _split_loss(sums: list[float], tokens: PackedTokens, sequences: list[int]) -> SplitLoss:
    loss, *right, num_tokens = sums
    num_bytes = sum(manifest.num_bytes for manifest in tokens.manifests)
    num_sequences, of_sequences = sequences
    return SplitLoss(
        loss=loss / num_tokens,
        num_sequences=num_sequences,
        of_sequences=of_sequences,
        num_tokens=round(num_tokens),
        num_right=round(right[0]) if right else None,
        bytes_per_token=None if tokens.is_chat else num_bytes / tokens.num_tokens,
    )
