"""What a silo trains on at once: sequences, their targets, and where their documents begin.

Shapes: T = sequence_tokens. Sequence i of text is tokens[i*T : i*T + T + 1]: T inputs, and the T tokens after them as
targets. Sequence i of conversations is row i of their split: its T tokens are the inputs, and the target of each is the
next one of the row, if that is trained, and else IGNORED, as the last one's is. With a prompt (prompt.py), of n tokens,
these stand before each conversation, in the room that its preparation has left, or before T - n tokens of text; their
targets are IGNORED.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pretrain.silo.prompt import prompt_ids

IGNORED = -100  # a target that has no loss, as torch's cross-entropy has it
BY_TOKENS = -1  # a position that is left to whoever knows which token begins a document


class Row(NamedTuple):
    """One sequence. # int64 (T,), each"""

    inputs: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64] | None = None
    """Of each token in its document; None: documents begin where end-of-text tokens are."""
    reference: npt.NDArray[np.float64] | None = None
    """Of preference pairs, at the first token of each document: its log-probability by the base; None: no pairs."""


class Batch(NamedTuple):
    """Some sequences. # int64 (num_sequences, T)"""

    inputs: Tensor
    targets: Tensor
    positions: Tensor | None = None
    """As of a row, where there are conversations in the corpora; BY_TOKENS throughout a sequence of text then."""
    num_trained: int | None = None
    """Targets of the whole inner step, of all its micro batches and ranks, that have a loss; None: every target has."""
    reference: Tensor | None = None
    """As of a row. # float64 (num_sequences, T)"""
    num_pairs: int | None = None
    """Preference pairs of the whole inner step; None: it has none."""

    def placed(self, place: Callable[[Tensor], Tensor]) -> "Batch":
        """With every tensor where `place` puts it."""
        positions = None if self.positions is None else place(self.positions)
        reference = None if self.reference is None else place(self.reference)
        placed = self._replace(inputs=place(self.inputs), targets=place(self.targets))
        return placed._replace(positions=positions, reference=reference)

    def split(self) -> "list[Batch]":
        """One sequence at a time."""
        rows = range(len(self.inputs))
        return [self.placed(lambda tensor, row=row: tensor[row : row + 1]) for row in rows]  # type: ignore[misc]


def text_row(tokens: npt.NDArray[np.int64], prompt_tokens: int = 0) -> Row:
    """The sequence of some tokens of text, after a prompt. # (T - prompt_tokens + 1,)"""
    if not prompt_tokens:
        return Row(tokens[:-1], tokens[1:])
    prompt = prompt_ids(np.arange(prompt_tokens))
    return Row(np.concatenate([prompt, tokens[:-1]]), np.concatenate([np.full_like(prompt, IGNORED), tokens[1:]]))


def chat_row(
    tokens: npt.NDArray[np.int64],
    is_trained: npt.NDArray[np.bool_],
    document_ends: npt.NDArray[np.int64],
    *,
    prompt_tokens: int = 0,
    room_id: int = 0,
) -> Row:
    """The sequence of a row of conversations. tokens, is_trained: (T,); document_ends: (num_documents,), the last is T.

    A prompt takes the place of the first `prompt_tokens` of each document, which are `room_id`. Raises ValueError for
    documents that are not those of a row.
    """
    lengths = np.diff(document_ends, prepend=0)
    if (lengths <= 0).any() or lengths.sum() != len(tokens):
        raise ValueError("documents do not end with the row")
    positions = np.arange(len(tokens)) - np.repeat(document_ends - lengths, lengths)
    targets = np.full_like(tokens, IGNORED)
    targets[:-1][is_trained[1:]] = tokens[1:][is_trained[1:]]
    if not prompt_tokens:
        return Row(tokens, targets, positions)
    in_prompt = positions < prompt_tokens
    if ((tokens != room_id) | is_trained)[in_prompt].any():
        raise ValueError(f"a conversation has no room for a prompt of {prompt_tokens} tokens before it")
    return Row(np.where(in_prompt, prompt_ids(positions), tokens), targets, positions)


def stacked(rows: Sequence[Row], *, with_positions: bool) -> Batch:
    """A batch of sequences; `with_positions` where some sequences of the corpora have them."""
    inputs, targets = (torch.from_numpy(np.stack(given)) for given in list(zip(*rows, strict=True))[:2])
    if not with_positions:
        return Batch(inputs, targets)
    by_tokens = np.full_like(rows[0].inputs, BY_TOKENS)
    positions = [by_tokens if row.positions is None else row.positions for row in rows]
    batch = Batch(inputs, targets, torch.from_numpy(np.stack(positions)))
    references = [row.reference for row in rows if row.reference is not None]
    return batch._replace(reference=torch.from_numpy(np.stack(references))) if references else batch
