"""Three small corpora made from the installed Python itself."""

import ast
import functools
import gzip
import hashlib
import importlib.metadata
import json
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from data_tools.sources import SPLITS, split_file
from pretrain.config.errors import ConfigError
from pretrain.silo.shards import atomic_path

MAX_BYTES = {"train": 6_000_000, "valid": 300_000}
MIN_DOCUMENT_CHARACTERS = 200
MAX_DOCUMENT_CHARACTERS = 9_000
# One source text in so many is held out, whole.
HELD_OUT_EVERY = 16
TEST_FOLDERS = {"test", "tests", "idle_test"}
# Tables and generated text; `topics` in pydoc_data is prose and read as such.
NOT_SOURCE_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
# A line of prose is letters to this share, spaces apart; code, tables, badges and addresses have less.
MIN_LETTER_SHARE = 0.75
NOT_LETTER = re.compile(r"[\W\d_]")
INTERPRETER_PROMPTS = (">>>", "...")


def write_python_corpora(
    output: Path,
    names: Collection[str] = ("library", "tests", "prose"),
    max_bytes: Mapping[str, int] = MAX_BYTES,
) -> dict[str, Path]:
    """Make the corpora `library`, `tests` and `prose`, or some, in `output`, from text that any installed CPython has.

    library is the standard library's source without its docstrings, tests the source of its tests (filled up from
    installed packages' tests, as some distributions leave the standard ones out), prose the language reference,
    docstrings and package descriptions. Each has at most `max_bytes` of a split (6 MB, 0.3 MB held out), no document
    twice.
    Equal installations give equal bytes; a corpus that is already there is left as it is. Returns name -> folder.
    Raises ConfigError when there is not enough text, or a folder of that name that is no corpus.
    """
    sources: dict[str, Callable[[], Iterator[str]]] = {"library": _library, "tests": _tests, "prose": _prose}
    folders = {name: output / name for name in sources if name in names}
    for name, folder in folders.items():
        if folder.exists():
            for split in SPLITS:
                split_file(folder, split)
            continue
        selected = _select(sources[name](), max_bytes)
        for split, texts in selected.items():
            if not texts:
                raise ConfigError(f"corpora: the installed Python has no text for {name}/{split}: use your own text")
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for split, texts in selected.items():
                _write_jsonl_gz(temporary / f"{split}.jsonl.gz", texts)
    return folders


def _select(texts: Iterator[str], max_bytes: Mapping[str, int]) -> dict[str, list[str]]:
    """Deal texts out to train and valid, cut, without duplicates, until both are full."""
    selected: dict[str, list[str]] = {split: [] for split in SPLITS}
    num_bytes = dict.fromkeys(SPLITS, 0)
    full: set[str] = set()
    seen: set[bytes] = set()
    for text in texts:
        digest = hashlib.sha256(text.encode()).digest()
        split = "valid" if int.from_bytes(digest[:8], "big") % HELD_OUT_EVERY == 0 else "train"
        pieces = _pieces(text)
        # A held-out text gives its first piece only, so that a small split still has many sources.
        for piece in pieces[:1] if split == "valid" else pieces:
            encoded = piece.encode()
            digest = hashlib.sha256(encoded).digest()
            if digest in seen or len(piece) < MIN_DOCUMENT_CHARACTERS:
                continue
            if num_bytes[split] + len(encoded) > max_bytes[split]:
                full.add(split)
                break
            seen.add(digest)
            selected[split].append(piece)
            num_bytes[split] += len(encoded)
        if len(full) == len(SPLITS):
            break
    return selected


def _pieces(text: str) -> list[str]:
    """Cut a text at line ends into pieces of at most MAX_DOCUMENT_CHARACTERS; longer lines are dropped."""
    pieces: list[str] = []
    lines: list[str] = []
    num_characters = 0
    for line in text.splitlines(keepends=True):
        if len(line) > MAX_DOCUMENT_CHARACTERS:
            continue
        if num_characters + len(line) > MAX_DOCUMENT_CHARACTERS:
            pieces.append("".join(lines))
            lines, num_characters = [], 0
        lines.append(line)
        num_characters += len(line)
    return [*pieces, "".join(lines)]


def _write_jsonl_gz(path: Path, texts: list[str]) -> None:
    # No name and no time in the header: equal texts give equal bytes.
    with path.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed:
        for text in texts:
            packed.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def site_packages() -> list[Path]:
    return sorted({Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")})


def python_files(root: Path, *, excluded_folders: set[str]) -> Iterator[Path]:
    """Python files below `root` in an order that mixes packages and depends on relative paths only."""
    files = [(str(path.relative_to(root)), path) for path in root.rglob("*.py")]
    for relative, path in sorted(files, key=lambda pair: hashlib.sha256(pair[0].encode()).digest()):
        # _sysconfigdata describes the build machine.
        if not excluded_folders & set(Path(relative).parts) and not path.name.startswith("_sysconfigdata"):
            yield path


def read_source(path: Path) -> str:
    """A Python file's text; empty when it cannot be decoded, as some of CPython's own test files cannot."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return ""


def parsed(source: str) -> ast.Module | None:
    """A Python file's syntax tree; None when it has none."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None


@functools.cache
def _code_and_docstrings(path: Path) -> tuple[str, str]:
    """A Python file's source without its docstrings, and its docstrings; both empty when it does not parse."""
    source = read_source(path)
    if (tree := parsed(source)) is None:
        return "", ""
    docstrings: list[str] = []
    docstring_lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                docstrings.append(docstring)
                expression = node.body[0]
                docstring_lines.update(range(expression.lineno, (expression.end_lineno or expression.lineno) + 1))
    lines = source.splitlines(keepends=True)
    code = "".join(line for number, line in enumerate(lines, start=1) if number not in docstring_lines)
    return code, "\n\n".join(docstrings) + "\n"


def _library() -> Iterator[str]:
    for path in python_files(standard_library(), excluded_folders=NOT_SOURCE_FOLDERS | TEST_FOLDERS):
        yield _code_and_docstrings(path)[0]


def _tests() -> Iterator[str]:
    for root in (standard_library(), *site_packages()):
        for path in python_files(root, excluded_folders=NOT_SOURCE_FOLDERS):
            if TEST_FOLDERS & set(path.relative_to(root).parts):
                yield read_source(path)


def _prose() -> Iterator[str]:
    yield from reference_topics()
    for path in python_files(standard_library(), excluded_folders=NOT_SOURCE_FOLDERS | TEST_FOLDERS):
        yield _prose_lines(_code_and_docstrings(path)[1])
    roots = [str(root) for root in site_packages()]
    # A half-removed package has a folder without METADATA, and so no name.
    whole = (found for found in importlib.metadata.distributions(path=roots) if found.read_text("METADATA"))
    for distribution in sorted(whole, key=lambda found: found.name):
        yield _prose_lines(str(distribution.metadata.json.get("description", "")))
    for root in site_packages():
        for path in python_files(root, excluded_folders=NOT_SOURCE_FOLDERS | TEST_FOLDERS):
            yield _prose_lines(_code_and_docstrings(path)[1])


def _prose_lines(text: str) -> str:
    """A text without its lines of code, tables, badges and addresses."""
    lines = []
    for line in text.splitlines():
        num_visible, num_letters = len("".join(line.split())), len(NOT_LETTER.sub("", line))
        if num_letters >= MIN_LETTER_SHARE * num_visible and not line.lstrip().startswith(INTERPRETER_PROMPTS):
            lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def reference_topics() -> Iterator[str]:
    """The chapters of the language reference that `help()` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    yield from topics.values()
