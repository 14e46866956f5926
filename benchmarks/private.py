"""What differential privacy for one sequence costs: held-out loss and time at several budgets, and without.

    python -m benchmarks.private TEXT DIRECTORY [--epsilon 2 4 8] [--delta 1e-6] [--seeds 0] [--epochs 1] [--batch 512]
        [--tokens 64] [--lr 0.01] [--clip-norm 1.0] [--characters N]

TEXT is a folder with a train and a valid file that `atoll data prepare` reads: one silo's text, of which at most
`--characters` are trained on. It gets a tokenizer of its own (BPE of 1,024, without privacy), and a llama of 0.2 M
parameters is trained for every budget and seed, and without a budget: the same text, batches, steps and learning rate.
What has ended in DIRECTORY is not done again.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import yaml

from benchmarks.heterogeneity import at_most
from benchmarks.runs import finished, mean_loss
from data_tools.pack import Recipe, prepare
from data_tools.sources import Source, read_documents, split_file, training_file
from data_tools.tokenizer import train_tokenizer
from pretrain.config.load import load_config
from pretrain.silo.shards import count_sequences, read_manifest

MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}


def packed(text: Path, directory: Path, characters: int | None) -> Path:
    """The text's packed shards, and its tokenizer beside them."""
    if not (directory / "packed").exists():
        part = directory / "text"
        part.mkdir(parents=True, exist_ok=True)
        for split, limit in (("train", characters), ("valid", None)):
            texts = at_most(read_documents(split_file(text, split)), limit)
            (part / f"{split}.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
        documents = read_documents(training_file(part))
        tokenizer = train_tokenizer(documents, vocab_size=1024, output=directory / "tokenizer")
        prepare(Recipe(sources=(Source(path=str(part)),), tokenizer=tokenizer), directory / "packed")
    return directory / "packed"


def main() -> None:
    """Train what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[2.0, 4.0, 8.0])
    parser.add_argument("--delta", type=float, default=1e-6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--clip-norm", type=float, default=1.0)
    parser.add_argument("--characters", type=int)
    given = parser.parse_args()
    shards = packed(given.text, given.directory, given.characters)
    num_sequences = count_sequences(read_manifest(shards / "train", key="text").num_tokens, given.tokens)
    num_steps = given.epochs * (num_sequences // given.batch)
    text = f"{num_sequences:,} sequences of {given.tokens} tokens"
    print(f"{text}; {num_steps} steps of {given.batch}, delta {given.delta:g}")
    print(f"{'epsilon':>8} {'noise':>7} {'held-out loss':>20} {'seconds':>8} {'ratio':>6}", flush=True)
    plain_seconds = 0.0
    for epsilon in [math.inf, *sorted(given.epsilon, reverse=True)]:
        summaries = [run(given, shards, num_steps, epsilon, seed) for seed in given.seeds]
        losses = [mean_loss(summary) for summary in summaries]
        seconds = statistics.mean(summary["seconds_training"] for summary in summaries)
        plain_seconds = plain_seconds or seconds
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        noise = noise_multiplier(given, epsilon)
        shown = f"{statistics.mean(losses):.4f}{spread}"
        print(f"{epsilon:8g} {noise:7.3f} {shown:>20} {seconds:8.1f} {seconds / plain_seconds:6.2f}", flush=True)


def noise_multiplier(given: argparse.Namespace, epsilon: float) -> float:
    """What the silo itself began its account with; 0 without privacy."""
    if epsilon == math.inf:
        return 0.0
    account = directory_of(given, epsilon, given.seeds[0]) / "silos" / "own" / "private" / "account.txt"
    return json.loads(account.read_text().splitlines()[0])["noise_multiplier"]


def directory_of(given: argparse.Namespace, epsilon: float, seed: int) -> Path:
    """Where a run is."""
    return given.directory / f"epsilon-{epsilon:g}-seed-{seed}"


def run(given: argparse.Namespace, shards: Path, num_steps: int, epsilon: float, seed: int) -> dict[str, Any]:
    """The summary of a run that has ended."""
    directory = directory_of(given, epsilon, seed)
    private = {"epsilon": epsilon, "delta": given.delta, "clip_norm": given.clip_norm} if epsilon < math.inf else {}
    settings = {
        "directory": str(directory),
        "tokenizer": str(given.directory / "tokenizer"),
        "sequence_tokens": given.tokens,
        "model": {"config": MODEL, "seed": seed},
        "inner": {"num_steps": num_steps, "lr": given.lr, "warmup_steps": num_steps // 20},
        "outer": {"sync_interval_steps": num_steps},
        "exchange": {"kind": "none"},
        "wandb": {"mode": "disabled"},
        "silo": {
            "global_batch_sequences": given.batch,
            "micro_batch_sequences": min(16, given.batch),
            "checkpoint_interval_steps": num_steps,
            "eval_sequences": 512,
            "private": private,
        },
        "silos": {"own": {"data": [str(shards / "train")], "valid": {"own": str(shards / "valid")}, "data_seed": seed}},
    }
    given.directory.mkdir(parents=True, exist_ok=True)
    file = given.directory / f"{directory.name}.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return finished(load_config([file]), given.directory / "runs.log")


if __name__ == "__main__":
    main()
