"""Scores of a model on tasks of this machine, by lm-evaluation-harness (the extra `eval`), without a network.

What is finished is kept, and not computed again for the same model, task, library and number of examples. Of a task
that was interrupted the answers that were there are taken.
"""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.config.errors import ConfigError
from pretrain.federation.task_files import TaskFile, find_tasks
from pretrain.host.foreign import loads
from pretrain.silo.shards import atomic_path, file_sha256
from pretrain.silo.weights import checkpoint_files

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
FORMAT = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of a task."""

    metric: str
    """With its filter, as the library has it: acc,none."""
    value: float
    stderr: float | None
    """By bootstrap or formula, as the library has it; None where it has none."""


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """What a model is worth on one task, and all that it takes to come to the same."""

    task: str
    scores: tuple[Score, ...]
    num_examples: int
    """How many were scored."""
    asked_examples: int | None
    """How many of the first were asked for; None: all."""
    batch_sequences: int
    lm_eval: str
    """The library's version."""
    model_sha256: str
    """Of its files: weights, configuration, tokenizer."""
    task_sha256: str | None
    """See TaskFile."""
    is_kept: bool = False
    """Whether it was there already."""

    @property
    def terms(self) -> dict[str, Any]:
        """All that has to be the same for a result to be taken."""
        names = ("task", "asked_examples", "batch_sequences", "lm_eval", "model_sha256", "task_sha256")
        return {name: getattr(self, name) for name in names}


def stay_offline() -> None:
    """Switch off all that could look into a network, before the libraries are imported, which read it then."""
    os.environ.update(dict.fromkeys(OFFLINE, "1"))


def evaluate_tasks(
    directory: Path,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    kept: Path | None = None,
    batch_sequences: int = 8,
    num_examples: int | None = None,
    network: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[TaskScores]:
    """Every metric of every task for the model of a `transformers` directory, one task after another.

    `tasks` and `include_path` are those of `find_tasks`. A `!function` in a task's file is Python that runs here.
    `num_examples`, if given, takes only the first of each. In the folder `kept` results are looked for and left.
    Each task is evaluated by itself, as the library's own command does when it is given one. Raises ConfigError.
    """
    if not network:
        stay_offline()
    if not (directory / "config.json").is_file():
        raise ConfigError(f"model: {str(directory)!r} given; allowed: a transformers directory (see atoll export)")
    try:
        import lm_eval
        import torch
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(f"--tasks: given; {error}; install it with: pip install 'atoll[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = find_tasks(tasks, include_path, network=network)
    asked = TaskScores(
        task="",
        scores=(),
        num_examples=0,
        asked_examples=num_examples,
        batch_sequences=batch_sequences,
        lm_eval=lm_eval.__version__,
        model_sha256=model_sha256(directory),
        task_sha256=None,
    )
    model: Any = None
    for task in found:
        one = replace(asked, task=task.name, task_sha256=task.sha256)
        file = _file_of(one, kept) if kept and task.sha256 else None
        if file and (before := _read(file, one)):
            tell(f"{task.name}: kept from before, in {file}")
            yield before
            continue
        if model is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = HFLM(pretrained=str(directory), dtype="float32", batch_size=batch_sequences, device=device)
        result = _evaluate(model, task, one, file, tell)
        if file:
            with atomic_path(file) as temporary:
                temporary.write_text(json.dumps({"format": FORMAT} | asdict(result), indent=1) + "\n")
        yield result


def _evaluate(
    model: Any, task: TaskFile, one: TaskScores, file: Path | None, tell: Callable[[str], None]
) -> TaskScores:
    """One task; its answers are in a database beside `file` until it is done."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    answers = file.with_suffix(".answers") if file else None
    database = Path(f"{answers}_rank0.db")  # the library's name for it
    if answers and database.is_file():
        tell(f"{task.name}: goes on with the answers in {database}")
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=[task.spec],
            task_manager=TaskManager(include_defaults=False),
            limit=one.asked_examples,
            use_cache=str(answers) if answers else None,
        )
    except Exception as error:  # what is wrong with a task can be anything
        raise ConfigError(f"--tasks: {task.name} given; {type(error).__name__}: {_one_line(error)}") from None
    for left in database.parent.glob(f"{database.name}*") if answers else ():
        left.unlink()
    model.set_cache_hook(type(model.cache_hook)(None))  # of the database that is gone
    scores = tuple(_scores(found["results"][task.name]))
    return replace(one, scores=scores, num_examples=int(found["n-samples"][task.name]["effective"]))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _scores(values: dict[str, Any]) -> Iterator[Score]:
    for metric, value in values.items():
        if isinstance(value, int | float) and "," in metric and "_stderr," not in metric:
            name, _, kind = metric.partition(",")
            stderr = values.get(f"{name}_stderr,{kind}")
            yield Score(metric=metric, value=float(value), stderr=stderr if isinstance(stderr, float) else None)


def model_sha256(directory: Path) -> str:
    """Of all files of a `transformers` directory that decide about a score. Raises ConfigError."""
    files = [*checkpoint_files(directory, key="model"), *(directory / name for name in TOKENIZER_FILES)]
    hashes = {file.name: file_sha256(file) for file in files if file.is_file()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _file_of(one: TaskScores, kept: Path) -> Path:
    terms = hashlib.sha256(json.dumps(one.terms, sort_keys=True).encode()).hexdigest()
    return kept / f"{re.sub(r'[^A-Za-z0-9_-]', '_', one.task)}-{terms[:16]}.json"


def _read(file: Path, one: TaskScores) -> TaskScores | None:
    """What was found before of the same terms. Raises ConfigError for a file that says something else."""
    if not file.is_file():
        return None
    try:
        found = loads(file.read_bytes())
        if found.pop("format") != FORMAT:
            raise ValueError("of another atoll")
        before = TaskScores(**found | {"scores": tuple(Score(**score) for score in found["scores"]), "is_kept": True})
        if before.terms != one.terms:
            raise ValueError("of another model or task than its name says")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--results: {file}: no result of a task ({_one_line(error)}): delete it") from None
    return before


@contextmanager
def as_directory(where: str, **options: Any) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A model as the library reads one, a `transformers` directory, and where it comes from.

    An exported one as it is; of a run, a store, or an adapter with its base it is exported, and gone afterwards.
    `options` are those of `open_subject`. Raises ConfigError.
    """
    from pretrain.federation.evaluation import open_subject
    from pretrain.silo.exported import export
    from pretrain.silo.prompt import num_prompt_tokens

    subject = open_subject(where, **options)
    if subject.directory and (subject.directory / "config.json").is_file():
        yield subject.directory, subject.provenance
        return
    model = subject.load()
    if num_prompt_tokens(model):
        raise ConfigError(
            f"--tasks: given with {where!r}, a prompt beside its base, which the library does not know; allowed: a "
            "model that is whole by itself"
        )
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        export(
            model,
            subject.tokenizer_file,
            directory,
            template_file=subject.template_file,
            trained_tokens=subject.sequence_tokens,
            is_fresh=subject.is_fresh,
        )
        del model
        yield directory, subject.provenance
