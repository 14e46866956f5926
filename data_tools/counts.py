"""How often pre-tokens occur in one institution's text: counted there, and exported so that no text leaves.

An export is a file that a person can read before it is sent (docs/tokenizer.md says what it protects):

    # one sentence that says what this file is
    # {"format": 1, "pre_tokenizer": "gpt2-byte-level", "kind": "occurrences", "min_count": 5, ...}
    48211<TAB>" the"

The exports of all silos are merged into one table, from which data_tools/tokenizer.py trains.
"""

import contextlib
import hashlib
import heapq
import itertools
import json
import math
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import NormalDist, median
from typing import IO, NamedTuple

from tokenizers import pre_tokenizers

from data_tools.workers import in_order, num_cores
from pretrain.config.check import ConfigError
from pretrain.silo.shards import atomic_path

FORMAT = 1
PRE_TOKENIZER = "gpt2-byte-level"
KINDS = ("occurrences", "documents")
MAX_PRETOKEN_BYTES = 64
# Some 300 bytes an entry: about 1 GB.
MAX_TABLE_ENTRIES = 4_000_000
# Sorted runs that are open together; more are first merged into one.
MAX_RUNS = 64
BATCH_CHARACTERS = 1_000_000
# Below so many batches, starting processes costs more than they save.
MIN_PARALLEL_BATCHES = 8
MAX_LINE_BYTES = 1024
# What one export adds up to, relative to the median of the others, at most: see merge_counts.
MAX_OTHERS = 2
SENTENCE = (
    "# How often pre-tokens (words, numbers, runs of signs or spaces) occur in one institution's text, "
    "to train a shared tokenizer from; this file holds nothing else of that text."
)

# With noise, a document adds 1 to each of its distinct pre-tokens if they are at most FULL_DISTINCT, otherwise a share
# of 1 that makes the L2 norm of all it adds sqrt(FULL_DISTINCT): that is the sensitivity of the sums. A document with
# more than MAX_DISTINCT adds to so many of them. The shares are whole multiples of 1 / SHARE_UNITS, so that a sum is
# exact in whatever order it is made.
FULL_DISTINCT = 64
MAX_DISTINCT = 1024
SHARE_UNITS = 1 << 20
MAX_EPSILON = 100.0

_splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
_COUNT = re.compile(rb"[1-9][0-9]{0,17}")


class PretokenCount(NamedTuple):
    """A pre-token, what the documents add up to for it, and how many of them added something."""

    pretoken: str
    value: int
    num_documents: int


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


# --- counting ---------------------------------------------------------------------------------------------------------


def count_pretokens(
    texts: Iterable[str], *, shares: bool = False, num_workers: int | None = None
) -> Iterator[PretokenCount]:
    """Yield every pre-token of at most MAX_PRETOKEN_BYTES in `texts` once, sorted.

    The value is the number of occurrences; with `shares` what documents add under differential privacy (see
    FULL_DISTINCT), times SHARE_UNITS. `num_workers` processes count (0: this one; None: one a core when there is enough
    text). Memory does not grow with the text: a full table goes to an unnamed temporary file as a sorted run. Raises
    ConfigError when a worker was killed.
    """
    runs: list[IO[bytes]] = []
    values: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:

        def spill(counts: Iterable[PretokenCount]) -> IO[bytes]:
            # Without a name: rare words of the text do not stay on the disk, however this process ends.
            file = stack.enter_context(tempfile.TemporaryFile())
            _write_run(file, counts)
            return file

        for batch_values, batch_documents in _counted(_batches(texts), shares, num_workers):
            values.update(batch_values)
            documents.update(batch_documents)
            if len(values) > MAX_TABLE_ENTRIES:
                if len(runs) == MAX_RUNS:
                    fewer = [spill(_merged([_read_run(run) for run in runs]))]
                    for run in runs:
                        run.close()
                    runs = fewer
                runs.append(spill(_table(values, documents)))
                values.clear()
                documents.clear()
        yield from _merged([*(_read_run(run) for run in runs), _table(values, documents)])


def _table(values: Counter[str], documents: Counter[str]) -> Iterator[PretokenCount]:
    return (PretokenCount(pretoken, values[pretoken], documents[pretoken]) for pretoken in sorted(values))


def _merged(sorted_runs: Sequence[Iterator[PretokenCount]]) -> Iterator[PretokenCount]:
    for pretoken, same in itertools.groupby(heapq.merge(*sorted_runs), key=itemgetter(0)):
        counts = list(same)
        yield PretokenCount(pretoken, sum(c.value for c in counts), sum(c.num_documents for c in counts))


def _write_run(file: IO[bytes], counts: Iterable[PretokenCount]) -> None:
    try:
        for count in counts:
            file.write(json.dumps(count).encode() + b"\n")
        file.seek(0)
    except OSError as error:
        with contextlib.suppress(OSError):
            file.close()  # would try to write the rest of its buffer later
        raise ConfigError(
            f"TMPDIR: {tempfile.gettempdir()} given; {error.strerror}: free space there or set TMPDIR"
        ) from None


def _read_run(file: IO[bytes]) -> Iterator[PretokenCount]:
    return (PretokenCount(*json.loads(line)) for line in file)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_characters = 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _counted(
    batches: Iterator[list[str]], shares: bool, num_workers: int | None
) -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Values and documents of each batch, in order."""
    first = list(itertools.islice(batches, MIN_PARALLEL_BATCHES))
    if num_workers is None:
        num_workers = num_cores() if len(first) == MIN_PARALLEL_BATCHES else 0
    count, all_batches = partial(_count_batch, shares=shares), itertools.chain(first, batches)
    return (counted for _, counted in in_order(count, all_batches, num_workers=num_workers, start=_no_preparation))


def _no_preparation() -> None:
    """A worker counts as it is."""


def _count_batch(texts: list[str], *, shares: bool) -> tuple[Counter[str], Counter[str]]:
    values: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    for text in texts:
        pretokens = [text[begin:end] for _, (begin, end) in _splitter.pre_tokenize_str(text)]
        if shares:
            distinct = _contributing(text, set(pretokens))
            share = math.floor(SHARE_UNITS * math.sqrt(min(1, FULL_DISTINCT / max(1, len(distinct)))))
            for pretoken in distinct:
                values[pretoken] += share
            documents.update(distinct)
        else:
            values.update(pretokens)
            documents.update(set(pretokens))
    for pretoken in [pretoken for pretoken in values if _num_bytes(pretoken) > MAX_PRETOKEN_BYTES]:
        del values[pretoken], documents[pretoken]
    return values, documents


def _contributing(text: str, distinct: set[str]) -> list[str]:
    """The pre-tokens that a document adds to: all, or a choice of MAX_DISTINCT that depends on this document only."""
    allowed = sorted(pretoken for pretoken in distinct if _num_bytes(pretoken) <= MAX_PRETOKEN_BYTES)
    if len(allowed) <= MAX_DISTINCT:
        return allowed
    return random.Random(hashlib.sha256(text.encode()).digest()).sample(allowed, MAX_DISTINCT)


def _num_bytes(pretoken: str) -> int:
    return len(pretoken) if pretoken.isascii() else len(pretoken.encode())


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


def export_counts(
    texts: Iterable[str],
    *,
    output: Path,
    min_count: int = 5,
    min_documents: int = 3,
    epsilon: float | None = None,
    delta: float = 1e-6,
    num_workers: int | None = None,
    random_source: random.Random | None = None,
) -> ExportSummary:
    """Count the pre-tokens of `texts` and write those that may leave to the file `output`, whole or not at all.

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
    for count in count_pretokens(texts, shares=noise is not None, num_workers=num_workers):
        num_pretokens += 1
        value = _released(count, header, noise, gauss)
        if value is not None:
            exported.append((value, count.pretoken))
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
