"""A model's continuations of text, piece by piece as they come: of an export, or of a version of a run."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from pretrain.config.errors import ConfigError
from pretrain.federation.export import load_global_model, provenance_of
from pretrain.federation.reading import exported, found_configuration
from pretrain.silo.exported import with_tokenizer
from pretrain.silo.model import load_checkpoint
from pretrain.silo.prompt import num_prompt_tokens, prompt_ids

Message = dict[str, str]
"""`role` and `content`, as chat templates have it."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when to stop."""

    num_tokens: int = 128
    """New ones at most; a model ends earlier where it ends a document, or where no more fit its positions."""
    temperature: float = 0.8
    """Of the softmax; 0 takes the likeliest token."""
    top_k: int = 50
    """Only so many of the likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability."""
    seed: int = 0
    """The same one says the same."""

    def __post_init__(self) -> None:
        """Raises ConfigError, by the name of the option."""
        for name, ok, allowed in (
            ("num-tokens", self.num_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top-k", self.top_k >= 0, "0 (all) or more"),
            ("top-p", 0 < self.top_p <= 1, "above 0, to 1"),
        ):
            if not ok:
                given = getattr(self, name.replace("-", "_"))
                raise ConfigError(f"--{name}: {given} given; allowed: {allowed}")

    def options(self) -> dict[str, Any]:
        """The same for `transformers`."""
        if not self.temperature:
            return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        return {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """What became of a text."""

    num_given: int
    """Tokens that the model was given, with the one to begin with."""
    num_tokens: int
    """New ones."""
    is_cut: bool
    """Whether it would have gone on, but no more fit the model's positions."""


@dataclass(kw_only=True)
class Speaker:
    """A model with its tokenizer; on a GPU where there is one."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """Whose it is, in words."""
    trained_tokens: int | None
    """Length of its training sequences, if that is known."""
    begins_with: int | None
    """The token that texts began after in training; None: there is none."""

    @property
    def has_template(self) -> bool:
        """Whether it knows what a conversation looks like."""
        return bool(self.tokenizer.chat_template)

    def go_on(self, text: str, sampling: Sampling, emit: Callable[[str], None]) -> Spoken:
        """Hand what follows a text to `emit`, piece by piece.

        The text is the beginning of a document: it follows an end of text, as in training. Raises ConfigError for one
        that is longer than the model can read.
        """
        found = self.tokenizer(text, verbose=False)["input_ids"]
        if self.begins_with is not None and found[:1] != [self.begins_with]:
            found = [self.begins_with, *found]
        if not found:
            raise ConfigError("--prompt: no text given, and this tokenizer has no token to begin with; allowed: a text")
        return self._generate(found, sampling, emit)

    def answer(self, messages: list[Message], sampling: Sampling, emit: Callable[[str], None]) -> Spoken:
        """The same for a conversation in the form of the tokenizer's chat template.

        The oldest messages are left out of `messages` where they are too long together.
        """
        while True:
            try:
                found = self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=False, tokenizer_kwargs={"verbose": False}
                )
            except Exception as error:  # a template raises what it likes
                raise ConfigError(f"chat template: it does not take this conversation: {error}") from None
            oldest = 1 if messages[0]["role"] == "system" else 0
            if len(found) + sampling.num_tokens <= self.positions or len(messages) <= oldest + 2:
                return self._generate(found, sampling, emit)
            del messages[oldest : oldest + 2]

    @property
    def positions(self) -> float:
        """The most tokens that the model can read, new ones included, after its prompt if it has one."""
        most = getattr(self.model.config, "max_position_embeddings", None) or math.inf
        return most - num_prompt_tokens(self.model)

    def _generate(self, tokens: list[int], sampling: Sampling, emit: Callable[[str], None]) -> Spoken:
        room = self.positions - len(tokens)
        if room < 1:
            raise ConfigError(
                f"--prompt: {len(tokens):,} tokens given; allowed: up to {self.positions - 1:,} with this model"
            )
        prompt = prompt_ids(np.arange(num_prompt_tokens(self.model))).tolist()
        rows = torch.tensor([prompt + tokens], device=self.model.device)
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        torch.manual_seed(sampling.seed)
        made = self.model.generate(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=int(min(sampling.num_tokens, room)),
            pad_token_id=ends[0],
            streamer=_Pieces(self.tokenizer, emit),
            **sampling.options(),
        )
        new = made[0, rows.shape[1] :].tolist()
        is_cut = len(new) < sampling.num_tokens and not {*new} & {*ends}
        return Spoken(num_given=len(tokens), num_tokens=len(new), is_cut=is_cut)


class _Pieces(TextStreamer):
    """Hands whole words over as they are there."""

    def __init__(self, tokenizer: Any, emit: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece of text; the last may be empty."""
        if text:
            self._emit(text)


def open_speaker(
    where: str, *, version: int | None = None, paths: list[Path] | None = None, tokenizer: Path | None = None
) -> Speaker:
    """The model of an exported directory, of a run directory, or of the store at a URL: its newest version, or another.

    A store alone needs the tokenizer, or with `paths` a configuration. Raises ConfigError.
    """
    options = {"--version": version is not None, "--config": paths, "--tokenizer": tokenizer}
    model: Any
    if directory := exported(where, options=options):
        model = load_checkpoint(directory, key="model").eval()
        found = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        origin = provenance_of(directory)
        # Of ours the tokenizer's is what a chat template begins with, which need not be what texts began after.
        begins_with = model.config.bos_token_id if origin else found.bos_token_id
        return _speaker(model, found, str(directory), origin.get("sequence_tokens"), begins_with)
    config = found_configuration(where, paths=paths or [], tokenizer=tokenizer)
    model, origin = load_global_model(config, version)
    whose = f"version {origin['version']}" if "version" in origin else f"silo {origin['silo']}'s last"
    of_run = with_tokenizer(model, config.tokenizer_file, config.template_file)
    own_tokens = config.sequence_tokens - num_prompt_tokens(model)
    return _speaker(model, of_run, f"{whose} of {config.name}", own_tokens, model.config.bos_token_id)


def _speaker(
    model: Any, tokenizer: PreTrainedTokenizerBase, name: str, trained_tokens: int | None, begins_with: int | None
) -> Speaker:
    model = model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return Speaker(model=model, tokenizer=tokenizer, name=name, trained_tokens=trained_tokens, begins_with=begins_with)
