"""lm-evaluation-harness on local tasks from one command: the same figures as from its own, kept and gone on with."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.evaluate import evaluate
from launch.show.report import summarize, write_report
from launch.show.scores import record
from pretrain.config.errors import ConfigError
from pretrain.config.keys import ModelConfig
from pretrain.config.load import CONFIG_FILE, save_config
from pretrain.federation.tasks import OFFLINE, Score, TaskScores, evaluate_tasks, model_sha256
from pretrain.host.tracker import numbers
from pretrain.silo.exported import export
from pretrain.silo.model import build_initial
from tests.conftest import TinyConfig
from tests.distributed.federation import federate
from tests.support import ROOT, VOCAB_SIZE, TinyText, one_line_error

TASKS = {
    "choose": "dataset_path: json\ndataset_kwargs: {data_files: {test: choose.jsonl}}\ntest_split: test\n"
    "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{label}}'\n"
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    "bits": "dataset_path: json\ndataset_kwargs: {data_files: {test: bits.jsonl}}\ntest_split: test\n"
    "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: bits_per_byte}]\n",
}
ROWS = {
    "choose": [{"text": "ba", "choices": [" bo", " tadu", " rikemo"], "label": n % 3} for n in range(7)],
    "bits": [{"text": "sol sukopu efipo musu " * n} for n in range(1, 4)],
}
# Ends its process with the first result of a task, when all answers are there and nothing else is.
KILLED = (
    "import os, pathlib\n\ndef results(doc, results):\n    flag = pathlib.Path(__file__).with_name('killed')\n"
    "    if not flag.exists():\n        flag.touch()\n        os._exit(9)\n"
    "    return {'bits_per_byte': (results[0], len(doc['text'].encode()))}\n"
)


@pytest.fixture
def model(tmp_path: Path, tiny_text: TinyText) -> Path:
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 64, "max_position_embeddings": 64}  # type: ignore[dict-item]
    built = build_initial(ModelConfig(config=config), VOCAB_SIZE)
    export(built, tiny_text.tokenizer, tmp_path / "model", trained_tokens=64, is_fresh=True)
    return tmp_path / "model"


def write_tasks(folder: Path) -> Path:
    folder.mkdir()
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{text}")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    (folder / "both.yaml").write_text("group: both\ntask: [choose, bits]\n")
    return folder


def atoll_eval(*given: object, code: int = 0) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "eval", *map(str, given)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


def their_results(model: Path, tasks: Path, name: str) -> dict[str, float]:
    """What the library's own command finds, given one task."""
    subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", f"{name}.yaml"),
            *("--model_args", f"pretrained={model},dtype=float32", "--batch_size", "8", "--output_path", f"out-{name}"),
        ],
        cwd=tasks,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        check=True,
    )
    (results,) = (tasks / f"out-{name}").rglob("results_*.json")
    return dict(json.loads(results.read_text())["results"][name])


def read_results(folder: Path) -> dict[str, Any]:
    return {found["task"]: found for file in folder.glob("*.json") if (found := json.loads(file.read_text()))}


@pytest.mark.soak  # several interpreters that import a large library
def test_the_figures_are_those_of_the_librarys_own_command_to_the_last_digit(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'atoll[eval]'")
    tasks = write_tasks(tmp_path / "tasks")
    told = atoll_eval(model, "--tasks", "both", "--include-path", tasks).stdout.splitlines()
    found = read_results(tmp_path / "model.tasks")
    assert {name: one["num_examples"] for name, one in found.items()} == {"choose": 7, "bits": 3}
    for name, one in found.items():
        theirs, (score,) = their_results(model, tasks, name), one["scores"]
        assert score["value"] == theirs[score["metric"]]
        stderr = theirs[score["metric"].replace(",", "_stderr,")]
        assert score["stderr"] == (stderr if isinstance(stderr, float) else None)
        (line,) = (line for line in told if line.endswith(f" {name}"))
        assert line.startswith(f"{score['value']:.4f}")
    assert found["bits"]["scores"][0]["value"] > 1
    assert {one["model_sha256"] for one in found.values()} == {model_sha256(model)}


@pytest.mark.soak
def test_an_interrupted_evaluation_goes_on_and_what_is_finished_is_not_done_again(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'atoll[eval]'")
    tasks = write_tasks(tmp_path / "tasks")
    (tasks / "ends.py").write_text(KILLED)
    (tasks / "ends.yaml").write_text(f"task: ends\n{TASKS['bits']}process_results: !function ends.results\n")
    given = (model, "--tasks", tasks / "choose.yaml", "--tasks", tasks / "ends.yaml", "--results", tmp_path / "kept")
    atoll_eval(*given, code=9)
    assert read_results(tmp_path / "kept").keys() == {"choose"}
    (database,) = (tmp_path / "kept").glob("ends-*.answers_rank0.db")
    (finished,) = (tmp_path / "kept").glob("*.json")
    written = finished.stat().st_mtime_ns
    again = atoll_eval(*given)
    assert f"choose: kept from before, in {finished}" in again.stderr
    assert f"ends: goes on with the answers in {database}" in again.stderr
    assert finished.stat().st_mtime_ns == written
    assert [*(tmp_path / "kept").glob("*.db*")] == []
    found = read_results(tmp_path / "kept")
    whole = their_results(model, tasks, "bits")
    assert found["ends"]["scores"][0]["value"] == whole["bits_per_byte,none"]
    (tasks / "choose.jsonl").write_text(json.dumps(ROWS["choose"][0]) + "\n")  # other data are another task
    assert "kept" not in atoll_eval(*given[:3], *given[-2:]).stderr
    finished.write_text("{}")
    (tasks / "choose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["choose"]))
    assert atoll_eval(*given[:3], *given[-2:], code=2).stderr.splitlines()[-1].endswith("delete it")


@pytest.mark.soak
def test_of_a_run_it_is_its_version_and_stands_in_summary_and_report(
    tmp_path: Path, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'atoll[eval]'")
    for name in OFFLINE:  # put back at the end
        monkeypatch.setenv(name, "1")
    config = tiny_config(tmp_path / "whole", exchange={"keep_versions": 9})
    federate(config)
    tasks, run = write_tasks(tmp_path / "tasks"), Path(config.directory)
    for version in (0, 3):
        evaluate(str(run), version=version, tasks=[f"{tasks}/bits.yaml"])
    found = summarize(run)["tasks"]
    assert [one["version"] for one in found] == [0, 3]
    assert found[0]["scores"]["bits/bits_per_byte,none"] > found[1]["scores"]["bits/bits_per_byte,none"]
    assert found[0]["model_sha256"] != found[1]["model_sha256"]
    assert found[0]["task_sha256"] == found[1]["task_sha256"]
    assert "bits/bits_per_byte,none" in write_report(run).read_text()


@pytest.mark.soak
def test_a_task_that_is_not_of_this_machine_is_one_line(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'atoll[eval]'")
    task, tasks = tmp_path / "task.yaml", write_tasks(tmp_path / "tasks")

    def run(*given: str, **options: Any) -> list[TaskScores]:
        return [*evaluate_tasks(model, given, **options)]

    for text, said in (
        ("task: t\ndataset_path: EleutherAI/arc\n", "its dataset_path is 'EleutherAI/arc'; allowed: json, csv, "),
        (f"task: choose\n{TASKS['choose']}", f"its data file '{tmp_path}/choose.jsonl' is not there; allowed: files"),
        ("a: [", ""),
        ("x: 1", "it has no `task: NAME`"),
    ):
        task.write_text(text)
        assert one_line_error(run, str(task)).startswith(f"--tasks: '{task}' given; {said}")
    assert one_line_error(run, "hellaswag").startswith("--tasks: 'hellaswag' given; there is no such file; allowed: ")
    said = f"--tasks: 'hellaswag' given; allowed of --include-path '{tasks}': bits, both, choose"
    assert one_line_error(run, "hellaswag", include_path=tasks) == said
    (tasks / "both.yaml").write_text("group: both\ntask: [choose, nowhere]\n")
    said = one_line_error(run, "both", include_path=tasks)
    assert said.startswith(f"--tasks: 'both' given; 'nowhere' of it is no task of --include-path '{tasks}'; allowed: ")
    assert one_line_error(run, "both", include_path=task).startswith(f"--include-path: '{task}' given; allowed: ")
    assert one_line_error(run, f"{tasks}/bits.yaml", f"{tasks}/bits.yaml").endswith("for the task 'bits'; allowed: one")


def test_something_must_be_given(model: Path) -> None:
    assert one_line_error(evaluate, model) == "--data, --tasks, --tools: none given; allowed: one at least"
    assert one_line_error(evaluate, model, network=True) == "--network: given without --tasks; allowed: with it"
    said = one_line_error(evaluate, "s3://bucket/run", tasks=["task.yaml"])
    assert said == "--results: none given with 's3://bucket/run'; allowed: a folder of this machine for them"


def test_without_the_library_it_says_how_to_install_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in OFFLINE:
        monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=r"^--tasks: given; .*; install it with: pip install 'atoll\[eval\]'$"):
        [*evaluate_tasks(model, ["task.yaml"])]


def test_scores_of_a_run_are_recorded_and_stand_in_summary_and_report(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path, wandb={"mode": "disabled"})
    run = Path(config.directory)
    run.mkdir()
    save_config(config, run / CONFIG_FILE)
    (run / "metrics.jsonl").touch()
    found = TaskScores(
        task="exam",
        scores=(Score(metric="acc,none", value=0.5, stderr=0.1), Score(metric="f1,none", value=0.25, stderr=None)),
        num_examples=4,
        asked_examples=None,
        batch_sequences=8,
        lm_eval="0.4.13",
        model_sha256="a" * 64,
        task_sha256="b" * 64,
    )
    for version in (1, 1):  # said twice, it is one
        record(run, [found], {"version": version})
    (told,) = summarize(run)["tasks"]
    assert told == {
        **{"task": "exam", "version": 1, "examples": 4, "lm_eval": "0.4.13"},
        **{"model_sha256": "a" * 64, "task_sha256": "b" * 64},
        **{"scores": {"exam/acc,none": 0.5, "exam/f1,none": 0.25}, "stderr": {"exam/acc,none": 0.1}},
    }
    assert numbers("tasks", told) | {"tasks/exam/acc,none": 0.5, "tasks/version": 1} == numbers("tasks", told)
    assert "<td>exam/f1,none</td>" in write_report(run).read_text()
