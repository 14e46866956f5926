"""A causal language model of `transformers`, from a configuration or from a local checkpoint directory."""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from pretrain.config.check import ConfigError
from pretrain.config.keys import ModelConfig, RunConfig
from pretrain.silo.vocabulary import vocabulary_size

# What masking may leave of the influence of the document before: 0, or a few roundings where experts take turns. Of the
# types that do not mask, every one left a tenth or more.
MASKING_TOLERANCE = 0.05


def model_config(settings: ModelConfig, vocab_size: int) -> PretrainedConfig:
    """The `transformers` configuration; a missing vocab_size is the tokenizer's `vocab_size`.

    Raises ConfigError for an unknown model type, a wrong value, or a vocabulary smaller than the tokenizer's.
    """
    try:
        if settings.checkpoint:
            config = AutoConfig.from_pretrained(settings.checkpoint, local_files_only=True)
        else:
            given: dict[str, Any] = {"vocab_size": vocab_size, **settings.config}
            config = AutoConfig.for_model(**given)
    except (ValueError, TypeError, OSError, KeyError) as error:
        key = "model.checkpoint" if settings.checkpoint else "model.config"
        raise ConfigError(f"{key}: {' '.join(str(error).split())[:300]}") from None
    if config.vocab_size < vocab_size:
        raise ConfigError(
            f"model.config.vocab_size: {config.vocab_size} given; allowed: {vocab_size} (the tokenizer's) or more"
        )
    return config


def build_initial(settings: ModelConfig, vocab_size: int) -> nn.Module:
    """The model of version 0 in fp32 on the CPU: fresh weights from the contract's seed, or the checkpoint's."""
    config = model_config(settings, vocab_size)
    if settings.checkpoint:
        return AutoModelForCausalLM.from_pretrained(settings.checkpoint, dtype=torch.float32, local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def initial_parameters(config: RunConfig) -> dict[str, Tensor]:
    """What version 0 holds: the trained parameters of `build_initial`, by name."""
    vocab_size = vocabulary_size(config.tokenizer_file)
    named = build_initial(config.model, vocab_size).named_parameters()
    return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}


def build_empty(
    settings: ModelConfig,
    vocab_size: int,
    *,
    dtype: torch.dtype,
    partitioned: AbstractContextManager[Any] | None = None,
) -> nn.Module:
    """The model's structure with parameters that are about to be overwritten; `partitioned` is ZeRO-3's context."""
    config = model_config(settings, vocab_size)
    config.use_cache = False
    with partitioned or nullcontext(), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # part of the initialization that was skipped
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside hold real buffers, but parameters without memory."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta")))

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def restore_buffers(model: nn.Module, settings: ModelConfig, vocab_size: int) -> None:
    """Give `model` the buffers of a plain model: ZeRO-3's context rounds them (rotary frequencies!) to bf16."""
    buffers = dict(model.named_buffers())
    with _parameters_on_meta():
        plain = build_empty(settings, vocab_size, dtype=torch.float32)
    for name, value in plain.named_buffers():
        buffers[name].data = value.to(buffers[name].device)


def document_positions(input_ids: Tensor, end_of_text_id: int) -> Tensor:
    """Each token's position in its document, which begins at an end-of-text token. # (num_sequences, sequence_tokens)

    What a sequence begins with, the rest of a document, counts from 0 too.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    begins = torch.where(input_ids == end_of_text_id, positions, 0).cummax(dim=1).values
    return positions - begins


def token_losses(model: nn.Module, input_ids: Tensor, targets: Tensor, mask_at: int | None = None) -> Tensor:
    """Cross-entropy in nats of every target. input_ids, targets and result: (num_sequences, sequence_tokens).

    `mask_at` is the end-of-text token at which another document begins that sees nothing of those before it (None:
    all is one text). So a document's loss in a packed sequence is its loss alone after an end-of-text token.
    """
    logits = _logits(model, input_ids, mask_at)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def _logits(model: nn.Module, input_ids: Tensor, mask_at: int | None) -> Tensor:
    # From positions that restart, and no mask and no cache, `transformers` makes the mask that keeps documents apart.
    positions = {} if mask_at is None else {"position_ids": document_positions(input_ids, mask_at)}
    return model(input_ids=input_ids, use_cache=False, **positions).logits


@torch.no_grad()
def check_document_masking(model: nn.Module, end_of_text_id: int, device: torch.device) -> None:
    """Raise ConfigError unless masking keeps a document's logits from depending on the document before it.

    Two short forward passes, so that it sees what this type of model makes of positions, layer by layer. `model` holds
    its parameters and has dropout off.
    """
    a, b, c, d, e = ((end_of_text_id + offset) % 6 for offset in range(1, 6))
    rows = torch.tensor([[a, b, c, end_of_text_id, d, e], [e, d, a, end_of_text_id, d, e]], device=device)

    def influence(mask_at: int | None) -> float:
        one, other = _logits(model, rows, mask_at)[:, 3:].float()
        return (one - other).abs().max().item()

    if not influence(end_of_text_id) <= MASKING_TOLERANCE * influence(None):
        raise ConfigError(
            "document_masking: true given; this type of model lets a document see the one before it even so; allowed: "
            "false, or a model whose attention follows position_ids (llama, mistral, qwen3, gpt2, gpt_neox, ...)"
        )


def export(model: nn.Module, tokenizer_file: Path, directory: Path) -> None:
    """Save a `transformers` directory that AutoModelForCausalLM and AutoTokenizer load."""
    from transformers import PreTrainedTokenizerFast

    end_of_text = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file))
    if end_of_text in tokenizer.get_vocab():
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer_file), eos_token=end_of_text, bos_token=end_of_text, pad_token=end_of_text
        )
        for part in (model.config, model.generation_config):  # type: ignore[union-attr]
            part.eos_token_id = part.bos_token_id = part.pad_token_id = tokenizer.eos_token_id  # type: ignore[union-attr]
    model.save_pretrained(directory)  # type: ignore[operator]
    tokenizer.save_pretrained(directory)
    shutil.copyfile(tokenizer_file, directory / "tokenizer.json")  # the very bytes that the contract's hash names
