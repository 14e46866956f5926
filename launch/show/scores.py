"""Scores on tasks, printed as they come, and recorded beside the run that they are of."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config.errors import ConfigError
from pretrain.config.load import CONFIG_FILE, load_run
from pretrain.config.paths import expand_home
from pretrain.host.foreign import shown

if TYPE_CHECKING:
    from pretrain.federation.tasks import TaskScores

FOLDER = "tasks"  # of a run directory


def score(
    where: str,
    tasks: list[str],
    *,
    results: Path | None,
    network: bool,
    of_model: dict[str, Any],
    **options: Any,
) -> None:
    """Evaluate a model on tasks, print every metric, and of a run directory record it there.

    `of_model` is what `as_directory` takes, `options` what `evaluate_tasks` does. Raises ConfigError.
    """
    from pretrain.federation.tasks import as_directory, evaluate_tasks, stay_offline

    if not network:
        stay_offline()
    run = Path(expand_home("model", where))
    is_run = (run / CONFIG_FILE).is_file() and (run / "metrics.jsonl").is_file()
    if results is None:
        if "://" in where:
            raise ConfigError(f"--results: none given with {where!r}; allowed: a folder of this machine for them")
        results = run / FOLDER if is_run else run.with_name(f"{run.name}.{FOLDER}")
    found = []
    with as_directory(where, **of_model) as (directory, provenance):
        for one in evaluate_tasks(directory, tasks, kept=results, network=network, tell=_tell, **options):
            _print(one)
            found.append(one)
    if is_run:
        record(run, found, provenance)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print(one: "TaskScores") -> None:
    for score in one.scores:
        error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
        print(f"{score.value:.4f}{error}  {score.metric}  {one.num_examples} examples  {shown(one.task)}", flush=True)


def record(run: Path, found: "list[TaskScores]", provenance: dict[str, Any]) -> None:
    """Into the run's metrics.jsonl, from which its summary and report are made, and to its tracker."""
    from pretrain.host.journal import Journal
    from pretrain.trust.egress import tracked
    from pretrain.trust.policy import read_policy

    config = load_run(run)
    policy = read_policy(config)
    says = tracked(config, min(config.silos), policy)
    journal = Journal(config, FOLDER, silo=None, allows=policy.shows, says=says)
    for one in found:
        journal.record(
            "tasks",
            task=one.task,
            version=provenance.get("version"),
            examples=one.num_examples,
            lm_eval=one.lm_eval,
            model_sha256=one.model_sha256,
            task_sha256=one.task_sha256,
            scores={f"{one.task}/{score.metric}": score.value for score in one.scores},
            stderr={f"{one.task}/{score.metric}": score.stderr for score in one.scores if score.stderr is not None},
        )
    journal.close()
