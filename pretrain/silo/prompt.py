"""A prompt: virtual tokens before each document, whose vectors alone are trained; the model stays as it is.

Their ids are below 0, where no vocabulary has any: -1 is the first row of the prompt's matrix, -2 the second. Only the
input embedding knows of them. So they are tokens like any other to positions, packing and masks, and none to the last
layer, whose softmax is that of the model without them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from pretrain.config.adapter import AdapterConfig
from pretrain.config.errors import ConfigError
from pretrain.host.foreign import shown
from pretrain.silo.weights import checkpoint_files, tensors_of

MATRIX = ".prompt.weight"  # what the name of the one trained parameter ends with


def prompt_ids(places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Ids of a prompt's tokens, by their places in it."""
    return -1 - places


class PromptedEmbedding(nn.Module):
    """An input embedding that looks ids below 0 up in a matrix of its own."""

    def __init__(self, embedding: nn.Module, num_tokens: int) -> None:
        """The matrix is about to be overwritten."""
        super().__init__()
        weight: Any = embedding.weight
        width = getattr(weight, "ds_shape", weight.shape)[1]
        rows = torch.empty(num_tokens, width, dtype=weight.dtype, device=weight.device)
        self.base_layer = embedding  # as peft calls what it wraps, whose names base.py knows how to read
        self.prompt = nn.Embedding.from_pretrained(rows, freeze=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Vectors of ids. # (num_sequences, num_tokens) to (num_sequences, num_tokens, width)"""
        is_prompt = input_ids < 0
        of_prompt = self.prompt(torch.where(is_prompt, -1 - input_ids, 0))
        return torch.where(is_prompt[..., None], of_prompt, self.base_layer(input_ids.clamp(min=0)))


def add_prompt(model: Any, settings: AdapterConfig) -> None:
    """Put a prompt's matrix beside the input embedding, in place; all of the model's own parameters are frozen.

    Raises ConfigError for a model whose input embedding is no matrix.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise ConfigError(
            f"model.adapter.kind: {settings.kind!r} given; this type of model has no matrix that it looks its tokens "
            "up in; allowed: none, lora"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    name = next(name for name, module in model.named_modules() if module is embedding)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, PromptedEmbedding(embedding, settings.tokens))


def num_prompt_tokens(model: nn.Module) -> int:
    """Of the prompt that a model has; 0: it has none."""
    return next((m.prompt.num_embeddings for m in model.modules() if isinstance(m, PromptedEmbedding)), 0)


def first_tokens(tokenizer: Tokenizer, settings: AdapterConfig) -> list[int]:
    """Tokens of the text that a prompt begins as: from the beginning again where they are fewer, cut where more.

    Raises ConfigError for a text of none.
    """
    found: list[int] = tokenizer.encode(settings.text, add_special_tokens=False).ids
    if not found:
        raise ConfigError(
            f"model.adapter.text: {shown(settings.text)!r} given, of which the tokenizer makes no token; allowed: a "
            "text of one token or more"
        )
    return (found * -(-settings.tokens // len(found)))[: settings.tokens]


@torch.no_grad()
def initial_prompt(
    model: nn.Module, tokens: Sequence[int], checkpoint: Path, whole: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Version 0 of a prompt, fp32: what the base's input embedding makes of some tokens. # (num_tokens, width)

    Of the base only these rows are read. `model` has buffers, but parameters without memory; `whole` loads the
    embedding's matrix, for a checkpoint whose files have other names than its model.
    """
    name, module = next((n, m) for n, m in model.named_modules() if isinstance(m, PromptedEmbedding))
    rows = _rows(checkpoint, f"{name}.weight", tokens, whole)
    module.base_layer.weight = nn.Parameter(rows)
    return {f"{name}{MATRIX}": module.base_layer(torch.arange(len(rows))).clone()}


def _rows(checkpoint: Path, name: str, tokens: Sequence[int], whole: Callable[[], Tensor]) -> Tensor:
    for file in checkpoint_files(checkpoint):
        if file.suffix == ".safetensors" and name in tensors_of(file):
            with safe_open(file, framework="pt") as tensors:
                matrix = tensors.get_slice(name)
                return torch.cat([matrix[token : token + 1] for token in tokens]).float()
    return whole()[list(tokens)].float()


@torch.no_grad()
def check_prompt(model: nn.Module, device: torch.device) -> None:
    """Raise ConfigError unless a model makes of a prompt's tokens what it makes of their vectors.

    It does not where tokens do more than to be looked up once. `model` holds its parameters and has dropout off.
    """
    module: Any = getattr(model, "module", model)
    rows = torch.tensor([[-1, 0, 1, 2], [-num_prompt_tokens(module), 2, 1, 0]], device=device)
    by_ids = model(input_ids=rows, use_cache=False).logits.float()
    try:
        vectors = module.get_input_embeddings()(rows)
        same = torch.allclose(
            model(inputs_embeds=vectors, use_cache=False).logits.float(), by_ids, rtol=1e-3, atol=1e-5
        )
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ConfigError(
            "model.adapter.kind: 'prompt' given; this type of model makes more of its tokens than to look them up in "
            "its input embedding; allowed: none, lora"
        )
