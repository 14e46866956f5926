"""An institution's raw text: where it is, and reading it in blocks, with an exact place to go on from.

A source is a file, a folder, a glob or a data set; it has parts, each one file or one split of a data set, in one of
the formats of `data_tools.formats`. One process cuts a part into blocks (`read_blocks`, cheap), any number of others
parse them (`parse_block`). However a part is cut and wherever reading goes on, its records and their numbers are the
same; one that cannot be used is a `Bad` in its place.
"""

import glob
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from data_tools.documents import document_text
from data_tools.formats import (
    Bad,
    Part,
    Row,
    checked_text,
    csv_rows,
    load_dataset,
    loaded,
    parquet_rows,
    parse_documents,
    parse_json_lines,
    saved_rows,
    streamed_rows,
    whole_records,
)
from data_tools.listing import SPLIT_NAMES, TEST, Listing, file_part, list_files, split_of
from data_tools.pieces import FORMATS, SUFFIXES, PartEnds, Pieces, one_line, suffix_of
from pretrain.config.errors import ConfigError

SPLITS = ("train", "valid")
BLOCK_BYTES = 1 << 20
BLOCK_RECORDS = 2_000
# The offset of a Place after which nothing can be read.
END = -1
NAME = re.compile(r"[a-z0-9_-]+")

Place = tuple[int, int]
"""Where in a part reading goes on: the offset (bytes of unpacked text; rows for CSV, Parquet and data sets), and the
number of the last line or row before it."""


@dataclass(kw_only=True, frozen=True)
class Source:
    """One source of text: `path` or `dataset`."""

    path: str = ""
    """A file, a folder or a glob, in which ** is any folders."""
    dataset: str = ""
    """A directory that `datasets` saved, or what `datasets.load_dataset` takes: a directory or a hub name."""
    dataset_config: str = ""
    """The data set's configuration, where it has several."""
    dataset_split: str = "train"
    """The data set's split to read."""
    text: str = "text"
    """The JSON key or column that holds the text."""
    as_text: tuple[str, ...] = ()
    """Globs of files, by name or by the end of their path, that are read as text files whatever their ending is."""
    name: str = ""
    """The folder of its shards; empty: see `source_name`."""
    weight: float | None = None
    """Its share of training relative to the other sources', above 0; None: all sources are one corpus."""


@dataclass(kw_only=True)
class Block:
    """Consecutive records of one part: some BLOCK_BYTES of text or one longer record; at most BLOCK_RECORDS rows."""

    part: Part
    """What it is of."""
    first: int
    """Number of its first line or row, from 1."""
    raw: bytes = b""
    """JSON lines and text files: whole lines or documents, undecoded."""
    texts: list[Any] = field(default_factory=list)
    """Other formats: the text column's value in each record, unchecked. In any: Bad."""
    numbers: list[int] = field(default_factory=list)
    """The line or row number of each of `texts`."""
    next: Place
    """Reading goes on here after this block."""
    bytes_read: int
    """Bytes of the file that are read so far, packed as they are; rows for a data set."""


# --- where the text is ------------------------------------------------------------------------------------------------


def load_sources(file: Path) -> list[Source]:
    """Read a YAML file `sources: [{path: law/*.jsonl.zst, text: body, weight: 2}, ...]` with the fields of Source.

    Raises ConfigError naming file and key.
    """
    try:
        given = yaml.safe_load(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"--sources: {str(file)!r} given; {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--sources: {file}: not YAML ({one_line(error)}): mend it") from None
    listed = given["sources"] if isinstance(given, dict) and list(given) == ["sources"] else None
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"{file}: {one_line(repr(given))} given; allowed: one key, sources, with a list of sources")
    sources = [_checked_source(one, f"{file}: sources[{index}]") for index, one in enumerate(listed)]
    names = [source_name(source) for source in sources]
    for index, source in enumerate(sources):
        if names[index] in names[:index]:
            raise ConfigError(
                f"{file}: sources[{index}].name: {names[index]} given; allowed: each name once: set another name"
            )
        if (source.weight is None) != (sources[0].weight is None):
            raise ConfigError(f"{file}: sources[{index}].weight: {source.weight} given; allowed: on all, or on none")
    return sources


def _checked_source(given: Any, key: str) -> Source:
    if not isinstance(given, dict):
        raise ConfigError(f"{key}: {one_line(repr(given))} given; allowed: a mapping with path or dataset")
    allowed = [one.name for one in fields(Source)]
    for name, value in given.items():
        if name not in allowed:
            raise ConfigError(f"{key}.{one_line(name)}: unknown key given; allowed: {', '.join(allowed)}")
        if name == "weight":
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ConfigError(f"{key}.weight: {one_line(repr(value))} given; allowed: a number above 0")
        elif name == "as_text":
            if "dataset" in given or not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                raise ConfigError(
                    f"{key}.as_text: {one_line(repr(value))} given; allowed: beside path, a list of globs: ['*.md']"
                )
        elif not isinstance(value, str) or not value:
            raise ConfigError(f"{key}.{name}: {one_line(repr(value))} given; allowed: text, in quotes")
    if ("path" in given) == ("dataset" in given):
        raise ConfigError(f"{key}: {', '.join(given)} given; allowed: one of path and dataset")
    if not NAME.fullmatch(given.get("name", "text")):
        raise ConfigError(f"{key}.name: {given['name']!r} given; allowed: names of a-z, 0-9, _ and -")
    return Source(**given | {"as_text": tuple(given.get("as_text", ()))})


def source_name(source: Source) -> str:
    """The source's name, or else one from the last part of its path that is no wildcard and no split's name."""
    if source.name:
        return source.name
    parts = Path(os.path.abspath(source.path or source.dataset)).parts
    stems = [part.removesuffix(suffix_of(part)).lower() for part in parts if not glob.has_magic(part)]
    last = next((stem for stem in reversed(stems) if not split_of(stem)), "")
    return re.sub(r"[^a-z0-9_]+", "-", last).strip("-") or "text"


def split_file(corpus: Path, split: str) -> Path:
    """The file of a corpus folder's split (`train` or `valid`). Raises ConfigError unless there is exactly one."""
    found = [path for suffix in SUFFIXES if (path := corpus / f"{split}{suffix}").is_file()]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ConfigError(f"corpus: {corpus} has {names}; allowed: one {split} file: {FORMATS}")
    return found[0]


def training_file(corpus: Path) -> Path:
    """The file to train on: the train file of a corpus folder, or the file itself. Raises ConfigError."""
    return split_file(corpus, "train") if corpus.is_dir() else corpus


def find_text(source: Source, check: Callable[[], None] = lambda: None) -> Listing:
    """What there is of a source, and what each part is for: see `data_tools.listing`, also for data sets' splits.

    `check` is called again and again, to raise when it is time to stop. Raises ConfigError when there is nothing to
    read, or a data set cannot be loaded.
    """
    if bool(source.path) == bool(source.dataset):
        raise ConfigError(f"corpus: path {source.path!r} and dataset {source.dataset!r} given; allowed: one of them")
    if source.dataset or _is_saved(Path(source.path)):
        return _list_dataset(source)
    return list_files(source.path, source.text, source.as_text, check)


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _list_dataset(source: Source) -> Listing:
    path = Path(source.dataset or source.path)
    left_out: dict[str, list[str]] = {}
    if _is_saved(path):
        splits, left_out = _saved_splits(path, source)
        parts = [_saved_part(folder, source.text, split) for folder, split in splits.items()]
    else:
        config, split = source.dataset_config, source.dataset_split
        parts = [
            Part(path=source.dataset, kind="dataset", text=source.text, dataset_config=config, dataset_split=split)
        ]
    for part in parts:
        load_dataset(part)  # what cannot be loaded is told before anything is begun
    return Listing(parts=parts, left_out=left_out)


def _saved_splits(path: Path, source: Source) -> tuple[dict[Path, str], dict[str, list[str]]]:
    """The folders to read, each with its split, and the splits that are left out."""
    if not (path / "dataset_dict.json").is_file():
        return {path: ""}, {}
    names = loaded(path, lambda: json.loads((path / "dataset_dict.json").read_bytes())["splits"])
    if source.dataset_split not in names:
        raise ConfigError(f"dataset_split: {source.dataset_split!r} given; {path} has {', '.join(names)}")
    used = {path / source.dataset_split: ""}
    if source.dataset_split == "train":
        valid = {path / name: "valid" for name in names if SPLIT_NAMES.get(name) == "valid"}
        used = {path / "train": "train", **valid} if valid else used
    left_out: dict[str, list[str]] = {}
    for name in names:
        if path / name not in used:
            left_out.setdefault(TEST if SPLIT_NAMES.get(name) == "test" else "of other splits", []).append(name)
    return used, left_out


def _saved_part(folder: Path, text: str, split: str) -> Part:
    changed_ns = loaded(folder, (folder / "state.json").stat).st_mtime_ns
    return Part(path=str(folder), kind="saved", text=text, split=split, mtime_ns=changed_ns)


def part_identity(part: Part) -> list[Any]:
    """What tells, as JSON holds it, whether a part is still the same text."""
    return list(astuple(part))


# --- reading it -------------------------------------------------------------------------------------------------------


def read_blocks(part: Part, place: Place = (0, 0)) -> Iterator[Block]:
    """Yield the blocks of a part from a place on, in order and in constant memory.

    When a part cannot be read, or not to its end, its last record is a Bad that says why. Raises ConfigError when a
    data set cannot be loaded.
    """
    if part.kind == "document":
        if not any(place):  # the worker reads it, as that takes long
            yield Block(part=part, first=1, next=(END, 1), bytes_read=part.num_bytes)
    elif place[0] != END:
        yield from (_raw_blocks if part.kind in ("jsonl", "txt") else _row_blocks)(part, place)


def _raw_blocks(part: Part, place: Place) -> Iterator[Block]:
    offset, number = place
    pieces = Pieces(part.path, offset)
    try:
        for raw in whole_records(part.kind, pieces, BLOCK_BYTES):
            first = number + 1
            offset += len(raw)
            number += raw.count(b"\n") + (not raw.endswith(b"\n"))
            yield Block(part=part, first=first, raw=raw, next=(offset, number), bytes_read=pieces.bytes_read)
        if not offset:
            raise PartEnds("empty file", "empty: fill it or leave it out")
    except PartEnds as ends:
        yield Block(
            part=part,
            first=number + 1,
            texts=[_bad_end(part, number, ends)],
            numbers=[number + 1],
            next=(END, number),
            bytes_read=pieces.bytes_read,
        )


def _row_blocks(part: Part, place: Place) -> Iterator[Block]:
    offset, number = place
    num_read = num_bytes = 0
    texts: list[Any] = []
    numbers: list[int] = []

    def block(following: Place) -> Block:
        return Block(part=part, first=numbers[0], texts=texts, numbers=numbers, next=following, bytes_read=num_read)

    try:
        for number, value, read in _rows(part, offset):
            num_read = read
            offset += 1
            texts.append(value)
            numbers.append(number)
            num_bytes += len(value) if isinstance(value, str | bytes) else 0
            if num_bytes >= BLOCK_BYTES or len(texts) == BLOCK_RECORDS:
                yield block((offset, number))
                texts, numbers, num_bytes = [], [], 0
        if not offset:
            raise PartEnds("empty file", "empty, without a row: fill it or leave it out")
    except PartEnds as ends:
        texts.append(_bad_end(part, number, ends))
        numbers.append(number + 1)
        offset = END
    if texts:
        yield block((offset, number))


def _rows(part: Part, first: int) -> Iterator[Row]:
    rows = {"csv": csv_rows, "parquet": parquet_rows, "saved": saved_rows, "dataset": streamed_rows}
    return rows[part.kind](part, first)


def _bad_end(part: Part, number: int, ends: PartEnds) -> Bad:
    where = f"{part.path}, after {part.unit} {number}" if number else part.path
    return Bad(ends.reason, f"{where}: {ends.what}")


def parse_block(block: Block) -> Iterator[tuple[int, str | Bad]]:
    """Line or row number and text, blank ones too, of every record of a block."""
    if block.part.kind == "jsonl":
        yield from parse_json_lines(block.part, block.raw, block.first)
    elif block.part.kind == "document":
        yield 1, document_text(block.part)
    elif block.part.kind == "txt":
        yield from parse_documents(block.part, block.raw, block.first)
    for number, value in zip(block.numbers, block.texts, strict=True):
        yield number, checked_text(block.part, number, value)


def read_documents(path: Path) -> Iterator[str]:
    """Yield the texts of one file, under "text", that are not blank, in order and in constant memory.

    Raises ConfigError, with file and line, for what cannot be used.
    """
    yield from _part_texts(file_part(path, "text"))


def read_parts(parts: Iterable[Part]) -> Iterator[str]:
    """Yield the texts of parts that are not blank, but for those that are held out. Raises ConfigError."""
    for part in parts:
        if part.split != "valid":
            yield from _part_texts(part)


def _part_texts(part: Part) -> Iterator[str]:
    for block in read_blocks(part):
        for _, text in parse_block(block):
            if isinstance(text, Bad):
                raise ConfigError(text.message)
            if text and not text.isspace():
                yield text
