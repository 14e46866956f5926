"""Many inputs for every reader, fast: what `make fuzz N=10000000` runs.

    python -m tests.fuzz.many [--inputs 1000000] [--seed 0] [--workers 2] [--reader NAME ...]

The inputs are those of test_readers.py (arbitrary bytes, arbitrary JSON, what is accepted with a value or some places
spoiled), drawn by `random` from a seed instead of hypothesis, which makes them many. A line a reader: inputs, in a
second of one core, the slowest, and findings: another exception than the intended one, several lines, or an input that
takes longer than LIMIT_SECONDS. Each is printed with its bytes; the same seed comes to it again. Exit code 1 if there
is one.
What a reader reads from a file lies in memory, where there is a place for it.
"""

import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tests.fuzz.readers import READERS, SPOILS, Reader

CHUNK = 20_000  # inputs of one task
LIMIT_SECONDS = 5.0
MEMORY_BYTES = 4 << 30  # of one worker, more than it has when it begins
SHARES = {"store": 0.2, "status": 0.5, "configuration": 0.2}
"""Of what other readers get: these take a millisecond or more an input."""
CHARACTERS = [*'aZ9_. "\\\n\x00\x1b', "\u202e", "\ud800", "é"]


@dataclass(kw_only=True)
class Found:
    """What some inputs have come to."""

    reader: str
    num_inputs: int = 0
    seconds: float = 0.0
    slowest_seconds: float = 0.0
    peak_bytes: int = 0
    findings: list[str] = field(default_factory=list)

    def __add__(self, other: "Found") -> "Found":
        return Found(
            reader=self.reader,
            num_inputs=self.num_inputs + other.num_inputs,
            seconds=self.seconds + other.seconds,
            slowest_seconds=max(self.slowest_seconds, other.slowest_seconds),
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
            findings=self.findings + other.findings,
        )


def value(rng: random.Random, depth: int = 3) -> Any:
    """Any JSON."""
    kind = rng.randrange(7 if depth else 5)
    if kind < 5:
        plain = (None, rng.random() < 0.5, rng.randrange(-(1 << 66), 1 << 66) >> rng.randrange(66))
        return (*plain, rng.choice([0.5, -1e308, float("inf"), float("nan")]), text(rng))[kind]
    inner = [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return inner if kind == 5 else {text(rng): one for one in inner}


def text(rng: random.Random) -> str:
    return "".join(rng.choices(CHARACTERS, k=rng.randrange(6)))


def spoiled(rng: random.Random, accepted: bytes, parsed: Any) -> bytes:
    """See `inputs` of test_readers.py."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return json.dumps(value(rng)).encode()
    if kind == 2 and parsed:
        found = copy.copy(parsed)
        found[rng.choice(list(found) if isinstance(found, dict) else range(len(found)))] = value(rng)
        return json.dumps(found).encode()
    data = bytearray(accepted)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        put = rng.choice(SPOILS) if rng.random() < 0.5 else rng.randbytes(rng.randrange(5))
        data[at : at + rng.randrange(9)] = put
    return bytes(data)


def read_one(reader: Reader, data: bytes, folder: Path) -> str:
    """What is wrong with how a reader took an input; empty if nothing is."""
    try:
        reader.read(data, folder)
    except SafetensorError:
        return ""
    except reader.refuses as error:
        return "several lines" if "\n" in str(error) else ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a library's is no Exception
        return f"{type(error).__name__}: {str(error)[:200]!r}"
    return ""


def fuzz(name: str, seed: str, num_inputs: int) -> Found:
    """Give a reader so many inputs, in this process."""
    reader, rng, found = READERS[name], random.Random(seed), Found(reader=name, num_inputs=num_inputs)
    try:
        parsed = json.loads(reader.accepted)
    except ValueError:
        parsed = None
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder, open(os.devnull, "w") as nowhere:
        began = time.perf_counter()
        with contextlib.redirect_stdout(nowhere):
            for number in range(num_inputs):
                data, start = spoiled(rng, reader.accepted, parsed), time.perf_counter()
                wrong = read_one(reader, data, Path(folder))
                seconds = time.perf_counter() - start
                found.slowest_seconds = max(found.slowest_seconds, seconds)
                if wrong or seconds > LIMIT_SECONDS:
                    where = f"{name}, seed {seed}, input {number}"
                    found.findings.append(f"{where}: {wrong or f'{seconds:.1f} s'}: {data[:400]!r}")
    found.seconds = time.perf_counter() - began
    found.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def begin() -> None:
    """In each worker: one thread, and an end to memory."""
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def tasks(readers: Sequence[str], seed: int, num_inputs: int) -> Iterator[tuple[str, str, int]]:
    """Reader, seed and number of inputs, in parts; the slow readers have fewer."""
    total = sum(SHARES.get(name, 1.0) for name in readers)
    for name in readers:
        left, part = round(num_inputs * SHARES.get(name, 1.0) / total), 0
        while left > 0:
            yield name, f"{seed}/{name}/{part}", min(left, CHUNK)
            left, part = left - CHUNK, part + 1


def run(num_inputs: int, *, seed: int = 0, workers: int = 2, readers: Sequence[str] = tuple(READERS)) -> list[Found]:
    """All of them; a row a reader."""
    found: defaultdict[str, Found] = defaultdict(lambda: Found(reader=""))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=begin) as pool:
        ordered = sorted(tasks(readers, seed, num_inputs), key=lambda task: task[1])
        waiting = {pool.submit(fuzz, *task): task for task in ordered}
        for future in as_completed(waiting):
            name, part, _ = waiting[future]
            try:
                new = future.result()
            except BrokenProcessPool:  # and so will all that follow
                new = Found(reader=name, findings=[f"{name}, seed {part}, or one beside it: the process has died"])
            found[name] = new + found[name]
    return [found[name] for name in readers if name in found]


def main() -> int:
    """Command line; 1 if there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--reader", action="append", choices=list(READERS), help="only these")
    given, began = parser.parse_args(), time.monotonic()
    rows = run(given.inputs, seed=given.seed, workers=given.workers, readers=given.reader or list(READERS))
    print(f"{'reader':16}{'inputs':>12}{'a second':>10}{'slowest s':>11}{'peak MB':>9}{'findings':>10}")
    for row in rows:
        pace = row.num_inputs / max(row.seconds, 1e-9)
        print(
            f"{row.reader:16}{row.num_inputs:12,}{pace:10,.0f}{row.slowest_seconds:11.2f}{row.peak_bytes / 1e6:9.0f}"
            f"{len(row.findings):10}"
        )
    findings = [line for row in rows for line in row.findings]
    print(
        f"{sum(row.num_inputs for row in rows):,} inputs in {time.monotonic() - began:.0f} s, {len(findings)} findings"
    )
    print("\n".join(findings[:100]))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
