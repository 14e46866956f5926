"""Runs as a user meets them: stopped and resumed, a loss that is NaN, a name taken, export."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import cli
from launch.show.page import Federation
from launch.show.status_reader import store_status
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_run, save_config
from pretrain.federation.evaluation import open_subject
from pretrain.federation.export import export_global_model
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_same_bits, federate, launched
from tests.support import ROOT, zero
from tests.waiting import PATIENCE_SECONDS, wait_for


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> Outcome:
    """A run of two silos."""
    return federate(tiny_config(tmp_path_factory.mktemp("finished"), outer={"codec": "bf16"}))


def start(config: RunConfig) -> subprocess.Popen[str]:
    """`atoll launch local` in a process of its own."""
    path = Path(config.directory).with_name("start.yaml")
    save_config(config, path)
    command = [sys.executable, "-m", "launch.cli", "launch", "local", "--config", str(path)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_with(process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    """Wait for a condition while `process` runs."""

    def runs() -> bool:
        return process.poll() is None

    def said() -> str:
        return "it runs on" if runs() else process.communicate()[0]

    wait_for(condition, seconds=120, poll_seconds=0.02, meanwhile=runs, tells=said)


def test_ctrl_c_saves_and_the_same_command_goes_on(finished: Outcome, tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path, outer={"codec": "bf16"}, silo={"checkpoint_interval_steps": 1000})
    process = start(config)
    run_directory, store = Path(config.directory), Path(config.store_url)
    # The aggregator is held still after version 0, so that the stop surely finds both silos waiting for commit 1.
    wait_with(process, (store / "global/000000/commit.json").exists)
    aggregator = int((run_directory / "aggregator/lock").read_text())
    os.kill(aggregator, signal.SIGSTOP)
    wait_with(process, lambda: len(list(store.glob("silos/*/000001/manifest.json"))) == 2)
    status = store_status(config.store_url)
    assert (status.version, status.aggregator.is_alive, status.waiting_for) == (0, True, "commit 1 from the aggregator")
    assert [(silo.life.words, silo.part) for silo in status.silos.values()] == [("alive", "yes")] * 2
    process.send_signal(signal.SIGINT)
    wait_with(process, lambda: len(list(run_directory.glob("silos/*/checkpoints/step-*/state.json"))) == 2)
    os.kill(aggregator, signal.SIGCONT)
    output = process.communicate(timeout=PATIENCE_SECONDS)[0]
    assert process.returncode == 130, output
    assert {silo.life.words for silo in store_status(config.store_url).silos.values()} == {"ended"}
    run = federate(config)
    assert_same_bits(run.parameters(3), finished.parameters(3))
    for silo in ("alpha", "beta"):
        assert run.by_step(silo, "loss") == finished.by_step(silo, "loss")
    assert sorted(path.name for path in (Path(config.directory) / "logs").glob("attempt-*")) == [
        "attempt-001",
        "attempt-002",
    ]


def test_a_loss_that_is_not_a_number_stops_the_silo(tmp_path: Path, tiny_config: TinyConfig) -> None:
    inner = {"optimizer": "sgd", "lr": 1e30, "warmup_steps": 6, "clip_norm": 0}
    outer = {"sync_interval_steps": 12}
    silo = {"checkpoint_interval_steps": 1}
    config = tiny_config(tmp_path, inner=inner, outer=outer, silo=silo, silos={"beta": None})
    code, output = launched(config)
    assert code == 2, output
    line = next(line for line in output.splitlines() if "error:" in line)
    assert "silo alpha: " in line
    assert "not finite at step" in line or "loss is" in line
    assert "last good checkpoint: " in line
    assert not list(Path(config.store_url).glob("silos/alpha/000001/*"))  # nothing of it was delivered


def test_a_name_that_is_taken_is_refused(finished: Outcome, tmp_path: Path) -> None:
    other = dataclasses.replace(
        finished.config,
        directory=str(tmp_path / "run"),
        exchange=dataclasses.replace(finished.config.exchange, url=finished.config.store_url),
    )
    before = {path: path.stat().st_mtime_ns for path in Path(finished.config.store_url).rglob("*") if path.is_file()}
    path = tmp_path / "run.yaml"
    save_config(other, path)
    train = [sys.executable, "-m", "launch.cli", "train", "--config", str(path), "--silo", "alpha"]
    run = subprocess.run(train, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert run.returncode == 2, run.stderr
    message = (tmp_path / "run/silos/alpha/error.txt").read_text()
    assert "another run directory takes part under this name" in message
    assert before == {p: p.stat().st_mtime_ns for p in Path(finished.config.store_url).rglob("*") if p.is_file()}


def test_a_checkpoint_of_another_model_is_one_line(finished: Outcome, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(finished.config.directory, tmp_path / "moved", symlinks=True))
    checkpoints = moved / "silos/beta/checkpoints"
    state = json.loads((checkpoints / "step-00000012/state.json").read_text())
    (checkpoints / "step-00000012/state.json").write_text(json.dumps(state | {"model": "0123456789ab"}))
    code, output = launched(load_run(moved))
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.endswith(
        f"{checkpoints}/step-00000012: it was written with model 0123456789ab, and this is {state['model']}; allowed: "
        f"what it was written with; or move {checkpoints} away, and the silo goes on from the store's newest version "
        "with a fresh inner optimizer"
    )
    assert "Traceback" not in output


def test_the_exported_model_loads_generates_and_has_the_loss_of_eval(
    finished: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    provenance = export_global_model(finished.config, tmp_path / "model")
    assert provenance["parameters_digest"] == finished.commit(3).parameters_digest
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert_same_bits({n: p.detach() for n, p in model.named_parameters()}, finished.parameters(3))

    split = Path(finished.config.silos["alpha"].valid["alpha"])
    found = open_subject(str(tmp_path / "model")).losses({"alpha": split})["alpha"]  # as many as the silo has evaluated
    tokens = torch.frombuffer(bytearray((split / "shard-00000.bin").read_bytes()), dtype=torch.uint16).long()
    all_sequences = (len(tokens) - 1) // 16
    assert (found.num_sequences, found.of_sequences) == (8, all_sequences)
    rows = torch.stack([tokens[16 * i : 16 * i + 17] for i in (n * all_sequences // 8 for n in range(8))])
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert found.loss == pytest.approx(plain, rel=1e-6)
    assert found.loss == pytest.approx(finished.held_out("alpha")[3]["alpha"], rel=1e-6)
    told = Federation(finished.config.store_url).history
    for silo in ("alpha", "beta"):
        assert {v: word.losses for v, word in told.held_out.of_silos[silo].items()} == finished.held_out(silo)
        text = json.loads((Path(finished.config.silos[silo].data[0]) / "manifest.json").read_text())["num_tokens"]
        tokens = [commit.contributors[silo == "beta"].tokens_total for commit in map(finished.commit, (1, 2, 3))]
        assert [epochs for _, epochs in told.of_silo(silo, "epochs")] == [count / text for count in tokens]
    assert found.perplexity == pytest.approx(math.exp(plain), rel=1e-5)
    manifest = json.loads((split / "manifest.json").read_text())
    bits = plain / math.log(2) * manifest["num_tokens"] / manifest["num_bytes"]
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-5)

    monkeypatch.setattr(sys, "argv", ["atoll", "eval", str(tmp_path / "model"), "--data", str(split)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    summary = json.loads((Path(finished.config.directory) / "summary.json").read_text())
    assert capsys.readouterr().out == (
        f"{summary['val_loss']['alpha']:.4f} nats  perplexity {math.exp(plain):.2f}  {bits:.4f} bits/byte  "
        f"{summary['val_sequences']['alpha']} sequences  {split}\n"
    )

    made = model.generate(**tokenizer("ba", return_tensors="pt", return_token_type_ids=False), max_new_tokens=5)
    assert made.shape[1] > 1


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": SMALL,
    "qwen3": SMALL | {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True},
}


@pytest.mark.parametrize(
    "kind", ["gpt2", *(pytest.param(kind, marks=pytest.mark.soak) for kind in ("gpt_neox", "qwen3"))]
)
def test_other_kinds_of_model_take_part(tmp_path: Path, tiny_config: TinyConfig, kind: str) -> None:
    settings = tiny_config(
        tmp_path,
        inner={"num_steps": 2},
        outer={"sync_interval_steps": 2},
        silos={"beta": zero(3)},
    )
    model = dataclasses.replace(settings.model, config={"model_type": kind, **KINDS[kind]})
    run = federate(dataclasses.replace(settings, model=model))
    assert run.commit(1).divisor == 2 * 2 * 4 * 16
    assert (Path(run.config.directory) / "summary.json").is_file()
