"""What is read of a folder, a glob or a file, and for what: by the names of its files, before one of them is read.

Known names of splits are train, training; valid, validation, val, dev, eval; test, testing: as a folder (`test/a.txt`),
as a file (`test.jsonl`) or as a file's beginning with a number (`test-00000-of-00001.parquet`, `test_2.jsonl`). Test
text is never trained on, and never held out for choosing by.
"""

import codecs
import glob
import itertools
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from data_tools import documents
from data_tools.files import CHECK_ENTRIES, find_files
from data_tools.formats import WHOLE, WHOLE_KINDS, Kind, Part, is_json_lines
from data_tools.pieces import DOCUMENTS, FORMATS, KINDS, PACKED, RECORD_FORMATS, PartEnds, Pieces, suffix_of
from pretrain.config.errors import ConfigError
from pretrain.host.foreign import shown

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev", "eval"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}
TEST, NO_SPLIT, NO_JSON_LINES = "of test text", "beside the splits, by no split's name", ".json that is no JSON lines"
NO_ENDING = "without an ending"
_NUMBERED = re.compile(r"([a-z]+)[-_.]\d+(?:-of-\d+)?")
# So many names are said of each kind.
MAX_NAMES = 3
MAX_ADVISED = 5
# Of a file that is not read, so much is looked at to see whether it could be.
LOOKED_AT_BYTES = 1 << 14


@dataclass(kw_only=True, frozen=True)
class Listing:
    """What there is of one source."""

    parts: list[Part]
    """What is read, in this order."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """What is not, to the names of the files."""
    unlisted: list[str] = field(default_factory=list)
    """Files and folders that the system does not let us look at, with the reason."""
    remarks: list[str] = field(default_factory=list)
    """What else to know about it."""

    @property
    def num_left_out(self) -> dict[str, int]:
        """Why something is not read, to how many files and folders that concerns."""
        counts = {why: len(names) for why, names in self.left_out.items()}
        return counts | ({"not listed": len(self.unlisted)} if self.unlisted else {})

    def lines(self, name: str, *, held_out: float | None = None) -> Iterator[str]:
        """What a user is told before anything is read; `held_out` is the share of documents that are chosen by hash."""
        by_split = {split: [one for one in self.parts if one.split == split] for split in ("valid", "train", "")}
        uses = {"train": "to train on", "valid": "held out", "": "to train on"}
        if held_out:
            uses[""] = f"to train on, but for {100 * held_out:g} % of the documents, held out"
        said = [f"{_files(parts)} {uses[split]}" for split, parts in reversed(by_split.items()) if parts]
        yield f"{name}: {'; '.join(said)}"
        if self.left_out:
            yield f"{name}: left out: {named(self.left_out)}"
        if self.unlisted:
            yield f"{name}: warning: {len(self.unlisted)} cannot be listed: {_some(self.unlisted)}"
        yield from (f"{name}: {remark}" for remark in self.remarks)


def named(left_out: dict[str, list[str]]) -> str:
    """Numbers and the first names of what is left out."""
    return "; ".join(f"{len(names):,} {why} ({_some(names)})" for why, names in left_out.items())


def _some(names: list[str]) -> str:
    return ", ".join(shown(name) for name in names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")


def _files(parts: list[Part]) -> str:
    num_bytes = sum(part.num_bytes for part in parts)
    what = "data sets" if parts[0].kind in ("saved", "dataset") else "files"
    size = f" of {num_bytes / 1e6:,.1f} MB" if num_bytes else ""
    return f"{len(parts):,} {what if len(parts) > 1 else what[:-1]}{size}"


def check_listed(listings: Iterable[Listing], *, advice: str) -> None:
    """Raise ConfigError when something could not be listed."""
    unlisted = [place for listing in listings for place in listing.unlisted]
    if unlisted:
        raise ConfigError(f"corpus: {len(unlisted)} cannot be listed: {_some(unlisted)}; mend or remove them{advice}")


def split_of(name: str) -> str:
    """train, valid or test where a relative path says so, or nothing; of several the one furthest from training."""
    *folders, file = Path(name.lower()).parts
    stem = file.removesuffix(suffix_of(file))
    numbered = _NUMBERED.fullmatch(stem)
    found = {SPLIT_NAMES.get(one, "") for one in (*folders, numbered[1] if numbered else stem)}
    return next((split for split in ("test", "valid", "train") if split in found), "")


def list_files(path: str, text: str, as_text: tuple[str, ...], check: Callable[[], None]) -> Listing:
    """The listing of a file, a folder or a glob, the text of whose records has the key or column `text`.

    Files that a glob of `as_text` names are text files, whatever their ending is. `check` is called again and again,
    to raise when it is time to stop. Raises ConfigError when there is nothing to read.
    """
    if empty := [one for one in as_text if not PurePath(one).parts]:
        raise ConfigError(f"--as-text: {empty[0]!r} given; allowed: a glob, in quotes: '*.md'")
    if os.path.isfile(path):
        return _list_file(Path(path), text, as_text)
    if not os.path.isdir(path) and not glob.has_magic(path):
        raise ConfigError(f"corpus: {path!r} given; there is no such file or folder")
    found = find_files(path, check)
    left_out = dict(found.left_out)
    names = []
    plain: dict[str, set[str]] = {}
    for number, name in enumerate(found.files):
        if number % CHECK_ENTRIES == CHECK_ENTRIES - 1:
            check()
        if globs := _globs_of(name, as_text):
            plain[name] = globs
            names.append(name)
        elif why := _no_text(found.root / name, text):
            left_out.setdefault(why, []).append(name)
        else:
            names.append(name)
    splits = _splits(names)
    for name in names:
        if (why := splits[name]) in (TEST, NO_SPLIT):
            left_out.setdefault(why, []).append(name)
    read = {name: split for name, split in splits.items() if split not in (TEST, NO_SPLIT)}
    _check_once(found.root, read)
    parts = [file_part(found.root / name, text, split, as_text=name in plain) for name, split in read.items()]
    if empty := [name for name, part in zip(read, parts, strict=True) if name in plain and not part.num_bytes]:
        left_out["empty"] = empty  # as a package's __init__.py; an empty file of text in its own right is a mistake
        parts = [part for name, part in zip(read, parts, strict=True) if name not in empty]
    others = {} if text == WHOLE else left_out  # conversations are in no other files
    advice, unread = _advice(found.root, others), [ending for ending in DOCUMENTS if ending in others]
    if not parts:
        there = f"; there are {named(left_out)}" if left_out else ""
        why = f", {len(found.unlisted)} cannot be listed: {_some(found.unlisted)}" if found.unlisted else ""
        raise ConfigError(
            f"corpus: {path!r} given, which has no file to read{why}; allowed: {_formats(text)}{there}"
            + (f": type {advice} to read such files as text" if advice else "")
            + (f": type {documents.EXTRA} to read {', '.join(unread)}" if unread else "")
        )
    outside = found.outside
    remarks = [f"to read such files as text, too, type {advice}"] if advice else []
    remarks += [f"to read {', '.join(unread)}, too, type {documents.EXTRA}"] if unread else []
    remarks += [f"{len(outside):,} of its links lead out of {path}: {_some(outside)}"] if outside else []
    unused = [one for one in as_text if one not in set().union(*plain.values())]
    remarks += [f"warning: --as-text {shlex.quote(one)} is the name of none of its files" for one in unused]
    return Listing(parts=parts, left_out=left_out, unlisted=found.unlisted, remarks=remarks)


def _list_file(path: Path, text: str, as_text: tuple[str, ...]) -> Listing:
    if _globs_of(str(path), as_text):
        return Listing(parts=[file_part(path, text, as_text=True)])
    if text == WHOLE and _no_text(path, text):
        array = "; of a .json with one list, jq -c '.[]' makes lines" if path.suffix == ".json" else ""
        raise ConfigError(
            f"corpus: {str(path)!r} given; allowed: conversations in {RECORD_FORMATS}, a line each{array}"
        )
    part = file_part(path, text)
    if _no_text(path, text):
        line = f'{{{json.dumps(text, ensure_ascii=False)}: "..."}}'
        raise ConfigError(
            f"corpus: {str(path)!r} given, which is no JSON lines; allowed in a .json: lines of {line}, or any "
            "text with --as-text '*.json'"
        )
    split = split_of(path.name)
    remark = f"warning: {path.name} is by its name {split} text, and is trained on as it was named alone"
    return Listing(parts=[part], remarks=[remark] if split in ("valid", "test") else [])


def _globs_of(name: str, as_text: tuple[str, ...]) -> set[str]:
    """The globs that match a file's name, or with a / in them the end of its path; in letters of any case."""
    return {one for one in as_text if PurePath(name.lower()).match(one.lower())}


def _advice(root: Path, left_out: dict[str, list[str]]) -> str:
    """Options for the endings, the most frequent first, whose first file begins as text does: UTF-8, and no NUL.

    Files without an ending go by the name that most of them have, as copyright, or if there is none by any name.
    """
    no_endings = (NO_JSON_LINES, *DOCUMENTS)
    globs = {f"*{why}": names for why, names in left_out.items() if why.startswith(".") and why not in no_endings}
    if names := left_out.get(NO_ENDING, []):
        name, number = Counter(PurePath(one).name for one in names).most_common(1)[0]
        globs[glob.escape(name) if 2 * number > len(names) else "*"] = names
    most_first = sorted(globs, key=lambda one: -len(globs[one]))
    readable = (one for one in most_first if _looks_like_text(root / globs[one][0]))
    return " ".join(f"--as-text {shlex.quote(one)}" for one in itertools.islice(readable, MAX_ADVISED))


def _looks_like_text(file: Path) -> bool:
    try:
        start = next(iter(Pieces(str(file), 0)), b"")[:LOOKED_AT_BYTES]
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except (PartEnds, UnicodeDecodeError):
        return False
    return bool(text) and "\0" not in text


def _no_text(file: Path, text: str) -> str:
    """Why a file is of no known format, or nothing."""
    suffix = suffix_of(file.name)
    if suffix.startswith(".json") and not suffix.startswith(".jsonl") and not is_json_lines(str(file), text):
        return NO_JSON_LINES
    is_known = bool(suffix) and (suffix not in DOCUMENTS or documents.is_installed())
    if is_known and (text != WHOLE or _kind(suffix) in WHOLE_KINDS):
        return ""
    *stems, ending = file.name.lower().split(".")
    if not stems:
        return NO_ENDING
    return f".{stems[-1]}.{ending}" if f".{ending}" in PACKED and len(stems) > 1 else f".{ending}"


def _splits(names: list[str]) -> dict[str, str]:
    """What each file is for: train or valid, nothing for text that is still to be split, or why it is left out."""
    exact = {name: SPLIT_NAMES.get(name.lower().removesuffix(suffix_of(name)), "") for name in names}
    if {"train", "valid"} <= set(exact.values()):  # these two are the corpus, whatever lies beside and below them
        splits = {name: split or ("test" if split_of(name) == "test" else "") for name, split in exact.items()}
    else:
        splits = {name: split_of(name) for name in names}
    there = set(splits.values())
    if "valid" in there:
        rest = NO_SPLIT if "train" in there else "train"
        purposes = {"train": "train", "valid": "valid", "test": TEST, "": rest}
    else:  # held-out text is still to be chosen from what is trained on
        rest = NO_SPLIT if there >= {"train", "test"} else ""
        purposes = {"train": "", "test": TEST, "": rest}
    return {name: purposes[split] for name, split in splits.items()}


def _check_once(root: Path, names: Iterable[str]) -> None:
    """Raise ConfigError for `train.jsonl` beside `train.jsonl.zst`, most likely the same text."""
    stems: dict[str, str] = {}
    for name in names:
        stem = name.lower().removesuffix(suffix_of(name))
        if Path(stem).name in SPLIT_NAMES and stems.setdefault(stem, name) != name:
            raise ConfigError(f"corpus: {root} has {stems[stem]}, {name}; allowed: one of them: move the other away")


def file_part(path: Path, text: str, split: str = "", *, as_text: bool = False) -> Part:
    """A file as part of a source. Raises ConfigError when it is of no known format, or cannot be looked at."""
    suffix = ".txt" if as_text else suffix_of(path.name)
    if not suffix:
        raise ConfigError(
            f"corpus: {str(path)!r} given; allowed: a folder or a file of {FORMATS}; any other is read as text with "
            f"--as-text {shlex.quote(path.name)}"
        )
    if suffix in DOCUMENTS and not documents.is_installed():
        raise ConfigError(
            f"corpus: {str(path)!r} given; {suffix} needs packages that are not installed: type {documents.EXTRA}"
        )
    try:
        stat = path.stat()
    except OSError as error:
        raise ConfigError(f"corpus: {str(path)!r} given; {error.strerror}") from None
    return Part(
        path=str(path), kind=_kind(suffix), text=text, split=split, num_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns
    )


def _kind(suffix: str) -> Kind:
    others: dict[str, Kind] = {".parquet": "parquet", **dict.fromkeys(DOCUMENTS, "document")}
    return others.get(suffix) or KINDS[suffix.split(".")[1]]


def _formats(text: str) -> str:
    return RECORD_FORMATS if text == WHOLE else FORMATS
