"""`atoll data prepare`, killed at random instants and started again, writes the bytes of an undisturbed run."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_tools.sources import read_documents
from data_tools.tokenizer import train_tokenizer
from tests.support import packed_hashes, pseudo_text
from tests.waiting import wait_for

NUM_KILLS = 20
# What the command runs, with a commit after every block of text, so that many kills fall into one preparation.
PREPARE = """
import sys
from pathlib import Path
from data_tools.clean import Cleaning
from data_tools.pack import Recipe, prepare
from data_tools.sources import Source

text, tokenizer, output, num_workers = sys.argv[1:]
recipe = Recipe(
    sources=(Source(path=text),),
    tokenizer=Path(tokenizer),
    cleaning=Cleaning(drop_duplicates=True, near_duplicates=0.8, drop_overlap=True),
    held_out=0.05,
    shard_tokens=700_000,
)
print("started", flush=True)
prepare(recipe, Path(output), num_workers=int(num_workers), commit_seconds=0.0)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 MB in three files, one of them compressed, with exact and near duplicates."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    documents = pseudo_text("kills", 300_000)
    for name, num_bytes in (("a.jsonl", 3_000_000), ("b.txt", 2_000_000), ("c.jsonl.gz", 3_000_000)):
        texts: list[str] = []
        while sum(map(len, texts)) < num_bytes:
            more = range(100)
            texts += [rng.choice(documents) if rng.random() < 0.1 else " ".join(rng.sample(documents, 3)) for _ in more]
        if name == "b.txt":
            raw = "\n<|endoftext|>\n".join(texts).encode()
        else:
            raw = "".join(json.dumps({"text": one}) + "\n" for one in texts).encode()
        (folder / name).write_bytes(gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw)
    return folder


@pytest.fixture(scope="module")
def tokenizer(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(read_documents(text / "b.txt"), vocab_size=300, output=tmp_path_factory.mktemp("tokenizer"))


def start(text: Path, tokenizer: Path, output: Path, *, num_workers: int) -> subprocess.Popen[str]:
    """A preparation that has passed its imports."""
    arguments = [str(text), str(tokenizer), str(output), str(num_workers)]
    process = subprocess.Popen([sys.executable, "-c", PREPARE, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "started\n"
    return process


@pytest.mark.soak
def test_killed_again_and_again(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    began = time.monotonic()
    assert start(text, tokenizer, undisturbed, num_workers=2).wait() == 0
    seconds = time.monotonic() - began
    rng = random.Random(1)
    num_kills, num_whole, places, workers = 0, 0, set[float](), set[int]()
    while num_kills < NUM_KILLS or num_whole == 0:
        output = tmp_path / f"killed-{num_whole}"
        process = start(text, tokenizer, output, num_workers=rng.choice([0, 1, 2]))
        try:
            process.wait(rng.uniform(0.0, 0.5) * seconds if num_kills < NUM_KILLS else None)
        except subprocess.TimeoutExpired:
            workers |= {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
            os.kill(process.pid, signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:  # and did not end by itself just before
            num_kills += 1
            partial = output.with_name(output.name + ".partial")
            if (partial / "output").is_dir():  # as of a kill while a manifest is written
                (partial / "output" / ".manifest.json.killed.tmp").mkdir(exist_ok=True)
                (partial / "output" / ".manifest.json.killed.tmp" / "manifest.json").touch()
            places.add(sum(file.stat().st_size for file in partial.rglob("*.bin")))
            continue
        assert process.returncode == 0
        assert packed_hashes(output) == packed_hashes(undisturbed)
        assert not output.with_name(output.name + ".partial").exists()
        num_whole += 1
    assert len(packed_hashes(undisturbed)) > 5
    assert len(places) > 2, "the kills fell before anything was written"
    wait_for(lambda: not any(map(psutil.pid_exists, workers)), seconds=20, tells=lambda: "workers outlive their parent")
