"""The example of docs/python.md and the notebook, run as they stand; and what the tables hold."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from typer.testing import CliRunner

from launch import api, cli
from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config
from pretrain.host.journal import Journal
from tests.conftest import TinyConfig
from tests.support import ROOT, one_line_error
from tests.unit.test_aggregate import GOOD, one_version, start, times


@pytest.fixture
def run(tmp_path: Path, tiny_config: TinyConfig) -> RunConfig:
    """Two versions, the second of alpha with three times the tokens of beta; two steps, one of them done again."""
    config = tiny_config(tmp_path, exchange={"keep_versions": 9})
    aggregator, state = start(config)
    for alpha, beta in ((100, 100), (300, 100)):
        for silo, tokens in (("alpha", alpha), ("beta", beta)):
            GOOD.deliver(config, silo, state, times(state, 0.5), tokens=tokens)
        one_version(aggregator, state)
    journal = Journal(config, "silos/alpha", silo="alpha")
    for step, loss in ((1, 4.0), (2, 3.0)):
        journal.record("step", step=step, round=1, loss=loss)
    journal.record("start", step=1, round=0, version=0)
    journal.record("step", step=2, round=1, loss=2.5)
    journal.record("eval", step=0, round=0, version=0, val_loss={"alpha": 5.5}, sequences={"alpha": [8, 40]})
    journal.close()
    save_config(config, Path(config.directory) / "config.yaml")
    return config


def test_the_example_of_the_docs(run: RunConfig) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    exec(example.replace('"runs/demo"', repr(run.directory)), found)
    assert list(found["commits"]["version"]) == [0, 1, 2]
    assert list(found["commits"]["tokens"]) == [0, 200, 400]
    assert found["shares"].loc[2].to_dict() == {"alpha": 0.75, "beta": 0.25}
    assert found["last"].to_dict() == {"alpha": 2.5}
    assert found["held_out"]["val_loss/alpha"].to_list() == [5.5]
    assert found["text"].startswith("The court")


@pytest.mark.soak
def test_the_notebook_in_a_jupyter_kernel(run: RunConfig) -> None:
    notebook = nbformat.read(ROOT / "docs/notebook.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all((cell.outputs, cell.execution_count) == ([], None) for cell in code), "strip its outputs"
    code[0].source = code[0].source.replace('"runs/run"', repr(run.directory))
    looked_at = "shares.loc[2].to_dict(), steps['alpha'].to_list(), held_out.loc[0].to_dict()"
    drawn = "[line.get_ydata().tolist() for line in axes.get_lines()]"
    notebook.cells.append(nbformat.v4.new_code_cell(f"print(({looked_at}, {drawn}))"))
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    expected = ({"alpha": 0.75, "beta": 0.25}, [4.0, 2.5], {"val_loss/alpha": 5.5}, [[4.0, 2.5]])
    assert notebook.cells[-1].outputs[0].text == f"{expected}\n"
    assert "image/png" in [kind for cell in code for output in cell.outputs for kind in output.get("data", {})]


def test_a_store_alone(run: RunConfig) -> None:
    seen = api.open_run(run.store_url, tokenizer=run.tokenizer_file)
    assert seen.contributions()["tokens"].to_list() == [100, 100, 300, 100]
    assert seen.model(1)[1].eos_token == "<|endoftext|>"
    assert one_line_error(seen.metrics, "step") == (
        f"metrics: '{run.store_url}' given; allowed: a run directory, which has metrics.jsonl"
    )
    without = one_line_error(api.open_run(run.store_url).model)
    assert without.startswith(f"--tokenizer: none given, and '{run.store_url}' is no run directory; allowed: ")
    nowhere = one_line_error(api.open_run("/nowhere").commits)
    assert nowhere == "run: '/nowhere' given; there is no contract.json, so no run, in /nowhere"


def test_metrics_as_csv(run: RunConfig) -> None:
    said = CliRunner().invoke(cli.app, ["metrics", run.directory, "--kind", "step"])
    head, *rows = said.stdout.splitlines()
    assert head == "time,silo,step,round,loss"
    assert [row.split(",", 1)[1] for row in rows] == ["alpha,1,1,4.0", "alpha,2,1,2.5"]
    other = one_line_error(api.open_run(run.directory).metrics, "sync")
    assert other == "kind: 'sync' given; allowed here: step, eval, commit, start"
