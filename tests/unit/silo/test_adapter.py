"""Adapters without processes: where the factors are, what they begin with, what is beneath them, and mistakes."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pretrain.config.adapter import AdapterConfig
from pretrain.config.keys import ModelConfig
from pretrain.plan.plan import make_plan
from pretrain.plan.seconds import Given
from pretrain.silo.adapter import frozen_parameters
from pretrain.silo.base import fill_base
from pretrain.silo.flops import flops_per_token
from pretrain.silo.model import (
    build_empty,
    build_initial,
    build_without_memory,
    initial_parameters,
    load_checkpoint,
    token_losses,
)
from pretrain.trust.contract import build_contract, check_same_contract, first_contract
from tests.adapters import adapter_model, save_base
from tests.conftest import TinyConfig
from tests.support import VOCAB_SIZE, TinyText, one_line_error, with_keys

ROWS = torch.arange(24).reshape(2, 12) % 7
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 2, "num_key_value_heads": 1, **SMALL}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
TIED = {"model_type": "llama", "tie_word_embeddings": True, **SMALL}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_text: TinyText) -> Path:
    """The frozen model."""
    return save_base(tmp_path_factory.mktemp("base"), tiny_text)


def with_adapter(config: dict[str, Any], directory: Path, **changes: Any) -> ModelConfig:
    """Settings of an adapter beside a model of a configuration, which is saved first."""
    plain = ModelConfig(config=config)
    build_initial(plain, VOCAB_SIZE).save_pretrained(directory)  # type: ignore[operator]
    return ModelConfig(checkpoint=str(directory), adapter=AdapterConfig(kind="lora", **changes))


def filled(settings: ModelConfig) -> torch.nn.Module:
    """The model with its base."""
    model = build_empty(settings, VOCAB_SIZE, dtype=torch.float32)
    assert settings.checkpoint
    fill_base(model, settings.checkpoint)
    return model


def test_version_0_has_factors_alone_and_changes_nothing(tmp_path: Path, tiny_config: TinyConfig, base: Path) -> None:
    config = tiny_config(tmp_path, model=adapter_model(base, targets=["q_proj", "down_proj"]))
    initial = initial_parameters(config)
    assert len(initial) == 2 * 2 * 2  # two factors of two layers of two
    assert all(value.any() == (".lora_A." in name) for name, value in initial.items())
    again = initial_parameters(config)
    assert all(torch.equal(again[name], value) for name, value in initial.items())
    config.model.seed = 1
    assert not torch.equal(initial_parameters(config)[next(iter(initial))], next(iter(initial.values())))
    model = filled(config.model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(initial[name])
    plain = load_checkpoint(base)
    assert torch.equal(token_losses(model, ROWS, ROWS), token_losses(plain, ROWS, ROWS))


@pytest.mark.parametrize("config", [MIXTRAL, GPT2, TIED], ids=["mixtral", "gpt2", "tied"])
def test_the_base_is_what_transformers_loads(tmp_path: Path, config: dict[str, Any]) -> None:
    # The files of Mixtral have each expert by itself, the model all of a layer in one tensor.
    settings = with_adapter(config, tmp_path)
    found, loaded = frozen_parameters(filled(settings)), dict(load_checkpoint(tmp_path).named_parameters())
    assert found.keys() == loaded.keys()
    assert all(torch.equal(found[name], loaded[name]) for name in loaded)


def test_one_tensor_after_another_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = with_adapter(TIED, tmp_path)
    monkeypatch.setattr("pretrain.silo.base.load_checkpoint", None)  # which has the whole model in memory
    filled(settings)


def test_a_checkpoint_that_does_not_fill_the_model_is_one_line(tmp_path: Path) -> None:
    settings = with_adapter(TIED, tmp_path)
    other = ModelConfig(config=TIED | {"intermediate_size": 32})
    (tmp_path / "model.safetensors").unlink()
    config_json = (tmp_path / "config.json").read_text()
    build_initial(other, VOCAB_SIZE).save_pretrained(tmp_path)  # type: ignore[operator]
    (tmp_path / "config.json").write_text(config_json)
    assert "3 have another shape" in one_line_error(filled, settings)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (
            ["q_proj", "queries"],
            "model.adapter.targets: 'queries' given; no layer that multiplies by a matrix is called so",
        ),
        (["embed_tokens"], "model.adapter.targets: 'embed_tokens' given; no layer that multiplies"),
        (
            ["lm_head"],
            "model.adapter.targets: 'lm_head' given; its matrix is the embedding, too; allowed: other layers",
        ),
    ],
)
def test_targets_that_are_none_are_one_line(tmp_path: Path, targets: list[str], said: str) -> None:
    settings = with_adapter(TIED, tmp_path, targets=targets)
    assert one_line_error(build_without_memory, settings, VOCAB_SIZE).startswith(said)


def test_without_peft_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = with_adapter(TIED, tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    said = one_line_error(build_without_memory, settings, VOCAB_SIZE)
    assert said == "model.adapter.kind: 'lora' given; peft is not installed: pip install 'atoll[adapters]'"


def test_another_base_is_one_line(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, base: Path) -> None:
    other = save_base(tmp_path / "other", tiny_text, seed=2)
    agreed, theirs = (tiny_config(tmp_path / one.name, model=adapter_model(one)) for one in (base, other))
    contract = first_contract(build_contract(agreed))
    assert build_contract(agreed)["model"]["adapter"] == agreed.model.adapter.terms
    said = one_line_error(check_same_contract, build_contract(theirs), contract, "store")
    assert "model.checkpoint.model.safetensors is" in said
    theirs.model = dataclasses.replace(agreed.model, adapter=dataclasses.replace(agreed.model.adapter, rank=3))
    said = one_line_error(check_same_contract, build_contract(theirs), contract, "store")
    assert "model.adapter.rank is 3 here and 2 there" in said


ALTERNATE = {"model.adapter.merge": "alternate", "outer.num_fragments": 2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model.adapter.kind": "dora"},
            "model.adapter.kind: 'dora' given; allowed: none, lora, prompt, and not this: it takes",
        ),
        (
            {"model.adapter.kind": "qlora"},
            "model.adapter.kind: 'qlora' given; allowed: none, lora, prompt, and not this: a base",
        ),
        (
            {"model.adapter.kind": "pissa"},
            "model.adapter.kind: 'pissa' given; allowed: none, lora, prompt, and not this: it beg",
        ),
        ({"model.adapter.kind": "ia3"}, "model.adapter.kind: 'ia3' given; allowed: none, lora"),
        ({"model.adapter.kind": "none"}, "model.adapter.rank: 2 given; allowed: 8 with model.adapter.kind=none"),
        ({"model.adapter.rank": 0}, "model.adapter.rank: 0 given; allowed: 1 or more"),
        ({"model.adapter.targets": []}, "model.adapter.targets: [] given; allowed: [all-linear], or names of layers"),
        (
            {"model.checkpoint": None, "model.config": {"model_type": "llama"}},
            "model.checkpoint: None given; allowed: a t",
        ),
        (
            {"inner.optimizer": "muon"},
            "inner.optimizer: 'muon' given; allowed: adamw, sgd with model.adapter.kind=lora",
        ),
        (
            ALTERNATE | {"outer.num_fragments": 1},
            "outer.num_fragments: 1 given; allowed: 2 with model.adapter.merge=alt",
        ),
        (
            ALTERNATE | {"outer.overlap_steps": 1},
            "outer.overlap_steps: 1 given; allowed: 0 with model.adapter.merge=alt",
        ),
        (ALTERNATE | {"outer.mixing": 0.5}, "outer.mixing: 0.5 given; allowed: 0.0 with model.adapter.merge=alternate"),
        (
            ALTERNATE | {"membership.quorum": 1, "membership.stale_weight": 0.5},
            "membership.stale_weight: 0.5 given; allowed: 0.0 with model.adapter.merge=alternate: a late factor",
        ),
        (ALTERNATE | {"outer.second_moments": "shared"}, "outer.second_moments: 'shared' given; allowed: local with"),
        (
            ALTERNATE | {"outer.second_moments": "shared", "outer.merge": "importance"},
            "outer.merge: 'importance' given; allowed: mean with model.adapter.merge=alternate: a mean of products",
        ),
        (
            ALTERNATE | {"silo.private.epsilon": 3.0},
            "silos.alpha.private.epsilon: 3.0 given; allowed: null with model.adapter.merge=alternate",
        ),
    ],
)
def test_what_cannot_be_with_an_adapter_is_one_line(
    tmp_path: Path, tiny_config: TinyConfig, base: Path, changes: dict[str, Any], said: str
) -> None:
    sections = with_keys({"model": adapter_model(base)}, changes)
    assert one_line_error(tiny_config, tmp_path, **sections).startswith(said)


def test_a_plan_counts_what_travels_and_holds_the_base(tmp_path: Path, tiny_config: TinyConfig, base: Path) -> None:
    config = tiny_config(tmp_path, model=adapter_model(base, targets=["q_proj"]))
    other = tiny_config(
        tmp_path, model=adapter_model(base, targets=["q_proj"], merge="alternate"), outer={"num_fragments": 2}
    )
    given = Given(link_bits_per_second=1e6, latency_seconds=0.0, tokens_per_second={"alpha": 1e3, "beta": 1e3})
    plan, in_turns = (make_plan(one, given) for one in (config, other))
    num_elements = 2 * 2 * 2 * 32  # of two layers, two factors of rank 2
    assert plan.num_parameters == num_elements
    assert plan.num_frozen == sum(p.numel() for p in load_checkpoint(base).parameters())
    initial = initial_parameters(config)
    save_file({f"parameter/values/{name}": value for name, value in initial.items()}, tmp_path / "payload")
    assert plan.traffic["alpha"][0].sent_bytes == pytest.approx((tmp_path / "payload").stat().st_size, abs=300)
    assert plan.sent_bytes["alpha"] == 3 * plan.traffic["alpha"][0].sent_bytes
    assert [moved.num_elements for moved in in_turns.traffic["alpha"]] == [num_elements // 2] * 2
    assert plan.memory["alpha"].device_bytes[0] > 4 * plan.num_frozen


def test_frozen_parameters_need_no_gradient_of_their_own(tmp_path: Path) -> None:
    settings = with_adapter(TIED, tmp_path, targets=["q_proj"], rank=2)
    plain = build_without_memory(ModelConfig(config=TIED), VOCAB_SIZE)
    whole, beside = (flops_per_token(one, 8) for one in (plain, build_without_memory(settings, VOCAB_SIZE)))
    assert whole
    assert beside == whole - 2 * sum(p.numel() for p in plain.parameters()) + 6 * 2 * 2 * 16
