"""Where an institution's text is, and that any cut of it and any place to go on from give the same records."""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_tools.formats import Bad, Part
from data_tools.pieces import FORMATS, PACKED
from data_tools.sources import Source, find_text, load_sources, part_identity, source_name, split_file
from tests.support import one_line_error
from tests.text_files import (
    TEXTS,
    check_law,
    pack,
    part_of,
    records_of,
    save_dataset,
    write,
    write_csv,
    write_jsonl,
    write_parquet,
)

MARK = b"\xef\xbb\xbf"


# --- the law: however a part is cut and wherever reading goes on, the records are the same ---

CUTS = st.fixed_dictionaries({"BLOCK_BYTES": st.integers(1, 90), "BLOCK_RECORDS": st.integers(1, 5)})
JSON_LINES = st.sampled_from(
    [
        *(json.dumps({"text": text}).encode() for text in (*TEXTS, "", "a" * 50)),
        *(b"", b"  ", b"\r", b'{"text": 3}', b'{"text"', b'{"text": "\\ud800"}', b'{"text": "\xff"}', b"[]", MARK),
    ]
)
TEXT_LINES = st.sampled_from(
    [
        b"<|endoftext|>",
        b" <|endoftext|>\t\r",
        b"<|endoftext|>.",
        b"",
        b"one",
        "zwölf".encode(),
        b"\xff",
        b"x" * 40,
        MARK,
    ]
)
SUFFIX = st.sampled_from(["", *PACKED])
ARCHIVES = [f"{kind}{packed}" for kind in ("jsonl", "txt", "csv") for packed in PACKED]
VALUES = st.lists(st.sampled_from([*TEXTS, "", "a" * 50, None]), min_size=1, max_size=12)


def is_good(line: bytes) -> bool:
    return line.startswith(b'{"text": "') and line.endswith(b"}") and b"\xff" not in line and b"ud800" not in line


@given(
    lines=st.lists(JSON_LINES, max_size=12),
    ended=st.booleans(),
    suffix=SUFFIX,
    num_frames=st.integers(1, 4),
    cut=CUTS,
    other=CUTS,
    piece_bytes=st.integers(1, 99),
)
@settings(deadline=None, max_examples=150)
def test_json_lines_are_the_same_for_any_cut(
    *, lines: list[bytes], ended: bool, suffix: str, num_frames: int, cut: Any, other: Any, piece_bytes: int
) -> None:
    raw = b"\n".join(lines) + b"\n" * ended
    with tempfile.TemporaryDirectory() as folder:
        part = part_of(write(Path(folder) / f"a.jsonl{suffix}", raw, num_frames=num_frames))
        records = check_law(part, cut, other, READ_BYTES=piece_bytes, PIECE_BYTES=piece_bytes)
    if not raw:
        assert [text.reason for _, text in records if isinstance(text, Bad)] == ["empty file"]
        return
    whole = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and (number, line) != (1, MARK)]
    assert [number for number, _ in records] == [number for number, _ in whole]
    good = [(number, json.loads(line)["text"]) for number, line in whole if is_good(line)]
    assert [record for record in records if isinstance(record[1], str)] == good


@given(
    lines=st.lists(TEXT_LINES, min_size=1, max_size=14),
    ended=st.booleans(),
    suffix=SUFFIX,
    cut=CUTS,
    other=CUTS,
    piece_bytes=st.integers(1, 99),
    max_bytes=st.integers(1, 60),
)
@settings(deadline=None, max_examples=200)
def test_text_files_are_the_same_for_any_cut(
    *, lines: list[bytes], ended: bool, suffix: str, cut: Any, other: Any, piece_bytes: int, max_bytes: int
) -> None:
    raw = b"\n".join(lines) + b"\n" * ended
    with tempfile.TemporaryDirectory() as folder:
        part = part_of(write(Path(folder) / f"a.txt{suffix}", raw))
        constants = {"READ_BYTES": piece_bytes, "PIECE_BYTES": piece_bytes, "MAX_TEXT_DOCUMENT_BYTES": max_bytes}
        records = check_law(part, cut, other, **constants)
    if b"\xff" not in raw:
        # Nothing of the text is lost but its separators and the mark before it.
        separators = (b"<|endoftext|>", b" <|endoftext|>\t\r")
        kept = [line for line in lines if line not in separators]
        joined = "".join(text for _, text in records if isinstance(text, str))
        assert joined.replace("\n", "") == b"".join(kept).decode().removeprefix("\ufeff" if lines[0] == MARK else "")


@given(
    texts=st.lists(st.sampled_from([*TEXTS, "", 'a "quoted", b\r\nc', "a" * 50]), max_size=12),
    messy=st.lists(st.sampled_from([b"1,\xff\n", b"1\n", b"1,2,3\n", b"\n", b'1,"a"b\n', b'1,"never']), max_size=4),
    suffix=SUFFIX,
    cut=CUTS,
    other=CUTS,
    marked=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_csv_is_the_same_for_any_cut(
    *, texts: list[str], messy: list[bytes], suffix: str, cut: Any, other: Any, marked: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = write_csv(Path(folder) / "a.csv", texts)
        file = write(Path(folder) / "b" / f"a.csv{suffix}", MARK * marked + file.read_bytes() + b"".join(messy))
        records = check_law(part_of(file), cut, other)
    assert [text for _, text in records][: len(texts)] == texts
    if not texts and not b"".join(messy).strip():
        assert [text.reason for _, text in records if isinstance(text, Bad)] == ["empty file"]


@given(VALUES, st.integers(1, 5), CUTS, CUTS, st.integers(1, 99))
@settings(deadline=None, max_examples=60)
def test_parquet_is_the_same_for_any_cut(texts: list[Any], group: int, cut: Any, other: Any, column_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        part = part_of(write_parquet(Path(folder) / "a.parquet", texts, row_group_size=group))
        records = check_law(part, cut, other, COLUMN_BYTES=column_bytes)
    assert [number for number, _ in records] == list(range(1, len(texts) + 1))
    assert [None if isinstance(text, Bad) else text for _, text in records] == texts


@given(VALUES, CUTS, CUTS)
@settings(deadline=None, max_examples=8)
def test_data_sets_are_the_same_for_any_cut(texts: list[Any], cut: Any, other: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        saved = save_dataset(Path(name) / "saved", texts)
        hub = write_parquet(Path(name) / "hub" / "data" / "train-00000.parquet", texts).parents[1]
        before = sorted(os.walk(name))
        for source in (Source(path=str(saved)), Source(dataset=str(saved)), Source(dataset=str(hub))):
            (part,) = find_text(source).parts
            records = check_law(part, cut, other)
            assert [None if isinstance(text, Bad) else text for _, text in records] == texts
        assert sorted(os.walk(name)) == before


@given(at=st.integers(0, 10_000), name=st.sampled_from(ARCHIVES), cut=CUTS, other=CUTS)
@settings(deadline=None, max_examples=80)
def test_what_is_left_of_an_archive_is_the_same_for_any_cut(*, at: int, name: str, cut: Any, other: Any) -> None:
    rng = random.Random(0)
    lines = [f"{rng.randbytes(9).hex()} {number}" for number in range(40)]
    raw = {
        "jsonl": "".join(json.dumps({"text": line}) + "\n" for line in lines),
        "txt": "\n<|endoftext|>\n".join(lines),
        "csv": "text\n" + "\n".join(lines),
    }[Path(name).stem].encode()
    half = raw.index(b"\n", len(raw) // 2) + 1
    frames = [pack(name, raw[:half]), pack(name, raw[half:])]
    left_bytes = 1 + at % (sum(map(len, frames)) - 1)
    assume(left_bytes != len(frames[0]))  # a file of one frame less is whole
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"a.{name}"
        file.write_bytes(b"".join(frames)[:left_bytes])
        *good, (_, bad) = check_law(part_of(file), cut, other, PIECE_BYTES=77)
    assert [str(text).strip() for _, text in good] == lines[: len(good)]
    assert isinstance(bad, Bad)
    assert bad.reason == "damaged archive"


# --- where the text is ---


def names_of(parts: list[Part], folder: Path) -> list[str]:
    return [str(Path(part.path).relative_to(folder)) for part in parts]


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.txt.gz", "a/y/x.csv", "c.tsv.zst", ".hidden.txt", ".git/a.txt", "read.me", "a.json"):
        write(tmp_path / name, b"text\nmore\n")
    write_parquet(tmp_path / "d.parquet", TEXTS)
    parts = find_text(Source(path=str(tmp_path), text="body")).parts
    assert names_of(parts, tmp_path) == ["a/y/x.csv", "a/z.txt.gz", "b.jsonl", "c.tsv.zst", "d.parquet"]
    assert [part.kind for part in parts] == ["csv", "txt", "jsonl", "csv", "parquet"]
    assert {part.text for part in parts} == {"body"}
    assert {part.split for part in parts} == {""}
    assert parts[0].unit == "line"
    assert parts[4].unit == "row"
    assert names_of(find_text(Source(path=str(tmp_path / "**/*.*"))).parts, tmp_path) == names_of(parts, tmp_path)
    assert names_of(find_text(Source(path=str(tmp_path / "[bc].*"))).parts, tmp_path) == ["b.jsonl", "c.tsv.zst"]
    assert names_of(find_text(Source(path=str(tmp_path / "b.jsonl"))).parts, tmp_path) == ["b.jsonl"]


def test_a_folder_with_train_and_valid_is_these_two(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl.zst", TEXTS)
    write_jsonl(tmp_path / "more.jsonl", TEXTS)
    assert {part.split for part in find_text(Source(path=str(tmp_path))).parts} == {""}
    write_csv(tmp_path / "valid.csv", TEXTS)
    parts = find_text(Source(path=str(tmp_path))).parts
    assert [(part.split, Path(part.path).name) for part in parts] == [
        ("train", "train.jsonl.zst"),
        ("valid", "valid.csv"),
    ]
    write_jsonl(tmp_path / "train.jsonl", TEXTS)
    assert one_line_error(find_text, Source(path=str(tmp_path))) == (
        f"corpus: {tmp_path} has train.jsonl, train.jsonl.zst; allowed: one of them: move the other away"
    )
    assert f"corpus: {tmp_path} has none; allowed: one valid file: .jsonl .ndjson" in one_line_error(
        split_file, tmp_path / "nowhere", "valid"
    ).replace("/nowhere", "")


def test_saved_data_sets_and_their_splits(tmp_path: Path) -> None:
    saved = save_dataset(tmp_path / "saved", TEXTS)
    (part,) = find_text(Source(dataset=str(saved))).parts
    assert (part.kind, part.split, part.num_bytes) == ("saved", "", 0)
    one = datasets.load_from_disk(str(saved))
    both = tmp_path / "both"
    datasets.DatasetDict({"train": one, "validation": one, "test": one}).save_to_disk(str(both))
    parts = find_text(Source(path=str(both))).parts
    assert [(part.split, Path(part.path).name) for part in parts] == [("train", "train"), ("valid", "validation")]
    assert [text for _, text in records_of(parts[1])] == TEXTS
    parts = find_text(Source(path=str(both), dataset_split="test")).parts
    assert [(part.split, Path(part.path).name) for part in parts] == [("", "test")]
    assert one_line_error(find_text, Source(path=str(both), dataset_split="dev")) == (
        f"dataset_split: 'dev' given; {both} has train, validation, test"
    )
    shutil.rmtree(both / "test")
    assert f"dataset: '{both}/test' given; it does not load (" in one_line_error(
        find_text, Source(path=str(both), dataset_split="test")
    )
    (saved / "state.json").write_text("{}")
    assert f"dataset: '{saved}' given; it does not load (" in one_line_error(find_text, Source(path=str(saved)))


def test_a_data_set_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    hub = write_parquet(tmp_path / "hub" / "a.parquet", TEXTS).parent
    assert "it does not load (Bad split: dev." in one_line_error(
        find_text, Source(dataset=str(hub), dataset_split="dev")
    )
    assert "(BuilderConfig 'en' not found." in one_line_error(find_text, Source(dataset=str(hub), dataset_config="en"))
    code = (
        "from data_tools.sources import *\n"
        "try: find_text(Source(dataset='an-institution/a-data-set')).parts\n"
        "except ConfigError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("dataset: 'an-institution/a-data-set' given; it does not load (")
    assert done.stdout.endswith("or the hub name of one that can be reached\n")
    assert done.stdout.count("\n") == 1
    assert not done.stderr


def test_nothing_to_read_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "no"
    assert one_line_error(find_text, Source(path=str(missing))) == (
        f"corpus: {str(missing)!r} given; there is no such file or folder"
    )
    for path in (str(tmp_path), f"{tmp_path}/*.jsonl"):
        assert one_line_error(find_text, Source(path=path)) == (
            f"corpus: {path!r} given, which has no file to read; allowed: {FORMATS}"
        )
    other = write(tmp_path / "a.odt", b"")
    assert "allowed: a folder or a file of" in one_line_error(find_text, Source(path=str(other)))
    assert one_line_error(find_text, Source()) == "corpus: path '' and dataset '' given; allowed: one of them"


def test_a_part_is_known_by_what_it_holds(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    part = part_of(file)
    identity = part_identity(part)
    assert identity[:6] == [str(file), "jsonl", "text", "", file.stat().st_size, file.stat().st_mtime_ns]
    assert json.loads(json.dumps(identity)) == part_identity(part_of(file)) == identity
    os.utime(file, ns=(0, 1))
    assert part_identity(part_of(file)) != identity
    saved = save_dataset(tmp_path / "saved", TEXTS)
    identity = part_identity(part_of(saved))
    os.utime(saved / "state.json", ns=(0, 1))
    assert part_identity(part_of(saved)) != identity


@pytest.mark.parametrize(
    ("given_source", "expected"),
    [
        (Source(path="corpora/law"), "law"),
        (Source(path="corpora/Law Reports/"), "law-reports"),
        (Source(path="raw/**/*.jsonl.zst"), "raw"),
        (Source(path="raw/2023.jsonl.gz"), "2023"),
        (Source(path="raw/é.txt"), "text"),
        (Source(dataset="wikimedia/wikipedia"), "wikipedia"),
        (Source(path="a", name="b"), "b"),
    ],
)
def test_names_of_sources(given_source: Source, expected: str) -> None:
    assert source_name(given_source) == expected


def test_sources_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "sources.yaml"
    file.write_text(
        "sources:\n- {path: law/*.jsonl, text: body, weight: 2}\n"
        "- {dataset: o/n, dataset_config: en, dataset_split: test, name: n-2, weight: 0.5}\n"
    )
    assert load_sources(file) == [
        Source(path="law/*.jsonl", text="body", weight=2),
        Source(dataset="o/n", dataset_config="en", dataset_split="test", name="n-2", weight=0.5),
    ]
    file.write_text("sources: [{path: law}]")
    assert load_sources(file) == [Source(path="law")]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("", "{}: None given; allowed: one key, sources, with a list of sources"),
        ("sources: []", "{}: {{'sources': []}} given; allowed: one key"),
        ("sources: [{path: a}]\nmore: 1", "given; allowed: one key"),
        ("sources: [a]", "{}: sources[0]: 'a' given; allowed: a mapping with path or dataset"),
        (
            "sources: [{path: a, txt: b}]",
            "{}: sources[0].txt: unknown key given; allowed: path, dataset, dataset_config",
        ),
        ("sources: [{path: a, text: 3}]", "{}: sources[0].text: 3 given; allowed: text, in quotes"),
        ("sources: [{path: a, weight: 0}]", "{}: sources[0].weight: 0 given; allowed: a number above 0"),
        ("sources: [{path: a, weight: true}]", "{}: sources[0].weight: True given"),
        ("sources: [{path: a, weight: .inf}]", "{}: sources[0].weight: inf given"),
        ("sources: [{path: a, weight: .nan}]", "{}: sources[0].weight: nan given"),
        ("sources: [{text: a}]", "{}: sources[0]: text given; allowed: one of path and dataset"),
        ("sources: [{path: a, dataset: b}]", "{}: sources[0]: path, dataset given; allowed: one of path and dataset"),
        ("sources: [{path: a, name: A b}]", "{}: sources[0].name: 'A b' given; allowed: names of a-z, 0-9, _ and -"),
        (
            "sources: [{path: x/a}, {path: y/a}]",
            "{}: sources[1].name: a given; allowed: each name once: set another name",
        ),
        (
            "sources: [{path: a, weight: 1}, {path: b}]",
            "{}: sources[1].weight: None given; allowed: on all, or on none",
        ),
        ("sources: [", "--sources: {}: not YAML (while parsing"),
    ],
)
def test_a_mistake_in_a_file_of_sources_is_named(tmp_path: Path, written: str, expected: str) -> None:
    file = tmp_path / "sources.yaml"
    file.write_text(written)
    assert expected.format(file) in one_line_error(load_sources, file)


def test_a_missing_file_of_sources_is_named(tmp_path: Path) -> None:
    assert (
        one_line_error(load_sources, tmp_path / "no") == f"--sources: '{tmp_path}/no' given; No such file or directory"
    )


def test_reading_files_imports_no_data_set_library() -> None:
    code = (
        "import sys, data_tools.sources; sys.exit(bool({'torch', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
