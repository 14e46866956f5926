"""The formats of text: cutting them where records end, and parsing records; data_tools.pieces unpacks them.

    NAME.jsonl, .ndjson  one JSON object a line, the text under the part's key; other keys are not read
    NAME.json            the same, where the first line is such an object
    NAME.txt, .text      documents separated by lines that hold <|endoftext|> and nothing else
    NAME.csv, NAME.tsv   a header row, then rows; the text in the part's column
    NAME.parquet         the text in the part's column, which holds strings
    NAME.pdf, .docx, .html  one document: see data_tools.documents
    a data set           saved by `datasets`, or what its `load_dataset` takes, streamed

All above Parquet also as .gz, .zst, .bz2 and .xz; text is UTF-8, and a byte order mark before it is dropped.
"""

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_tools.conversations import COLUMNS
from data_tools.pieces import READ_BYTES, PartEnds, Pieces, one_line, suffix_of, unreadable
from pretrain.config.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

TEXT_SEPARATOR = "<|endoftext|>"
# A text file without separators would be one document of any size; it is cut so that memory stays bounded.
MAX_TEXT_DOCUMENT_BYTES = 1_000_000
# A quote that is never closed would swallow the rest of the file.
MAX_CSV_FIELD_CHARACTERS = 1 << 27
# Bytes and rows that are taken from a column at a time.
COLUMN_BYTES = 1 << 20
COLUMN_ROWS = 2_000
# More is not read of a .json to see whether it is JSON lines.
MAX_FIRST_LINE_BYTES = 1 << 26
# In place of the key or column of text: all of a record, as JSON.
WHOLE = ""
WHOLE_KINDS = ("jsonl", "parquet", "saved", "dataset")
ON_BAD = ("stop", "skip")
MAX_BAD_EXAMPLES = 20
_SEPARATOR_LINE = re.compile(rb"(?m)^(?:\xef\xbb\xbf)?[ \t\r\f\v]*<\|endoftext\|>[ \t\r\f\v]*(?:\n|\Z)")

Kind = Literal["jsonl", "txt", "csv", "parquet", "document", "saved", "dataset"]

Row = tuple[int, Any, int]
"""Number of its line or row, value of the text column or Bad, and what is read so far: see Block.bytes_read."""


@dataclass(kw_only=True, frozen=True)
class Part:
    """One file of a source, or one split of a data set."""

    path: str
    """The file, the saved directory, or the data set's name."""
    kind: Kind
    """How it is read."""
    text: str = "text"
    """The JSON key or column that holds the text; WHOLE: the whole record, of columns `conversations.COLUMNS`."""
    split: str = ""
    """train or valid where the folder says so; empty: neither."""
    num_bytes: int = 0
    """Size of the file, packed as it is; 0 for a data set."""
    mtime_ns: int = 0
    """When it was last changed; 0 for a data set that is streamed."""
    dataset_config: str = ""
    """The data set's configuration, where it has several."""
    dataset_split: str = ""
    """The data set's split."""

    @property
    def unit(self) -> str:
        """What its numbers count: line, row or document."""
        return "line" if self.kind in ("jsonl", "txt", "csv") else "document" if self.kind == "document" else "row"


@dataclass(frozen=True)
class Bad:
    """A record that cannot be used, or the reason why a part ends early."""

    reason: str
    """Its kind, the name of a count."""
    message: str
    """One line: file, line or row number, what is wrong and what to do."""


def check_on_bad(on_bad: str) -> None:
    """Raise ConfigError for what may not be done about records that cannot be used."""
    if on_bad not in ON_BAD:
        raise ConfigError(f"--on-bad: {on_bad!r} given; allowed: {', '.join(ON_BAD)}")


def stop_at_bad(found: Sequence[Bad], on_bad: str) -> None:
    """Raise ConfigError for the first of some records that cannot be used, unless they are skipped."""
    if found and on_bad == "stop":
        raise ConfigError(f"{found[0].message}, or give --on-bad skip")


def nothing_bad() -> dict[str, Any]:
    """What `count_bad` adds to: a number of each kind, and the first messages."""
    return {"bad": {}, "bad_examples": []}


def count_bad(counts: dict[str, Any], found: Iterable[Bad]) -> None:
    """Count records that were skipped."""
    for bad in found:
        counts["bad"][bad.reason] = counts["bad"].get(bad.reason, 0) + 1
        if len(counts["bad_examples"]) < MAX_BAD_EXAMPLES:
            counts["bad_examples"].append(bad.message)


def whole_records(kind: str, pieces: Iterable[bytes], block_bytes: int) -> Iterator[bytes]:
    """Cut JSON lines (kind jsonl) or documents (txt) into runs of at most `block_bytes`, or of one longer record.

    Where the text is damaged (PartEnds) all whole records before are given, and what follows them is dropped.
    """
    last_end = _last_line_end if kind == "jsonl" else _last_document_end
    buffer, lines_bytes = bytearray(), 0  # up to the end of the last whole line

    def whole(min_bytes: int) -> Iterator[bytes]:
        nonlocal lines_bytes
        while len(buffer) >= min_bytes and lines_bytes and (size := last_end(buffer, lines_bytes, block_bytes)):
            yield bytes(buffer[:size])
            del buffer[:size]
            lines_bytes -= size

    try:
        for piece in pieces:
            if newline := piece.rfind(b"\n") + 1:
                lines_bytes = len(buffer) + newline
            buffer += piece
            yield from whole(block_bytes)
    except PartEnds:
        yield from whole(0)
        raise
    if buffer:
        yield bytes(buffer)


def _last_line_end(buffer: bytearray, lines_bytes: int, block_bytes: int) -> int:
    return buffer.rfind(b"\n", 0, block_bytes) + 1 or buffer.find(b"\n", block_bytes, lines_bytes) + 1


def _last_document_end(buffer: bytearray, lines_bytes: int, block_bytes: int) -> int:
    """The last end of a document within `block_bytes`, or else the first one after; 0: none. A document begins at 0."""
    begin = min(lines_bytes, block_bytes)
    while (begin := buffer.rfind(TEXT_SEPARATOR.encode(), 0, begin)) >= 0:
        begin = buffer.rfind(b"\n", 0, begin) + 1
        if separator := _SEPARATOR_LINE.match(buffer, begin, lines_bytes):
            return separator.end()
    separator = _SEPARATOR_LINE.search(buffer, 0, lines_bytes)
    document_bytes = separator.start() if separator else lines_bytes
    cut = buffer.find(b"\n", MAX_TEXT_DOCUMENT_BYTES - 1, document_bytes) + 1
    return cut or (separator.end() if separator else 0)


# --- records ----------------------------------------------------------------------------------------------------------


def _without_mark(raw: bytes, *, at_start: bool) -> bytes:
    return raw.removeprefix(codecs.BOM_UTF8) if at_start else raw


def parse_json_lines(part: Part, raw: bytes, first: int) -> Iterator[tuple[int, str | Bad]]:
    """Line number, from `first` on, and text of every line that is not blank."""
    for number, line in enumerate(_without_mark(raw, at_start=first == 1).split(b"\n"), start=first):
        if line and not line.isspace():
            yield number, _json_text(part, line, number)


def is_json_lines(path: str, text: str) -> bool:
    """Whether the first line of a file is a JSON object with text under the key; an empty or unreadable file is for the
    reader."""
    start = b""
    try:
        for piece in Pieces(path, 0):
            start = _without_mark(start + piece, at_start=True).lstrip()
            if (start and not start.startswith(b"{")) or len(start) > MAX_FIRST_LINE_BYTES:
                return False
            if b"\n" in start:
                break
        if not start:
            return True
        record = json.loads(start.partition(b"\n")[0])
    except PartEnds:  # the reader says so
        return True
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and (text == WHOLE or isinstance(record.get(text), str))


def _json_text(part: Part, line: bytes, number: int) -> str | Bad:
    where = f"{part.path}, line {number}"
    try:
        decoded = line.decode("utf-8")
        if part.text == WHOLE:
            return decoded  # whoever wants it parses it
        record = json.loads(decoded)
    except UnicodeDecodeError as error:
        return Bad("not UTF-8", f"{where}: not UTF-8 ({error.reason}): convert the file")
    except (ValueError, RecursionError) as error:
        return Bad("not JSON", f"{where}: not JSON ({one_line(error)}): mend or drop the line")
    text = record.get(part.text) if isinstance(record, dict) else None
    if not isinstance(text, str):
        allowed = f'{{{json.dumps(part.text, ensure_ascii=False)}: "..."}}'
        return Bad(
            "no text", f"{where}: no text; allowed: {allowed}: mend or drop the line, or name its key (--text-field)"
        )
    return checked_text(part, number, text)


def parse_documents(part: Part, raw: bytes, first: int) -> Iterator[tuple[int, str | Bad]]:
    """Number of its first line, lines counted from `first` on, and text of every document."""
    begin, line = 0, first
    for separator in itertools.chain(_SEPARATOR_LINE.finditer(raw), [None]):
        end, following = separator.span() if separator else (len(raw), len(raw))
        while cut := raw.find(b"\n", begin + MAX_TEXT_DOCUMENT_BYTES - 1, end) + 1:
            yield line, _document(part, raw[begin:cut], line)
            line, begin = line + raw.count(b"\n", begin, cut), cut
        if separator or begin < end:
            yield line, _document(part, raw[begin:end], line)
        line, begin = line + raw.count(b"\n", begin, following), following


def _document(part: Part, document: bytes, line: int) -> str | Bad:
    try:
        return _without_mark(document, at_start=line == 1).decode("utf-8")
    except UnicodeDecodeError as error:
        number = line + document.count(b"\n", 0, error.start)
        return Bad("not UTF-8", f"{part.path}, line {number}: not UTF-8 ({error.reason}): convert the file")


def checked_text(part: Part, number: int, value: Any) -> str | Bad:
    """A value that should be text, as str or UTF-8 bytes. A Bad stays one."""
    if isinstance(value, Bad):
        return value
    where, drop = f"{part.path}, {part.unit} {number}", f"mend or drop the {part.unit}"
    if not isinstance(value, str | bytes):
        found = "null" if value is None else type(value).__name__
        return Bad("no text", f"{where}: no text ({found} in {one_line(part.text)!r}): {drop}")
    try:
        text = value if isinstance(value, str) else value.decode("utf-8")
        text.encode("utf-8")
    except UnicodeDecodeError as error:
        return Bad("not UTF-8", f"{where}: not UTF-8 ({error.reason}): convert the file")
    except UnicodeEncodeError:
        if part.kind == "csv":  # bytes that are not UTF-8 were decoded to halves of surrogate pairs
            return Bad("not UTF-8", f"{where}: not UTF-8: convert the file")
        return Bad("half a surrogate pair", f"{where}: half of a surrogate pair in text: {drop}")
    return text


# --- rows -------------------------------------------------------------------------------------------------------------


def csv_rows(part: Part, first: int) -> Iterator[Row]:
    """The rows but for the `first` first ones; a row's number is that of its first line."""
    csv.field_size_limit(MAX_CSV_FIELD_CHARACTERS)
    pieces = Pieces(part.path, 0)
    delimiter = "\t" if suffix_of(part.path).startswith(".tsv") else ","
    rows = _numbered_csv_rows(csv.reader(_csv_lines(pieces), delimiter=delimiter, strict=True))
    _, header = next(rows, (0, None))
    if header is None:
        return
    if isinstance(header, csv.Error):
        raise PartEnds("not CSV", f"not CSV ({one_line(header)}): mend the header row")
    if part.text not in header:
        raise _no_such_column(part, f"columns {one_line(', '.join(header))}")
    column = header.index(part.text)
    for line, row in itertools.islice(rows, first, None):
        where, drop = f"{part.path}, line {line}", "mend or drop the row"
        value: str | Bad
        if isinstance(row, csv.Error):
            value = Bad("not CSV", f"{where}: not CSV ({one_line(row)}): {drop}")
        elif len(row) != len(header):
            value = Bad("other columns", f"{where}: {len(row)} fields given; allowed: {len(header)}: {drop}")
        else:
            value = row[column]
        yield line, value, pieces.bytes_read


def _numbered_csv_rows(reader: Any) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Line number and fields of every row that is not blank, or what is wrong with it.

    The reader is a strict one: read loosely, a quote out of place shifts text from column to column unseen.
    """
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            row = error
        if row is None:
            return
        if row:
            yield line, row


def _csv_lines(pieces: Iterable[bytes]) -> Iterator[str]:
    rest, at_start = bytearray(), True
    for piece in itertools.chain(pieces, [None]):
        rest += piece or b""
        size = len(rest) if piece is None else rest.rfind(b"\n") + 1
        if size:
            # A row that is not UTF-8 is told from the halves of surrogate pairs in it.
            text = _without_mark(bytes(rest[:size]), at_start=at_start).decode("utf-8", "surrogateescape")
            yield from io.StringIO(text, newline="")
            at_start = False
            del rest[:size]


def _no_such_column(part: Part, found: str) -> PartEnds:
    return PartEnds(
        "no such column", f"no column of text named {one_line(part.text)!r}; it has {found}: name one (--text-field)"
    )


def _name_not_utf8(error: UnicodeDecodeError) -> PartEnds:
    return PartEnds("not Parquet", f"the name of a column is not UTF-8 ({error.reason}): write it again")


def _columns(part: Part, schema: "pa.Schema") -> list[str]:
    """The columns to read. Raises PartEnds where there is none."""
    import pyarrow as pa

    try:
        columns = ", ".join(f"{one.name} ({one.type})" for one in schema)
    except UnicodeDecodeError as error:  # nobody has checked the names either
        raise _name_not_utf8(error) from None
    if part.text == WHOLE:
        if not (found := [name for name in COLUMNS if name in schema.names]):
            raise PartEnds("no such column", f"no column of conversations; it has {one_line(columns)}: leave it out")
        return found
    index = schema.get_field_index(part.text)
    if index < 0 or not (pa.types.is_string(schema.types[index]) or pa.types.is_large_string(schema.types[index])):
        raise _no_such_column(part, one_line(columns))
    return [part.text]


def _column_values(part: Part, batches: Iterator[Any]) -> Iterator[bytes | str | Bad | None]:
    """The column's strings as bytes: nobody has checked that they are UTF-8. Of whole records their JSON."""
    import pyarrow as pa

    try:
        for batch in batches:
            if part.text == WHOLE:
                yield from map(_record_json, batch.to_pylist())
                continue
            yield from batch.column(part.text).cast(pa.large_binary()).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PartEnds("damaged file", f"damaged ({one_line(error)}): copy it again") from None


def _record_json(record: Any) -> str:
    """A row as JSON. What is null in a table is not there: all objects of a column have the keys of all others."""

    def there(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: there(inner) for key, inner in value.items() if inner is not None}
        return [there(inner) for inner in value] if isinstance(value, list) else value

    return json.dumps(there(record), ensure_ascii=False, default=str)


def _rows_at_once(num_bytes: int, num_rows: int) -> int:
    return max(1, min(COLUMN_ROWS, COLUMN_BYTES * num_rows // max(1, num_bytes)))


def parquet_rows(part: Part, first: int) -> Iterator[Row]:
    """The rows but for the `first` first ones; row groups before them are not read."""
    import pyarrow as pa
    import pyarrow.parquet

    if not part.num_bytes:
        return
    try:
        # Without the buffer size, a whole row group's column is held.
        file = pyarrow.parquet.ParquetFile(part.path, buffer_size=READ_BYTES, pre_buffer=False)
    except OSError as error:
        raise unreadable(error) from None
    except UnicodeDecodeError as error:
        raise _name_not_utf8(error) from None
    except pa.ArrowException as error:
        raise PartEnds("not Parquet", f"not Parquet ({one_line(error)}): copy it again") from None
    with file:
        names = _columns(part, file.schema_arrow)
        end = 0
        for index in range(file.num_row_groups):
            group = file.metadata.row_group(index)
            begin, end = end, end + group.num_rows
            if first >= end:
                continue
            columns = [group.column(number) for number in range(group.num_columns)]
            read = [one for one in columns if one.path_in_schema.split(".")[0] in names or one.path_in_schema in names]
            num_rows = _rows_at_once(sum(one.total_uncompressed_size for one in read), group.num_rows)
            batches = file.iter_batches(num_rows, row_groups=[index], columns=names)
            for number, value in enumerate(_column_values(part, batches), start=begin + 1):
                if number > first:
                    yield number, value, part.num_bytes * number // file.metadata.num_rows


def saved_rows(part: Part, first: int) -> Iterator[Row]:
    """The rows but for the `first` first ones, of a data set that `datasets` saved."""
    dataset = load_dataset(part)
    dataset = dataset.select_columns(_columns(part, dataset.features.arrow_schema)).with_format("arrow")
    num_rows = _rows_at_once(dataset.data.nbytes, len(dataset))
    batches = (dataset[begin : begin + num_rows] for begin in range(first, len(dataset), num_rows))
    for number, value in enumerate(_column_values(part, batches), start=first + 1):
        yield number, value, number


def streamed_rows(part: Part, first: int) -> Iterator[Row]:
    """The rows but for the `first` first ones, of a data set that is streamed."""
    dataset = load_dataset(part)
    if dataset.features is not None:
        dataset = dataset.select_columns(_columns(part, dataset.features.arrow_schema))
    rows = enumerate(dataset.skip(first), start=first + 1)
    while True:
        try:
            number, row = next(rows, (0, None))
        except Exception as error:  # `datasets` and what it calls raise errors of every kind
            raise PartEnds("unreadable", f"unreadable ({one_line(error)}): mend it, or try again later") from None
        if row is None:
            return
        yield number, _record_json(row) if part.text == WHOLE else row.get(part.text), number


def load_dataset(part: Part) -> Any:
    """The data set of a part, without a copy: one that was saved is mapped, any other is streamed.

    Raises ConfigError when it cannot be loaded.
    """
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()  # it tells of every retry; the error says it all
    if part.kind == "saved":
        return loaded(part.path, lambda: datasets.load_from_disk(part.path))
    config, split = part.dataset_config or None, part.dataset_split
    return loaded(part.path, lambda: datasets.load_dataset(part.path, config, split=split, streaming=True))


def loaded(dataset: str | Path, load: Callable[[], Any]) -> Any:
    """What `load` returns. Raises ConfigError for whatever it raises."""
    try:
        return load()
    except Exception as error:  # `datasets` and what it calls raise errors of every kind
        raise ConfigError(
            f"dataset: {str(dataset)!r} given; it does not load ({one_line(error)}); allowed: a directory that "
            "datasets saved, a data set's directory, or the hub name of one that can be reached"
        ) from None
