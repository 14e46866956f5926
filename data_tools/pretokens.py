"""How often pre-tokens occur, in memory that does not grow with the text; of files, also going on after a kill.

What was counted so far is a table in memory, and before it sorted runs on the disk; in the end all are merged. For
texts the runs are unnamed temporary files. For an institution's files they lie in a folder with the reading position,
and whoever is killed loses what came after the last of them.
"""

import contextlib
import hashlib
import heapq
import itertools
import json
import math
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, NamedTuple

from rich.console import Console
from tokenizers import pre_tokenizers

from data_tools.formats import Bad, Part, count_bad, stop_at_bad
from data_tools.progress import Speed
from data_tools.sources import Block, parse_block, part_identity, read_blocks
from data_tools.workers import StoppedError, in_order, num_cores, workers_for
from pretrain.config.errors import ConfigError
from pretrain.silo.shards import atomic_path

MAX_PRETOKEN_BYTES = 64
# Some 300 bytes an entry: about 1 GB.
MAX_TABLE_ENTRIES = 4_000_000
# Sorted runs that are open together; more are first merged into one.
MAX_RUNS = 64
BATCH_CHARACTERS = 1_000_000
# Below so many batches, starting processes costs more than they save.
MIN_PARALLEL_BATCHES = 8
# Time between two runs of a count that goes on after a kill, and so the work that a kill can cost; no run takes more
# than a share of the time since the one before.
COMMIT_SECONDS, MOST_OF_TIME = 30.0, 0.05
STATE_FILE, RUN_SUFFIX = "state.json", ".run"
# Merged pre-tokens between two questions whether to stop.
CHECK_PRETOKENS = 1 << 16

# With noise, a document adds 1 to each of its distinct pre-tokens if they are at most FULL_DISTINCT, otherwise a share
# of 1 that makes the L2 norm of all it adds sqrt(FULL_DISTINCT): that is the sensitivity of the sums. A document with
# more than MAX_DISTINCT adds to so many of them. The shares are whole multiples of 1 / SHARE_UNITS, so that a sum is
# exact in whatever order it is made.
FULL_DISTINCT = 64
MAX_DISTINCT = 1024
SHARE_UNITS = 1 << 20

_splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)


class PretokenCount(NamedTuple):
    """A pre-token, what the documents add up to for it, and how many of them added something."""

    pretoken: str
    value: int
    num_documents: int


# --- texts in memory --------------------------------------------------------------------------------------------------


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
            try:
                _write_run(file, counts)
                file.seek(0)
            except OSError as error:
                with contextlib.suppress(OSError):
                    file.close()  # would try to write the rest of its buffer later
                raise ConfigError(
                    f"TMPDIR: {tempfile.gettempdir()} given; {error.strerror}: free space there or set TMPDIR"
                ) from None
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
    for count in counts:
        file.write(json.dumps(count).encode() + b"\n")
    file.flush()


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


# --- files, going on after a kill -------------------------------------------------------------------------------------


def count_parts(
    parts: Sequence[Part],
    *,
    shares: bool = False,
    num_workers: int | None = None,
    directory: Path,
    console: Console,
    on_bad: str,
    skipped: dict[str, Any],
    asked_to_stop: Callable[[], bool] = lambda: False,
    commit_seconds: float = COMMIT_SECONDS,
) -> Iterator[PretokenCount]:
    """What `count_pretokens` yields of the parts' texts that are not held out, from where `directory` says it is.

    `directory` is locked by the caller, who removes it once what is yielded is used up. With `on_bad` "skip" records
    that cannot be used are counted in `skipped` (`nothing_bad`), else they are a ConfigError, as it is when `directory`
    was begun with other text. Raises OSError for a full disk, and StoppedError when `asked_to_stop`, with all on the
    disk.
    """
    chosen = [part for part in parts if part.split != "valid"]
    counting = _Counting(directory, {"text": [part_identity(part) for part in chosen], "shares": shares}, skipped)
    sizes = [part.num_bytes for part in chosen]
    num_workers = workers_for(sizes) if num_workers is None else num_workers
    first, *within = counting.place

    def blocks() -> Iterator[tuple[int, Block]]:
        for index, part in enumerate(chosen[first:], start=first):
            start = (within[0], within[1]) if index == first else (0, 0)
            yield from ((index, block) for block in read_blocks(part, start))

    work = partial(_count_block, shares=shares)
    with Speed(console, "counting", sizes) as speed:
        for (index, block), (values, documents, bad) in in_order(
            work, blocks(), num_workers=num_workers, start=_no_preparation
        ):
            stop_at_bad(bad, on_bad)
            counting.take(values, documents, bad, (index, *block.next))
            speed.update(index, block.bytes_read)
            stop = asked_to_stop()
            if stop or counting.is_due(commit_seconds):
                counting.commit()
            if stop:
                raise StoppedError
    with console.status("adding up what was counted"):
        for number, count in enumerate(counting.merged()):
            if number % CHECK_PRETOKENS == CHECK_PRETOKENS - 1 and asked_to_stop():
                raise StoppedError
            yield count


def _count_block(item: tuple[int, Block], *, shares: bool) -> tuple[Counter[str], Counter[str], list[Bad]]:
    """Values and documents of a numbered block, and its records that cannot be used."""
    texts, bad = [], []
    for _, text in parse_block(item[1]):
        if isinstance(text, Bad):
            bad.append(text)
        elif text and not text.isspace():
            texts.append(text)
    return *_count_batch(texts, shares=shares), bad


class _Counting:
    """A count under way: a table in memory, and in `directory` the runs before it and how far the text is read."""

    def __init__(self, directory: Path, terms: dict[str, object], skipped: dict[str, Any]) -> None:
        self._directory, self._terms, self._skipped = directory, terms, skipped
        file = directory / STATE_FILE
        state: dict[str, Any] = {"terms": terms, "place": (0, 0, 0), "runs": []}
        if file.exists():
            state = json.loads(file.read_bytes())
        if differing := ", ".join(key for key in terms if state["terms"].get(key) != terms[key]):
            raise ConfigError(
                f"--output: {directory} was begun with other {differing}: delete it, or choose another --output"
            )
        self.place: tuple[int, int, int] = tuple(state["place"])
        """Part, and the offset and number in it, where reading goes on."""
        self._runs: list[str] = state["runs"]
        self._skipped.update(state.get("skipped", {}))
        self._remove_other_runs()
        self._values: Counter[str] = Counter()
        self._documents: Counter[str] = Counter()
        self._committed, self._cost = time.monotonic(), 0.0

    def take(self, values: Counter[str], documents: Counter[str], bad: list[Bad], place: tuple[int, int, int]) -> None:
        """Add what was counted up to `place`."""
        self._values.update(values)
        self._documents.update(documents)
        count_bad(self._skipped, bad)
        self.place = place

    def is_due(self, commit_seconds: float) -> bool:
        """Whether the table is full, or a commit is worth its time."""
        waited = time.monotonic() - self._committed
        return len(self._values) > MAX_TABLE_ENTRIES or waited >= max(commit_seconds, self._cost / MOST_OF_TIME)

    def commit(self) -> None:
        """Bring everything to the disk: from here the next process goes on."""
        began = time.monotonic()
        if len(self._runs) == MAX_RUNS:
            self._runs = [self._write(self._merged_runs())]
        self._runs.append(self._write(_table(self._values, self._documents)))
        self._values.clear()
        self._documents.clear()
        with atomic_path(self._directory / STATE_FILE) as temporary:
            state = {"terms": self._terms, "place": self.place, "runs": self._runs, "skipped": self._skipped}
            temporary.write_text(json.dumps(state))
        self._remove_other_runs()
        self._committed = time.monotonic()
        self._cost = self._committed - began

    def merged(self) -> Iterator[PretokenCount]:
        """All that was counted. Where there are runs, what is not yet among them becomes one before."""
        if not self._runs:
            yield from _table(self._values, self._documents)
            return
        if self._values:
            self.commit()
        yield from self._merged_runs()

    def _merged_runs(self) -> Iterator[PretokenCount]:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context((self._directory / run).open("rb")) for run in self._runs]
            yield from _merged([_read_run(file) for file in files])

    def _write(self, counts: Iterable[PretokenCount]) -> str:
        """A new run; returns its name, which no earlier one had."""
        last = max((int(run.removesuffix(RUN_SUFFIX)) for run in self._runs), default=-1)
        name = f"{last + 1}{RUN_SUFFIX}"
        with (self._directory / name).open("wb") as file:
            _write_run(file, counts)
            os.fsync(file.fileno())
        return name

    def _remove_other_runs(self) -> None:
        """Those that were merged into another, or that a killed process had not yet named in the state."""
        for file in self._directory.glob(f"*{RUN_SUFFIX}"):
            if file.name not in self._runs:
                file.unlink()
