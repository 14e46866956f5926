"""Presets: chosen by name, above files or below them, and shipped with the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.start.site import load_site
from pretrain.config.keys import ModelConfig
from pretrain.config.load import load_config
from pretrain.config.presets import SECTIONS, SITE, Preset, presets_of
from pretrain.silo.model import build_without_memory
from tests.support import ROOT, one_line_error

MINIMAL = """
model: {config: {model_type: gpt2, n_layer: 2}, seed: 7}
inner: {num_steps: 3000, lr: 0.5}
silos: {alpha: {precision: fp32}}
"""
PRESETS = [preset for section in (*SECTIONS, SITE) for preset in presets_of(section)]


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def test_a_preset_on_the_command_line_is_above_the_files_and_below_what_follows(minimal: Path) -> None:
    config = load_config([minimal], ["outer=recommended", "outer.momentum=0.25", "outer.sync_interval_steps=10"])
    assert (config.outer.codec, config.outer.momentum, config.inner.optimizer) == ("int4", 0.25, "muon")
    assert config.inner.lr == 0.01
    assert load_config([minimal], ["outer.momentum=0.25", "outer=recommended"]).outer.momentum == 0.5


def test_a_model_takes_the_place_of_another_and_does_not_mix_with_it(minimal: Path) -> None:
    model = load_config([minimal], ["model=llama-20m"]).model
    assert model.config["model_type"] == "llama"
    assert "n_layer" not in model.config
    assert model.seed == 7
    assert load_config([minimal], ["model.checkpoint=/x", "model=llama-20m"]).model == model


def test_a_file_is_above_the_presets_that_it_names(minimal: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("presets: [model=llama-5m, outer=recommended, silo=zero3-bf16]\ninner: {lr: 0.25}\n")
    config = load_config([minimal, file])
    assert (config.inner.lr, config.inner.muon_lr, config.sequence_tokens) == (0.25, 0.02, 256)
    assert (config.model.config["hidden_size"], config.silos["alpha"].precision) == (128, "fp32")
    assert config.silos["alpha"].deepspeed == {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "model=llama-15m",
            "model: 'llama-15m' given; no preset is called so; allowed: llama-150m, llama-5m, llama-350m",
        ),
        ("silo=fast", "silo: 'fast' given; no preset is called so; allowed: zero2-offload, zero3-bf16"),
        ("presets=outer", "presets: unknown key given; allowed: "),
    ],
)
def test_a_preset_that_is_none_is_one_line(minimal: Path, override: str, expected: str) -> None:
    assert one_line_error(load_config, [minimal], [override]).startswith(expected)


@pytest.mark.parametrize("named", ["outer=recommended", "[outer]", "[{a: b}]", "[colour=red]"])
def test_a_list_of_presets_that_is_none_is_one_line(minimal: Path, named: str) -> None:
    minimal.write_text(f"presets: {named}\n{MINIMAL}")
    message = one_line_error(load_config, [minimal])
    assert message.startswith("presets: ")
    assert message.endswith("allowed: a list of SECTION=NAME, such as [outer=recommended]; atoll presets lists them")


def test_a_site_is_chosen_by_name(minimal: Path) -> None:
    config = load_config([minimal])
    assert load_site([Path("gpu")], config).job.partition == "gpu"
    assert one_line_error(load_site, [Path("gpus")], config) == (
        "--site: 'gpus' given; no preset is called so; allowed: gpu"
    )


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.typed)
def test_every_preset_has_a_line_that_80_columns_hold(preset: Preset) -> None:
    width = max(len(other.typed) for other in PRESETS)
    assert preset.path.read_text().startswith("# ")
    assert width + 2 + len(preset.line) <= 80


@pytest.mark.parametrize("preset", presets_of("model"), ids=lambda preset: preset.path.stem)
def test_a_model_has_as_many_parameters_as_it_says(preset: Preset, minimal: Path) -> None:
    config = load_config([minimal], [preset.typed])
    model = build_without_memory(ModelConfig(config=config.model.config), 32_768)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    said = re.search(r"([\d.]+) million parameters, sequences of ([\d,]+) tokens", preset.line)
    assert said
    assert float(said[1]) == pytest.approx(millions, rel=0.005)
    size, unit = re.findall(r"(\d+)([mb])$", preset.path.stem)[0]
    assert millions == pytest.approx(int(size) * {"m": 1, "b": 1000}[unit], rel=0.03)
    assert int(said[2].replace(",", "")) == config.sequence_tokens == config.model.config["max_position_embeddings"]


def test_an_installed_package_has_them(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("pretrain", "launch", "data_tools", "configs", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    place = tmp_path / "site-packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(place), str(source)], check=True, timeout=200)
    shutil.rmtree(source)
    shown = subprocess.run(
        [sys.executable, "-c", "from launch.cli import main; main()", "presets"],
        env={**os.environ, "PYTHONPATH": str(place)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split("  ")[0] for line in shown.stdout.splitlines()] == [preset.typed for preset in PRESETS]
