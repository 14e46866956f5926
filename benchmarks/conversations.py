"""Four kinds of conversations, four ways to fine-tune: together, in one place, and alone, at equal tokens.

    python -m benchmarks.conversations --corpora DIR [--directory runs/conversations] [--seeds 0 1 2] [--ways full ...]

DIR has law, medicine, encyclopedia and literature (`train.jsonl.gz`, `valid.jsonl.gz` each), of which conversations are
made, at most one a document and 400 a silo:

    law           the heading of a section, and what the section says
    medicine      a question, and its answer
    encyclopedia  the first half of an article's first paragraphs, and the second
    literature    a paragraph of a novel, and the next one

What is said is cut at the end of a sentence, at 200 characters. One in five is held out to choose learning rates by
(`valid`, seed 0); those of `valid.jsonl.gz`, of other books, articles and subjects, choose nothing (`test`). The base
has 0.5 million parameters and has read, in one place, prose and source of the installed Python (as `atoll demo` has
them), and conversations of nobody's: a sentence of the prose, and the next one. Prints for each way and silo the loss
over what the assistant says in `test`, mean over the seeds, and what a silo sends in a round.
"""

import argparse
import collections
import itertools
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from data_tools.corpora import write_python_corpora
from data_tools.pack import ChatRecipe, Recipe, prepare
from data_tools.sources import Source, read_documents, training_file
from data_tools.tokenizer import train_tokenizer
from launch.compare.compare import CompareConfig, ModelSpec, Planned, plan_runs
from launch.compare.run import compare
from launch.demo import ON_CPUS
from launch.demo_chat import TEXTS, VOCAB_SIZE, places, train_base
from pretrain.federation.evaluation import open_subject
from pretrain.federation.held_out import SplitLoss, together
from pretrain.federation.personal import export_personal_model
from pretrain.silo.shards import atomic_path

ROW = 288
CHARACTERS = 200
PROMPT_TOKENS = 16
CONVERSATIONS = 400
HELD_OUT = 0.2
PUBLIC = "reference"  # as the demo calls what its base learns turns from
TEXT_BYTES = {"train": 3_000_000, "valid": 100_000}
SENTENCE = re.compile(r"(?<=[.!?;:])\s+")
Pair = tuple[str, str]

SMALL = [
    *("model.config.hidden_size=96", "model.config.intermediate_size=256", "model.config.num_hidden_layers=3"),
    *("model.config.num_attention_heads=4", "model.config.num_key_value_heads=4", "inner.num_steps=400"),
    *("silo.processes_per_node=1", "silo.global_batch_sequences=8", "silo.micro_batch_sequences=8"),
    *(f"sequence_tokens={ROW}", "wandb.mode=disabled"),
]
LORA = [
    *("model.adapter.kind=lora", "model.adapter.rank=16", "model.adapter.alpha=32"),
    "model.adapter.targets=[all-linear]",
]
PROMPT = [
    "model.adapter.kind=prompt",
    f"model.adapter.tokens={PROMPT_TOKENS}",
    "model.adapter.text=Answer the question.",
]
BESIDE = [
    *("silo.personal_adapter.rank=16", "silo.personal_adapter.alpha=32"),
    "silo.personal_adapter.targets=[all-linear]",
]
OUTER = ["outer.optimizer=nesterov", "outer.lr=0.9", "outer.momentum=0.4"]
AVERAGED = ["outer.optimizer=sgd", "outer.lr=1.0", "outer.momentum=0.0", "outer.sync_interval_steps=4"]
SHARED = "outer.second_moments=shared"
COMMON = [
    *(f"sequence_tokens={ROW}", "document_masking=true", "inner.num_steps=120", "inner.optimizer=adamw"),
    *("inner.warmup_steps=10", "inner.schedule=cosine", "outer.sync_interval_steps=2", *OUTER, "outer.max_share=1.0"),
    *("silo.global_batch_sequences=2", "silo.micro_batch_sequences=2", "silo.checkpoint_interval_steps=1000000"),
    *("silo.eval_interval_rounds=0", "silo.log_interval_steps=20", "exchange.poll_seconds=0.02", "wandb.mode=disabled"),
]
WAYS = {
    "full": [SHARED],
    "full-12": [SHARED, "outer.sync_interval_steps=12"],
    "factors": [*LORA, SHARED, "model.adapter.merge=factors"],
    "factors-beside": [*LORA, SHARED, "model.adapter.merge=factors", *BESIDE],
    "alternate": [*LORA, *AVERAGED, "model.adapter.merge=alternate", "outer.num_fragments=2"],
    "prompt": [*PROMPT, SHARED],
}
KINDS_OF_RUN = {"federated": "federated", "central": "central", "alone": "isolated", "own": "personalised"}
OWN_STEPS = 40
RATES = {  # the best in `valid` of seed 0; in one place, and alone, the others are full and factors
    "full": {"federated": 0.012, "central": 0.006, "alone": 0.006, "own": 0.003},
    "full-12": {"federated": 0.012},
    "factors": {"federated": 0.01, "central": 0.01, "alone": 0.01, "own": 0.01},
    "factors-beside": {"federated": 0.01},
    "alternate": {"federated": 0.01},
    "prompt": {"federated": 0.05, "central": 0.05, "alone": 0.05},
}


# ---- conversations


def until(text: str, characters: int = CHARACTERS) -> str:
    """Its sentences from the first on, as many as there is room for; the first is cut where it has none."""
    said = ""
    for sentence in SENTENCE.split(" ".join(text.split())):
        if said and len(said) + 1 + len(sentence) > characters:
            break
        said = f"{said} {sentence}".strip()
    return said[:characters]


def of_law(text: str) -> Pair | None:
    """Heading and content of a section."""
    heading, _, content = text.partition("\n")
    return (heading, until(content)) if content else None


def of_medicine(text: str) -> Pair | None:
    """The first question and its answer."""
    found = re.search(r"Question: (.+?)\nAnswer: (.+?)(?:\nQuestion: |\Z)", text, re.DOTALL)
    return (until(found[1]), until(found[2])) if found else None


def of_halves(text: str) -> Pair | None:
    """The first half of what is said first, and the second, parted between sentences."""
    sentences = SENTENCE.split(until(text.partition("\n")[2], 2 * CHARACTERS))
    half = len(sentences) // 2
    return (" ".join(sentences[:half])[-CHARACTERS:], until(" ".join(sentences[half:]))) if half else None


def of_paragraphs(text: str) -> Pair | None:
    """A paragraph and the next one."""
    paragraphs = [part for part in text.split("\n\n") if len(part) > 40]
    return (until(paragraphs[0]), until(paragraphs[1])) if len(paragraphs) > 1 else None


def of_sentences(text: str) -> Pair | None:
    """A sentence and the next one: nobody's."""
    sentences = [part for part in SENTENCE.split(text) if 20 < len(part) < CHARACTERS]
    return (sentences[0], sentences[1]) if len(sentences) > 1 else None


KINDS: dict[str, Callable[[str], Pair | None]] = {
    "law": of_law,
    "medicine": of_medicine,
    "encyclopedia": of_halves,
    "literature": of_paragraphs,
}


def write_lines(file: Path, records: list[dict[str, Any]]) -> Path:
    """JSON lines, whole or not at all; a file that is there is left as it is."""
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        temporary.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return file


def conversations(texts: Iterable[str], kind: Callable[[str], Pair | None]) -> list[dict[str, Any]]:
    """One of each text that has one."""
    pairs = [pair for text in texts if (pair := kind(text)) and all(pair)]
    return [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in pairs
    ]


def prepared(directory: Path, corpora: Path) -> Path:
    """Pack text and conversations (law, law-test, ...), each with room for a prompt, too; returns the tokenizer."""
    made = directory / "made"
    texts = write_python_corpora(directory / "text", TEXTS, TEXT_BYTES)
    sources = {name: (folder, 0.0) for name, folder in texts.items()}
    for name, kind in KINDS.items():
        for split, where, held_out in (("train", name, HELD_OUT), ("valid", f"{name}-test", 0.0)):
            found = conversations(read_documents(corpora / name / f"{split}.jsonl.gz"), kind)[:CONVERSATIONS]
            sources[where] = (write_lines(made / f"{where}.jsonl", found), held_out)
    public = conversations(read_documents(training_file(texts["prose"])), of_sentences)
    sources[PUBLIC] = (write_lines(made / f"{PUBLIC}.jsonl", public), HELD_OUT)
    tokenizer = directory / "tokenizer" / "tokenizer.json"
    if not tokenizer.exists():
        every = [text for folder in texts.values() for text in read_documents(training_file(folder))]
        every += [text for name in KINDS for text in (made / f"{name}.jsonl").read_text().splitlines()]
        train_tokenizer(every, vocab_size=VOCAB_SIZE, output=tokenizer.parent, chat=True)
    for name, (file, held_out) in sources.items():
        for room in [0] if name in (*TEXTS, PUBLIC) else [0, PROMPT_TOKENS]:
            chat = ChatRecipe(sequence_tokens=ROW, too_long="skip", prompt_tokens=room)
            recipe = Recipe(
                sources=(Source(path=str(file)),),
                tokenizer=tokenizer,
                chat=None if name in TEXTS else chat,
                held_out=held_out,
            )
            output = directory / (f"packed-{room}" if room else "packed") / name
            prepare(recipe, output, num_workers=0, console=Console(quiet=True))
    return tokenizer


# ---- runs


def comparison(given: argparse.Namespace, settings: list[str]) -> CompareConfig:
    """Every way federated, central and alone, as asked; what the command line says goes last."""
    directory, models = given.directory, {}
    for way, label, scale in itertools.product(given.ways, given.kinds, given.scales):
        if label not in RATES[way]:
            continue
        rate = RATES[way][label] * scale
        every = [*settings, *silos_of(directory, way), *WAYS[way], f"inner.lr={rate:g}", *given.overrides]
        spec = ModelSpec(kind=KINDS_OF_RUN[label], settings=every)
        if label == "own":
            spec.of, spec.steps = f"{way}-federated-{RATES[way]['federated']:g}", OWN_STEPS
        models[f"{way}-{label}-{rate:g}"] = spec
    return CompareConfig(
        directory=str(directory / "compare"),
        run=[str(directory / "run.yaml")],
        models=models,
        seeds=given.seeds,
        reference=next(iter(models)),
        keep_checkpoints=True,
    )


def packed_of(directory: Path, way: str) -> Path:
    """Where the rows of a way are."""
    return directory / (f"packed-{PROMPT_TOKENS}" if way.startswith("prompt") else "packed")


def silos_of(directory: Path, way: str) -> list[str]:
    """What every silo trains on and holds out, as `key=value`."""
    packed = packed_of(directory, way)
    every = {name: {"data": [f"{packed / name}/train"], "valid": {name: f"{packed / name}/valid"}} for name in KINDS}
    return [f"silos.{name}={json.dumps(silo)}" for name, silo in every.items()]


def losses(planned: Planned, split: str, packed: Path) -> dict[str, float]:
    """Loss of a run's model on the split of each silo, and on all tokens of them, kept beside the run."""
    kept = planned.directory / f"{split}.json"
    if not kept.exists():
        where = "-test/train" if split == "test" else "/valid"
        splits = {name: Path(f"{packed / name}{where}") for name in KINDS}
        found = dict(_losses(planned, splits))
        values = {name: one.loss for name, one in found.items()} | {"all": together([*found.values()]).loss}
        kept.write_text(json.dumps(values))
    return json.loads(kept.read_text())


def _losses(planned: Planned, splits: dict[str, Path]) -> Iterable[tuple[str, SplitLoss]]:
    """Of the run's model; where silos have adapters of their own, of each silo's on its own split."""
    if not any(silo.personal_adapter.is_on for silo in planned.config.silos.values()):
        yield from open_subject(str(planned.directory)).losses(splits, num_sequences=0).items()
        return
    for name, split in splits.items():
        own = planned.directory / f"own-{name}"
        if not own.exists():
            export_personal_model(planned.config, own, silo=name, form="merged")
        yield from open_subject(str(own)).losses({name: split}, num_sequences=0).items()


def sent(planned: Planned) -> tuple[float, float]:
    """Bytes that a silo sends and receives in a round."""
    summary = json.loads((planned.directory / "summary.json").read_text())
    rounds = planned.config.num_rounds * len(planned.config.silos)
    return summary["bytes_sent"] / rounds, summary["bytes_received"] / rounds


def main() -> None:
    """Prepare, train what has not been trained yet, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("runs/conversations"))
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS_OF_RUN], default=[*KINDS_OF_RUN])
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0], help="of the learning rates")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--split", choices=["valid", "test"], default="test")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    os.environ |= ON_CPUS
    torch.set_num_threads(1)
    directory = arguments.directory
    tokenizer = prepared(directory, arguments.corpora)
    base, packed = directory / "base", {name: directory / "packed" / name for name in (*TEXTS, PUBLIC)}
    if train_base(directory, packed, tokenizer, base, SMALL):
        raise SystemExit(f"{directory / 'base-run'} failed")
    settings = [*COMMON, *places(directory, tokenizer), f"model.checkpoint={base}"]
    (directory / "run.yaml").write_text("{}\n")
    spec = comparison(arguments, settings)
    if code := compare(spec, jobs=arguments.jobs):
        raise SystemExit(code)
    found = collections.defaultdict(list)
    for planned in plan_runs(spec):
        values = losses(planned, arguments.split, packed_of(directory, planned.model))
        for name in [planned.silo] if planned.silo else values:
            found[planned.model, name].append(values[name])
        if planned.kind == "federated":
            found[planned.model, "sent"].append(sent(planned)[0])
    names = [*KINDS, "all", "sent"]
    print("".join(f"{name:>16}" for name in ["", *names]))
    for model in spec.models:
        cells = [statistics.mean(found[model, name]) if found[model, name] else math.nan for name in names]
        print(f"{model:>16}" + "".join(f"{cell:16,.4f}" for cell in cells))


if __name__ == "__main__":
    main()
