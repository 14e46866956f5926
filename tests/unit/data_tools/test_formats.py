"""Reading every format, and what cannot be used."""

import random
from pathlib import Path

import pyarrow as pa
import pytest

from data_tools import formats
from data_tools.formats import Bad, Part
from data_tools.pieces import DOCUMENTS, SUFFIXES
from data_tools.sources import (
    Block,
    Source,
    find_text,
    parse_block,
    read_blocks,
    read_documents,
    split_file,
    training_file,
)
from tests.support import one_line_error
from tests.text_files import (
    TEXTS,
    check_law,
    messages,
    pack,
    part_of,
    reasons,
    records_of,
    save_dataset,
    write,
    write_csv,
    write_jsonl,
    write_parquet,
)


def random_texts(num_texts: int) -> list[str]:
    rng = random.Random(0)
    return [rng.randbytes(20).hex() for _ in range(num_texts)]


# --- reading one file ---


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.jsonl.zst", "train.JSONL"])
def test_json_lines_are_read_in_order_without_blank_ones(tmp_path: Path, name: str) -> None:
    file = write_jsonl(tmp_path / name, [*TEXTS, "", "  \n"])
    assert list(read_documents(file)) == TEXTS
    assert training_file(file) == file
    if name != "train.JSONL":
        assert split_file(tmp_path, "train") == training_file(tmp_path) == file


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix not in DOCUMENTS])
def test_every_format_gives_the_same_texts(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        write_parquet(file, TEXTS, text_type=pa.large_string())
    elif suffix.startswith((".txt", ".text")):
        write(file, "\n<|endoftext|>\n".join(TEXTS).encode())
    elif suffix.startswith((".json", ".ndjson")):
        write_jsonl(file, TEXTS)
    else:
        write_csv(file, TEXTS, delimiter="\t" if suffix.startswith(".tsv") else ",")
    assert [text.rstrip() for text in read_documents(file)] == [text.rstrip() for text in TEXTS]
    (*_, last) = read_blocks(part_of(file))
    assert last.bytes_read == file.stat().st_size


@pytest.mark.parametrize(
    ("name", "raw"), [("a.jsonl", b'{"text": "a"}'), ("a.txt.gz", b"a"), ("a.csv.zst", b"text\na")]
)
def test_a_byte_order_mark_is_dropped(tmp_path: Path, name: str, raw: bytes) -> None:
    assert list(read_documents(write(tmp_path / name, b"\xef\xbb\xbf" + raw))) == ["a"]


def test_text_files_are_cut_at_separators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "all.txt"
    file.write_text("one\ntwo\n<|endoftext|>\n\n<|endoftext|>\nthree\n")
    assert list(read_documents(file)) == ["one\ntwo\n", "three\n"]
    assert [number for number, _ in records_of(part_of(file))] == [1, 4, 6]
    monkeypatch.setattr(formats, "MAX_TEXT_DOCUMENT_BYTES", 4)
    assert list(read_documents(file)) == ["one\n", "two\n", "three\n"]


def test_blocks_are_some_megabyte_or_one_longer_record(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["word " * 2_000] * 500 + ["long " * 900_000, "end"])
    sizes = [len(block.raw) for block in read_blocks(part_of(file))]
    assert sum(sizes) == file.stat().st_size
    assert max(sizes) > 4_500_000
    assert all(900_000 < size <= 1 << 20 for size in sizes[:4])
    file = write_parquet(tmp_path / "a.parquet", ["word " * 100_000] * 9 + ["short"] * 5_000, row_group_size=4_000)
    rows = [len(block.texts) for block in read_blocks(part_of(file))]
    assert rows == [3, 3, 3, 2_000, 2_000, 1_000]


def test_a_place_of_an_archive_counts_unpacked_bytes(tmp_path: Path) -> None:
    part = part_of(write_jsonl(tmp_path / "a.jsonl.gz", random_texts(60_000)))
    first, second, *_ = read_blocks(part)
    assert first.next == (len(first.raw), len(first.raw.splitlines()))
    assert next(read_blocks(part, first.next)).raw == second.raw
    assert 0 < first.bytes_read < second.bytes_read <= part.num_bytes
    (block,) = read_blocks(part_of(write(tmp_path / "a.txt", b"one\n<|endoftext|>\nno newline")))
    assert block.next == (28, 3)


# --- what cannot be used ---


@pytest.mark.parametrize(
    ("line", "reason", "expected"),
    [
        (
            b'{"text": "a"',
            "not JSON",
            "line 2: not JSON (Expecting ',' delimiter: line 1 column 13 (char 12)): mend or",
        ),
        (b"[" * 100_000, "not JSON", "line 2: not JSON (maximum recursion"),
        (
            b'{"txt": "a"}',
            "no text",
            'line 2: no text; allowed: {"text": "..."}: mend or drop the line, or name its key (--text-field)',
        ),
        (b'{"text": 3}', "no text", "line 2: no text"),
        (b'["text"]', "no text", "line 2: no text"),
        (
            b'{"text": "\\ud800"}',
            "half a surrogate pair",
            "line 2: half of a surrogate pair in text: mend or drop the line",
        ),
        (b'{"text": "\xff"}', "not UTF-8", "line 2: not UTF-8 (invalid start byte): convert the file"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, reason: str, expected: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    assert one_line_error(list, read_documents(file)).startswith(f"{file}, {expected}")
    assert reasons(part_of(file)) == ["", reason, ""]


def test_an_unreadable_text_document_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", b"one\n<|endoftext|>\ntwo\n\xff\n<|endoftext|>\nthree\n")
    assert messages(part_of(file)) == [", line 4: not UTF-8 (invalid start byte): convert the file"]
    assert reasons(part_of(file)) == ["", "not UTF-8", ""]
    file.write_text("Grüße".encode("utf-16").decode("latin-1"), "latin-1")
    assert messages(part_of(file)) == [", line 1: not UTF-8 (invalid start byte): convert the file"]


def test_bad_rows_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = b'id,text\n1,"two\nlines"\n\n2,\xff\n3\n4,"a"b\n5,good\n6,"never closed\n'
    part = part_of(write(tmp_path / "a.csv", rows))
    assert records_of(part)[0] == (2, "two\nlines")
    assert messages(part) == [
        ", line 5: not UTF-8: convert the file",
        ", line 6: 1 fields given; allowed: 2: mend or drop the row",
        ", line 7: not CSV (',' expected after '\"'): mend or drop the row",
        ", line 9: not CSV (unexpected end of data): mend or drop the row",
    ]
    assert reasons(part) == ["", "not UTF-8", "other columns", "not CSV", "", "not CSV"]
    monkeypatch.setattr(formats, "MAX_CSV_FIELD_CHARACTERS", 8)
    assert ", line 2: not CSV (field larger than field limit (8)): mend or drop the row" in messages(part)
    part = part_of(write_parquet(tmp_path / "a.parquet", ["a", None, "b"]))
    assert messages(part) == [", row 2: no text (null in 'text'): mend or drop the row"]
    not_utf8 = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    part = part_of(write_parquet(tmp_path / "b.parquet", not_utf8))
    assert messages(part) == [", row 1: not UTF-8 (invalid start byte): convert the file"]


def test_half_a_surrogate_pair_or_a_number_in_a_row_is_named() -> None:
    part = Part(path="hub/name", kind="dataset")
    block = Block(part=part, first=1, texts=["a", "\ud800", 3], numbers=[1, 2, 3], next=(3, 3), bytes_read=3)
    (_, good), (_, half), (_, number) = parse_block(block)
    assert good == "a"
    assert half == Bad(
        "half a surrogate pair", "hub/name, row 2: half of a surrogate pair in text: mend or drop the row"
    )
    assert number == Bad("no text", "hub/name, row 3: no text (int in 'text'): mend or drop the row")


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".parquet"])
def test_an_empty_file_is_named(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    for raw in (b"", pack(file.name, b"")):
        file.write_bytes(raw)
        (message,) = messages(part_of(file))
        assert message in (": empty: fill it or leave it out", ": empty, without a row: fill it or leave it out")
        assert reasons(part_of(file)) == ["empty file"]


def test_files_without_rows_are_named(tmp_path: Path) -> None:
    for file in (write(tmp_path / "a.csv", b"id,text\n"), write_parquet(tmp_path / "a.parquet", [])):
        assert messages(part_of(file)) == [": empty, without a row: fill it or leave it out"]
    (tmp_path / "a.parquet").write_bytes(b"")
    assert reasons(part_of(tmp_path / "a.parquet")) == ["empty file"]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
def test_a_damaged_archive_gives_what_precedes_the_damage(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    texts = random_texts(9_000)
    packed = write_jsonl(file, texts).read_bytes()
    file.write_bytes(packed[:-20])
    *good, (number, bad) = records_of(part_of(file))
    assert len(good) > 7_000  # zstd compresses blocks of 128 KB
    assert [text for _, text in good] == texts[: len(good)]
    assert isinstance(bad, Bad)
    assert number == len(good) + 1
    assert bad.reason == "damaged archive"
    assert bad.message.startswith(f"{file}, after line {len(good)}: damaged archive (")
    assert bad.message.endswith("): copy it again")
    assert "damaged archive" in one_line_error(list, read_documents(file))
    middle = len(packed) // 2
    file.write_bytes(packed[:middle] + b"damaged!" * 9 + packed[middle + 72 :])
    assert reasons(part_of(file))[-1] == "damaged archive"
    file.write_bytes(b"this is no archive")
    assert reasons(part_of(file)) == ["damaged archive"]


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", random_texts(3_000), row_group_size=1_000)
    whole = file.read_bytes()
    damaged = bytearray(whole)
    middle = len(whole) // 2
    damaged[middle : middle + 3_000] = b"\xff" * 3_000
    file.write_bytes(damaged)
    *good, last = check_law(part_of(file), {"BLOCK_BYTES": 9_000, "BLOCK_RECORDS": 70}, {"BLOCK_BYTES": 50_000})
    assert isinstance(last[1], Bad)
    assert last[1].message.startswith(f"{file}, after row {len(good)}: damaged (")
    assert len(good) >= 1_000
    for raw in (whole[:-9], b"PAR1", b"no Parquet at all"):
        file.write_bytes(raw)
        assert reasons(part_of(file)) == ["not Parquet"]
        assert messages(part_of(file))[0].startswith(": not Parquet (")


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    ask = ": name one (--text-field)"
    csv_file = write_csv(tmp_path / "a.csv", TEXTS)
    parquet = write_parquet(tmp_path / "a.parquet", TEXTS)
    saved = save_dataset(tmp_path / "saved", TEXTS)
    missing = ": no column of text named 'body'; it has "
    assert messages(part_of(csv_file, "body")) == [f"{missing}columns id, text{ask}"]
    for path in (parquet, saved):
        assert messages(part_of(path, "body")) == [f"{missing}id (int64), text (string){ask}"]
        assert messages(part_of(path, "id"))[0].startswith(": no column of text named 'id'; it has id (int64)")
        assert reasons(part_of(path, "id")) == ["no such column"]
    streamed = part_of(write_parquet(tmp_path / "hub" / "a.parquet", TEXTS).parent, "body", key="dataset")
    assert messages(streamed) == [f"{missing}id (int64), text (string){ask}"]
    broken = write(tmp_path / "b.csv", b'id,"te"xt\n1,2\n')
    assert messages(part_of(broken)) == [": not CSV (',' expected after '\"'): mend the header row"]


def test_a_streamed_data_set_that_breaks_off_is_named(tmp_path: Path) -> None:
    write(tmp_path / "hub" / "train.jsonl", b'{"text": "a"}\n{"text": "b"}\n')
    (part,) = find_text(Source(dataset=str(tmp_path / "hub"))).parts
    write(tmp_path / "hub" / "train.jsonl", b'{"text": "a"}\n{"text"')
    (message,) = messages(part)
    assert message.startswith(": unreadable (")
    assert message.endswith("): mend it, or try again later")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    for file in (write_jsonl(tmp_path / "a.jsonl", TEXTS), write_parquet(tmp_path / "a.parquet", TEXTS)):
        part = part_of(file)
        file.unlink()
        assert messages(part) == [
            ": unreadable (No such file or directory): mend its permissions or its disk, or leave it out"
        ]
        assert one_line_error(list, read_documents(file)) == f"corpus: '{file}' given; No such file or directory"
    assert "allowed: a folder or a file of .jsonl .ndjson" in one_line_error(list, read_documents(tmp_path / "x.odt"))


def test_a_column_whose_name_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": ["a"], "zzzz": ["b"]}), file, store_schema=False)
    file.write_bytes(file.read_bytes().replace(b"zzzz", b"zz\xffz"))
    assert messages(part_of(file)) == [": the name of a column is not UTF-8 (invalid start byte): write it again"]
