"""Function calling learned in four silos: exact calls of the federated model, of a central one, and of each silo alone.

    pip download --no-deps bfcl-eval==2026.3.23 && unzip bfcl_eval-*.whl 'bfcl_eval/data/*' -d bfcl
    python -m benchmarks.function_calls bfcl/bfcl_eval/data DIRECTORY --seeds 0 1 2

The questions, functions and right answers are the Berkeley Function Calling Leaderboard's; benchmarks/function_texts.py
has the recipe. A base learns from public conversations what a call is; then adapters are trained beside it, by the
commands that users have: together, all text in one place, and each silo alone, for the same steps. Every model is
asked the questions of all silos, which nobody trained on, as `atoll eval --tools` asks them. What was stopped goes on
with the same command; DIRECTORY/result.json has all numbers.
"""

import argparse
import json
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.function_texts import DOMAINS, NUM_VARIANTS, by_domain, held_out, public, training
from data_tools.chat_template import find_template
from data_tools.pack import ChatRecipe, Recipe, prepare
from data_tools.sources import Source
from data_tools.tokenizer import train_tokenizer
from launch.calling import Judged, evaluate_calls
from launch.compare.compare import CompareConfig, ModelSpec, Planned, plan_runs
from launch.compare.run import compare
from launch.start.local import launch_local
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config, save_config
from pretrain.federation.evaluation import open_subject
from pretrain.federation.export import export_global_model

Exams = dict[str, Path]
VOCAB_SIZE = 1024
ROW_TOKENS = 512
NUM_PUBLIC = 20_000
ANSWER_TOKENS = 96
MODEL = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "max_position_embeddings": ROW_TOKENS,
}
SILO: dict[str, Any] = {"eval_interval_rounds": 0, "eval_sequences": 8, "log_interval_steps": 10}
COMMON: dict[str, Any] = {
    "sequence_tokens": ROW_TOKENS,
    "document_masking": True,
    "wandb": {"mode": "disabled"},
}
BASE = COMMON | {
    "name": "base",
    "model": {"config": MODEL},
    "inner": {"optimizer": "muon", "muon_lr": 0.02, "muon_momentum": 0.9, "lr": 0.01, "warmup_steps": 20},
    "outer": {"sync_interval_steps": 50},
    "exchange": {"kind": "none"},
    "silo": SILO | {"global_batch_sequences": 16, "micro_batch_sequences": 16, "checkpoint_interval_steps": 100},
}
ADAPTERS = COMMON | {
    "name": "calls",
    "inner": {"lr": 0.007, "warmup_steps": 5},
    "outer": {"sync_interval_steps": 5, "optimizer": "nesterov", "lr": 0.8, "momentum": 0.5},
    "exchange": {"poll_seconds": 0.1, "keep_versions": 1000},
    "silo": SILO | {"global_batch_sequences": 4, "micro_batch_sequences": 4, "checkpoint_interval_steps": 1000},
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="bfcl_eval/data of the package")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=24, help="of a silo, at most")
    parser.add_argument("--base-steps", type=int, default=900)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the runs with adapters")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    directory = given.directory.absolute()
    asked = write_texts(given.data, directory, given.questions)
    base = trained_base(directory, given.base_steps)
    spec = comparison(directory, base, given)
    if code := compare(spec, jobs=given.jobs):
        raise SystemExit(code)
    found = evaluated(plan_runs(spec), base, asked, directory)
    (directory / "result.json").write_text(json.dumps(found, indent=1) + "\n")
    print_tables(found)


# --- text -------------------------------------------------------------------------------------------------------------


def write_texts(data: Path, directory: Path, most: int) -> Exams:
    """Conversations, tokenizer and packed rows below the directory; returns the held-out questions of each silo."""
    asked = {name: found[:most] for name, found in by_domain(data).items()}
    texts = directory / "texts"
    files = {name: texts / f"{name}.jsonl" for name in (*DOMAINS, "public")}
    exams = {name: texts / f"{name}.asked.jsonl" for name in DOMAINS}
    if not (directory / "packed" / "public").exists():
        texts.mkdir(parents=True, exist_ok=True)
        for name, found in asked.items():
            _write(files[name], training(found, name))
            _write(exams[name], held_out(found, name))
        _write(files["public"], public(NUM_PUBLIC))
        share = files["public"].read_text().splitlines()[:6000]  # of nothing that only adapters see
        train_tokenizer(share, vocab_size=VOCAB_SIZE, output=directory / "tokenizer", chat=True)
        for name, file in files.items():
            chat = ChatRecipe(sequence_tokens=ROW_TOKENS, too_long="skip")
            source = (Source(path=str(file)),)
            recipe = Recipe(sources=source, tokenizer=directory / "tokenizer", held_out=0.02, chat=chat)
            prepare(recipe, directory / "packed" / name, num_workers=0, console=Console(quiet=True))
    for name, found in asked.items():
        print(
            f"{name:<8} {len(found)} questions of {len({one.name for one in found})} functions, {NUM_VARIANTS} variants"
        )
    return exams


def _write(file: Path, records: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


# --- runs -------------------------------------------------------------------------------------------------------------


def loaded(directory: Path, name: str, settings: dict[str, Any], silos: Iterable[str], *overrides: str) -> RunConfig:
    """The configuration of a run on what was prepared."""
    packed = directory / "packed"
    places = {"tokenizer": directory / "tokenizer", "chat_template": directory / "tokenizer"}
    rows = {
        silo: {"data": [str(packed / text / "train")], "valid": {text: str(packed / text / "valid")}}
        for silo in silos
        for text in ["public" if silo == "base" else silo]
    }
    config = settings | {"directory": str(directory / name), "silos": rows}
    config |= {key: str(place) for key, place in places.items()}
    file = directory / f"{name}.yaml"
    file.write_text(json.dumps(config))
    return load_config([file], list(overrides))


def trained_base(directory: Path, steps: int) -> Path:
    """The base as a transformers directory; one that is there is kept."""
    base = directory / "base"
    if not base.exists():
        config = loaded(directory, "base-run", BASE, ["base"], f"inner.num_steps={steps}")
        if code := launch_local(config):
            raise SystemExit(code)
        export_global_model(config, base)
    return base


def comparison(directory: Path, base: Path, given: argparse.Namespace) -> CompareConfig:
    """Federated, central and alone, at the same steps."""
    adapter = {"kind": "lora", "rank": given.rank, "alpha": 2 * given.rank, "targets": ["all-linear"]}
    settings = ADAPTERS | {"model": {"checkpoint": str(base), "adapter": adapter}}
    config = loaded(directory, "run", settings, DOMAINS, f"inner.num_steps={given.steps}", *given.set)
    file = directory / "checked.yaml"
    save_config(config, file)
    models = {
        "federated": ModelSpec(kind="federated"),
        "central": ModelSpec(kind="central"),
        "alone": ModelSpec(kind="isolated"),
    }
    return CompareConfig(directory=str(directory / "compare"), run=[str(file)], models=models, seeds=given.seeds)


# --- what they know ---------------------------------------------------------------------------------------------------


def evaluated(runs: Sequence[Planned], base: Path, asked: Exams, directory: Path) -> list[dict[str, Any]]:
    """Every model's calls on every silo's questions; of federated ones of some versions on the way, too."""
    kept = directory / "answers"
    found: list[dict[str, Any]] = [{"model": "base", "seed": None, "version": None} | _calls(base, None, asked, kept)]
    for run in runs:
        told = {"model": f"{run.silo} alone" if run.silo else run.model, "seed": run.seed}
        last = run.config.num_rounds
        on_the_way = {last // 8, last // 4, last // 2, 3 * last // 4} - {0} if run.kind == "federated" else set()
        found += [
            told | {"version": version} | _calls(run.directory, version, asked, kept / run.model / run.silo)
            for version in (None, *sorted(on_the_way))
        ]
    return found


def _calls(where: Path, version: int | None, asked: Exams, kept: Path) -> dict[str, Any]:
    subject = open_subject(str(where), version=version)
    template = find_template(subject.tokenizer_file, subject.template_file, "")
    answers = kept / f"{where.name}-{'last' if version is None else version}.jsonl"
    options: dict[str, Any] = {"num_tokens": ANSWER_TOKENS, "batch_sequences": 16, "answers": answers}
    return _counted(evaluate_calls(subject, template, asked, **options))


def _counted(judged: Sequence[Judged]) -> dict[str, Any]:
    silos = {silo: [one for one in judged if one.silo == silo] for silo in DOMAINS} | {"all": list(judged)}
    return {
        "questions": {silo: len(found) for silo, found in silos.items()},
        "exact": {silo: _share([one.is_right for one in found]) for silo, found in silos.items()},
        "functions": {silo: _share([one.has_names for one in found]) for silo, found in silos.items()},
        "wrong": dict(Counter(one.verdict for one in judged if not one.is_right).most_common()),
    }


def _share(found: Sequence[bool]) -> float:
    return 100 * sum(found) / max(1, len(found))


def print_tables(found: Sequence[dict[str, Any]]) -> None:
    """Exact calls in percent, right functions in brackets: the mean of the seeds, and of all questions each seed's."""
    print(f"| model | {' | '.join(DOMAINS)} | all | each seed |\n|---|{'---|' * (len(DOMAINS) + 2)}")
    last = [one for one in found if one["version"] is None]
    for name in dict.fromkeys(one["model"] for one in last):
        of_model = [one for one in last if one["model"] == name]
        cells = [_cell(of_model, silo) for silo in (*DOMAINS, "all")]
        seeds = ", ".join(f"{one['exact']['all']:.1f}" for one in of_model)
        print(f"| {name} | {' | '.join(cells)} | {seeds} |")
    print("\n| version | exact | right functions | each seed |\n|---|---|---|---|")
    on_the_way = [one for one in found if one["version"] is not None]
    for version in sorted({one["version"] for one in on_the_way}):
        of_version = [one for one in on_the_way if one["version"] == version]
        seeds = ", ".join(f"{one['exact']['all']:.1f}" for one in of_version)
        exact, names = (statistics.mean(one[what]["all"] for one in of_version) for what in ("exact", "functions"))
        print(f"| {version} | {exact:.1f} | {names:.1f} | {seeds} |")


def _cell(found: Sequence[dict[str, Any]], silo: str) -> str:
    exact, names = (statistics.mean(one[what][silo] for one in found) for what in ("exact", "functions"))
    return f"{exact:.1f} ({names:.1f})"


if __name__ == "__main__":
    main()
