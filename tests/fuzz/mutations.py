"""Millions of spoiled inputs for every reader of bytes that another party wrote: as many processes as there are cores.

    python -m tests.fuzz.mutations [--inputs 10000000] [--seed 0] [--only READER ...]

Each input is what the reader accepts, with bits, bytes, ranges or JSON values changed, or nothing like it. A reader has
one way to say no, in one line; whatever else it raises, ten seconds without an answer, and memory that grows beyond
`MEMORY_BYTES` are findings: the input is written to a file, and the exit code is 1. Readers take turns by time, so that
slow ones get fewer inputs; of each the same seed and number of cores make the same ones.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError

from tests.fuzz.readers import READERS, SNIPPETS, Reader

MEMORY_BYTES = 1 << 30  # more than when it began
SECONDS = 10  # of one input
TURN_SECONDS = 0.1

Found = tuple[Counter[str], list[tuple[str, bytes, str]]]
"""Inputs by reader; and findings: reader, input, what is wrong."""


class Mutator:
    """Makes inputs of what one reader accepts."""

    def __init__(self, accepted: bytes, seed: str) -> None:
        self._accepted, self._rng = accepted, random.Random(seed)
        try:
            self._parsed: Any = json.loads(accepted)
        except ValueError:
            self._parsed = None

    def next(self) -> bytes:
        chance = self._rng.random()
        if chance < 0.05:
            return self._rng.randbytes(self._rng.randrange(200))
        if chance < 0.35 and self._parsed is not None:
            return json.dumps(self._changed(self._parsed)).encode(errors="replace")
        data = bytearray(self._accepted)
        for _ in range(self._rng.randint(1, 4)):
            self._spoil(data)
        return bytes(data)

    def _spoil(self, data: bytearray) -> None:
        rng = self._rng
        first = rng.randrange(len(data) + 1)
        last = min(len(data), first + rng.choice((0, 1, 1, 2, 4, 8, 64)))
        way = rng.randrange(6)
        if way == 0 and first < len(data):
            data[first] ^= 1 << rng.randrange(8)
        elif way == 1:
            data[first:last] = rng.randbytes(last - first)
        elif way == 2:
            data[first:last] = rng.choice(SNIPPETS)
        elif way == 3:
            del data[first:last]
        elif way == 4:
            data[first:first] = data[first:last] * rng.choice((1, 2, 100))
        else:
            data[first:last] = str(rng.choice((-1, 0, 1 << 31, 1 << 53, 1 << 64, 10**400, 0.1, 1e308))).encode()

    def _changed(self, value: Any) -> Any:
        """The same with one value somewhere in it replaced, added or missing."""
        rng = self._rng
        if not value or not isinstance(value, dict | list) or rng.random() < 0.1:
            return self._value(3)
        if isinstance(value, list):
            at = rng.randrange(len(value))
            return [*value[:at], self._changed(value[at]), *value[at + rng.randrange(2) :]]
        key, copy = rng.choice(list(value)), dict(value)
        way = rng.randrange(8)
        if way == 0:
            del copy[key]
        elif way == 1:
            copy[self._text()] = self._value(2)
        else:
            copy[key] = self._changed(value[key])
        return copy

    def _value(self, depth: int) -> Any:
        rng = self._rng
        kind = rng.randrange(9 if depth else 7)
        if kind == 7:
            return [self._value(depth - 1) for _ in range(rng.randrange(4))]
        if kind == 8:
            return {self._text(): self._value(depth - 1) for _ in range(rng.randrange(4))}
        whole, real = rng.randrange(-2, 1 << rng.randrange(1, 70)), rng.uniform(-1, 1) * 10.0 ** rng.randrange(300)
        return (None, True, whole, real, float(rng.choice(("nan", "inf", "-inf"))), self._text(), "")[kind]

    def _text(self) -> str:
        alphabet = "ab0._-/\\\"'\n\t\x00\x1b[${}:é²\u202e\ud800\U0001f600"
        return "".join(self._rng.choice(alphabet) for _ in range(self._rng.randrange(12)))


def answer(reader: Reader, data: bytes, folder: Path) -> str:
    """What is wrong with a reader's answer, or nothing."""
    said = ""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            reader.read(data, folder)
    except SafetensorError:  # the library's own words; whoever catches it makes a line of them
        pass
    except reader.refuses as error:
        said = str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error}"
    return f"several lines: {said!r}" if "\n" in said else ""


def fuzz(names: list[str], num_inputs: int, seed: str, folder: Path) -> Found:
    """Give readers so many inputs in turn."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer in {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    began_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    mutators = {name: Mutator(READERS[name].accepted, f"{seed} {name}") for name in names}
    done, findings = Counter[str](), list[tuple[str, bytes, str]]()
    while done.total() < num_inputs and len(findings) < 100:
        for name in names:
            until = time.monotonic() + TURN_SECONDS
            while time.monotonic() < until and done.total() < num_inputs:
                data = mutators[name].next()
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                wrong = answer(READERS[name], data, folder)
                signal.setitimer(signal.ITIMER_REAL, 0)
                done[name] += 1
                grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - began_bytes
                if not wrong and grown > MEMORY_BYTES:
                    wrong, began_bytes = f"memory has grown by {grown >> 20} MiB", began_bytes + grown
                if wrong:
                    findings.append((name, data, wrong))
    return done, findings


def _work(given: tuple[list[str], int, str]) -> Found:
    with tempfile.TemporaryDirectory(prefix="atoll-fuzz-") as folder:
        return fuzz(*given, Path(folder))


def main() -> int:
    """Spread over all cores, print, keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=READERS, default=list(READERS))
    arguments = parser.parse_args()
    num_workers, began = len(os.sched_getaffinity(0)), time.monotonic()
    share = -(-arguments.inputs // num_workers)
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        found = pool.map(_work, [(arguments.only, share, f"{arguments.seed}/{n}") for n in range(num_workers)])
    done = sum((one for one, _ in found), Counter[str]())
    for name, number in sorted(done.items()):
        print(f"{name:20} {number:>10,} inputs")
    findings = [finding for _, of_worker in found for finding in of_worker]
    for number, (name, data, wrong) in enumerate(findings):
        file = Path(tempfile.gettempdir()) / f"atoll-fuzz-{os.getpid()}-{number:03d}.bin"
        file.write_bytes(data)
        print(f"FINDING {name}: {wrong}: {file}")
    print(f"RESULT {done.total():,} inputs in {time.monotonic() - began:.0f} s: {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
