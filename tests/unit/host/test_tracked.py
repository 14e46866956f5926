"""What trackers keep of a run: Weights & Biases' own file, TensorBoard's event files, read back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config.keys import RunConfig, WandbConfig
from pretrain.host.journal import Journal
from pretrain.host.tensorboard import FOLDER, check_tensorboard
from tests.support import ROOT, one_line_error
from tests.unit.host.wandb_file import items, records

# A silo that starts, is killed after its second step, and goes on from its first: a process that wandb has to itself.
RUN = """
import sys
from pretrain.config.keys import ExchangeConfig, RunConfig, SiloConfig, WandbConfig
from pretrain.host.journal import Journal
silos = {"law": SiloConfig(data=["packed/law"]), "press": SiloConfig(data=["packed/press"])}
exchange = ExchangeConfig(options={"anon": "hidden"})
config = RunConfig(name="fed", run_id="r1", directory=sys.argv[1], silos=silos, exchange=exchange)
for steps in ((1, 2), (2, 3)):
    journal = Journal(config, "silos/law", silo="law")
    for step in steps:
        journal.record("step", step=step, loss=4.0 / step, tokens=100 * step)
    journal.record("eval", step=steps[-1], val_loss={"law": 2.5})
    journal.close()
"""


def test_weights_and_biases_has_one_run_a_silo_through_all_its_starts(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        env=environment | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        check=True,
    )
    found = [list(records(file)) for file in sorted((tmp_path / "silos/law/wandb").glob("offline-run-*/*.wandb"))]
    assert len(found) == 2
    runs = [next(one.run for one in start if one.HasField("run")) for start in found]
    assert {(run.run_id, run.run_group, run.job_type, run.display_name) for run in runs} == {
        ((tmp_path / "silos/law/wandb.id").read_text().strip(), "fed-r1", "silo", "fed-law")
    }
    config = items(runs[0].config.update)
    assert (config["inner"]["lr"], config["silo"]["data"]) == (3e-4, ["packed/law"])  # defaults, too, and its own text
    assert config["silos"] == ["law", "press"]
    assert "hidden" not in str(runs[0])
    axes = {one.metric.glob_name: one.metric.step_metric for one in found[0] if one.HasField("metric")}
    assert axes == {"step/*": "step/step", "sync/*": "sync/step", "eval/*": "eval/step", "commit/*": "commit/version"}
    told = [items(one.history.item) for start in found for one in start if one.HasField("history")]
    assert [(one["step/step"], one["step/loss"], one["step/tokens"]) for one in told if "step/loss" in one] == [
        *((1, 4.0, 100), (2, 2.0, 200)),
        *((2, 2.0, 200), (3, 4.0 / 3, 300)),
    ]
    assert told[-1] == {"eval/step": 3, "eval/law": 2.5}


def test_event_files_have_every_step_once(tmp_path: Path) -> None:
    config = RunConfig(directory=str(tmp_path), wandb=WandbConfig(mode="disabled"), tensorboard=True)
    for first, last in ((0, 3), (1, 4)):
        journal = Journal(config, "silos/law", silo="law")
        journal.record("start", step=first, version=0)
        for step in range(first + 1, last + 1):
            journal.record("step", step=step, loss=8.0 / step, note="words")
        journal.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "silos/law" / FOLDER)).Reload()
    assert [(one.step, one.value) for one in events.Scalars("step/loss")] == [
        (step, pytest.approx(8.0 / step)) for step in range(1, 5)
    ]
    assert "step/note" not in events.Tags()["scalars"]


def test_no_event_files_unless_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(directory=str(tmp_path), wandb=WandbConfig(mode="disabled"))
    journal = Journal(config, "silos/law", silo="law")
    journal.record("step", step=1, loss=1.0)
    journal.close()
    assert not (tmp_path / "silos/law" / FOLDER).exists()
    monkeypatch.setattr("pretrain.host.tensorboard.find_spec", lambda name: None)
    config.tensorboard = True
    assert one_line_error(check_tensorboard, config) == (
        "tensorboard: true given; the package is not installed here; allowed: false, or after pip install "
        "'atoll[tensorboard]'"
    )
