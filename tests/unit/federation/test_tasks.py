"""lm-evaluation-harness on local tasks from one command: the same figures as from its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.evaluate import evaluate
from pretrain.config.keys import ModelConfig
from pretrain.federation.tasks import evaluate_tasks
from pretrain.silo.exported import export
from pretrain.silo.model import build_initial
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


@pytest.fixture
def model(tmp_path: Path, tiny_text: TinyText) -> Path:
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 64, "max_position_embeddings": 64}  # type: ignore[dict-item]
    built = build_initial(ModelConfig(config=config), VOCAB_SIZE)
    export(built, tiny_text.tokenizer, tmp_path / "model", trained_tokens=64, is_fresh=True)
    return tmp_path / "model"


@pytest.mark.soak  # two interpreters that import a large library
def test_the_figures_are_those_of_the_librarys_own_command(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'atoll[eval]'")
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{text}")
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    asked = [part for name in TASKS for part in ("--tasks", str(tmp_path / f"{name}.yaml"))]
    ours = subprocess.run(
        [sys.executable, "-m", "launch.cli", "eval", str(model), *asked],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    told = {(metric, task): float(value) for value, *_, metric, _, _, task in map(str.split, ours.stdout.splitlines())}
    subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "choose.yaml,bits.yaml"),
            *("--model_args", f"pretrained={model},dtype=float32", "--batch_size", "8", "--output_path", "out"),
        ],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        check=True,
    )
    (results,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]
    assert told == {
        ("acc,none", "choose"): pytest.approx(theirs["choose"]["acc,none"], abs=1e-4),
        ("bits_per_byte,none", "bits"): pytest.approx(theirs["bits"]["bits_per_byte,none"], abs=1e-4),
    }
    assert told["bits_per_byte,none", "bits"] > 1


@pytest.mark.soak
def test_a_task_that_is_not_of_this_machine_is_one_line(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'atoll[eval]'")
    task = tmp_path / "task.yaml"
    for text, said in (
        ("task: t\ndataset_path: EleutherAI/arc\n", "its dataset_path is 'EleutherAI/arc'; allowed: json, csv, "),
        (f"task: choose\n{TASKS['choose']}", f"its data file '{tmp_path}/choose.jsonl' is not there; allowed: files"),
        ("a: [", ""),
        ("x: 1", "it has no `task: NAME`"),
    ):
        task.write_text(text)
        assert one_line_error(evaluate_tasks, model, [task]).startswith(f"--tasks: '{task}' given; {said}")


def test_something_must_be_given(model: Path) -> None:
    assert one_line_error(evaluate, model) == "--data, --tasks, --tools: none given; allowed: one at least"


def test_without_the_library_it_says_how_to_install_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")
    said = one_line_error(evaluate_tasks, model, [model])
    assert said.startswith("--tasks: given; ")
    assert said.endswith("; install it with: pip install 'atoll[eval]'")
