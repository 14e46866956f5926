"""A model's answers to many prompts, several at a time: any, and the likeliest."""

import inspect
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from pretrain.config.errors import ConfigError
from pretrain.silo.prompt import num_prompt_tokens, prompt_ids

# Logits of a prompt alone and beside longer ones differ by the order of sums; of a model that reads filling, by more.
CLOSE = 1e-2


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model says to a prompt."""

    prompt: int
    """Its place."""
    tokens: list[int]
    """Without what fills a row."""
    is_cut: bool
    """Whether it would have gone on."""


def continued(
    model: Any, prompts: Sequence[Sequence[int]], ends: Sequence[int], *, num_tokens: int, **options: Any
) -> list[tuple[list[int], bool]]:
    """What a model says to each prompt, without the token that ends it, and whether it would have gone on."""
    rows, mask = _rows(model, prompts, ends[0])
    with torch.inference_mode():
        made = model.generate(
            input_ids=rows, attention_mask=mask, max_new_tokens=num_tokens, pad_token_id=ends[0], **options
        )
    found = []
    for row in made[:, rows.shape[1] :].tolist():
        end = next((at for at, token in enumerate(row) if token in ends), None)
        found.append((row[:end], end is None))
    return found


def _rows(model: Any, prompts: Sequence[Sequence[int]], filling: int) -> tuple[Tensor, Tensor]:
    """The prompts at the ends of rows, and what of them is no filling, both (num_prompts, longest)."""
    before = prompt_ids(np.arange(num_prompt_tokens(model))).tolist()
    longest = max(map(len, prompts)) + len(before)
    rows = torch.full((len(prompts), longest), filling, dtype=torch.long, device=model.device)
    mask = torch.zeros_like(rows)
    for place, prompt in enumerate(prompts):
        tokens = [*before, *prompt]
        rows[place, longest - len(tokens) :] = torch.tensor(tokens)
        mask[place, longest - len(tokens) :] = 1
    return rows, mask


class Answering:
    """Takes the likeliest token each time, for several prompts at a time."""

    def __init__(self, model: nn.Module, ends: Collection[int], *, num_tokens: int, batch_sequences: int) -> None:
        """`ends` are the tokens that end an answer; it has `num_tokens` at most."""
        self._model: Any = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self._ends = sorted(ends)
        self._num_tokens, self._batch_sequences = num_tokens, batch_sequences
        # Its own, as an exported one samples, or takes off what was said already.
        self._model.generation_config = GenerationConfig(do_sample=False, use_cache=True, eos_token_id=self._ends)

    def room(self, prompt: Sequence[int]) -> int:
        """The most tokens that an answer to a prompt can have; below 1: it is too long for the model."""
        positions = getattr(self._model.config, "max_position_embeddings", None)
        if not positions:
            return self._num_tokens
        return min(self._num_tokens, positions - num_prompt_tokens(self._model) - len(prompt))

    def _check_padding(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise ConfigError if what a model says depends on how long the prompts beside its own are."""
        short, long = min(prompts, key=len), max(prompts, key=len)
        if self._batch_sequences == 1 or len(short) == len(long):
            return
        with torch.inference_mode():
            rows, mask = _rows(self._model, [short, long], self._ends[0])
            places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
            knows_places = "position_ids" in inspect.signature(self._model.forward).parameters
            told = places if knows_places else {}
            beside = self._model(input_ids=rows, attention_mask=mask, **told).logits[0, -1]
            alone = self._model(input_ids=_rows(self._model, [short], self._ends[0])[0]).logits[0, -1]
        if not float((beside - alone).abs().max()) <= CLOSE * float(alone.abs().max()):
            raise ConfigError(
                f"--batch-sequences: {self._batch_sequences} given; what this model says depends on the prompts beside "
                "its own; allowed: 1"
            )

    def answers(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[Answer]]:
        """Batches of answers to all prompts, which have room for one, the longest first. Raises ConfigError."""
        if prompts:
            self._check_padding(prompts)
        order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
        for room, group in itertools.groupby(order, key=lambda place: self.room(prompts[place])):
            places = list(group)  # with the same room, so that each is what it would be alone
            for first in range(0, len(places), self._batch_sequences):
                chosen = places[first : first + self._batch_sequences]
                said = continued(self._model, [prompts[place] for place in chosen], self._ends, num_tokens=room)
                yield [
                    Answer(prompt=place, tokens=tokens, is_cut=is_cut)
                    for place, (tokens, is_cut) in zip(chosen, said, strict=True)
                ]
