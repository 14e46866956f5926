"""The script for one card: its plain loop's model, its table of what was measured and what not, its end in time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.gpu import print_results, run_part
from benchmarks.gpu_parts import GPT2S, MEASURES
from benchmarks.plain_loops import Gpt, model_section
from pretrain.config.keys import ModelConfig
from pretrain.silo.model import build_without_memory
from tests.support import ROOT


@pytest.mark.parametrize("name", GPT2S)
def test_the_plain_loop_has_as_many_parameters_as_the_silo(name: str) -> None:
    size = GPT2S[name]
    silo = build_without_memory(ModelConfig(config=model_section(size)), size.vocab_size)
    with torch.device("meta"):
        plain = Gpt(size)
    numbers = [sum(p.numel() for p in model.parameters()) for model in (silo, plain)]
    assert numbers[0] == numbers[1] == {"124M": 124_475_904, "350M": 354_871_296, "1.3B": 1_315_819_520}[name]


def test_the_table_of_what_was_measured_and_what_was_not() -> None:
    head = {"way": "", "card": "NVIDIA H100 80GB HBM3", "peak_tflops": 989.4, "flops_per_token": 855_166_464}
    measured = {"range": [469_000.0, 481_000.0], "peak_bytes": 30_000_000_000}
    rows = [
        head | {"batch": "32 x 4 x 1024 tokens", "precision": "bf16", "torch": "2.13.0"},
        {"way": "silo", "tokens_per_second": 475_000.0, "of_bare": 0.991, **measured},
        {"way": "plain loop", "tokens_per_second": 500_000.0, **measured},
        {"way": "transformers.Trainer", "error": "no time was left"},
    ]
    tests = {"state": "ended for want of time", "seconds": 70.0, "rows": [], "log": "runs/gpu-tests.log"}
    sync = {"way": "sync", "deliver_seconds": 0.4625, "beyond_training_bytes": 32_000_000}
    parts = {"124M": {"state": "done", "seconds": 90.0, "rows": rows}, "tests": tests}
    parts["sync"] = {"state": "done", "seconds": 50.0, "rows": [sync]}
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_results({"parts": parts}, console)
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "silo 475,000 469,000 to 481,000 41.1% 0.950 0.991 30.0 GB" in lines  # 0.8552 TFLOP x 475,000 / 989.4
    assert "transformers.Trainer no time was left" in lines
    assert "tests ended for want of time after 70.0 s: see runs/gpu-tests.log" in lines
    assert "sync: deliver seconds 0.4625" in lines
    assert "sync: beyond training bytes 32.0 MB" in lines


def test_a_part_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    found = run_part("124M", 0.3, tmp_path / "gpu-124M.log", is_toy=True)
    assert found["state"] == "ended for want of time"
    assert found["seconds"] >= 0.3
    assert found["rows"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-124M.log"]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_all_of_it_at_toy_size(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--minutes", "25", "--output", str(output)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    parts = json.loads(output.read_text())["parts"]
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(("124M", "tests", "sync"), "done")
    speeds = {row["way"]: row.get("tokens_per_second") or row.get("error") for row in parts["124M"]["rows"][1:]}
    assert speeds.keys() == {"bare DeepSpeed", "plain loop", "transformers.Trainer", *MEASURES}
    is_there = {way: isinstance(speed, float) for way, speed in speeds.items() if way != "transformers.Trainer"}
    assert all(is_there.values()), speeds  # Trainer's package may not be
    assert parts["tests"]["rows"][0]["exit_code"] == 0
    _, seconds, sync = parts["sync"]["rows"]
    assert sync["beyond_training_bytes"] == 0
    assert all(seconds[f"{name}_seconds"] > 0 for name in ("deliver", "wait", "adopt"))
