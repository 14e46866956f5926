"""Which files of a folder are read, each once, for what, and how all others are named before anything is read."""

import json
import os
from pathlib import Path

import datasets
import pytest
from typer.testing import CliRunner

from data_tools.cli import app
from data_tools.counts import read_counts
from data_tools.listing import Listing, split_of
from data_tools.pack import Recipe, prepare
from data_tools.sources import Source, find_text, load_sources, read_parts, source_name
from data_tools.tokenizer import train_tokenizer
from data_tools.workers import StoppedError
from tests.support import one_line_error
from tests.text_files import TEXTS, save_dataset, write, write_jsonl


def listed(folder: Path, *names: str, text: str = "one text") -> Listing:
    """The listing of a folder in which files of these names were written."""
    for name in names:
        write(folder / name, json.dumps({"text": f"{text} {name}"}).encode())
    return find_text(Source(path=str(folder)))


def uses(listing: Listing, folder: Path) -> dict[str, str]:
    return {str(Path(part.path).relative_to(folder)): part.split for part in listing.parts}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(TEXTS, vocab_size=270, output=tmp_path_factory.mktemp("tokenizer"))


# --- splits ---


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("Training.JSONL.gz", "train"),
        ("data/train-00000-of-00012.parquet", "train"),
        ("validation-00000-of-00001.parquet", "valid"),
        ("dev_2.txt", "valid"),
        ("val/a.txt", "valid"),
        ("eval.csv", "valid"),
        ("en/test/part-1.jsonl", "test"),
        ("test.3.txt", "test"),
        ("testing/train.txt", "test"),  # of two the one further from training
        ("train/dev.txt", "valid"),
        ("tests/a.txt", ""),
        ("testimony.txt", ""),
        ("test-results.txt", ""),
        ("trainee-2.txt", ""),
    ],
)
def test_known_names_of_splits(name: str, split: str) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("names", "expected", "left_out"),
    [
        (
            ["train.jsonl", "validation.jsonl", "test.jsonl"],
            {"train.jsonl": "train", "validation.jsonl": "valid"},
            {"of test text": ["test.jsonl"]},
        ),
        (
            ["train/a.jsonl", "train/b.jsonl", "dev/a.jsonl", "test/a.jsonl"],
            {"train/a.jsonl": "train", "train/b.jsonl": "train", "dev/a.jsonl": "valid"},
            {"of test text": ["test/a.jsonl"]},
        ),
        (
            [f"data/{split}-0000{n}-of-00002.jsonl" for split in ("test", "train", "validation") for n in range(2)],
            {f"data/{split}-0000{n}-of-00002.jsonl": split[:5] for split in ("train", "validation") for n in range(2)},
            {"of test text": ["data/test-00000-of-00002.jsonl", "data/test-00001-of-00002.jsonl"]},
        ),
        (
            ["train.jsonl", "valid.jsonl", "train-2.jsonl", "more/train.jsonl", "letters.jsonl", "old/test.jsonl"],
            {"train.jsonl": "train", "valid.jsonl": "valid"},
            {
                "beside the splits, by no split's name": ["letters.jsonl", "more/train.jsonl", "train-2.jsonl"],
                "of test text": ["old/test.jsonl"],
            },
        ),
        (["train.jsonl", "test.jsonl"], {"train.jsonl": ""}, {"of test text": ["test.jsonl"]}),
        (["a.jsonl", "b.jsonl", "test.jsonl"], {"a.jsonl": "", "b.jsonl": ""}, {"of test text": ["test.jsonl"]}),
        (["a.jsonl", "valid.jsonl"], {"a.jsonl": "train", "valid.jsonl": "valid"}, {}),
        (["train.jsonl", "more.jsonl"], {"train.jsonl": "", "more.jsonl": ""}, {}),
        (["x/train.jsonl", "x/valid.jsonl", "x/y.jsonl"], {"x/train.jsonl": "train", "x/valid.jsonl": "valid"}, None),
    ],
)
def test_every_split_is_used_for_what_it_is(
    tmp_path: Path, names: list[str], expected: dict[str, str], left_out: dict[str, list[str]] | None
) -> None:
    found = listed(tmp_path, *names)
    assert uses(found, tmp_path) == expected
    assert left_out is None or found.left_out == left_out
    assert len(found.parts) + sum(map(len, found.left_out.values())) == len(names)
    assert uses(find_text(Source(path=f"{tmp_path}/**/*.jsonl")), tmp_path) == expected


def test_test_text_is_never_packed_and_all_is_said_before_reading(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["train.jsonl", "validation.jsonl", "test.jsonl", "notes.odt", "more.odt", "README"]
    listed(tmp_path / "law", *names, "b.json", ".git")
    write(tmp_path / "law" / "train.jsonl", b"broken\n")
    sources = (Source(path=str(tmp_path / "law")),)
    assert "train.jsonl, line 1: not JSON" in one_line_error(
        prepare, Recipe(sources=sources, tokenizer=tokenizer), tmp_path / "packed"
    )
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [
        "law: 1 file of 0.0 MB to train on; 1 file of 0.0 MB held out",
        "law: left out: 1 hidden (.git); 1 without an ending (README); 2 .odt (more.odt, notes.odt); "
        "1 beside the splits, by no split's name (b.json); 1 of test text (test.jsonl)",
    ]
    write(tmp_path / "law" / "train.jsonl", b'{"text": "train"}\n')
    manifests = prepare(Recipe(sources=sources, tokenizer=tokenizer), tmp_path / "packed2")
    assert {split: manifest.num_documents for split, manifest in manifests.items()} == {"train": 1, "valid": 1}
    assert json.loads((tmp_path / "packed2" / "report.json").read_text())["left_out"]["law"]["of test text"] == 1


def test_only_test_text_or_only_held_out_text_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a" / "test.jsonl", TEXTS)
    assert one_line_error(find_text, Source(path=str(tmp_path / "a"))).endswith(
        "; there are 1 of test text (test.jsonl)"
    )
    write_jsonl(tmp_path / "b" / "dev.jsonl", TEXTS)
    recipe = Recipe(sources=(Source(path=str(tmp_path / "b")),), tokenizer=tokenizer)
    assert one_line_error(prepare, recipe, tmp_path / "packed") == (
        "corpus: all files given are held out, by their names; allowed: text to train on, too"
    )
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a", tmp_path / "b"]


def test_a_file_that_is_named_alone_is_read_with_a_warning(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "test.jsonl", TEXTS)
    (line, warning) = find_text(Source(path=str(file))).lines("law", held_out=0.01)
    assert line == "law: 1 file of 0.0 MB to train on, but for 1 % of the documents, held out"
    assert warning == "law: warning: test.jsonl is by its name test text, and is trained on as it was named alone"
    # What a shell makes of a glob without quotes is not sources of their own.
    files = [write_jsonl(tmp_path / f"{split}-00000-of-00001.jsonl", TEXTS) for split in ("train", "test")]
    assert len({source_name(Source(path=str(file))) for file in files}) == 1


def test_saved_splits_are_used_for_what_they_are(tmp_path: Path) -> None:
    one = datasets.load_from_disk(str(save_dataset(tmp_path / "one", TEXTS)))
    names = ("train", "dev", "test", "unsupervised")
    datasets.DatasetDict(dict.fromkeys(names, one)).save_to_disk(str(tmp_path / "law"))
    found = find_text(Source(dataset=str(tmp_path / "law")))
    assert uses(found, tmp_path / "law") == {"train": "train", "dev": "valid"}
    assert found.left_out == {"of test text": ["test"], "of other splits": ["unsupervised"]}
    assert next(found.lines("law")) == "law: 1 data set to train on; 1 data set held out"


# --- links ---


def test_links_that_lead_back_are_followed_once(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    listed(raw, "2023/a.jsonl", "2024/b.jsonl")
    (raw / "2023" / "again").symlink_to("../2023")
    (raw / "2023" / "up").symlink_to("..")
    (raw / "0-first.jsonl").symlink_to("2024/b.jsonl")
    os.link(raw / "2024" / "b.jsonl", raw / "2024" / "c.jsonl")
    for path in (str(raw), f"{raw}/**/*.jsonl", f"{raw}/**"):
        found = find_text(Source(path=path))
        assert uses(found, raw) == {"2023/a.jsonl": "", "2024/b.jsonl": ""}
    found = find_text(Source(path=str(raw)))
    assert sorted(found.left_out["there under another name, too"]) == [
        "0-first.jsonl",
        "2023/again",
        "2023/up",
        "2024/c.jsonl",
    ]
    assert not found.remarks


def test_links_out_of_the_folder_are_followed_and_said(tmp_path: Path) -> None:
    listed(tmp_path / "store", "a.jsonl", "b/c.jsonl")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").symlink_to("../store/a.jsonl")
    (tmp_path / "raw" / "b").symlink_to(tmp_path / "store" / "b")
    found = find_text(Source(path=str(tmp_path / "raw")))
    assert uses(found, tmp_path / "raw") == {"a.jsonl": "", "b/c.jsonl": ""}
    assert found.remarks == [
        f"2 of its links lead out of {tmp_path}/raw: a.jsonl -> ../store/a.jsonl, b -> {tmp_path}/store/b"
    ]


def test_listing_many_files_can_be_stopped(tokenizer: Path, tmp_path: Path) -> None:
    for number in range(150):
        (tmp_path / f"{number}.txt").write_text("text")
    recipe = Recipe(sources=(Source(path=str(tmp_path)),), tokenizer=tokenizer)
    with pytest.raises(StoppedError):
        prepare(recipe, tmp_path / "packed", asked_to_stop=lambda: True)
    assert not (tmp_path / "packed.partial").exists()


def test_a_named_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    assert listed(tmp_path, "a.jsonl").left_out == {"neither file nor folder": ["pipe.json"]}


# --- what cannot be listed ---


def test_what_cannot_be_listed_stops_the_work_unless_told_to_go_on(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw"
    listed(raw, "2023/a.jsonl", "2024/b.jsonl")
    (raw / "2025").symlink_to("../annex/2025")
    (raw / "loop.jsonl").symlink_to("loop.jsonl")
    scandir = os.scandir

    def without_rights(path: str | Path) -> object:  # root may read everything
        if path == raw / "2024":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", without_rights)
    recipe = Recipe(sources=(Source(path=str(raw)),), tokenizer=tokenizer, held_out=0.0)
    expected = (
        f"3 cannot be listed: {raw}/2025 (a link to nothing: ../annex/2025), {raw}/loop.jsonl (Too many levels of "
        f"symbolic links), {raw}/2024 (Permission denied)"
    )
    assert one_line_error(prepare, recipe, tmp_path / "packed") == (
        f"corpus: {expected}; mend or remove them, or give --on-bad skip"
    )
    assert sorted(tmp_path.iterdir()) == [raw]
    capsys.readouterr()
    prepare(recipe, tmp_path / "packed", on_bad="skip")
    assert capsys.readouterr().err.splitlines()[1] == f"raw: warning: {expected}"
    assert json.loads((tmp_path / "packed" / "report.json").read_text())["left_out"]["raw"]["not listed"] == 3


def test_counts_say_what_was_passed_over(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.py").write_text("text")
    listed(tmp_path, "a.txt", "b.tar.gz", "c.pdf.xz", text="word word word word word word")
    command = ["counts", str(tmp_path), "--output", str(tmp_path / "out" / "x.tsv"), "--min-documents", "1"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "1 file of 0.0 MB to train on" in done.stderr
    assert "left out: 30 .py (0.py, 1.py, 10.py, ...); 1 .tar.gz (b.tar.gz); 1 .pdf.xz (c.pdf.xz)" in done.stderr


def test_counts_that_a_shell_spread_out_are_answered_with_what_to_type(tmp_path: Path) -> None:
    command = ["tokenizer", "--counts", "a.tsv", "b.tsv", "c d.tsv", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert str(done.exception) == (
        "--counts: text or files beside it given; allowed: one file each: type --counts a.tsv --counts b.tsv "
        "--counts 'c d.tsv'"
    )


# --- endings ---


def test_json_is_read_where_it_is_json_lines(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.JSON", TEXTS)
    write_jsonl(tmp_path / "b.json.bz2", TEXTS)
    write(tmp_path / "c.json", b'[\n{"text": "a"}\n]')
    write(tmp_path / "d.json", b'{"name": "a card"}\n')
    write(tmp_path / "e.json", b'{\n"text": "a"\n}')
    write(tmp_path / "f.json", b"[" * 100_000)
    write_jsonl(tmp_path / "g.NDJSON", TEXTS)
    write(tmp_path / "h.text", b"text")
    write(tmp_path / "i.md", b"text")
    found = find_text(Source(path=str(tmp_path)))
    assert list(uses(found, tmp_path)) == ["a.JSON", "b.json.bz2", "g.NDJSON", "h.text"]
    assert found.left_out == {
        ".json that is no JSON lines": ["c.json", "d.json", "e.json", "f.json"],
        ".md": ["i.md"],
    }
    assert one_line_error(find_text, Source(path=str(tmp_path / "c.json"))) == (
        f'corpus: \'{tmp_path}/c.json\' given, which is no JSON lines; allowed in a .json: lines of {{"text": "..."}}, '
        "or any text with --as-text '*.json'"
    )


# --- text files of other endings ---


def test_other_endings_are_read_as_text_where_the_user_says_so(tmp_path: Path) -> None:
    code = [f"src/{name}" for name in ("a.py", "B.PY", "train.py", "valid.py", "pi.py.gz")]
    for name in [*code, "docs/a.md", "old/a.md", "README"]:
        write(tmp_path / name, f"text of {name}\n".encode())
    write(tmp_path / "a.png", b"\x89PNG\r\n\x1a\n\0")
    assert one_line_error(find_text, Source(path=str(tmp_path))).endswith(
        "there are 1 without an ending (README); 1 .png (a.png); 2 .md (docs/a.md, old/a.md); "
        "4 .py (src/B.PY, src/a.py, src/train.py, ...); 1 .py.gz (src/pi.py.gz)"
        ": type --as-text '*.py' --as-text '*.md' --as-text '*.py.gz' --as-text README to read such files as text"
    )
    source = Source(path=str(tmp_path), as_text=("*.py", "*.py.gz", "docs/*.md", "*.rst"))
    found = find_text(source)
    # A program's train.py and valid.py are no splits.
    assert uses(found, tmp_path) == dict.fromkeys(sorted([*code, "docs/a.md"]), "")
    assert found.left_out == {"without an ending": ["README"], ".png": ["a.png"], ".md": ["old/a.md"]}
    assert found.remarks == [
        "to read such files as text, too, type --as-text '*.md' --as-text README",
        "warning: --as-text '*.rst' is the name of none of its files",
    ]
    assert list(read_parts(found.parts)) == [f"text of {name}\n" for name in sorted([*code, "docs/a.md"])]
    for name in ("docs/README", "old/LICENSE", "old/NOTES"):  # of which most have no name in common
        write(tmp_path / name, b"text\n")
    assert "type --as-text '*' --as-text '*.md'" in find_text(source).remarks[0]


def test_commands_read_other_endings_as_text(tmp_path: Path) -> None:
    for number in range(60):
        write(tmp_path / "code" / f"{number}.py", f"number = {number}\n".encode())
    write(tmp_path / "code" / "b.json", b'{"a": [1,\n2]}\n')
    write(tmp_path / "code" / "__init__.py", b"")
    output = ["--as-text", "*.py", "--as-text", "*.json", "--output", str(tmp_path / "counts.tsv")]
    done = CliRunner().invoke(app, ["counts", str(tmp_path / "code"), *output], catch_exceptions=False)
    assert "code: 61 files of 0.0 MB to train on" in done.stderr
    assert "code: left out: 1 empty (__init__.py)" in done.stderr
    assert read_counts(tmp_path / "counts.tsv")[1]["number"] == 60
    train_tokenizer(TEXTS, vocab_size=270, output=tmp_path)
    (tmp_path / "sources.yaml").write_text(f"sources: [{{path: '{tmp_path}/code', as_text: ['*.py']}}]")
    output = ["--tokenizer", str(tmp_path), "--output", str(tmp_path / "packed"), "--held-out", "0"]
    done = CliRunner().invoke(app, ["prepare", "--sources", str(tmp_path / "sources.yaml"), *output])
    assert done.exit_code == 0, done.output
    assert "code: left out: 1 .json that is no JSON lines (b.json); 1 empty (__init__.py)" in done.stderr
    assert "60 documents" in done.stdout
    assert "1 .json that is no JSON lines" in done.stdout  # at the end once more, after what may have been hours


def test_mistakes_about_text_of_other_endings_are_one_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.rst", b"text")
    assert one_line_error(find_text, Source(path=str(file))).endswith("is read as text with --as-text a.rst")
    assert find_text(Source(path=str(file), as_text=("*.rst",))).parts[0].kind == "txt"
    assert one_line_error(find_text, Source(path=str(file), as_text=("",))) == (
        "--as-text: '' given; allowed: a glob, in quotes: '*.md'"
    )
    (tmp_path / "sources.yaml").write_text("sources: [{path: a, as_text: '*.md'}]")
    assert one_line_error(load_sources, tmp_path / "sources.yaml").endswith(
        "sources[0].as_text: '*.md' given; allowed: beside path, a list of globs: ['*.md']"
    )
