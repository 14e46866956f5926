"""Throughput and memory of `atoll data prepare` against `tokenizers` alone, on the same documents in the same run.

    python -m benchmarks.prepare CORPUS.jsonl.gz ... [--megabytes 100 1000] [--vocab-size 32768]

The documents of the given corpora are repeated, each copy with a number of its own in front so that none is a
duplicate, up to each size in turn. The reference is the time within `Tokenizer.encode_batch` on batches of 1,000
documents that are in memory already. Memory is the highest sum of anonymous memory over main process and workers.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from tokenizers import Tokenizer

from benchmarks.memory import MIB, SAMPLE_SECONDS, Peak
from data_tools.sources import read_documents
from data_tools.tokenizer import train_tokenizer

REFERENCE_DOCUMENTS = 1_000


def write_text(corpora: list[Path], file: Path, num_bytes: int) -> None:
    """Repeat the documents, numbered, as JSON lines until they are `num_bytes` of text."""
    texts = [text for corpus in corpora for text in read_documents(corpus)]
    written = 0
    with file.open("w") as lines:
        for copy in itertools.count():
            for text in texts:
                numbered = f"{copy}. {text}"
                lines.write(json.dumps({"text": numbered}, ensure_ascii=False) + "\n")
                written += len(numbered.encode())
                if written >= num_bytes:
                    return


def reference_seconds(file: Path, tokenizer: Path) -> float:
    """Time within encode_batch over all documents of the file."""
    encoder, seconds = Tokenizer.from_file(str(tokenizer)), 0.0
    for batch in _batches(read_documents(file)):
        began = time.monotonic()
        encoder.encode_batch(batch, add_special_tokens=False)
        seconds += time.monotonic() - began
    return seconds


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(itertools.islice(texts, REFERENCE_DOCUMENTS)):
        yield batch


def prepare_seconds(file: Path, tokenizer: Path, output: Path, options: list[str]) -> tuple[float, int]:
    """Wall time of the whole command, its start included, and the peak of its memory in bytes."""
    command = [sys.executable, "-m", "launch.cli", "data", "prepare", str(file), *options]
    command += ["--tokenizer", str(tokenizer), "--output", str(output)]
    began = time.monotonic()
    with output.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    peak = Peak(process=process)
    while process.poll() is None:
        root = psutil.Process(process.pid)
        peak.tree = [root, *root.children(recursive=True)]
        peak.sample()
        time.sleep(SAMPLE_SECONDS * 20)
    if process.returncode:
        raise SystemExit(output.with_suffix(".log").read_text())
    return time.monotonic() - began, peak.anonymous_bytes


def main() -> None:
    """Print one line a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="+", type=Path)
    parser.add_argument("--megabytes", nargs="+", type=int, default=[100, 1000])
    parser.add_argument("--vocab-size", type=int, default=32_768)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        texts = (text for corpus in arguments.corpora for text in read_documents(corpus))
        tokenizer = train_tokenizer(texts, vocab_size=arguments.vocab_size, output=directory / "tokenizer")
        for megabytes in arguments.megabytes:
            file = directory / f"{megabytes}.jsonl"
            write_text(arguments.corpora, file, megabytes * 1_000_000)
            alone = reference_seconds(file, tokenizer)
            for options in ([], ["--drop-duplicates", "--normalize", "NFC", "--min-characters", "100"]):
                output = directory / f"{megabytes}-{len(options)}"
                seconds, peak_bytes = prepare_seconds(file, tokenizer, output, options)
                print(
                    f"{megabytes:5d} MB  encode_batch alone {megabytes / alone:6.2f} MB/s  "
                    f"prepare {megabytes / seconds:6.2f} MB/s  ratio {alone / seconds:.3f}  "
                    f"peak memory {peak_bytes / MIB:.0f} MiB  {' '.join(options) or 'no cleaning'}",
                    flush=True,
                )
            file.unlink()


if __name__ == "__main__":
    main()
