"""What an exported model says of itself: its card, its positions, and the same logits as before."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from launch.model import export as export_command
from launch.show.run import held_out_of
from pretrain.config.keys import ModelConfig
from pretrain.config.load import save_config
from pretrain.federation.card import CARD, check_license
from pretrain.federation.export import describe_export, export_global_model, load_global_model
from pretrain.host.journal import Journal
from pretrain.silo.exported import export
from pretrain.silo.model import build_initial
from tests.conftest import TinyConfig
from tests.support import VOCAB_SIZE, TinyText, one_line_error
from tests.unit.test_aggregate import start

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TABLE = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
ROPE: dict[str, Any] = {"model_type": "llama", **SIZES, "max_position_embeddings": 64}
SCALED = ROPE | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}


@pytest.mark.parametrize(
    ("given", "is_fresh", "positions"),
    [(ROPE, True, 16), (ROPE, False, 64), (SCALED, True, 64), (TABLE, True, 64)],
    ids=["rope", "continued", "scaled rope", "table"],
)
def test_positions_are_those_that_were_trained_and_logits_the_same(
    tmp_path: Path, tiny_text: TinyText, given: dict[str, Any], is_fresh: bool, positions: int
) -> None:
    model: nn.Module = build_initial(ModelConfig(config=given), VOCAB_SIZE).eval()
    rows = torch.arange(16)[None] * 7 % VOCAB_SIZE
    with torch.no_grad():
        before = model(rows).logits
    export(model, tiny_text.tokenizer, tmp_path / "model", trained_tokens=16, is_fresh=is_fresh)
    assert AutoConfig.from_pretrained(tmp_path / "model").max_position_embeddings == positions
    assert AutoTokenizer.from_pretrained(tmp_path / "model").model_max_length == 16
    with torch.no_grad():
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(tmp_path / "model")(rows).logits, before, rtol=0, atol=0
        )


def test_a_card_says_what_the_contract_makes_public(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path, model={"config": dict.fromkeys([*ROPE, "num_key_value_heads"]) | TABLE})
    start(config)
    save_config(config, Path(config.directory) / "config.yaml")
    journal = Journal(config, "silos/alpha", silo="alpha")
    journal.record("eval", step=0, round=0, version=0, val_loss={"a|b": 5.5}, sequences={"a|b": [8, 406]})
    journal.record("eval", step=4, round=1, version=1, val_loss={"a|b": 4.5}, sequences={"a|b": [8, 406]})
    journal.close()
    assert held_out_of(config, None) == {"a|b": "4.5000 (of 8 of 406 sequences)"}
    export_command(Path(config.directory), output=tmp_path / "out", license="apache-2.0")
    card = (tmp_path / "out" / CARD).read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "apache-2.0"
    for line in (
        "# tiny",
        "| model | gpt2, 37,120 parameters |",
        "| rounds | 0 of 3, of 4 steps each (version 0) |",
        "| silos | alpha (0 tokens), beta (0 tokens) |",
        "| merged | mean of the silos' changes every 4 steps; outer nesterov, learning rate 0.7, momentum 0.9 |",
        r"| a\|b | 5.5000 (of 8 of 406 sequences) |",
    ):
        assert line in body.splitlines()
    assert str(tmp_path) not in card  # no place of this site
    assert (tmp_path / "out" / CARD).stat().st_mode == (tmp_path / "out/config.json").stat().st_mode

    config.trust.metrics |= {"tokens": "consortium", "held_out": "member"}
    provenance = export_global_model(
        config, tmp_path / "less", held_out=lambda found: held_out_of(config, found["version"])
    )
    card = (tmp_path / "less" / CARD).read_text()
    assert "| silos | alpha, beta |" in card
    assert "Held-out" not in card
    assert "license" not in card
    assert "tokens" not in provenance
    said = describe_export(config, tmp_path / "less", provenance)
    assert "; its configuration allows 64, more than it has seen\n" in said
    assert load_global_model(config)[1] == provenance


def test_a_license_is_a_name() -> None:
    assert one_line_error(check_license, "a\nb") == (
        "--license: 'a\\\\nb' given; allowed: a name as hubs know it (apache-2.0, cc-by-4.0, other), up to 100 "
        "characters"
    )
