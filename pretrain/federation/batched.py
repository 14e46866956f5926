"""What a model answers to many conversations at a time, several answers to each."""

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.config.errors import ConfigError
from pretrain.federation.answers import continued
from pretrain.federation.generate import Sampling, Speaker


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A conversation that the assistant is to go on with."""

    messages: Sequence[dict[str, Any]]
    """As chat templates have it."""
    tools: Sequence[dict[str, Any]] | None = None
    """What may be called."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One turn of the assistant."""

    text: str
    """Without the token that ends it."""
    num_tokens: int
    """New ones, with that token."""
    is_complete: bool
    """Whether the model has ended it; else it was cut."""


Batch = list[tuple[int, list[int]]]
"""Conversations, by their place, with their tokens: as many of each."""


def batches(
    speaker: Speaker, asked: Sequence[Asked], *, num_answers: int = 1, batch_sequences: int = 64
) -> list[Batch]:
    """Conversations whose prompts have equally many tokens together, so that none is padded, which would change it.

    In each as many as give `batch_sequences` answers, or one. Raises ConfigError where the template refuses one.
    """
    of_length = defaultdict[int, Batch](list)
    for place, one in enumerate(asked):
        try:
            tokens = speaker.tokenizer.apply_chat_template(
                list(one.messages),
                tools=list(one.tools) if one.tools else None,
                add_generation_prompt=True,
                return_dict=False,
                tokenizer_kwargs={"verbose": False},
            )
        except Exception as error:  # a template raises what it likes
            raise ConfigError(f"chat template: it does not take conversation {place + 1}: {error}") from None
        of_length[len(tokens)].append((place, tokens))
    size = max(1, batch_sequences // num_answers)
    return [some[at : at + size] for _, some in sorted(of_length.items()) for at in range(0, len(some), size)]


def answers(
    speaker: Speaker, batch: Batch, sampling: Sampling, *, num_answers: int = 1, most_tokens: int | None = None
) -> Iterator[tuple[int, list[Answer]]]:
    """The answers to each conversation of a batch, by its place; none where there is no room for any.

    They depend on the batch and `sampling.seed`, and on no other batch. `most_tokens` bounds prompt and answer
    together, beside the model's positions.
    """
    length = len(batch[0][1])
    room = int(
        min(sampling.num_tokens, speaker.positions - length, (most_tokens or length + sampling.num_tokens) - length)
    )
    if room < 1:
        yield from ((place, []) for place, _ in batch)
        return
    model: Any = speaker.model
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    torch.manual_seed(zlib.crc32(f"{sampling.seed}/{length}/{batch[0][0]}".encode()))
    prompts = [tokens for _, tokens in batch for _ in range(num_answers)]
    said = [
        Answer(
            text=speaker.tokenizer.decode(tokens, skip_special_tokens=True),
            num_tokens=len(tokens) + (not is_cut),
            is_complete=not is_cut,
        )
        for tokens, is_cut in continued(model, prompts, ends, num_tokens=room, **sampling.options())
    ]
    for number, (place, _) in enumerate(batch):
        yield place, said[number * num_answers : (number + 1) * num_answers]
