"""Files of text in every format, written for tests, and what is read from them."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from data_tools import formats, pieces, sources
from data_tools.formats import Bad, Part
from data_tools.sources import Block, Place, Source, find_text, parse_block, read_blocks

TEXTS = [
    "The appeal is allowed.\nCosts follow the event.\n",
    "Der Patient klagt über 日本語 🙂.",
    "Said <|endoftext|> here.",
]
Records = list[tuple[int, str | Bad]]


def pack(name: str, raw: bytes, *, num_frames: int = 1) -> bytes:
    """As a file of that name holds it, in several gzip members or zstandard frames."""
    size = max(1, -(-len(raw) // num_frames))
    parts = [raw[begin : begin + size] for begin in range(0, len(raw), size)]
    if name.endswith(".gz"):
        return b"".join(gzip.compress(part) for part in parts)
    if name.endswith(".zst"):
        return b"".join(zstandard.ZstdCompressor(write_checksum=True).compress(part) for part in parts)
    if name.endswith(".bz2"):
        return b"".join(bz2.compress(part) for part in parts)
    if name.endswith(".xz"):
        return b"".join(lzma.compress(part) for part in parts)
    return raw


def write(path: Path, raw: bytes, *, num_frames: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack(path.name, raw, num_frames=num_frames))
    return path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    return write(path, "".join(json.dumps({"text": text, "source": 1}) + "\n" for text in texts).encode())


def write_csv(path: Path, texts: list[str], *, delimiter: str = ",") -> Path:
    rows = io.StringIO(newline="")
    csv.writer(rows, delimiter=delimiter).writerows(
        [["id", "text"], *([index, text] for index, text in enumerate(texts))]
    )
    return write(path, rows.getvalue().encode())


def write_parquet(path: Path, texts: list[Any], *, row_group_size: int = 2, text_type: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, text_type or pa.string())})
    pa.parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def save_dataset(path: Path, texts: list[Any]) -> Path:
    datasets.disable_progress_bars()
    features = datasets.Features({"id": datasets.Value("int64"), "text": datasets.Value("string")})
    rows = {"id": list(range(len(texts))), "text": texts}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(path))
    return path


def part_of(path: Path, text: str = "text", *, key: str = "path") -> Part:
    (part,) = find_text(Source(**{key: str(path)}, text=text)).parts
    return part


def blocks_of(part: Part, place: Place = (0, 0), **constants: int) -> list[Block]:
    """Read with other constants."""
    with pytest.MonkeyPatch.context() as patch:
        set_constants(patch, constants)
        return list(read_blocks(part, place))


def parsed(block: Block, **constants: int) -> Records:
    """Parse with other constants, as another process would."""
    with pytest.MonkeyPatch.context() as patch:
        set_constants(patch, constants)
        return list(parse_block(pickle.loads(pickle.dumps(block))))


def records_of(part: Part, place: Place = (0, 0), **constants: int) -> Records:
    """All records from a place on."""
    return [record for block in blocks_of(part, place, **constants) for record in parsed(block, **constants)]


def set_constants(patch: pytest.MonkeyPatch, constants: dict[str, int]) -> None:
    """Set constants of the module that has them."""
    for name, value in constants.items():
        patch.setattr(next(module for module in (sources, pieces, formats) if hasattr(module, name)), name, value)


def messages(part: Part) -> list[str]:
    """What is bad, each one line that begins with the file."""
    bad = [text.message for _, text in records_of(part) if isinstance(text, Bad)]
    assert all("\n" not in message and message.startswith(part.path) for message in bad)
    return [message.removeprefix(part.path) for message in bad]


def reasons(part: Part) -> list[str]:
    return [text.reason if isinstance(text, Bad) else "" for _, text in records_of(part)]


def check_law(part: Part, cut: dict[str, int], other: dict[str, int], **constants: int) -> Records:
    """Returns the records, after any cut and restart has given the same."""
    expected = records_of(part, **constants)
    blocks = blocks_of(part, **cut, **constants)
    num_before = 0
    for block in blocks:
        found = parsed(block, **constants)
        assert found == expected[num_before : num_before + len(found)]
        num_before += len(found)
        place = tuple(json.loads(json.dumps(block.next)))
        assert records_of(part, place, **other, **constants) == expected[num_before:]
        assert block.first <= min((number for number, _ in found), default=block.first)
        assert len(block.texts) <= cut["BLOCK_RECORDS"] + 1
    assert num_before == len(expected)
    return expected
