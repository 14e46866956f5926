"""Three silos practise, each on one kind of reasoning-gym's tasks: together, and each alone.

    pip install reasoning-gym
    python -m benchmarks.practice --directory build/practice

A model of some 500,000 parameters first learns from a few public tasks of all kinds what an answer looks like. Then
three times each silo tries its own tasks with the current model, reasoning-gym's scoring says what was right, and an
adapter is trained on that. Alone is a federation of one silo: the same tasks, settings and steps. Printed is the share
of held-out tasks, on which nobody practised, that the likeliest answer of the model solves, by iteration; how many
of each silo's tries were right; and what left the silos.
"""

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_tools.pack import ChatRecipe, Recipe, prepare
from data_tools.sources import Source
from data_tools.tokenizer import train_tokenizer
from launch.demo import ON_CPUS
from launch.start.local import launch_local
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config

TWO_TERMS = {"min_terms": 2, "max_terms": 2}
ONE_DIGIT = {"min_digits": 1, "max_digits": 1}
PLAIN = {"operators": ("+", "-"), "allow_parentheses": False, "allow_negation": False, "format_style": "natural"}
# Silo to its kind of task: name and settings.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sums": ("chain_sum", TWO_TERMS | ONE_DIGIT),
    "words": ("basic_arithmetic", TWO_TERMS | ONE_DIGIT | PLAIN),
    "equations": ("simple_equations", TWO_TERMS | {"min_value": 1, "max_value": 9}),
}
DRAWN, NUM_PUBLIC, NUM_OWN, NUM_HELD_OUT = 3000, 80, 70, 50
VERIFIER = "benchmarks.practice_verifier:verify"
VOCAB_SIZE, ROW_TOKENS, MOST_TOKENS = 360, 128, 8
ITERATIONS, ROUNDS_EACH, STEPS_EACH = 3, 2, 15
Tasks = dict[str, dict[str, Path]]  # silo to files: public, own, held_out
MODEL = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
}


def draw(directory: Path, seed: int) -> Tasks:
    """Tasks of each kind in three files: public, own, held out. No question is in two."""
    import reasoning_gym

    found: Tasks = {}
    for silo, (kind, settings) in KINDS.items():
        drawn = reasoning_gym.create_dataset(kind, size=DRAWN, seed=seed, **settings)
        by_question = {entry["question"]: entry for entry in drawn}
        entries = list(by_question.values())
        random.Random(f"{seed}/{silo}").shuffle(entries)
        sizes = {"public": NUM_PUBLIC, "own": NUM_OWN, "held_out": NUM_HELD_OUT}
        assert len(entries) >= sum(sizes.values()), (kind, len(entries))
        begin, found[silo] = 0, {}
        for name, size in sizes.items():
            some, begin = entries[begin : begin + size], begin + size
            found[silo][name] = directory / "tasks" / f"{silo}-{name}.jsonl"
            lines = ({"prompt": one["question"], "kind": kind, "entry": one} for one in some)
            found[silo][name].parent.mkdir(parents=True, exist_ok=True)
            found[silo][name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return found


def public(directory: Path, tasks: Tasks) -> tuple[Path, Path]:
    """The tokenizer, and the packed public tasks of all kinds with their answers."""
    lines = [json.loads(line) for files in tasks.values() for line in files["public"].read_text().splitlines()]
    random.Random(0).shuffle(lines)
    talks = directory / "public.jsonl"
    said = [{"prompt": line["prompt"], "completion": line["entry"]["answer"]} for line in lines]
    if not talks.exists():  # its time is a part of what was prepared
        talks.write_text("".join(json.dumps(one) + "\n" for one in said))
    words = ["".join(" " if c.isdigit() else c for c in line["prompt"]) for line in lines]  # a digit stays a token
    tokenizer = directory / "tokenizer" / "tokenizer.json"
    if not tokenizer.exists():
        train_tokenizer(words, vocab_size=VOCAB_SIZE, output=tokenizer.parent, chat=True)
    recipe = Recipe(
        sources=(Source(path=str(talks)),),
        tokenizer=tokenizer,
        held_out=0.0,
        chat=ChatRecipe(sequence_tokens=ROW_TOKENS),
    )
    prepare(recipe, directory / "public", num_workers=0, console=Console(quiet=True))
    return tokenizer, directory / "public" / "train"


def settings_of(directory: Path, name: str, tokenizer: Path) -> dict[str, Any]:
    """What all runs have."""
    return {
        "name": f"practice-{name}",
        "directory": str(directory / name),
        "tokenizer": str(tokenizer),
        "chat_template": str(tokenizer.parent),
        "sequence_tokens": ROW_TOKENS,
        "document_masking": True,
        "wandb": {"mode": "disabled"},
        "exchange": {"poll_seconds": 0.1},
        "silo": {
            "global_batch_sequences": 8,
            "micro_batch_sequences": 8,
            "checkpoint_interval_steps": 1000,
            "eval_interval_rounds": 0,
            "log_interval_steps": 10,
        },
    }


def loaded(directory: Path, name: str, settings: dict[str, Any]) -> RunConfig:
    """A configuration through its file."""
    import yaml

    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return load_config([path])


def train_base(directory: Path, tokenizer: Path, data: Path, seed: int, steps: int) -> Path:
    """Learn from the public tasks what an answer looks like."""
    from pretrain.federation.export import export_global_model

    base = directory / "base"
    if base.exists():
        return base
    settings = settings_of(directory, "base-run", tokenizer) | {
        "model": {"config": MODEL, "seed": seed},
        "inner": {"num_steps": steps, "lr": 0.003, "warmup_steps": 20, "schedule": "cosine"},
        "outer": {"sync_interval_steps": steps},
        "silos": {"base": {"data": [str(data)], "valid": {"public": str(data)}}},
    }
    settings["exchange"] = {"kind": "none"}
    config = loaded(directory, "base-run", settings)
    assert launch_local(config) == 0
    export_global_model(config, base)
    return base


def practise(
    directory: Path, name: str, silos: list[str], *, tasks: Tasks, base: Path, data: Path, seed: int
) -> RunConfig:
    """A federation of some silos; one that has finished is left as it is."""
    settings = settings_of(directory, name, base / "tokenizer.json") | {
        "model": {
            "checkpoint": str(base),
            "seed": seed,
            "adapter": {"kind": "lora", "rank": 16, "alpha": 32, "targets": ["all-linear"]},
        },
        "practice": {"every_rounds": ROUNDS_EACH},
        "inner": {"num_steps": ITERATIONS * ROUNDS_EACH * STEPS_EACH, "lr": 0.004, "schedule": "constant"},
        "outer": {"sync_interval_steps": STEPS_EACH, "optimizer": "nesterov", "lr": 0.8, "momentum": 0.5},
        "silos": {
            silo: {
                "data": [str(data)],
                "valid": {"public": str(data)},
                "practice": {
                    "tasks": str(tasks[silo]["own"]),
                    "verifier": VERIFIER,
                    "samples": 8,
                    "num_tokens": MOST_TOKENS,
                    "share": 0.75,
                    "iterations": ITERATIONS,
                    "batch_sequences": 128,
                },
            }
            for silo in silos
        },
    }
    settings["exchange"] = {"poll_seconds": 0.1, "keep_versions": ITERATIONS * ROUNDS_EACH + 1}
    config = loaded(directory, name, settings)
    if not (Path(config.directory) / "summary.json").exists():
        assert launch_local(config) == 0
    return config


def solved(where: str, tasks: Tasks, version: int | None) -> dict[str, float]:
    """The share of each kind's held-out tasks that a version's likeliest answer solves; scored in this process."""
    from benchmarks.practice_verifier import verify
    from pretrain.federation.batched import Asked, answers, batches
    from pretrain.federation.generate import Sampling, open_speaker
    from pretrain.practice.tasks import read_tasks

    speaker, found = open_speaker(where, version=version), {}
    for silo, files in tasks.items():
        asked = read_tasks(files["held_out"])
        right = 0
        for batch in batches(speaker, [Asked(messages=one.messages) for one in asked], batch_sequences=128):
            for place, (answer,) in answers(speaker, batch, Sampling(num_tokens=MOST_TOKENS, temperature=0.0)):
                right += verify(asked[place].record, [{"role": "assistant", "content": answer.text}])
        found[silo] = right / len(asked)
    return found


def tried(config: RunConfig) -> dict[str, list[float]]:
    """Of each silo the share of its tries that were right, by iteration."""
    found: dict[str, list[float]] = {}
    for line in (Path(config.directory) / "metrics.jsonl").read_text().splitlines():
        if (record := json.loads(line))["kind"] == "practice":
            kinds = record["practice"]["kinds"]
            found.setdefault(record["silo"], []).append(kinds.get("right", 0) / sum(kinds.values()))
    return found


def left(config: RunConfig) -> dict[str, int]:
    """Of all silos, what left them, by kind of object: how many."""
    found: dict[str, int] = {}
    for silo in config.silos:
        for line in (Path(config.directory) / "egress" / f"{silo}.jsonl").read_text().splitlines():
            record = json.loads(line)
            found[str(record.get("kind"))] = found.get(str(record.get("kind")), 0) + 1
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("build/practice"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base-steps", type=int, default=500)
    given = parser.parse_args()
    os.environ |= ON_CPUS
    directory = given.directory.absolute() / f"seed-{given.seed}"
    directory.mkdir(parents=True, exist_ok=True)
    tasks = draw(directory, given.seed)
    tokenizer, data = public(directory, tasks)
    base = train_base(directory, tokenizer, data, given.seed, given.base_steps)
    before = solved(str(base), tasks, None)
    print("base", before, flush=True)
    options: Any = {"tasks": tasks, "base": base, "data": data, "seed": given.seed}
    runs = {"together": practise(directory, "together", [*KINDS], **options)}
    for silo in KINDS:
        runs[f"{silo} alone"] = practise(directory, f"alone-{silo}", [silo], **options)
    table = Table(title="held-out tasks solved by the likeliest answer, by iteration")
    for column in ("model", *KINDS, "all kinds"):
        table.add_column(column, justify="left" if column == "model" else "right")
    results = {name: [before] for name in runs}
    for name, config in runs.items():
        for iteration in range(1, ITERATIONS + 1):
            results[name].append(solved(config.directory, tasks, iteration * ROUNDS_EACH))
        cells = [" ".join(f"{100 * one[silo]:.0f}" for one in results[name]) for silo in KINDS]
        means = " ".join(f"{100 * sum(one.values()) / len(one):.0f}" for one in results[name])
        table.add_row(name, *cells, means)
    Console().print(table)
    for name, config in runs.items():
        print(f"{name}: tries right, by iteration: {tried(config)}; left: {left(config)}")
    (directory / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    used = os.times()
    print(f"{used.user + used.system + used.children_user + used.children_system:.0f} processor seconds")


if __name__ == "__main__":
    main()
