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

from pretrain.config import ConfigError, ModelConfig


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


def token_losses(model: nn.Module, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of every target. input_ids, targets and result: (num_sequences, sequence_tokens)."""
    logits = model(input_ids=input_ids, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


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
