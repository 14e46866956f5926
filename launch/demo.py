"""`atoll demo`: the main job on one machine, on text that is on it already."""

import dataclasses
import json
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.compare.compare import central_config, isolated_config
from launch.show.report import summarize, write_report
from launch.start.local import launch_local
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config

SETTINGS = Path(__file__).parent.parent / "configs" / "run" / "demo.yaml"
VOCAB_SIZE = 2048
# It trains what a laptop can: GPUs, of which there may be fewer than processes, would make it no faster.
ON_CPUS = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
# How the silos differ on purpose; more silos than rows start again from the first.
LAYOUTS = (
    {"processes_per_node": 2, "micro_batch_sequences": 8, "deepspeed": {"zero_optimization": {"stage": 2}}},
    {"processes_per_node": 1, "deepspeed": {"zero_optimization": {"stage": 3}}},
    {"processes_per_node": 1},
)
PROMPTS = {"library": "def read_lines(path", "tests": "    def test_empty", "prose": "This module provides"}


def run_demo(
    directory: Path, *, corpora: Path | None, compare: bool, overrides: list[str], dry_run: bool = False
) -> int:
    """Prepare text, train the silos together, show what came of it; returns the exit code."""
    console = Console()
    os.environ |= ON_CPUS
    check_overrides(overrides)
    checked = load_config([SETTINGS], ["silos.any={}", *overrides])  # a mistake must not cost the preparation
    if dry_run:
        of = f"the folders of {corpora}" if corpora else "the installed Python"
        print(f"text of {of}, tokenizer, shards, {checked.num_rounds} rounds, model and report in {directory}")
        print("dry run: nothing was started")
        return 0
    console.print(f"[bold]1/4[/bold]  text, shared tokenizer, packed shards ({directory})")
    packed, tokenizer = prepare_text(directory, corpora)
    config = federated_config(directory, packed, tokenizer, overrides)
    console.print(f"[bold]2/4[/bold]  {len(packed)} silos and an aggregator, {config.num_rounds} rounds")
    code = launch_local(config)
    if code:
        return code
    comparisons = {}
    for label, other in comparison_configs(config).items() if compare else ():
        console.print(f"[bold]2/4[/bold]  for comparison: {label}")
        code = launch_local(other)
        if code:
            return code
        comparisons[label] = Path(other.directory)
    console.print("[bold]3/4[/bold]  final model and report")
    model = export_final(config)
    report = write_report(directory, comparisons=comparisons)
    console.print("[bold]4/4[/bold]  what came of it\n")
    show_results(console, summarize(directory), {label: summarize(path) for label, path in comparisons.items()})
    show_sample(console, model, packed, corpora)
    console.print(f"\nreport   {report}\nsummary  {directory / 'summary.json'}\nmodel    {model}")
    return 0


def check_overrides(overrides: list[str]) -> None:
    """Raise ConfigError for a place that the demo chooses: what comes after training would look elsewhere."""
    for one in overrides:
        key, _, given = one.partition("=")
        if key.strip() == "directory":
            raise ConfigError(f"directory: {given!r} given; allowed: --directory {given or 'DIRECTORY'}")


def prepare_text(directory: Path, corpora: Path | None) -> tuple[dict[str, Path], Path]:
    """Corpora, tokenizer and packed shards below `directory`; what is there is kept. Returns the last two."""
    from data_tools.corpora import write_python_corpora
    from data_tools.pack import Recipe, prepare
    from data_tools.sources import Source, read_documents, training_file
    from data_tools.tokenizer import train_tokenizer

    if corpora is None:
        folders = write_python_corpora(directory / "corpora")
    else:
        folders = {path.name: path for path in sorted(corpora.iterdir()) if path.is_dir()} if corpora.is_dir() else {}
        if not folders:
            raise ConfigError(f"--corpora: {str(corpora)!r} given; allowed: a folder of folders with train.jsonl.gz")
    tokenizer = directory / "tokenizer" / "tokenizer.json"
    if not tokenizer.exists():
        texts = (text for folder in folders.values() for text in read_documents(training_file(folder)))
        train_tokenizer(texts, vocab_size=VOCAB_SIZE, output=tokenizer.parent)
    packed = {}
    for name, folder in folders.items():
        packed[name] = directory / "packed" / name
        prepare(Recipe(sources=(Source(path=str(folder)),), tokenizer=tokenizer), packed[name])
    return packed, tokenizer


def federated_config(directory: Path, packed: dict[str, Path], tokenizer: Path, overrides: list[str]) -> RunConfig:
    """The demo's configuration: shipped settings, then where things are, then the user's `key=value`."""
    here = [f"directory={json.dumps(str(directory))}", f"tokenizer={json.dumps(str(tokenizer))}"]
    for index, (name, path) in enumerate(packed.items()):
        silo = LAYOUTS[index % len(LAYOUTS)] | {"data": [str(path / "train")], "valid": {name: str(path / "valid")}}
        here.append(f"silos.{name}={json.dumps(silo)}")
    return load_config([SETTINGS], [*here, *overrides])


def comparison_configs(config: RunConfig) -> dict[str, RunConfig]:
    """One central model on the same total tokens, and each silo alone on the same number of its own tokens."""
    configs = {"central": central_config(config)}
    configs |= {f"{name} alone": isolated_config(config, name) for name in config.silos}
    place = f"{config.directory}/compare"
    return {
        label: dataclasses.replace(other, directory=f"{place}/{label.replace(' ', '-')}")
        for label, other in configs.items()
    }


def export_final(config: RunConfig) -> Path:
    """The final global model as a `transformers` directory in the run directory."""
    from pretrain.federation.export import export_global_model

    directory = Path(config.directory) / "model"
    if not directory.exists():
        export_global_model(config, directory)
    return directory


def show_results(console: Console, summary: dict, others: dict[str, dict]) -> None:
    """Held-out loss before and after on each silo's text, against the other models if there are any, and the cost."""
    by_round = summary["val_loss_by_round"]
    before, after = by_round[0]["val_loss"], summary["val_loss"]
    corpora = sorted(after)
    table = Table(title="held-out loss, nats per token")
    table.add_column("model")
    for corpus in [*corpora, "mean"]:
        table.add_column(corpus, justify="right")
    rows = {"global model before": before, "global model after": after}
    rows |= {label: other["val_loss"] for label, other in others.items()}
    for label, losses in rows.items():
        values = [losses[corpus] for corpus in corpora]
        values.append(sum(values) / len(values))
        table.add_row(label, *(f"{value:.4f}" for value in values), style="bold" if label.endswith("after") else "")
    console.print(table)
    sent, parallel = summary["bytes_sent"], summary["bytes_data_parallel"]
    console.print(
        f"\n{summary['parameters']:,} parameters, {summary['tokens']:,} tokens, {summary['rounds']} rounds of "
        f"{summary['sync_interval']} steps\n"
        f"bytes sent {sent / 1e6:,.0f} MB; all-reducing every step in bf16 would have sent {parallel / 1e6:,.0f} MB: "
        f"{parallel / sent:.1f} times as many\n"
        f"time training {summary['seconds_training']:,.0f} s, waiting {summary['seconds_waiting']:,.0f} s, "
        "summed over silos"
    )


def show_sample(console: Console, model: Path, packed: dict[str, Path], corpora: Path | None) -> None:
    """What the final model writes after a few words."""
    from pretrain.federation.generate import Sampling, open_speaker

    prompts = PROMPTS if corpora is None else dict.fromkeys(list(packed)[:1], "The")
    speaker, sampling = open_speaker(str(model)), Sampling(num_tokens=48, temperature=0.7, top_k=40)
    console.print("\nsample continuations")
    for name, prompt in prompts.items():
        pieces: list[str] = []
        speaker.go_on(prompt, sampling, pieces.append)
        console.print(f"  {name}: ", end="", style="bold")
        console.print(repr(prompt)[1:-1], end="", markup=False, highlight=False, style="dim")
        console.print(repr("".join(pieces))[1:-1], markup=False, highlight=False)
