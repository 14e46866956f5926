"""Text and configurations of the comparisons in docs/learning.md: four corpora as silos, and harder divisions of them.

    python -m benchmarks.heterogeneity CORPORA DIRECTORY
    atoll compare --config DIRECTORY/four.yaml --jobs 2

CORPORA is a folder of folders with train.jsonl.gz and valid.jsonl.gz, at least three. DIRECTORY gets the shared
tokenizer (BPE of 2,048), packed shards, and one YAML file for each comparison:

    four      every corpus a silo, a quarter of an epoch
    long      the same, three quarters of an epoch
    wide      the same as four, a model of 2 M parameters
    ablation  one measure less, each
    little    every corpus a silo with some 50,000 tokens of it: ten epochs and more
    two       the corpora in two silos
    eight     every corpus in two silos
    unequal   three silos, whose text and batches are 1 : 4 : 16
    code      one silo more, with the installed Python's own library
    code-half the same, with almost half of the steps left to each silo alone
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from data_tools.corpora import write_python_corpora
from data_tools.pack import Recipe, prepare
from data_tools.sources import Source, read_documents, training_file
from data_tools.tokenizer import train_tokenizer

VOCAB_SIZE = 2048
LITTLE_CHARACTERS = 160_000  # some 50,000 tokens
SPLITS = ("train", "valid")
MODEL = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
WIDE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
RUN = {
    "sequence_tokens": 64,
    "model": {"config": MODEL},
    "inner": {"num_steps": 1000, "lr": 0.006, "warmup_steps": 50, "schedule": "cosine"},
    "outer": {"sync_interval_steps": 20, "optimizer": "sgd", "lr": 1.0},
    "exchange": {"poll_seconds": 0.05},
    "wandb": {"mode": "disabled"},
    "silo": {
        "global_batch_sequences": 8,
        "micro_batch_sequences": 8,
        "checkpoint_interval_steps": 500,
        "eval_interval_rounds": 10,
        "eval_sequences": 256,
        "log_interval_steps": 20,
    },
}
PLAIN = ["outer.optimizer=sgd", "outer.lr=1.0"]
MUON = ["inner.optimizer=muon", "inner.muon_momentum=0.9"]
SHARED = ["outer.second_moments=shared", "outer.merge=importance"]
NESTEROV = ["outer.optimizer=nesterov", "outer.lr=0.8", "outer.momentum=0.5"]
CONTROL = ["outer.control_variates=0.8"]
INT4 = ["outer.codec=int4", "outer.downlink_codec=int4"]
STREAMING = ["outer.num_fragments=4", "outer.overlap_steps=2"]
# configs/outer/recommended.yaml, with RUN's learning rate for AdamW, central's best, where a model does not say 0.01.
BEST = [*MUON, *SHARED, *NESTEROV, *CONTROL, *INT4]
ALONE = [*MUON, "inner.lr=0.0012", "inner.muon_lr=0.004", "inner.warmup_steps=30", "inner.min_lr_ratio=0.0"]
SETTINGS = {
    "long": ["inner.num_steps=3000"],
    "wide": [f"model.config.{key}={value}" for key, value in WIDE.items()] + ["inner.lr=0.004"],
    "ablation": ["inner.num_steps=400"],
    "little": ["silo.eval_interval_rounds=3"],
    "code-half": ["inner.num_steps=700"],
}


def federated(*settings: str) -> dict[str, Any]:
    """A federated model of a comparison."""
    return {"kind": "federated", "settings": list(settings)}


def every(steps: int) -> list[str]:
    """The settings of a sync interval; evaluations stay where they are."""
    return [f"outer.sync_interval_steps={steps}", f"silo.eval_interval_rounds={max(1, 200 // steps)}"]


def personalised(of: str, steps: int) -> dict[str, Any]:
    """Each silo going on alone from a federated model, for `steps`."""
    return {"kind": "personalised", "of": of, "steps": steps, "settings": ALONE}


def divided(steps: int, *settings: str) -> dict[str, Any]:
    """The models of every division; `steps`: how long each silo goes on alone in the end."""
    return {
        "central": {"kind": "central", "settings": MUON},
        "recommended": federated(*BEST, *every(5), *settings),
        "isolated": {"kind": "isolated", "settings": MUON},
        "personalised": personalised("recommended", steps),
    }


FOUR = divided(300) | {
    "recommended, H 2, lr 0.01": federated(*BEST, *every(2), "inner.lr=0.01"),
    "recommended, H 5, lr 0.01": federated(*BEST, *every(5), "inner.lr=0.01"),
    "recommended, H 20, lr 0.01": federated(*BEST, "inner.lr=0.01"),
    "recommended, H 20": federated(*BEST),
    "recommended, H 20, streaming": federated(*BEST, *STREAMING),
    "recommended, H 50": federated(*BEST, *every(50)),
    "recommended, H 100": federated(*BEST, *every(100)),
    "central AdamW": {"kind": "central", "seeds": [0]},
    "plain averaging": federated(*PLAIN) | {"seeds": [0]},
    "personalised, lr 0.01": personalised("recommended, H 5, lr 0.01", 300),
}
FOUR |= {name: FOUR[name] | {"seeds": [0]} for name in FOUR if name.startswith(("isolated", "personalised"))}
BOTH = {
    "central": {"kind": "central", "settings": MUON},
    "recommended": federated(*BEST, *every(5)),
}
ABLATION = BOTH | {
    "without control variates": federated(*BEST, *every(5), "outer.control_variates=0.0"),
    "without outer momentum": federated(*BEST, *every(5), *PLAIN),
    "without importance": federated(*BEST, *every(5), "outer.merge=mean"),
    "without shared moments": federated(*BEST, *every(5), "outer.merge=mean", "outer.second_moments=local"),
    "without Muon": federated(*SHARED, *NESTEROV, *INT4, *every(5)),
}
LONG = BOTH | {
    "in full, not clipped": federated(*BEST, *every(5), "outer.control_variates=1.0", "inner.clip_norm=0.0"),
}
WIDER = BOTH | {
    "recommended": BOTH["recommended"] | {"seeds": [0]},
    "recommended, lr 0.0067": federated(*BEST, *every(5), "inner.lr=0.0067"),
}
DIVIDED = divided(300)
UNEQUAL = divided(300, "outer.weight_power=0.5") | {
    "by tokens": federated(*BEST, *every(5)),
    "recommended, lr 0.01": federated(*BEST, *every(5), "outer.weight_power=0.5", "inner.lr=0.01"),
    "personalised, lr 0.01": personalised("recommended, lr 0.01", 300),
    "personalised, by tokens": personalised("by tokens", 300),
}
LITTLE = divided(100, "silo.eval_interval_rounds=12") | {
    f"recommended, H {steps}": federated(*BEST, *every(steps), f"silo.eval_interval_rounds={max(1, 60 // steps)}")
    for steps in (20, 50, 100)
}
LITTLE |= {name: LITTLE[name] | {"seeds": [0]} for name in LITTLE if name not in ("central", "recommended, H 20")}


def write_parts(folder: Path, output: Path, num_parts: int, *, characters: int | None = None) -> list[Path]:
    """A corpus dealt out to folders of its own, document by document; of its training text, at most `characters`."""
    parts = [output / f"{folder.name}-{part + 1}" for part in range(num_parts)]
    for number, part in enumerate(parts):
        if part.exists():
            continue
        part.mkdir(parents=True)
        for split in SPLITS:
            texts = islice(read_documents(folder / f"{split}.jsonl.gz"), number, None, num_parts)
            limit = characters if split == "train" else None
            with (part / f"{split}.jsonl").open("w") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in at_most(texts, limit))
    return parts


def at_most(texts: Iterable[str], characters: int | None) -> Iterator[str]:
    """Documents until they have so many characters."""
    for text in texts:
        if characters is not None and characters <= 0:
            return
        yield text if characters is None else text[:characters]
        characters = None if characters is None else characters - len(text)


def pack(folder: Path, tokenizer: Path, output: Path) -> dict[str, Any]:
    """Packed shards of a corpus; returns the silo that has it."""
    prepare(Recipe(sources=(Source(path=str(folder)),), tokenizer=tokenizer), output)
    return {"data": [str(output / "train")], "valid": {folder.name: str(output / "valid")}}


def joined(silos: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One silo with the text of several."""
    found = list(silos)
    data = [path for silo in found for path in silo["data"]]
    return {"data": data, "valid": {name: path for silo in found for name, path in silo["valid"].items()}}


def batch(silo: Mapping[str, Any], num_sequences: int) -> dict[str, Any]:
    """The silo with another batch."""
    return {**silo, "global_batch_sequences": num_sequences, "micro_batch_sequences": num_sequences}


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    directory = arguments.directory.absolute()
    folders = {path.name: path for path in sorted(arguments.corpora.iterdir()) if path.is_dir()}
    tokenizer = directory / "tokenizer" / "tokenizer.json"
    if not tokenizer.exists():
        texts = (text for folder in folders.values() for text in read_documents(training_file(folder)))
        train_tokenizer(texts, vocab_size=VOCAB_SIZE, output=tokenizer.parent)

    def silos_of(kind: str, parts: Iterable[Path]) -> dict[str, Any]:
        return {part.name: pack(part, tokenizer, directory / "packed" / kind / part.name) for part in parts}

    whole = silos_of("whole", folders.values())
    names = list(whole)
    text = directory / "text"
    halves = [part for folder in folders.values() for part in write_parts(folder, text / "halves", 2)]
    little = [write_parts(folder, text / "little", 1, characters=LITTLE_CHARACTERS)[0] for folder in folders.values()]
    sixteenth = write_parts(folders[names[-1]], text / "sixteenth", 16)[:1]
    quarter = write_parts(folders[names[-2]], text / "quarter", 4)[:1]
    library = write_python_corpora(text / "python")["library"]
    few, some, many = silos_of("unequal", sixteenth), silos_of("unequal", quarter), {names[0]: whole[names[0]]}
    unequal = {name: batch(s, n) for silos, n in ((few, 2), (some, 8), (many, 32)) for name, s in silos.items()}
    code = whole | silos_of("code", [library])
    half = len(names) // 2
    comparisons: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "four": (whole, FOUR),
        "long": (whole, LONG),
        "wide": (whole, WIDER),
        "ablation": (whole, ABLATION),
        "little": (silos_of("little", little), LITTLE),
        "two": (
            {
                "first": batch(joined(whole[name] for name in names[:half]), 16),
                "second": batch(joined(whole[name] for name in names[half:]), 16),
            },
            DIVIDED,
        ),
        "eight": ({name: batch(silo, 4) for name, silo in silos_of("halves", halves).items()}, DIVIDED),
        "unequal": (unequal, UNEQUAL),
        "code": (code, DIVIDED),
        "code-half": (code, divided(600)),
    }
    for name, (silos, models) in comparisons.items():
        run = RUN | {"name": name, "tokenizer": str(tokenizer), "silos": silos}
        (directory / f"{name}-run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
        comparison = {
            "directory": str(directory / name),
            "run": [str(directory / f"{name}-run.yaml")],
            "seeds": [0, 1, 2] if name in ("four", "wide", "ablation", "little") else [0],
            "choice": "best" if name == "little" else "last",
            "settings": SETTINGS.get(name, []),
            "models": models,
        }
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(comparison, sort_keys=False))


if __name__ == "__main__":
    main()
