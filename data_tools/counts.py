"""How often pre-tokens occur in one institution's text: counted there, and exported so that no text leaves.

An export is a file that a person can read before it is sent (docs/tokenizer.md says what it protects):

    # one sentence that says what this file is
    # {"format": 1, "pre_tokenizer": "gpt2-byte-level", "kind": "occurrences", "min_count": 5, ...}
    48211<TAB>" the"

The exports of all silos are merged into one table, from which data_tools/tokenizer.py trains.
"""

import itertools
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist, median
from typing import IO, Any

from rich.console import Console

from data_tools.formats import Part, check_on_bad, nothing_bad
from data_tools.pretokens import (
    COMMIT_SECONDS,
    FULL_DISTINCT,
    MAX_DISTINCT,
    MAX_PRETOKEN_BYTES,
    SHARE_UNITS,
    STATE_FILE,
    PretokenCount,
    count_parts,
    count_pretokens,
)
from pretrain.config.errors import ConfigError
from pretrain.host.lock import lock_directory
from pretrain.silo.shards import atomic_path

FORMAT = 1
PRE_TOKENIZER = "gpt2-byte-level"
KINDS = ("occurrences", "documents")
MAX_LINE_BYTES = 1024
# What one export adds up to, relative to the median of the others, at most: see merge_counts.
MAX_OTHERS = 2
SENTENCE = (
    "# How often pre-tokens (words, numbers, runs of signs or spaces) occur in one institution's text, "
    "to train a shared tokenizer from; this file holds nothing else of that text."
)

MAX_EPSILON = 100.0

_COUNT = re.compile(rb"[1-9][0-9]{0,17}")


@dataclass(kw_only=True, frozen=True)
class CountsHeader:
    """What an export says about itself; nothing in it depends on the text."""

    format: int = FORMAT
    """Version of the file's layout."""
    pre_tokenizer: str = PRE_TOKENIZER
    """How the text was cut."""
    kind: str
    """occurrences: exact counts; documents: noisy sums of what each document adds, at most 1."""
    min_count: int
    """Counts below were left out."""
    min_documents: int
    """Pre-tokens of fewer documents were left out."""
    epsilon: float | None
    """Of differential privacy for one document; None without noise."""
    delta: float | None
    """Of differential privacy for one document; None without noise."""
    per_document: int | None
    """Square of the L2 norm of what one document adds; None without noise."""


@dataclass(kw_only=True, frozen=True)
class Noise:
    """Gaussian noise on the counts, and from where on a noisy count is released; in documents."""

    sigma: float
    threshold: float


@dataclass(kw_only=True, frozen=True)
class ExportSummary:
    """What one export did; for the institution itself, since the numbers of its text are exact."""

    num_pretokens: int
    """Distinct pre-tokens that were counted."""
    num_exported: int
    """Those that are in the file."""
    noise: Noise | None
    """None without noise."""
    skipped: dict[str, Any] = field(default_factory=nothing_bad)
    """Records that could not be used."""


# --- noise ------------------------------------------------------------------------------------------------------------


def gaussian_delta(*, sigma: float, epsilon: float, sensitivity: float) -> float:
    """The delta with which Gaussian noise of `sigma` is (epsilon, delta)-private for an L2 `sensitivity`."""
    # Theorem 8 of https://arxiv.org/abs/1805.06530
    half, shift = sensitivity / (2 * sigma), epsilon * sigma / sensitivity
    return _normal_cdf(half - shift) - math.exp(epsilon) * _normal_cdf(-half - shift)


def gaussian_sigma(*, epsilon: float, delta: float, sensitivity: float) -> float:
    """The smallest noise that `gaussian_delta` allows, to 12 digits: the analytic Gaussian mechanism."""
    low, high = 0.0, sensitivity
    while gaussian_delta(sigma=high, epsilon=epsilon, sensitivity=sensitivity) > delta:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if gaussian_delta(sigma=middle, epsilon=epsilon, sensitivity=sensitivity) > delta:
            low = middle
        else:
            high = middle
    return high


def noise_for(*, epsilon: float, delta: float, min_count: int, min_documents: int) -> Noise:
    """Noise and threshold that make an export (epsilon, delta)-private for adding or removing one document.

    Half of `delta` pays for the Gaussian noise, half for pre-tokens that only this document brings to `min_documents`:
    that any of its at most MAX_DISTINCT passes the threshold is less likely than that (as in
    https://arxiv.org/abs/2202.01100 and https://arxiv.org/abs/2306.07884). Raises ConfigError.
    """
    if not 0 < epsilon <= MAX_EPSILON:
        raise ConfigError(f"--epsilon: {epsilon} given; allowed: above 0, at most {MAX_EPSILON:g}")
    if not 0 < delta < 1:
        raise ConfigError(f"--delta: {delta} given; allowed: above 0, below 1 (1e-6; less than 1 / documents)")
    sigma = gaussian_sigma(epsilon=epsilon, delta=delta / 2, sensitivity=math.sqrt(FULL_DISTINCT))
    # 1 - (1 - p) ** MAX_DISTINCT = delta / 2, without losing digits.
    p = -math.expm1(math.log1p(-delta / 2) / MAX_DISTINCT)
    # Before the noise such a pre-token has at most 1 from each of min_documents documents.
    threshold = min_documents - sigma * NormalDist().inv_cdf(p)
    return Noise(sigma=sigma, threshold=max(min_count, threshold))


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


# --- exporting --------------------------------------------------------------------------------------------------------


def export_parts(
    parts: Sequence[Part],
    *,
    output: Path,
    console: Console,
    on_bad: str = "stop",
    asked_to_stop: Callable[[], bool] = lambda: False,
    commit_seconds: float = COMMIT_SECONDS,
    **options: Any,
) -> ExportSummary:
    """`export_counts` of an institution's files, with its options; how far it is lies in `output`.partial.

    The same call goes on after a kill, and writes the same bytes. The folder is for its owner alone, since it has the
    rare words, too. Records that cannot be used stop the work (`on_bad` "stop") or are counted ("skip"). Raises
    ConfigError as `export_counts` does and for a full disk, and StoppedError when `asked_to_stop`.
    """
    check_on_bad(on_bad)
    skipped = nothing_bad()
    directory = output.with_name(output.name + ".partial")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = lock_directory(directory, f"counting for {output}")
    is_done = output.exists()  # by a process that was killed after its last rename
    counting = partial(
        count_parts,
        directory=directory,
        console=console,
        on_bad=on_bad,
        skipped=skipped,
        asked_to_stop=asked_to_stop,
        commit_seconds=commit_seconds,
    )
    try:
        summary = export_counts(parts, output=output, count=counting, **options)
        is_done = True
    except OSError as error:
        raise ConfigError(
            f"--output: {output}: {error.strerror or error}: make room, then run the same command again; it goes on "
            f"from {directory}"
        ) from None
    finally:
        if is_done or not (directory / STATE_FILE).exists():
            shutil.rmtree(directory)
        os.close(lock)
    return replace(summary, skipped=skipped)


def export_counts(
    texts: Iterable[Any],
    *,
    output: Path,
    min_count: int = 5,
    min_documents: int = 3,
    epsilon: float | None = None,
    delta: float = 1e-6,
    num_workers: int | None = None,
    random_source: random.Random | None = None,
    count: Callable[..., Iterator[PretokenCount]] = count_pretokens,
) -> ExportSummary:
    """Let `count` count the pre-tokens of `texts`; write those that may leave to a file `output`, whole or not at all.

    Without `epsilon` these are the exact occurrences of pre-tokens that occur `min_count` times in `min_documents`
    documents. With it, documents are counted and Gaussian noise makes the file (epsilon, delta)-private for one
    document; the noise is the operating system's, unless a test gives another `random_source`. Raises ConfigError for
    a bad option, an `output` that is already there (each noisy file spends epsilon again), or when nothing may leave.
    """
    for option, given in (("--min-count", min_count), ("--min-documents", min_documents)):
        if given < 1:
            raise ConfigError(f"{option}: {given} given; allowed: 1 or more")
    if output.exists():
        raise ConfigError(f"--output: {output} exists: delete it or choose another --output")
    noise = None
    if epsilon is not None:
        noise = noise_for(epsilon=epsilon, delta=delta, min_count=min_count, min_documents=min_documents)
    header = CountsHeader(
        kind=KINDS[noise is not None],
        min_count=min_count,
        min_documents=min_documents,
        epsilon=epsilon,
        delta=delta if noise else None,
        per_document=FULL_DISTINCT if noise else None,
    )
    gauss = (random_source or random.SystemRandom()).gauss
    exported: list[tuple[int, str]] = []
    num_pretokens = 0
    for one in count(texts, shares=noise is not None, num_workers=num_workers):
        num_pretokens += 1
        value = _released(one, header, noise, gauss)
        if value is not None:
            exported.append((value, one.pretoken))
    if not exported:
        raise ConfigError(
            f"--min-count, --min-documents, --epsilon: none of {num_pretokens} pre-tokens may leave: "
            "add text, lower the first two or raise --epsilon"
        )
    exported.sort(key=lambda pair: (-pair[0], pair[1]))
    with atomic_path(output) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(f"{SENTENCE}\n# {json.dumps(asdict(header))}\n")
        file.writelines(f"{value}\t{_readable(pretoken)}\n" for value, pretoken in exported)
    return ExportSummary(num_pretokens=num_pretokens, num_exported=len(exported), noise=noise)


def _released(
    count: PretokenCount, header: CountsHeader, noise: Noise | None, gauss: Callable[[float, float], float]
) -> int | None:
    """What the file says about a pre-token; None when it may not leave."""
    if count.num_documents < header.min_documents:
        return None
    if noise is None:
        return count.value if count.value >= header.min_count else None
    noisy = count.value / SHARE_UNITS + gauss(0.0, noise.sigma)
    # Rounded after the noise, which also hides what the last bits of a float would tell.
    return round(noisy) if noisy >= noise.threshold else None


def _readable(pretoken: str) -> str:
    """A JSON string in which all that an editor would not show as it is stands as an escape."""
    return '"' + "".join(_escaped(character) for character in pretoken) + '"'


def _escaped(character: str) -> str:
    return json.dumps(character, ensure_ascii=not character.isprintable())[1:-1]


# --- reading and merging ----------------------------------------------------------------------------------------------


def merge_counts(files: Sequence[Path], *, warn: Callable[[str], None] = lambda line: None) -> dict[str, int]:
    """The sums of several exports; none counts for more than MAX_OTHERS times what the median of the others adds up to.

    Whoever claims more is scaled down, all its counts alike, each rounded down, and `warn` is called with a line. The
    order of the files does not matter. Raises ConfigError as `read_counts` does, and when their kinds differ.
    """
    merged: dict[str, int] = {}
    first_kind = ""
    tables = []
    for file in files:
        header, counts = read_counts(file)
        first_kind = first_kind or header.kind
        if header.kind != first_kind:
            raise ConfigError(
                f"{file}: counts {header.kind}, {files[0]} {first_kind}; allowed: one kind: "
                "export all with --epsilon or all without"
            )
        tables.append(counts)
    totals = [sum(counts.values()) for counts in tables]
    for index, (file, counts) in enumerate(zip(files, tables, strict=True)):
        others = totals[:index] + totals[index + 1 :]
        most = int(MAX_OTHERS * median(others)) if others else totals[index]
        if totals[index] > most:
            warn(
                f"warning: {file} adds up to {totals[index]:,}, more than {MAX_OTHERS} times the median of the others; "
                f"it is taken as {most:,}, all its counts in proportion"
            )
        for pretoken, count in counts.items():
            if taken := count * min(most, totals[index]) // totals[index]:
                merged[pretoken] = merged.get(pretoken, 0) + taken
    return merged


def read_counts(file: Path) -> tuple[CountsHeader, dict[str, int]]:
    """Read another party's export and check every line. Raises ConfigError, with file and line."""
    counts: dict[str, int] = {}
    try:
        with file.open("rb") as stream:
            lines = _lines(file, stream)
            header = _read_header(file, lines)
            for number, line in lines:
                pretoken, count = _read_count(file, number, line)
                if pretoken in counts:
                    raise _bad(file, number, f"{_readable(pretoken)} a second time; allowed: each pre-token once")
                counts[pretoken] = count
    except OSError as error:
        raise ConfigError(f"counts: {str(file)!r} given; {error.strerror}") from None
    return header, counts


def _bad(file: Path, number: int, what: str) -> ConfigError:
    return ConfigError(f"{file}, line {number}: {what}: export it again (atoll data counts)")


def _lines(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    for number in itertools.count(1):
        line = stream.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise _bad(file, number, f"longer than {MAX_LINE_BYTES} bytes")
        if not line.endswith(b"\n"):
            raise _bad(file, number, "cut off, it has no line end")
        yield number, line[:-1]


def _read_header(file: Path, lines: Iterator[tuple[int, bytes]]) -> CountsHeader:
    (_, sentence), (_, line) = next(lines, (1, b"")), next(lines, (2, b""))
    if not sentence.startswith(b"# "):
        raise _bad(file, 1, "not a file of counts")
    try:
        loaded = json.loads(line.removeprefix(b"# ")) if line.startswith(b"# ") else None
        header = CountsHeader(**loaded) if isinstance(loaded, dict) else None
    except (ValueError, TypeError, RecursionError):
        header = None
    if header is None:
        raise _bad(file, 2, "no header; allowed: # and one JSON object with the fields of an export")
    for name, given, allowed in (
        ("format", header.format, (FORMAT,)),
        ("pre_tokenizer", header.pre_tokenizer, (PRE_TOKENIZER,)),
        ("kind", header.kind, KINDS),
    ):
        if given not in allowed:
            raise _bad(file, 2, f"{name} {given!r} given; allowed: {' or '.join(map(str, allowed))}")
    return header


def _read_count(file: Path, number: int, line: bytes) -> tuple[str, int]:
    count, tab, written = line.partition(b"\t")
    if not tab or not _COUNT.fullmatch(count):
        raise _bad(file, number, 'allowed: a positive count, a tab, "a pre-token as JSON string"')
    try:
        pretoken = json.loads(written)
        num_bytes = len(pretoken.encode()) if isinstance(pretoken, str) else 0
    except (ValueError, RecursionError):
        num_bytes = 0
    if not 1 <= num_bytes <= MAX_PRETOKEN_BYTES:
        raise _bad(file, number, f"the pre-token is no JSON string of 1 to {MAX_PRETOKEN_BYTES} bytes")
    return pretoken, int(count)
