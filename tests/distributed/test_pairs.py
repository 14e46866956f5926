"""Training on preference pairs: the loss and gradient of trl, whatever ranks, ZeRO stage and micro batch."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.reference import refer
from pretrain.config.keys import ModelConfig
from pretrain.federation.preflight import check_run
from pretrain.silo.exported import export
from pretrain.silo.model import build_initial
from pretrain.silo.shards import TEMPLATE_FILE, template_sha256, tokenizer_sha256
from tests.conftest import TinyConfig
from tests.distributed.federation import federate
from tests.distributed.pair_worker import write_expected
from tests.pairs import Pair, write_pairs
from tests.support import VOCAB_SIZE, TinyText, one_line_error, tiny_settings, torchrun

WORKER = Path(__file__).parent / "pair_worker.py"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and what trl makes of them."""
    directory = tmp_path_factory.mktemp("pairs")
    write_expected(directory)
    return directory


@pytest.mark.soak
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_step_is_the_one_of_trl(packed: Path, num_ranks: int) -> None:
    expected = json.loads((packed / "expected.json").read_text())
    given, counted, in_all = expected["num_pairs"]
    assert given == counted == sum(expected["by_row"])
    assert in_all == 40
    assert len(set(expected["by_row"])) > 1  # so that a mean of micro batches' means would be another
    assert expected["largest"] > 0.05
    (line,) = torchrun(WORKER, packed, num_ranks=num_ranks, timeout=230).splitlines()[-1:]
    result = json.loads(line.removeprefix("RESULT"))
    for case in result["cases"]:
        assert case["off"] < 1e-5, case
        assert case["loss"] == pytest.approx(expected["loss"], abs=1e-5), case
        number, margins, right = case["told"]
        assert number == given
        assert margins / number == pytest.approx(expected["metrics"]["rewards/margins"], abs=1e-5)
        assert right / number == pytest.approx(expected["metrics"]["rewards/accuracies"])
    assert {case["stage"] for case in result["cases"]} == ({0, 1, 2, 3} if num_ranks > 1 else {0, 2, 3})
    assert result["evaluated"] == pytest.approx(expected["evaluated"], abs=1e-5)


def preferring(number: int, seed: int) -> list[Pair]:
    """Pairs in which an answer of some tokens is chosen over one of others, whatever was asked."""
    random = np.random.default_rng(seed)

    def some(least: int, most: int) -> list[int]:
        return random.integers(least, most, random.integers(2, 5)).tolist()

    return [(some(1, VOCAB_SIZE), some(1, 20), some(150, 170)) for _ in range(number)]


def packed_silos(folder: Path, tokenizer: str, template: str) -> dict[str, Any]:
    """Sections of two silos, each with pairs of its own."""
    silos: dict[str, Any] = {}
    for seed, name in enumerate(("alpha", "beta")):
        for split, number in (("train", 120), ("valid", 30)):
            write_pairs(
                folder / name / split,
                preferring(number, 2 * seed + (split == "valid")),
                row_tokens=32,
                vocab_size=VOCAB_SIZE,
                tokenizer=tokenizer,
                template=template,
            )
        silos[name] = {"data": [str(folder / name / "train")], "valid": {name: str(folder / name / "valid")}}
    return silos


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("adapter", [{}, {"kind": "lora", "rank": 4, "alpha": 8}], ids=["whole", "adapter"])
def test_margins_rise_in_a_federation(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, adapter: dict[str, Any]
) -> None:
    settings = tiny_settings(tmp_path, tiny_text)
    base, template = tmp_path / "base", tmp_path / TEMPLATE_FILE
    export(build_initial(ModelConfig(config=settings["model"]["config"]), VOCAB_SIZE), tiny_text.tokenizer, base)
    template.write_text("{{ messages }}")
    silos = packed_silos(tmp_path, tokenizer_sha256(tiny_text.tokenizer), template_sha256(template))
    silos["beta"] |= {"micro_batch_sequences": 2} | {"deepspeed": {"zero_optimization": {"stage": 3}}}
    changes: dict[str, Any] = {
        "sequence_tokens": 32,
        "chat_template": str(template),
        "document_masking": True,
        "model": {"config": None, "checkpoint": str(base), "adapter": adapter},
        "inner": {"loss": "dpo", "lr": 0.02 if adapter else 0.01, "num_steps": 24},
        "outer": {"sync_interval_steps": 8, "optimizer": "sgd", "lr": 1.0},
        "silos": silos,
    }
    config = tiny_config(tmp_path / "first", **changes)
    missing = one_line_error(check_run, config)
    assert "/alpha/train has preference pairs without the log-probabilities of the base: type atoll data" in missing
    assert len([*refer([tmp_path / "alpha", tmp_path / "beta"], base)]) == 4
    run = federate(config)
    found = [json.loads(line) for line in (Path(config.directory) / "metrics.jsonl").read_text().splitlines()]
    for name in silos:
        held_out = [one for one in found if one["kind"] == "eval" and one["silo"] == name]
        assert held_out[0]["val_loss"][name] == pytest.approx(math.log(2), abs=1e-4)  # the base against itself
        margins = [one["val_margin"][name] for one in held_out]
        assert margins[0] == pytest.approx(0, abs=1e-4)
        assert margins[-1] > margins[1] > 0
        assert held_out[-1]["val_right"][name] > 0.5
        steps = run.by_step(name, "reward_margin")
        assert steps[1] == pytest.approx(0, abs=1e-4)
        assert steps[24] > 0.02
        assert 0 <= run.by_step(name, "reward_right")[24] <= 1
    contract = json.loads((Path(config.store_url) / "contract.json").read_text())
    assert (contract["inner"]["loss"], contract["inner"]["dpo_beta"]) == ("dpo", 0.1)
    other = tmp_path / "other"
    export(
        build_initial(ModelConfig(config=settings["model"]["config"], seed=3), VOCAB_SIZE), tiny_text.tokenizer, other
    )
    changes["model"]["checkpoint"] = str(other)
    another = one_line_error(check_run, tiny_config(tmp_path / "second", **changes))
    assert (
        "/alpha/train has log-probabilities of another base than model.checkpoint: model.safetensors differ" in another
    )
    changes["model"]["checkpoint"] = str(base)
    changes["inner"] = {"num_steps": 24}
    plain = one_line_error(check_run, tiny_config(tmp_path / "third", **changes))
    assert "has preference pairs, and inner.loss is 'masked'; allowed: inner.loss=dpo, or conversations" in plain
