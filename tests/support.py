"""What several test files share: tiny text, tiny settings, and asking for a user's one-line error.

The fixtures of conftest.py hand these out; a test that starts processes uses `write_settings` for the path of the YAML.
"""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_tools.pack import Recipe, prepare
from data_tools.sources import Source, read_documents, training_file
from data_tools.tokenizer import train_tokenizer
from pretrain.config.errors import ConfigError
from pretrain.silo.shards import file_sha256

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
CORPORA = ("alpha", "beta", "gamma")
VOCAB_SIZE = 300
TWO_RANKS = {"processes_per_node": 2, "micro_batch_sequences": 2}
"""Changes of a silo: the tiny batch on two ranks."""
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]


def free_port() -> int:
    """A loopback port that nobody serves, outside the range out of which connections that leave are given theirs."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@dataclass(frozen=True, kw_only=True)
class TinyText:
    """Packed text that is shared by all tests of a session; never write into it."""

    tokenizer: Path
    """tokenizer.json, of `VOCAB_SIZE` tokens."""
    packed: dict[str, Path]
    """Corpus name to a folder with packed `train` and `valid`."""

    @property
    def keys(self) -> Path:
        """Where launches make their keys; not there at first."""
        return self.tokenizer.parents[1] / "keys"


def pseudo_text(seed: str, num_characters: int) -> list[str]:
    """Documents of pseudo-words, some 300 characters each; every seed has words of its own, some far more often."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(200)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    documents: list[str] = []
    while sum(map(len, documents)) < num_characters:
        sentences = (" ".join(rng.choices(words, weights, k=rng.randint(5, 12))) + "." for _ in range(6))
        documents.append("\n".join(sentences))
    return documents


def write_corpus(folder: Path, seed: str, *, num_characters: int) -> Path:
    """A corpus folder: train.jsonl of `num_characters`, valid.jsonl of a tenth of it."""
    folder.mkdir(parents=True)
    for split, size in (("train", num_characters), ("valid", num_characters // 10)):
        lines = (json.dumps({"text": text}) for text in pseudo_text(f"{seed}/{split}", size))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_tiny_text(directory: Path) -> TinyText:
    """The three corpora of `CORPORA`, 60 kB each, their tokenizer and packed shards, below `directory`."""
    folders = {name: write_corpus(directory / "corpora" / name, name, num_characters=60_000) for name in CORPORA}
    texts = (text for folder in folders.values() for text in read_documents(training_file(folder)))
    tokenizer = train_tokenizer(texts, vocab_size=VOCAB_SIZE, output=directory / "tokenizer")
    packed = {name: directory / "packed" / name for name in folders}
    for name, folder in folders.items():
        prepare(Recipe(sources=(Source(path=str(folder)),), tokenizer=tokenizer), packed[name])
    return TinyText(tokenizer=tokenizer, packed=packed)


def tiny_silo(text: TinyText, corpus: str) -> dict[str, Any]:
    """The section of a silo that trains on `corpus`."""
    return {"data": [str(text.packed[corpus] / "train")], "valid": {corpus: str(text.packed[corpus] / "valid")}}


def tiny_settings(directory: Path, text: TinyText) -> dict[str, Any]:
    """Two silos, a llama of some 30,000 parameters, three rounds of four steps; the run is in `directory`/run."""
    return {
        "name": "tiny",
        "run_id": "tiny",  # two runs are compared byte by byte, and the contract is in every commit
        "directory": str(directory / "run"),
        "tokenizer": str(text.tokenizer),
        "sequence_tokens": 16,
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "intermediate_size": 64,
                "max_position_embeddings": 64,
            }
        },
        "inner": {"num_steps": 12, "lr": 0.003},
        "outer": {"sync_interval_steps": 4},
        "exchange": {"poll_seconds": 0.05},
        "silo": {
            "global_batch_sequences": 4,
            "micro_batch_sequences": 4,
            "checkpoint_interval_steps": 4,
            "eval_sequences": 8,
        },
        "silos": {name: tiny_silo(text, name) for name in ("alpha", "beta")},
        "wandb": {"mode": "disabled"},
        "trust": {"directory": str(text.keys)},  # of a launch: the same keys in all runs, for the same reason
    }


def zero(stage: int) -> dict[str, Any]:
    """Changes of a silo: a stage of ZeRO."""
    return {"deepspeed": {"zero_optimization": {"stage": stage}}}


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with `changes`, section by section; a change to None takes the key out."""
    result = dict(settings)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def with_keys(sections: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Sections with values set by key, as "outer.lr"; they are changed in place."""
    for key, value in values.items():
        section = sections
        *path, last = key.split(".")
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return sections


def write_settings(directory: Path, text: TinyText, **changes: Any) -> Path:
    """Write the tiny settings with `changes` as `directory`/tiny.yaml; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(merged(tiny_settings(directory, text), changes), sort_keys=False))
    return path


def torchrun(worker: Path, *arguments: object, num_ranks: int, timeout: float, may_have_gpus: bool = False) -> str:
    """What a worker of so many ranks prints; on the CPU, unless it may have GPUs. Fails with what it said of errors."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    hide_gpus = {} if may_have_gpus else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(
        [*command, str(worker), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | hide_gpus,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


def one_line_error(function: Callable[..., Any], *arguments: object, **named: object) -> str:
    """The message of the ConfigError that calling `function` raises: a user must get one line."""
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **named)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


@contextmanager
def mounted(directory: Path, *, num_bytes: int) -> Iterator[Path]:
    """A file system of its own in memory, of a size that can be filled; skips the test where only root may mount."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(directory)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        pytest.skip(f"a small file system to fill cannot be mounted: {found.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(directory: Path) -> Path:
    """A file that takes all the room there is."""
    file = directory / "filler"
    with file.open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize)
    return file


def packed_hashes(output: Path) -> dict[str, str]:
    """Of every file below `output` whose bytes a preparation promises: those of the packed splits."""
    files = [*output.rglob("*.bin"), *output.rglob("*.mask"), *output.rglob("manifest.json")]
    return {str(file.relative_to(output)): file_sha256(file) for file in files}
