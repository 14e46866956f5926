"""A silo's own adapter without processes: where its factors are, that it can be away, both in one, and mistakes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config.adapter import AdapterConfig
from pretrain.config.keys import ModelConfig, RunConfig
from pretrain.config.personal import PersonalConfig
from pretrain.federation.preflight import check_model
from pretrain.plan.plan import make_plan
from pretrain.plan.seconds import Given
from pretrain.silo.adapter import Turns, merge_adapter
from pretrain.silo.base import fill_base
from pretrain.silo.model import build_empty, token_losses, trained_parameters
from pretrain.silo.personal import NAME, Personal, both_in_one, personal_shapes
from tests.adapters import adapter_model, save_base
from tests.conftest import TinyConfig
from tests.support import VOCAB_SIZE, TinyText, one_line_error, with_keys

ROWS = torch.arange(24).reshape(2, 12) % 7
OWN = PersonalConfig(rank=3, alpha=6.0, targets=["v_proj", "down_proj"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_text: TinyText) -> Path:
    """The frozen model."""
    return save_base(tmp_path_factory.mktemp("base"), tiny_text)


def shared_model(base: Path, targets: list[str] | None = None) -> tuple[ModelConfig, torch.nn.Module]:
    """Beside the base an adapter whose factors are not zero."""
    adapter = AdapterConfig(kind="lora", rank=2, alpha=5.0, targets=targets or ["q_proj", "v_proj"])
    settings = ModelConfig(checkpoint=str(base), adapter=adapter)
    model = build_empty(settings, VOCAB_SIZE, dtype=torch.float32)
    fill_base(model, str(base))
    fill(trained_parameters(model), seed=1)
    return settings, model.eval()


def fill(parameters: dict[str, Tensor], seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    for value in parameters.values():
        value.copy_(0.1 * torch.randn(value.shape, generator=noise))


def losses(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return token_losses(model, ROWS, ROWS)


def test_it_changes_nothing_until_it_is_trained_and_can_be_away(base: Path) -> None:
    settings, model = shared_model(base)
    alone, shared = losses(model), trained_parameters(model)
    personal = Personal(model, OWN)
    every = trained_parameters(model)
    assert every.keys() == shared.keys() | personal.names
    assert len(personal.names) == 2 * 2 * 2  # two factors of two layers of two
    assert all(f".{NAME}." in name for name in personal.names)
    shapes = {name: every[name].shape for name in every if name in personal.names}
    assert shapes == personal_shapes(settings, VOCAB_SIZE, OWN)
    for name, value in personal.initial(shapes, 0):
        assert value.any() == (".lora_A." in name)
        every[name].copy_(value)
    assert torch.equal(losses(model), alone)
    fill({name: every[name] for name in personal.names}, seed=2)
    beside = losses(model)
    assert not torch.equal(beside, alone)
    with personal.away():
        assert torch.equal(losses(model), alone)
    assert torch.equal(losses(model), beside)


def test_it_trains_whichever_shared_factor_is_due(base: Path) -> None:
    settings, model = shared_model(base)
    turns = Turns(model, dataclasses.replace(settings.adapter, merge="alternate"))
    personal = Personal(model, OWN)
    every = dict(model.named_parameters())
    fill({name: every[name].data for name in personal.names}, seed=2)
    for now, (rests, due) in enumerate(((".lora_B.", ".lora_A."), (".lora_A.", ".lora_B."))):
        turns.now = now
        model.zero_grad()
        token_losses(model, ROWS, ROWS).mean().backward()
        moves = {name: bool(p.grad.any()) for name, p in every.items() if p.grad is not None}
        assert moves.keys() == {name for name, p in every.items() if p.requires_grad}
        for name, does in moves.items():
            assert does == (name in personal.names or due in name), name
            assert name in personal.names or (due in name) != (rests in name)
        assert all(turns.trains(turn) for turn in personal.turns.values())


def test_without_one_nothing_is_put_anywhere(base: Path) -> None:
    _, model = shared_model(base)
    names = [name for name, _ in model.named_modules()]
    personal = Personal(model, PersonalConfig())
    assert [name for name, _ in model.named_modules()] == names
    assert not personal.names
    assert not personal.turns


def test_one_adapter_does_what_both_do(base: Path) -> None:
    settings, model = shared_model(base)
    Personal(model, OWN)
    every = trained_parameters(model)
    fill({name: value for name, value in every.items() if f".{NAME}." in name}, seed=2)
    adapter, factors = both_in_one(settings.adapter, OWN, every)
    assert adapter.rank == 5
    one = build_empty(ModelConfig(checkpoint=str(base), adapter=adapter), VOCAB_SIZE, dtype=torch.float32).eval()
    fill_base(one, str(base))
    trained = trained_parameters(one)
    assert trained.keys() == factors.keys()
    for name, value in factors.items():
        trained[name].copy_(value)
    expected = losses(model)
    assert torch.allclose(losses(one), expected, atol=1e-5)
    merge_adapter(one)
    assert torch.allclose(losses(one), expected, atol=1e-5)


def test_a_plan_holds_it_and_sends_nothing_of_it(tmp_path: Path, tiny_config: TinyConfig, base: Path) -> None:
    given = Given(link_bits_per_second=1e6, latency_seconds=0.0, tokens_per_second={"alpha": 1e3, "beta": 1e3})
    own = {"silos": {"alpha": {"personal_adapter": {"rank": 4, "targets": ["q_proj"]}}}}
    without, plan = (
        make_plan(tiny_config(tmp_path, model=adapter_model(base), **changes), given) for changes in ({}, own)
    )
    assert plan.sent_bytes == without.sent_bytes
    assert plan.num_parameters == without.num_parameters
    more = {silo: plan.memory[silo].device_bytes[0] - without.memory[silo].device_bytes[0] for silo in plan.memory}
    factors = 12 * 2 * 2 * 4 * 32  # parameters and two moments; two layers, two factors
    kept = 4 * 2 * 4 * (4 * 16)  # for the backward pass what each A makes of 64 tokens
    assert more == {"alpha": factors + kept, "beta": 0}


def loaded(tiny_config: TinyConfig, directory: Path, base: Path, changes: dict[str, Any]) -> RunConfig:
    """A run whose silo alpha has an adapter of its own, with changes by key."""
    sections: dict[str, Any] = {"model": adapter_model(base), "silos": {"alpha": {"personal_adapter": {"rank": 2}}}}
    return tiny_config(directory, **with_keys(sections, changes))


RANK = "silos.alpha.personal_adapter.rank"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({RANK: -1}, f"{RANK}: -1 given; allowed: 0 or more"),
        (
            {RANK: 0, "silos.alpha.personal_adapter.alpha": 8.0},
            "silos.alpha.personal_adapter.alpha: 8.0 given; allowed: 16.0 with silos.alpha.personal_adapter.rank=0",
        ),
        (
            {"silos.alpha.personal_adapter.targets": []},
            "silos.alpha.personal_adapter.targets: [] given; allowed: [all-linear], or names of layers",
        ),
        (
            {"silos.alpha.personal_adapter.dropout": 1.0},
            "silos.alpha.personal_adapter.dropout: 1.0 given; allowed: 0 to below 1",
        ),
        (
            {"model": {"config": {"model_type": "llama"}}},
            f"model.adapter.kind: 'none' given; allowed: lora with {RANK}=2: it is trained beside the shared adapter",
        ),
        (
            {"exchange.kind": "none"},
            f"{RANK}: 2 given; allowed: 0 with exchange.kind=none: there is no shared model for it to be beside",
        ),
        (
            {"silos.alpha.private.epsilon": 3.0},
            f"silos.alpha.private.epsilon: 3.0 given; allowed: null with {RANK}=2: gradients that leave would follow",
        ),
        (
            {"membership.quorum": 1, "membership.max_loss_rise": 2.0},
            f"membership.max_loss_rise: 2.0 given; allowed: null with {RANK}=2: no version has it to go back to",
        ),
    ],
)
def test_what_it_cannot_be_with_is_one_line(
    tmp_path: Path, tiny_config: TinyConfig, base: Path, changes: dict[str, Any], said: str
) -> None:
    assert one_line_error(loaded, tiny_config, tmp_path, base, changes).startswith(said)


def test_targets_that_are_none_are_one_line_before_anything_starts(
    tmp_path: Path, tiny_config: TinyConfig, base: Path
) -> None:
    config = loaded(tiny_config, tmp_path, base, {"silos.alpha.personal_adapter.targets": ["q_proj", "queries"]})
    assert one_line_error(check_model, config).startswith(
        "silos.alpha.personal_adapter.targets: 'queries' given; no layer that multiplies by a matrix is called so; "
        "allowed: all-linear, q_proj, "
    )
