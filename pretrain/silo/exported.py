"""A trained model as others use it: with its tokenizer, and as a `transformers` directory."""

import copy
import inspect
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from pretrain.silo.model import parameters_on_meta
from pretrain.silo.shards import END_OF_TEXT_NAMES, TEMPLATE_FILE
from pretrain.silo.template import read_template, special_tokens


def with_tokenizer(
    model: nn.Module, tokenizer_file: Path, template_file: Path | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer of a trained model, which from then on is as it is used: with a cache, and ends where documents do.

    Its end of text is the token that ended documents in training. It names no padding, as none was trained, and whoever
    goes on from it would freeze the embedding of a token that is padding. A chat template, or else one beside the
    tokenizer's file, is taken over, with the special tokens that it was given when conversations were prepared, and
    what the model says ends where a turn does, too.
    """
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file))
    vocabulary = tokenizer.get_vocab()
    name = next((name for name in END_OF_TEXT_NAMES if name in vocabulary), None)
    template, named = template_file or tokenizer_file.with_name(TEMPLATE_FILE), {"eos_token": name, "bos_token": name}
    if template.is_file():
        given = special_tokens(tokenizer_file)
        named = {kind: token for kind, token in given.items() if token in vocabulary}  # another would have no embedding
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), **named)
    if template.is_file():
        tokenizer.chat_template = read_template(template, key="chat_template")  # as the contract's hash names it
    code = inspect.getsource(sys.modules[type(model).__module__])
    for part in (model.config, model.generation_config):
        settings: Any = part
        settings.eos_token_id = settings.bos_token_id = None if name is None else vocabulary[name]
        settings.use_cache = True  # switched off for training
        if "create_position_ids_from_input_ids" not in code:  # roberta and its like count from there
            settings.pad_token_id = None
    end, of_turns = model.generation_config.eos_token_id, _end_of_turns(tokenizer)  # type: ignore[union-attr]
    if of_turns not in (None, end):
        model.generation_config.eos_token_id = [of_turns] if end is None else [end, of_turns]  # type: ignore[union-attr]
    return tokenizer


def _end_of_turns(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The token with which the assistant's turns end in the chat template; None without one."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        said = tokenizer.apply_chat_template(turns, return_dict=False) if tokenizer.chat_template else []
    except Exception as error:  # a template raises what it likes
        logging.getLogger(__name__).debug("no end of turns: %s", error)
        return None
    added = {*tokenizer.get_added_vocab().values()}
    return next((token for token in reversed(said) if token in added), None)


def export(
    model: nn.Module,
    tokenizer_file: Path,
    directory: Path,
    *,
    template_file: Path | None = None,
    trained_tokens: int | None = None,
    is_fresh: bool = False,
) -> None:
    """Save a `transformers` directory that AutoModelForCausalLM and AutoTokenizer load.

    With `trained_tokens`, the length of its training sequences, the tokenizer says that no text shall be longer; of a
    model that is fresh, not gone on with from a checkpoint, the configuration does, too, where that changes no number.
    """
    tokenizer = with_tokenizer(model, tokenizer_file, template_file)
    if trained_tokens:
        tokenizer.model_max_length = trained_tokens
    if trained_tokens and is_fresh:
        _lower_positions(model, trained_tokens)
    with _deepspeed_says_nothing():
        model.save_pretrained(directory)  # type: ignore[operator]
    save_tokenizer(tokenizer, tokenizer_file, directory)
    for file in directory.iterdir():
        file.chmod((directory / "config.json").stat().st_mode)  # safetensors makes files that only their owner reads


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, tokenizer_file: Path, directory: Path) -> None:
    """With the very bytes that the contract's hash names."""
    tokenizer.save_pretrained(directory)
    shutil.copyfile(tokenizer_file, directory / "tokenizer.json")


@contextmanager
def _deepspeed_says_nothing() -> Iterator[None]:
    """Where accelerate is installed, saving imports DeepSpeed, which without a GPU says so on stdout."""
    name = "DS_ACCELERATOR"
    if name in os.environ or torch.cuda.is_available():
        yield
        return
    os.environ[name] = "cpu"
    try:
        yield
    finally:
        del os.environ[name]


def _lower_positions(model: nn.Module, trained_tokens: int) -> None:
    """Have the configuration allow the positions that were trained, unless a table or a scale hangs on their number."""
    ours: Any = model.config
    if not trained_tokens < (getattr(ours, "max_position_embeddings", None) or 0):
        return
    config = copy.deepcopy(ours)
    config.max_position_embeddings = trained_tokens
    with parameters_on_meta(), no_init_weights():
        other = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    shapes = [{name: one.shape for name, one in each.named_parameters()} for each in (model, other)]
    before, after = dict(model.named_buffers()), dict(other.named_buffers())
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    if same and shapes[0] == shapes[1] and set(_rope_types(config.to_dict())) <= {"default"}:
        ours.max_position_embeddings = trained_tokens


def _rope_types(value: Any, key: str = "") -> Iterator[Any]:
    """How positions are scaled, of all layers."""
    if key in ("rope_type", "type"):
        yield value
    for inner_key, inner in value.items() if isinstance(value, dict) else ():
        yield from _rope_types(inner, inner_key)
