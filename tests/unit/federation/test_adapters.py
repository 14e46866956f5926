"""Adapters that were merged: the error of it, what the turns make exact, and both ways to hand one on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.model import export as export_command
from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config
from pretrain.exchange.store import StoreExchange
from pretrain.federation.card import CARD
from pretrain.federation.contract import Agreed, describe
from pretrain.federation.evaluation import open_subject
from pretrain.federation.export import describe_export, export_global_model, exported_digest, load_global_model
from pretrain.federation.join import find_federation, joined_config, measure_size
from pretrain.federation.verify import StoreVerifier
from pretrain.outer.factors import pairs
from pretrain.silo.model import load_checkpoint, token_losses
from tests.adapters import adapter_model, save_base
from tests.conftest import TinyConfig
from tests.support import TinyText, one_line_error, tiny_settings, tiny_silo
from tests.unit.test_aggregate import Hand, commit_of, one_version, plus_noise, start

ROWS = torch.arange(32).reshape(2, 16) * 7 % 300
PLAIN_AVERAGING = {"optimizer": "sgd", "lr": 1.0}
TOKENS = {"alpha": 100, "beta": 300}
Factors = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_text: TinyText) -> Path:
    """The frozen model."""
    return save_base(tmp_path_factory.mktemp("base"), tiny_text)


def products(factors: Factors) -> Factors:
    """B A of every pair, whole, float64."""
    return {a: factors[b].double() @ factors[a].double() for a, b in pairs(factors)}


def mean(of_silos: dict[str, Factors]) -> Factors:
    """Weighted by tokens."""
    total = sum(TOKENS.values())
    names = next(iter(of_silos.values()))
    return {name: sum(TOKENS[s] * of[name] for s, of in of_silos.items()) / total for name in names}  # type: ignore[misc]


def off(left: Factors, right: Factors) -> float:
    """Distance, as a share of what is on the right."""
    squared = [sum((one[name] ** 2).sum().item() for name in right) for one in (right, subtract(left, right))]
    return (squared[1] / squared[0]) ** 0.5


def subtract(left: Factors, right: Factors) -> Factors:
    return {name: left[name] - right[name] for name in right}


def committed(config: RunConfig, num_versions: int) -> list[tuple[dict[str, Factors], Factors]]:
    """What both silos had and what came of it, version by version; what is not due rests, as the silos have it."""
    aggregator, state = start(config)
    save_config(config, Path(config.directory) / "config.yaml")
    found = []
    for version in range(1, num_versions + 1):
        before = {name: value.clone() for name, value in state.parameters.items()}
        due = config.cut({name: value.numel() for name, value in before.items()})[config.schedule.fragment(version)]
        trained = {silo: plus_noise(state, seed) for seed, silo in enumerate(TOKENS)}
        local = {silo: before | {name: of[name] for name in due} for silo, of in trained.items()}
        for silo, of in local.items():
            Hand().deliver(config, silo, state, of, tokens=TOKENS[silo])
        one_version(aggregator, state)
        found.append((local, {name: value.clone() for name, value in state.parameters.items()}))
    return found


def test_averaging_factors_says_its_error(tmp_path: Path, tiny_config: TinyConfig, base: Path) -> None:
    config = tiny_config(tmp_path, model=adapter_model(base), outer=PLAIN_AVERAGING)
    for version, (local, now) in enumerate(committed(config, 2), start=1):
        wanted = mean({silo: products(of) for silo, of in local.items()})
        error = commit_of(config, version)["metrics"]["aggregation_error"]
        assert error == pytest.approx(off(products(now), wanted), rel=1e-4)
        assert error > 0.01
    assert verified(config, tmp_path) == []


def test_in_turns_the_product_is_the_mean_of_products(tmp_path: Path, tiny_config: TinyConfig, base: Path) -> None:
    outer = PLAIN_AVERAGING | {"num_fragments": 2}
    config = tiny_config(tmp_path, model=adapter_model(base, merge="alternate"), outer=outer)
    schedule = config.schedule
    assert [schedule.turn(step) for step in range(9)] == [
        1,
        1,
        0,
        0,
        1,
        1,
        0,
        0,
        1,
    ]  # B first: with B zero A has nothing
    assert [schedule.sent(version) for version in range(1, 7)] == [2, 4, 6, 8, 10, 12]
    assert {schedule.steps(version) for version in range(1, 7)} == {2}
    assert schedule.num_versions == 6
    for version, (local, now) in enumerate(committed(config, 4), start=1):
        assert off(products(now), mean({silo: products(of) for silo, of in local.items()})) < 1e-6
        moved = [name for name in now if any(not torch.equal(of[name], now[name]) for of in local.values())]
        assert all((".lora_B." in name) == bool(version % 2) for name in moved)
        assert "aggregation_error" not in commit_of(config, version)["metrics"]
    assert verified(config, tmp_path) == []


def verified(config: RunConfig, directory: Path) -> list[object]:
    """What `atoll verify` finds fault with; it merges every version again."""
    verifier = StoreVerifier(StoreExchange(config.store_url), directory / "scratch", tell=lambda line: None)
    return [*verifier.verify().findings]


def loss(model: torch.nn.Module) -> float:
    with torch.no_grad():
        return token_losses(model.eval(), ROWS, ROWS).mean().item()


def test_an_adapter_is_handed_on_merged_or_for_peft(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, base: Path
) -> None:
    config = tiny_config(tmp_path, model=adapter_model(base), outer=PLAIN_AVERAGING)
    ((_, now),) = committed(config, 1)
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    said = one_line_error(export_global_model, config, whole)
    assert said.startswith(
        "atoll export: neither --merged nor --adapter given, and this run trained an adapter; allowed"
    )
    export_global_model(config, whole, form="merged")
    provenance = export_global_model(config, alone, form="adapter")
    assert exported_digest(alone) == provenance["parameters_digest"] == commit_of(config, 1)["parameters_digest"]
    told = json.loads((alone / "atoll.json").read_text())
    assert set(told["base"]) == {"config.json", "model.safetensors"}

    by_hand = load_checkpoint(base)
    for name, product in products(now).items():
        layer = by_hand.get_submodule(name.partition(".lora_A.")[0])
        layer.weight.data.copy_(layer.weight.double() + 2 * product)  # alpha / rank
    plain = AutoModelForCausalLM.from_pretrained(base)
    expected = loss(by_hand)
    assert abs(expected - loss(plain)) > 1e-4
    beside: torch.nn.Module = PeftModel.from_pretrained(plain, alone)
    evaluated = open_subject(str(alone), base=base).load()
    for model in (AutoModelForCausalLM.from_pretrained(whole), beside, load_global_model(config)[0], evaluated):
        assert loss(model) == pytest.approx(expected, abs=1e-6)
    assert one_line_error(open_subject, str(alone)).startswith("--base: none given, and ")
    assert one_line_error(open_subject, str(whole), base=base).startswith("--base: given with ")
    other = open_subject(str(alone), base=save_base(tmp_path / "other", tiny_text, seed=2))
    assert one_line_error(other.load).endswith("alone was trained beside another (atoll.json: base)")
    assert AutoTokenizer.from_pretrained(alone).model_max_length
    cards = [(place / CARD).read_text() for place in (whole, alone)]
    assert [yaml.safe_load(card.split("---")[1])["library_name"] for card in cards] == ["transformers", "peft"]
    assert all("| adapter | lora of rank 2, alpha 4, beside all-linear; merge: factors" in card for card in cards)
    assert str(tmp_path) not in "".join(file.read_text() for file in alone.glob("*.json")) + "".join(cards)
    assert "an adapter; peft loads it beside its base" in describe_export(config, alone, provenance)


def test_an_adapter_is_not_merged_into_another_base(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, base: Path
) -> None:
    own = Path(shutil.copytree(base, tmp_path / "own"))
    config = tiny_config(tmp_path, model=adapter_model(own))
    start(config)
    save_base(own, tiny_text, seed=2)
    said = one_line_error(export_global_model, config, tmp_path / "out", form="merged")
    assert "model.checkpoint.model.safetensors is" in said
    assert not (tmp_path / "out").exists()


def test_a_run_without_adapter_has_no_forms(tmp_path: Path, tiny_config: TinyConfig) -> None:
    said = one_line_error(export_global_model, tiny_config(tmp_path), tmp_path / "out", form="merged")
    assert said == "--merged: given; this run trained all of its model; allowed: neither --merged nor --adapter"
    said = one_line_error(export_command, tmp_path, output=tmp_path / "out", merged=True, adapter=True)
    assert said == "--merged: given with --adapter; allowed: one of them"


def test_whoever_joins_takes_over_the_adapter_and_has_a_base_of_its_own(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, base: Path
) -> None:
    agreed = tiny_config(
        tmp_path, model=adapter_model(base, targets=["q_proj"], merge="alternate"), outer={"num_fragments": 2}
    )
    start(agreed)
    settings = tiny_settings(tmp_path / "beta", tiny_text)
    own = {key: settings[key] for key in ("directory", "tokenizer", "exchange", "silo", "wandb")}
    path = tmp_path / "silo.yaml"
    path.write_text(yaml.safe_dump(own | {"silos": {"beta": tiny_silo(tiny_text, "beta")}}))
    federation = find_federation(agreed.store_url, [path], [])
    assert dict(describe(Agreed.at(agreed.store_url)))["adapter"].startswith("lora of rank 2, alpha 4")
    assert "allowed: a directory that has them" in one_line_error(joined_config, federation, [path], [])
    joined = joined_config(federation, [path], [f"model.checkpoint={shutil.copytree(base, tmp_path / 'own')}"])
    assert joined.model.adapter == agreed.model.adapter
    assert measure_size(federation, joined, "beta", 0).num_parameters == 2 * 2 * 2 * 32
    other = save_base(tmp_path / "other", tiny_text, seed=2)
    said = one_line_error(joined_config, federation, [path], [f"model.checkpoint={other}"])
    assert "model.checkpoint.model.safetensors is" in said
