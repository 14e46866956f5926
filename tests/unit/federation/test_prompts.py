"""A prompt that was merged: for peft, and for whoever speaks, evaluates, joins and revokes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.evaluate import evaluate
from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config
from pretrain.exchange.store import StoreExchange
from pretrain.federation.card import CARD
from pretrain.federation.contract import Agreed, describe
from pretrain.federation.evaluation import open_subject
from pretrain.federation.export import (
    describe_export,
    export_global_model,
    exported_digest,
    load_global_model,
)
from pretrain.federation.generate import Sampling, open_speaker
from pretrain.federation.held_out import evaluate_model
from pretrain.federation.join import find_federation, joined_config, measure_size
from pretrain.federation.revoke import REVOCATION, Revoker, losses, write_revoked
from pretrain.silo.data import PackedTokens
from pretrain.silo.shards import tokenizer_sha256
from tests.adapters import prompt_model, save_base
from tests.conftest import TinyConfig
from tests.support import TinyText, one_line_error, tiny_settings, tiny_silo
from tests.unit.federation.test_adapters import PLAIN_AVERAGING, committed, verified
from tests.unit.test_aggregate import commit_of

ROWS = torch.arange(32).reshape(2, 16) * 7 % 300
PROMPT = torch.tensor([[-1, -2, -3]]).expand(2, -1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_text: TinyText) -> Path:
    """The frozen model."""
    return save_base(tmp_path_factory.mktemp("base"), tiny_text)


@pytest.fixture
def run(tmp_path: Path, tiny_config: TinyConfig, base: Path) -> RunConfig:
    """Two silos, one version."""
    config = tiny_config(tmp_path, model=prompt_model(base), outer=PLAIN_AVERAGING)
    committed(config, 1)
    return config


def logits(model: Callable[..., object], ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits  # type: ignore[attr-defined]
    return found


def test_the_mean_of_prompts_is_handed_on_for_peft(
    tmp_path: Path, tiny_config: TinyConfig, run: RunConfig, base: Path
) -> None:
    assert "aggregation_error" not in commit_of(run, 1)["metrics"]
    assert verified(run, tmp_path) == []
    alone = tmp_path / "alone"
    provenance = export_global_model(run, alone, form="adapter")
    assert provenance["prompt_tokens"] == 3
    assert exported_digest(alone) == provenance["parameters_digest"] == commit_of(run, 1)["parameters_digest"]
    told = json.loads((alone / "atoll.json").read_text())
    assert set(told["base"]) == {"config.json", "model.safetensors"}
    assert "an adapter; peft loads it beside its base" in describe_export(run, alone, provenance)

    model, _ = load_global_model(run)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    beside = PeftModel.from_pretrained(plain, alone).eval()
    for row in ROWS:  # one document at a time, as peft keeps none apart
        ours, theirs = logits(model, torch.cat([PROMPT[:1], row[None]], 1)), logits(beside, row[None])
        assert ours.shape == theirs.shape == (1, 19, 300)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
        assert (theirs[:, 3:] - logits(plain, row[None])).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(alone).model_max_length
    card = (alone / CARD).read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    assert "| adapter | a prompt of 3 tokens before each document; the base was not trained |" in card
    assert "96 parameters" in card
    assert str(tmp_path) not in "".join(file.read_text() for file in alone.glob("*.json")) + card
    assert "bada" not in card
    assert dict(describe(Agreed.at(run.store_url)))["adapter"] == ("a prompt of 3 tokens, which begins as 'bada gefi'")


def test_it_is_merged_into_nothing(tmp_path: Path, run: RunConfig) -> None:
    why = (
        "; this run trained a prompt, which stands before the text and is in no matrix of the base; allowed: --adapter"
    )
    for form, given in {"merged": "--merged: given", "": "atoll export: no --adapter given"}.items():
        said = one_line_error(export_global_model, run, tmp_path / "out", form=form)
        assert said == f"{given}{why} (a peft directory, without it)"
    assert not (tmp_path / "out").exists()


def test_a_run_speaks_and_is_evaluated_behind_its_prompt(
    tmp_path: Path, run: RunConfig, tiny_text: TinyText, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_config(run, Path(run.directory) / "config.yaml")
    pieces: list[str] = []
    speaker = open_speaker(run.directory)
    spoken = speaker.go_on("ba", Sampling(num_tokens=9, temperature=0), pieces.append)
    model, tokenizer = load_global_model(run)[0], speaker.tokenizer
    given = [tokenizer.eos_token_id, *tokenizer("ba")["input_ids"]]
    row = [-1, -2, -3, *given]
    while len(row) < len(given) + 12 and (len(row) == len(given) + 3 or row[-1] != tokenizer.eos_token_id):
        row.append(int(logits(model, torch.tensor([row]))[0, -1].argmax()))
    new = row[3 + len(given) :]
    assert "".join(pieces) == tokenizer.decode(new, skip_special_tokens=True)
    assert (spoken.num_given, spoken.num_tokens, spoken.is_cut) == (len(given), len(new), False)
    assert one_line_error(speaker.go_on, "ba" * 80, Sampling(), pieces.append).endswith("up to 60 with this model")

    split = tiny_text.packed["alpha"] / "valid"
    evaluate(run.directory, data=[str(split)], num_sequences=2)
    assert " 2 of " in capsys.readouterr().out
    subject = open_subject(run.directory)
    tokenizer_hash = tokenizer_sha256(subject.tokenizer_file)
    found = evaluate_model(subject.load, {"alpha": split}, subject.provenance, tokenizer_hash, num_sequences=1)
    assert found["alpha"].num_sequences == 1
    first = torch.from_numpy(PackedTokens([split], sequence_tokens=13).sequence(0))
    behind = logits(model, torch.cat([PROMPT[:1], first[None, :-1]], 1))[0, 3:]
    expected = torch.nn.functional.cross_entropy(behind, first[1:]).item()
    assert found["alpha"].loss == pytest.approx(expected, rel=1e-5)
    options = subject.load, {"alpha": split}, subject.provenance, tokenizer_hash
    assert one_line_error(evaluate_model, *options, sequence_tokens=4) == (
        "--sequence-tokens: 4 given; allowed: 5 or more"
    )

    export_global_model(run, tmp_path / "alone", form="adapter")
    assert one_line_error(open_speaker, str(tmp_path / "alone")).endswith(
        "given, which is an adapter without its base; allowed: the run directory or the store that it is from, or a "
        "whole model"
    )
    beside = open_subject(str(tmp_path / "alone"), base=base)
    options = beside.load, {"alpha": split}, beside.provenance, tokenizer_hash
    assert evaluate_model(*options, num_sequences=1) == found


def test_without_a_member_it_is_a_prompt_too(tmp_path: Path, run: RunConfig, tiny_text: TinyText) -> None:
    exchange = StoreExchange(run.store_url)
    assert exchange.read_contract()
    found = Revoker(run, exchange, tmp_path / "scratch", tell=lambda line: None).revoke("beta", 1, None, reason="")
    write_revoked(run, found, tmp_path / "without")
    assert exported_digest(tmp_path / "without") == found.record.parameters_digest
    assert (tmp_path / "without" / REVOCATION).is_file()
    assert "peft" in (tmp_path / "without" / CARD).read_text()
    original, without = losses(run, found, {"alpha": tiny_text.packed["alpha"] / "valid"})["alpha"]
    assert original.loss != without.loss


def test_whoever_joins_begins_with_the_same_text(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, run: RunConfig, base: Path
) -> None:
    settings = tiny_settings(tmp_path / "beta", tiny_text)
    own = {key: settings[key] for key in ("directory", "tokenizer", "exchange", "silo", "wandb")}
    path = tmp_path / "silo.yaml"
    path.write_text(yaml.safe_dump(own | {"silos": {"beta": tiny_silo(tiny_text, "beta")}}))
    federation = find_federation(run.store_url, [path], [])
    joined = joined_config(federation, [path], [f"model.checkpoint={base}"])
    assert joined.model.adapter == run.model.adapter
    assert measure_size(federation, joined, "beta", 0).num_parameters == 3 * 32
