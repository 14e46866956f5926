"""benchmarks/secure_sum.py: its model and its ways, and a small round in which all parties come to a commit."""

from pathlib import Path

import pytest

from benchmarks.secure_sum import federation, model, one_round
from pretrain.config.keys import ModelConfig
from pretrain.silo.model import build_without_memory


@pytest.mark.parametrize("num_parameters", [200_000, 65_000_000, 1_000_000_000])
def test_the_model_has_about_as_many_parameters_as_were_asked_for(num_parameters: int) -> None:
    found = build_without_memory(ModelConfig(config=model(num_parameters) | {"model_type": "llama"}), 260)
    assert sum(parameter.numel() for parameter in found.parameters()) == pytest.approx(num_parameters, rel=0.01)


@pytest.mark.soak
def test_a_round_of_three_silos(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one_round(tmp_path, 150_000, 3, "sealed")
    silo, aggregator, cipher = [line for line in capfd.readouterr().out.splitlines() if line.startswith("RESULT")]
    for part in ("code", "mask", "write", "seal, shares", "deliver", "cipher"):
        assert f" {part} " in silo
    for part in ("verify", "sum, unmask", "outer step", "merge", "commit", "since the last came"):
        assert f" {part} " in aggregator
    assert "of the cipher's speed: mask " in cipher
    assert (tmp_path / "run" / "store" / "global" / "000001" / "commit.json").exists()


def test_a_way_says_what_is_compared(tmp_path: Path) -> None:
    secure, plain = (federation(tmp_path / way, 150_000, 3, way) for way in ("secure", "plain"))
    assert secure.outer.secure_sum
    assert not plain.outer.secure_sum
    assert plain.outer.codec == "fp32"
    assert set(secure.trust.keys) == {"aggregator", *secure.full_roster}
