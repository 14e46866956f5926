"""Scores of an exported model on local tasks, by lm-evaluation-harness (the extra `eval`), without a network."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config.errors import ConfigError

LOCAL = ("json", "csv", "parquet", "text", "arrow")  # builders of `datasets` that read files
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    """With its filter, as the library has it: acc,none."""
    value: float
    stderr: float | None
    """By bootstrap or formula, as the library has it; None where it has none."""
    num_examples: int


def evaluate_tasks(
    directory: Path, tasks: Sequence[Path], *, batch_sequences: int = 8, num_examples: int | None = None
) -> list[Score]:
    """Every metric of every task, each a YAML file of the library's form whose data are files of this machine.

    Relative places in `data_files` are from the file's folder. A `!function` in such a file is Python that runs here.
    `num_examples`, if given, takes only the first of each. Raises ConfigError.
    """
    os.environ.update(dict.fromkeys(OFFLINE, "1"))  # read when the libraries are imported
    if not (directory / "config.json").is_file():
        raise ConfigError(f"model: {str(directory)!r} given; allowed: a transformers directory (see atoll export)")
    try:
        import lm_eval
        import torch
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"--tasks: given; {error}; install it with: pip install 'atoll[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    specs = [_local(path) for path in tasks]
    names = [spec["task"] for spec in specs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--tasks: two files given for the task {twice[0]!r}; allowed: one")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HFLM(pretrained=str(directory), dtype="float32", batch_size=batch_sequences, device=device)
    try:
        found = lm_eval.simple_evaluate(
            model=model, tasks=specs, task_manager=TaskManager(include_defaults=False), limit=num_examples
        )
    except Exception as error:  # what is wrong with a task can be anything
        raise ConfigError(f"--tasks: {', '.join(names)} given; {type(error).__name__}: {error}") from None
    return [score for name in names for score in _scores(name, found)]


def _local(path: Path) -> dict[str, Any]:
    """A task's file with its data named from the root on. Raises ConfigError unless they are files of this machine."""
    from lm_eval.tasks._yaml_loader import load_yaml

    key = f"--tasks: {str(path)!r} given"
    if not path.is_file():
        raise ConfigError(f"{key}; there is no such file; allowed: a YAML file of lm-evaluation-harness")
    try:
        spec = load_yaml(path, resolve_func=True)
    except Exception as error:  # of a YAML parser, and of what it includes
        raise ConfigError(f"{key}; {error}") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("task"), str):
        raise ConfigError(f"{key}; it has no `task: NAME`")
    options = spec.get("dataset_kwargs") or {}
    if spec.get("dataset_path") not in LOCAL or not options.get("data_files"):
        raise ConfigError(
            f"{key}; its dataset_path is {spec.get('dataset_path')!r}; allowed: {', '.join(LOCAL)}, with "
            "dataset_kwargs.data_files of this machine"
        )
    return spec | {"dataset_kwargs": options | {"data_files": _placed(options["data_files"], path, key)}}


def _placed(files: Any, path: Path, key: str) -> Any:
    if isinstance(files, dict):
        return {split: _placed(file, path, key) for split, file in files.items()}
    if isinstance(files, list):
        return [_placed(file, path, key) for file in files]
    place = path.absolute().parent / str(files)
    if not place.is_file():
        raise ConfigError(f"{key}; its data file {str(place)!r} is not there; allowed: files of this machine")
    return str(place)


def _scores(task: str, found: dict[str, Any]) -> list[Score]:
    values = found["results"][task]
    return [
        Score(
            task=task,
            metric=metric,
            value=float(value),
            stderr=stderr if isinstance(stderr := values.get(_stderr(metric)), float) else None,
            num_examples=int(found["n-samples"][task]["effective"]),
        )
        for metric, value in values.items()
        if isinstance(value, int | float) and "," in metric and "_stderr," not in metric
    ]


def _stderr(metric: str) -> str:
    name, _, kind = metric.partition(",")
    return f"{name}_stderr,{kind}"
