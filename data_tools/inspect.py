"""What packed splits hold: sizes, lengths, tokens, and decoded samples for whoever asks for them.

Memory does not grow with a split: files are mapped and read in pieces. Nothing but names and numbers goes into the
picture; text of documents goes to the terminal of the one who asked for samples and nowhere else.
"""

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from data_tools.report import (
    COLORS,
    REPORT_FILE,
    WIDTH_INCHES,
    format_bytes,
    format_count,
    format_ratio,
    new_picture,
    print_described,
    printable,
)
from data_tools.report import print_side_by_side as print_columns
from data_tools.tokenizer import load_tokenizer, tokenizer_file
from pretrain.config.errors import ConfigError
from pretrain.host.foreign import loads
from pretrain.silo.shards import (
    DOCUMENTS_FILE,
    MANIFEST_FILE,
    Manifest,
    open_documents,
    open_shard,
    read_manifest,
    token_outside_vocabulary,
    tokenizer_sha256,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEY = "splits"
# Tokens, or documents, that are looked at together.
PIECE = 1 << 20
# Of a larger split only so many tokens are counted, in pieces spread evenly over it.
MAX_COUNTED_TOKENS = 1 << 28
PERCENTILES = (1, 10, 50, 90, 99)
NUM_FREQUENT_TOKENS = 10
SAMPLE_CHARACTERS = 400
# A token that is not special has at least one byte, a character at most four: so many tokens are enough to decode.
SAMPLE_TOKENS = 4 * SAMPLE_CHARACTERS
MAX_PLOTTED_RANKS = 400
LINE_STYLES = ("-", "--", ":", "-.")


@dataclass(kw_only=True, frozen=True)
class Sample:
    """The beginning of one document."""

    number: int
    """Which document of the split, from 0."""
    num_tokens: int
    """Of the whole document, its end-of-text token included."""
    text: str
    """At most SAMPLE_CHARACTERS; ends in an ellipsis when the document goes on."""


@dataclass(kw_only=True, frozen=True)
class Inspection:
    """What was found in one packed split."""

    name: str
    """Its path below what all the given directories have in common."""
    manifest: Manifest
    """Documents, tokens, bytes, token type."""
    token_counts: npt.NDArray[np.int64]
    """How often each token was seen among those that were counted. # (vocab_size,)"""
    lengths: npt.NDArray[np.int64]
    """Each length, in tokens with the end-of-text token, that a document has; rising. # (num_lengths,)"""
    length_counts: npt.NDArray[np.int64]
    """Documents of each of these lengths. # (num_lengths,)"""
    frequent: tuple[tuple[str, float], ...]
    """The most frequent tokens and their shares of those that were counted; ids where no tokenizer was given."""
    samples: tuple[Sample, ...]
    """In the order of the documents."""

    @property
    def num_counted_tokens(self) -> int:
        """Tokens in `token_counts`: all of them, unless the split has more than MAX_COUNTED_TOKENS."""
        return int(self.token_counts.sum())

    @property
    def vocabulary_used(self) -> float:
        """Share of the vocabulary's entries that were seen."""
        return float(np.count_nonzero(self.token_counts) / self.manifest.vocab_size)

    def length_percentile(self, percent: float) -> int:
        """The shortest length, in tokens, that `percent` of the documents do not exceed."""
        ranks = np.cumsum(self.length_counts)
        return int(self.lengths[np.searchsorted(ranks, percent * ranks[-1] / 100)])


def inspect_splits(
    directories: Sequence[Path],
    *,
    tokenizer: Path | None = None,
    num_samples: int = 0,
    seed: int = 0,
    picture: Path | None = None,
) -> list[Inspection]:
    """Look into packed splits, given themselves or as folders that hold some at any depth; sorted by path.

    `tokenizer`, a tokenizer.json or a folder that holds one, is what turns tokens into text. `seed` decides which
    `num_samples` documents of each split are decoded. `picture` is where a PNG of document lengths and token
    frequencies is written. Raises ConfigError, before anything is counted, when there is no split, one was packed with
    another tokenizer, samples are asked for without one, or the picture is no .png; later for a damaged split.
    """
    if num_samples < 0:
        raise ConfigError(f"--samples: {num_samples} given; allowed: 0 or more")
    if num_samples and tokenizer is None:
        raise ConfigError(f"--samples: {num_samples} given, and no tokenizer to decode with: add --tokenizer")
    if picture is not None and picture.suffix != ".png":
        raise ConfigError(f"--picture: {str(picture)!r} given; allowed: a name that ends in .png")
    decoder, manifests = open_splits(directories, tokenizer)
    found = [
        _inspect(name, directory, manifest, decoder=decoder, num_samples=num_samples, seed=seed)
        for directory, (name, manifest) in manifests.items()
    ]
    if picture is not None:
        with new_picture(picture) as figure:
            _draw(figure, found)
    return found


def open_splits(
    directories: Sequence[Path], tokenizer: Path | None
) -> tuple[Tokenizer | None, dict[Path, tuple[str, Manifest]]]:
    """The tokenizer, if one was given, and the name and manifest of each split. Raises ConfigError as above."""
    decoder, sha256 = None, None
    if tokenizer is not None:
        file = tokenizer_file(tokenizer)
        decoder, sha256 = load_tokenizer(file), tokenizer_sha256(file, key="--tokenizer")
    manifests: dict[Path, tuple[str, Manifest]] = {}
    for directory, name in find_splits(directories).items():
        manifest = read_manifest(directory, key=KEY)
        if sha256 not in (None, manifest.tokenizer_sha256):
            raise ConfigError(
                f"--tokenizer: {tokenizer} given, which is {str(sha256)[:12]}; {directory} was packed with "
                f"{manifest.tokenizer_sha256[:12]}: name the tokenizer.json that packed it"
            )
        manifests[directory] = name, manifest
    return decoder, manifests


def find_splits(directories: Sequence[Path]) -> dict[Path, str]:
    """The packed splits that `directories` are or hold, each once, to their paths below what all have in common.

    Hidden folders, in which a split may be in the making, are passed over. Raises ConfigError for a directory that
    neither is nor holds one.
    """
    found: set[Path] = set()
    roots: set[str] = set()
    for directory in directories:
        if not directory.is_dir():
            raise ConfigError(f"{KEY}: {str(directory)!r} given; there is no such folder: name a packed split")
        # Not resolved: a link keeps the name that the user gave it.
        root = Path(os.path.abspath(directory))
        splits = [path.parent for path in root.rglob(MANIFEST_FILE)]
        visible = [split for split in splits if not any(part[0] == "." for part in split.relative_to(root).parts)]
        if root in splits:
            visible = [root]
        if not visible:
            raise ConfigError(
                f"{KEY}: {str(directory)!r} given; there is no {MANIFEST_FILE} in it or below: name a packed split, or "
                "a folder of some (atoll data prepare)"
            )
        found.update(visible)
        roots.add(str(root.parent if visible == [root] else root))
    common = os.path.commonpath(roots)
    return {split: str(split.relative_to(common)) for split in sorted(found)}


def _inspect(
    name: str, directory: Path, manifest: Manifest, *, decoder: Tokenizer | None, num_samples: int, seed: int
) -> Inspection:
    lengths, length_counts = _count_lengths(directory, manifest)
    counts = _count_tokens(directory, manifest)
    # The most frequent first; of equally frequent ones the smaller id.
    most_frequent = np.argsort(-counts, kind="stable")[:NUM_FREQUENT_TOKENS]
    return Inspection(
        name=name,
        manifest=manifest,
        token_counts=counts,
        lengths=lengths,
        length_counts=length_counts,
        frequent=tuple(
            (_show_token(int(token), decoder), float(counts[token] / counts.sum()))
            for token in most_frequent
            if counts[token]
        ),
        samples=() if decoder is None else tuple(_samples(directory, manifest, decoder, num_samples, seed)),
    )


def _count_lengths(
    directory: Path, manifest: Manifest
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:  # both (num_lengths,)
    """The lengths that documents have, and how many have each.

    Exact, and small: documents of n different lengths have at least n (n + 1) / 2 tokens.
    """
    ends = open_documents(directory, manifest)
    lengths, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    begin = 0
    for first in range(0, len(ends), PIECE):
        piece = np.diff(ends[first : first + PIECE].astype(np.int64), prepend=begin)
        if piece.min() < 1:
            break
        begin += int(piece.sum())
        lengths, where = np.unique(np.concatenate([lengths, piece]), return_inverse=True)
        weights = np.concatenate([counts, np.ones(len(piece), np.int64)])
        counts = np.zeros(len(lengths), np.int64)
        np.add.at(counts, where, weights)
    if begin != manifest.num_tokens:
        raise ConfigError(
            f"{KEY}: {directory / DOCUMENTS_FILE} does not hold the ends of documents, rising to the "
            f"{manifest.num_tokens} tokens of {MANIFEST_FILE}: copy or prepare the split again"
        )
    return lengths, counts


def _count_tokens(directory: Path, manifest: Manifest) -> npt.NDArray[np.int64]:  # (vocab_size,)
    """How often each token occurs, in the whole split or in pieces of it, MAX_COUNTED_TOKENS in all."""
    num_pieces = -(-min(manifest.num_tokens, MAX_COUNTED_TOKENS) // PIECE)
    if manifest.num_tokens <= MAX_COUNTED_TOKENS:
        starts = [number * PIECE for number in range(num_pieces)]
    else:
        starts = [number * (manifest.num_tokens - PIECE) // max(1, num_pieces - 1) for number in range(num_pieces)]
    counts = np.zeros(manifest.vocab_size, np.int64)
    for start in starts:
        for file, tokens in _read_tokens(directory, manifest, start, min(start + PIECE, manifest.num_tokens)):
            if tokens.max() >= manifest.vocab_size:
                raise ConfigError(token_outside_vocabulary(KEY, file, int(tokens.max()), manifest))
            counts += np.bincount(tokens, minlength=manifest.vocab_size)
    return counts


def _read_tokens(directory: Path, manifest: Manifest, start: int, stop: int) -> Iterator[tuple[Path, npt.NDArray[Any]]]:
    """Tokens `start` to `stop` of the split, shard by shard, with the file they are from."""
    begin = 0
    for shard in manifest.shards:
        first, last = max(start - begin, 0), min(stop - begin, shard.num_tokens)
        if first < last:
            yield directory / shard.file, open_shard(directory, manifest, shard)[first:last]
        begin += shard.num_tokens


def _samples(directory: Path, manifest: Manifest, decoder: Tokenizer, num_samples: int, seed: int) -> Iterator[Sample]:
    ends = open_documents(directory, manifest)
    chosen = random.Random(seed).sample(range(len(ends)), min(num_samples, len(ends)))
    for number in sorted(chosen):
        start, end = int(ends[number - 1]) if number else 0, int(ends[number])
        pieces = _read_tokens(directory, manifest, start, min(end - 1, start + SAMPLE_TOKENS))
        tokens = [int(token) for _, piece in pieces for token in piece]
        text = decoder.decode(tokens, skip_special_tokens=False)
        cut = text[:SAMPLE_CHARACTERS]
        is_whole = text == cut and len(tokens) == end - start - 1
        yield Sample(number=number, num_tokens=end - start, text=cut if is_whole else f"{cut}…")


def _show_token(token: int, decoder: Tokenizer | None) -> str:
    """A token as quoted text; as the vocabulary writes it when its bytes alone are no text."""
    if decoder is None:
        return f"id {token}"
    text = decoder.decode([token], skip_special_tokens=False)
    return repr(text) if text and "\N{REPLACEMENT CHARACTER}" not in text else str(decoder.id_to_token(token))


# --- what is shown ----------------------------------------------------------------------------------------------------


def print_inspections(found: Sequence[Inspection], console: Console) -> None:
    """Print a table with a column for each split, their most frequent tokens, and the samples that were asked for."""
    manifests = [one.manifest for one in found]
    rows = [
        ("documents", [format_count(manifest.num_documents) for manifest in manifests]),
        ("tokens", [format_count(manifest.num_tokens) for manifest in manifests]),
        ("text", [format_bytes(manifest.num_bytes) for manifest in manifests]),
        ("bytes per token", [format_ratio(manifest.num_bytes, manifest.num_tokens) for manifest in manifests]),
        *_of_conversations(manifests),
        ("token type", [manifest.token_type for manifest in manifests]),
        ("vocabulary", [format_count(manifest.vocab_size) for manifest in manifests]),
        ("  used", [f"{one.vocabulary_used:.1%}".replace("%", " %") for one in found]),
        ("document, tokens", [""] * len(found)),
        ("  mean", [f"{manifest.num_tokens / manifest.num_documents:,.1f}" for manifest in manifests]),
    ]
    for percent in PERCENTILES:
        label = "  median" if percent == 50 else f"  {percent} % up to"
        rows.append((label, [format_count(one.length_percentile(percent)) for one in found]))
    rows.append(("  longest", [format_count(int(one.lengths[-1])) for one in found]))
    names = [one.name for one in found]
    print_columns(console, names, rows)
    frequent = [[f"{token} {100 * share:.1f} %" for token, share in one.frequent] for one in found]
    ranks = range(max(len(tokens) for tokens in frequent))
    shown = [(f"  {rank + 1}", [tokens[rank] if rank < len(tokens) else "" for tokens in frequent]) for rank in ranks]
    print_columns(console, names, shown, label="frequent tokens")
    for one in found:
        if one.num_counted_tokens < one.manifest.num_tokens:
            sampled = f"{one.num_counted_tokens:,} of {one.manifest.num_tokens:,}"
            console.print(Text(f"{one.name}: tokens counted in pieces spread evenly, {sampled}\n"), soft_wrap=True)
    for one in found:
        for sample in one.samples:
            heading = f"{one.name}, document {sample.number:,}, {sample.num_tokens:,} tokens"
            console.print(Text(heading, style="bold"), Text(printable(sample.text)), Text(), sep="\n", soft_wrap=True)


def _of_conversations(manifests: Sequence[Manifest]) -> list[tuple[str, list[str]]]:
    """Rows and what of them is trained, where a split is of conversations; of these what fills a row is a document."""
    chats = [manifest.chat for manifest in manifests]
    if not any(chats):
        return []
    rows = [format_count(one.num_tokens // one.chat.sequence_tokens) if one.chat else "" for one in manifests]
    shares = [f"{100 * one.num_trained_tokens / one.num_tokens:.1f} %" for one in manifests]
    found = [
        ("rows", rows),
        ("  of tokens", [format_count(chat.sequence_tokens) if chat else "" for chat in chats]),
        ("  trained", shares),
    ]
    prompts = [chat.prompt_tokens if chat else None for chat in chats]
    return [*found, ("  prompts of", [str(one or "") for one in prompts])] if any(prompts) else found


def print_reports(splits: Iterable[Path], console: Console) -> None:
    """Print what `atoll data prepare` reported of the splits' languages and quality, each report once.

    Raises ConfigError for a report that is damaged. Of a split that was moved away from its report nothing is said.
    """
    # OUTPUT/train or OUTPUT/NAME/train
    files = {folder / REPORT_FILE: None for split in splits for folder in split.parents[:2]}
    for file in filter(Path.is_file, files):
        try:
            report = loads(file.read_bytes())
            if "recipe" in report:
                print_described(report, console)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError):
            raise ConfigError(
                f"{KEY}: {file} is no whole report of atoll data prepare: delete it, or prepare the text again"
            ) from None


def _draw(figure: "Figure", found: Sequence[Inspection]) -> None:
    """How long documents are, and how frequent the token of each rank is: one line a split in either."""
    from matplotlib.ticker import FuncFormatter, LogFormatter

    rows_of_legend = -(-len(found) // 4)
    figure.set_size_inches(WIDTH_INCHES, 4.0 + 0.25 * rows_of_legend)
    lengths, ranks = figure.subplots(1, 2)
    lines = []
    for number, one in enumerate(found):
        color, style = COLORS[number % len(COLORS)], LINE_STYLES[number // len(COLORS) % len(LINE_STYLES)]
        lines.append(_draw_lengths(lengths, one, color=color, linestyle=style))
        frequencies = -np.sort(-one.token_counts[one.token_counts > 0]) / one.num_counted_tokens
        shown = np.unique(np.geomspace(1, len(frequencies), MAX_PLOTTED_RANKS).round().astype(np.int64))
        ranks.plot(shown, 100 * frequencies[shown - 1], color=color, linestyle=style)
    lengths.set_title("length of documents")
    lengths.set_xlabel("tokens in a document")
    lengths.set_ylabel("% of documents, two steps to a doubling")
    lengths.set_ylim(bottom=0)
    ranks.set_title("how frequent tokens are")
    ranks.set_xlabel("rank of the token, the most frequent first")
    ranks.set_ylabel("% of the tokens counted")
    ranks.set_yscale("log")
    for axes in (lengths, ranks):
        axes.set_xscale("log")
    for axis in (lengths.xaxis, ranks.xaxis, ranks.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
        # Labels between powers of ten where these are few; the default writes them as mathematics.
        axis.set_minor_formatter(LogFormatter())
    figure.legend(lines, [one.name for one in found], loc="outside upper left", ncols=4)


def _draw_lengths(axes: "Axes", one: Inspection, *, color: str, linestyle: str) -> Any:
    """A histogram of whole lengths with two steps to a doubling; returns its outline."""
    num_steps = 2 * int(one.lengths[-1]).bit_length()
    edges = np.unique(np.ceil(2.0 ** (np.arange(num_steps + 1) / 2))).astype(np.int64)
    counts, _ = np.histogram(one.lengths, edges, weights=one.length_counts)
    used = np.flatnonzero(counts)
    counts, edges = counts[used[0] : used[-1] + 1], edges[used[0] : used[-1] + 2]
    shares = 100 * counts / one.manifest.num_documents
    return axes.stairs(shares, edges, color=color, linestyle=linestyle, linewidth=1.8)
