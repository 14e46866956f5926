"""`atoll demo --chat`: three institutions teach a small base to answer, from conversations made on the spot."""

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from launch.compare.compare import CompareConfig, ModelSpec, Planned, plan_runs
from launch.compare.run import compare
from launch.demo import ON_CPUS, check_overrides
from launch.show.report import write_report
from launch.start.local import launch_local
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config, save_config

if TYPE_CHECKING:
    from pretrain.federation.held_out import SplitLoss

CONFIGS = Path(__file__).parent.parent / "configs" / "run"
BASE, ADAPTERS = CONFIGS / "demo-base.yaml", CONFIGS / "demo-chat.yaml"
VOCAB_SIZE = 2048
HELD_OUT = 0.1
TEXTS = ("library", "prose")  # what the base reads, beside conversations of nobody's
TEXT_BYTES = {"train": 2_000_000, "valid": 100_000}
PUBLIC_SHARE = 0.2
# A conversation with the models, before and after.
ASKED = ("What does read_lines(path, encoding) of files do?", "Which arguments does it take?")


def run_demo_chat(directory: Path, *, overrides: list[str], dry_run: bool = False) -> int:
    """Make conversations, train a base and adapters beside it, show what came of them; returns the exit code."""
    console = Console()
    os.environ |= ON_CPUS
    check_overrides(overrides)
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("--chat: given; peft is not installed: pip install 'atoll[adapters]'")
    checked = load_config([ADAPTERS], ["silos.any={}", *overrides])  # a mistake must not cost the preparation
    if dry_run:
        print(f"conversations, tokenizer, base, adapters of {checked.inner.num_steps} steps, table in {directory}")
        print("dry run: nothing was started")
        return 0

    def say(step: int, what: str) -> None:
        console.print(f"[bold]{step}/5[/bold]  {what}", soft_wrap=True, highlight=False)

    say(1, f"conversations from the installed Python, shared tokenizer and template, packed rows ({directory})")
    packed, tokenizer = prepare_conversations(directory)
    for name, place in packed.items():
        say_rows(console, name, place)
    base = directory / "base"
    say(2, f"a base that all have: {' and '.join(TEXTS)} of the installed Python, and public conversations ({base})")
    if code := train_base(directory, packed, tokenizer, base):
        return code
    institutions = {name: place for name, place in packed.items() if name not in (*TEXTS, "reference")}
    config = adapters_config(directory, institutions, tokenizer, base, overrides)
    say(3, f"{len(institutions)} institutions train one adapter together, {config.num_rounds} rounds")
    if code := launched(config):
        return code
    say(4, "for comparison: all conversations in one place, and each institution alone, two runs at a time")
    spec = comparison(config)
    if code := compare(spec, jobs=2, console=console):
        return code
    others = {f"{one.silo} alone" if one.silo else one.model: one.config for one in plan_runs(spec)}
    say(5, "what came of it\n")
    model = export_merged(config)
    report = write_report(directory, comparisons={label: Path(other.directory) for label, other in others.items()})
    show_table(console, evaluated(base, {"federated": config} | others, institutions))
    show_conversation(console, {"before": base, "after": model})
    lines = [f"report   {report}", f"model    {model}", f"next     atoll chat {model}"]
    lines += [f"         atoll eval {model} --chat --data {institutions['docs'] / 'valid'}"]
    lines += ["         docs/finetuning.md, with conversations of your own"]
    console.print("\n" + "\n".join(lines), soft_wrap=True, markup=False, highlight=False)
    return 0


def comparison(config: RunConfig) -> CompareConfig:
    """One central model, and each silo alone, at the same steps."""
    place = Path(config.directory) / "compare"
    save_config(config, place / "run.yaml")
    models = {"central": ModelSpec(kind="central"), "alone": ModelSpec(kind="isolated")}
    return CompareConfig(directory=str(place), run=[str(place / "run.yaml")], models=models)


def launched(config: RunConfig) -> int:
    """The exit code of a run on this machine; one that has finished is left as it is."""
    planned = Planned(model=config.name, kind="federated", seed=0, silo="", config=config)
    return 0 if planned.is_finished else launch_local(config)


def prepare_conversations(directory: Path) -> tuple[dict[str, Path], Path]:
    """Conversations and text by name, packed, and the tokenizer.json below `directory`; what is there is kept."""
    from data_tools.corpora import write_python_corpora
    from data_tools.dialogues import write_conversations
    from data_tools.pack import ChatRecipe, Recipe, prepare
    from data_tools.sources import Source, read_documents, training_file
    from data_tools.tokenizer import train_tokenizer

    texts = write_python_corpora(directory / "text", TEXTS, TEXT_BYTES)
    talks = write_conversations(directory / "conversations")
    tokenizer = directory / "tokenizer" / "tokenizer.json"
    if not tokenizer.exists():
        both = [text for folder in texts.values() for text in read_documents(training_file(folder))]
        both += [line for file in talks.values() for line in file.read_text().splitlines()]
        train_tokenizer(both, vocab_size=VOCAB_SIZE, output=tokenizer.parent, chat=True)
    rows = ChatRecipe(sequence_tokens=load_config([ADAPTERS], ["silos.any={}"]).sequence_tokens, too_long="skip")
    packed = {}
    for name, place in (texts | talks).items():
        packed[name] = directory / "packed" / name
        kind: dict[str, Any] = {"chat": rows, "held_out": HELD_OUT} if name in talks else {}
        recipe = Recipe(sources=(Source(path=str(place)),), tokenizer=tokenizer, **kind)
        prepare(recipe, packed[name], num_workers=0, console=Console(quiet=True))
    return packed, tokenizer


def say_rows(console: Console, name: str, packed: Path) -> None:
    """How many conversations there are of an institution, or tokens of a text, and how many are held out."""
    from pretrain.silo.shards import read_manifest

    kept = json.loads((packed / "report.json").read_text())["sources"][name]["kept"]
    what = "conversations" if read_manifest(packed / "train", key="packed").chat else "tokens"
    found = [kept[split]["documents" if what == "conversations" else "tokens"] for split in ("train", "valid")]
    console.print(f"     {name:<10} {found[0]:,} {what}, {found[1]:,} more held out", soft_wrap=True, highlight=False)


def train_base(
    directory: Path, packed: Mapping[str, Path], tokenizer: Path, base: Path, settings: Sequence[str] = ()
) -> int:
    """Train the base on one machine, and export it; returns the exit code. One that is there is kept.

    `settings` are changes to the shipped ones, key=value.
    """
    from pretrain.federation.export import export_global_model

    if base.exists():
        return 0
    text = (1 - PUBLIC_SHARE) / len(TEXTS)
    silo = {
        "data": [str(packed[name] / "train") for name in (*TEXTS, "reference")],
        "data_weights": [*(text for _ in TEXTS), PUBLIC_SHARE],
        "valid": {name: str(packed[name] / "valid") for name in (*TEXTS, "reference")},
    }
    own = [*settings, *places(directory / "base-run", tokenizer), f"silos.base={json.dumps(silo)}"]
    config = load_config([BASE], own)
    if code := launch_local(config):
        return code
    export_global_model(config, base)
    return 0


def adapters_config(
    directory: Path, institutions: Mapping[str, Path], tokenizer: Path, base: Path, overrides: list[str]
) -> RunConfig:
    """The federation's configuration: shipped settings, then where things are, then the user's `key=value`."""
    here = [*places(directory, tokenizer), f"model.checkpoint={json.dumps(str(base))}"]
    for name, place in institutions.items():
        silo = {"data": [str(place / "train")], "valid": {name: str(place / "valid")}}
        here.append(f"silos.{name}={json.dumps(silo)}")
    return load_config([ADAPTERS], [*here, *overrides])


def places(directory: Path, tokenizer: Path) -> list[str]:
    """Where a run, its tokenizer and its template are, as `key=value`."""
    found = {"directory": directory, "tokenizer": tokenizer, "chat_template": tokenizer.parent}
    return [f"{key}={json.dumps(str(place))}" for key, place in found.items()]


def export_merged(config: RunConfig) -> Path:
    """The federation's adapter in its base, as a `transformers` directory in the run directory."""
    from pretrain.federation.export import export_global_model

    directory = Path(config.directory) / "model"
    if not directory.exists():
        export_global_model(config, directory, form="merged")
    return directory


def evaluated(
    base: Path, runs: Mapping[str, RunConfig], institutions: Mapping[str, Path]
) -> "dict[str, dict[str, SplitLoss]]":
    """Of the base and of every run's model what it is worth on each institution's held-out conversations."""
    import torch

    from pretrain.federation.evaluation import open_subject

    torch.set_num_threads(1)  # several wait for each other on a machine that has more to do
    found, splits = {}, {name: place / "valid" for name, place in institutions.items()}
    for label, where in {"base, before": str(base), **{label: run.directory for label, run in runs.items()}}.items():
        found[label] = open_subject(where).losses(splits, num_sequences=0)
    return found


def show_table(console: Console, found: "Mapping[str, Mapping[str, SplitLoss]]") -> None:
    """Held-out loss and share of right tokens of every model on each institution's conversations, and of all."""
    from pretrain.federation.held_out import together

    table = Table(title="held-out loss in nats per token that the assistant says; the share that is right")
    table.add_column("model")
    names = [*next(iter(found.values()))]
    for name in [*names, "all"]:
        table.add_column(name, justify="right")
    for label, splits in found.items():
        each = [*(splits[name] for name in names), together([*splits.values()])]
        cells = (f"{one.loss:.3f}  {one.accuracy:.0%}" for one in each)
        table.add_row(label, *cells, style="bold" if label == "federated" else "")
    console.print(table)


def show_conversation(console: Console, models: Mapping[str, Path]) -> None:
    """What each model answers to the same questions, the likeliest token at a time."""
    from pretrain.federation.generate import Sampling, open_speaker

    for label, model in models.items():
        speaker = open_speaker(str(model))
        console.print(f"\na conversation {label}:", style="bold")
        messages: list[dict[str, str]] = []
        for question in ASKED:
            pieces: list[str] = []
            messages.append({"role": "user", "content": question})
            speaker.answer(messages, Sampling(num_tokens=32, temperature=0), pieces.append)
            messages.append({"role": "assistant", "content": "".join(pieces)})
            console.print(f"  user       {question}", markup=False, highlight=False, style="dim")
            answer = repr("".join(pieces))[1:-1]
            console.print(f"  assistant  {answer}", soft_wrap=True, markup=False, highlight=False)
