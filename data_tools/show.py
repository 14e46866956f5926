"""Packed conversations as text, with what of them is learned: `atoll data show`.

Text of conversations goes to the terminal of the one who asked for it and nowhere else.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from data_tools.inspect import open_splits
from data_tools.report import printable
from pretrain.config.errors import ConfigError
from pretrain.silo.shards import Manifest, open_documents, open_mask, open_shard, trained

LEARNED = "bold green"
# Where there is no colour.
OPENING, CLOSING = "[[", "]]"
# Documents for each that is shown, as some fill rows.
LOOKED_AT = 100

Run = tuple[str, bool]
"""Some of a conversation's text, and whether it is learned."""


def print_conversations(
    directories: Sequence[Path], tokenizer: Path, *, num_samples: int, seed: int, console: Console
) -> None:
    """Print so many conversations of each split, chosen by `seed`. Raises ConfigError for what is none."""
    if num_samples < 1:
        raise ConfigError(f"--samples: {num_samples} given; allowed: 1 or more")
    decoder, splits = open_splits(directories, tokenizer)
    assert decoder
    for directory, (_, manifest) in splits.items():
        if not manifest.chat:
            raise ConfigError(
                f"show: {directory} given, which is of text; allowed: conversations (atoll data prepare --chat): type "
                "atoll data inspect --samples to see text"
            )
    has_color = console.color_system is not None and not console.no_color
    for directory, (name, manifest) in splits.items():
        for number, tokens, learned in _chosen(directory, manifest, num_samples, seed):
            counts = f"{len(tokens):,} tokens, {int(learned.sum()):,} learned"
            console.print(Text(f"{name}, document {number:,}, {counts}", style="bold"), soft_wrap=True)
            console.print(_shown(runs(tokens, learned, decoder), has_color), Text(), sep="\n", soft_wrap=True)


def _chosen(
    directory: Path, manifest: Manifest, num_samples: int, seed: int
) -> Iterator[tuple[int, npt.NDArray[Any], npt.NDArray[np.bool_]]]:
    """Numbers, tokens and masks of some documents of which anything is learned, in their order."""
    ends = open_documents(directory, manifest)
    shard_ends = np.cumsum([shard.num_tokens for shard in manifest.shards])
    assert manifest.chat
    found, room = {}, manifest.chat.prompt_tokens or 0  # of a prompt, which is no part of a conversation
    for number in random.Random(seed).sample(range(len(ends)), min(len(ends), LOOKED_AT * num_samples)):
        begin, end = int(ends[number - 1]) if number else 0, int(ends[number])
        index = int(np.searchsorted(shard_ends, begin, side="right"))
        shard = manifest.shards[index]
        before = int(shard_ends[index]) - shard.num_tokens
        learned = trained(open_mask(directory, shard), begin - before, end - before)
        if learned.any():  # or else it fills a row
            tokens = open_shard(directory, manifest, shard)[begin - before : end - before]
            found[number] = tokens[room:], learned[room:]
        if len(found) == num_samples:
            break
    yield from ((number, *found[number]) for number in sorted(found))


def runs(tokens: npt.NDArray[Any], learned: npt.NDArray[np.bool_], decoder: Tokenizer) -> list[Run]:
    """A conversation's text in the pieces that are learned, and those between them."""
    edges = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(tokens)]
    return [
        (decoder.decode(tokens[begin:end].tolist(), skip_special_tokens=False), bool(learned[begin]))
        for begin, end in itertools.pairwise(edges)
    ]


def _shown(pieces: Sequence[Run], has_color: bool) -> Text:
    shown = Text()
    for text, is_learned in pieces:
        written = printable(text)
        if is_learned and not has_color:
            written = f"{OPENING}{written}{CLOSING}"
        shown.append(written, style=LEARNED if is_learned and has_color else "")
    return shown
