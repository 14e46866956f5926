"""The learning rate by hand, which parameters are decayed, and which are Muon's."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config.errors import ConfigError
from pretrain.config.keys import InnerConfig
from pretrain.config.load import load_config
from pretrain.silo.model import build_initial
from pretrain.silo.optim import build_optimizer, is_muon_matrix, learning_rate
from tests.conftest import TinyConfig

# cos of 0, 30, 60, 90, 120 and 150 degrees is 1, sqrt(3)/2, 1/2, 0, -1/2, -sqrt(3)/2.
HALF_ROOT_3 = 0.75**0.5
GOLDEN = {
    "cosine": (
        # Down from 1 to 0.2 on half a cosine over steps 2 to 8.
        {"lr": 1.0, "num_steps": 8, "warmup_steps": 2, "min_lr_ratio": 0.2},
        [0.5, 1.0, 1.0, 0.6 + 0.4 * HALF_ROOT_3, 0.8, 0.6, 0.4, 0.6 - 0.4 * HALF_ROOT_3],
    ),
    "wsd": (
        # Up to 2 in two steps, stays until step 6, then down to 0.5 in four steps of 0.375.
        {"lr": 2.0, "num_steps": 10, "warmup_steps": 2, "decay_steps": 4, "min_lr_ratio": 0.25},
        [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.625, 1.25, 0.875],
    ),
    "constant": ({"lr": 1.0, "num_steps": 6, "warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
}


@pytest.mark.parametrize("schedule", GOLDEN)
def test_golden_values(schedule: str) -> None:
    settings, expected = GOLDEN[schedule]
    inner = InnerConfig(schedule=schedule, **settings)
    assert [learning_rate(step, inner) for step in range(inner.num_steps)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", GOLDEN)
def test_without_warmup_or_decay_it_starts_at_the_peak(schedule: str) -> None:
    inner = InnerConfig(schedule=schedule, lr=0.5, num_steps=4)
    assert learning_rate(0, inner) == 0.5
    assert all(0 < learning_rate(step, inner) <= 0.5 for step in range(4))


def test_warmup_may_be_the_whole_run() -> None:
    inner = InnerConfig(schedule="cosine", lr=1.0, num_steps=4, warmup_steps=4)
    assert [learning_rate(step, inner) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@given(st.sampled_from(sorted(GOLDEN)), st.integers(1, 40), st.integers(0, 20), st.integers(1, 20), st.floats(0, 1))
def test_stays_between_its_ends_and_never_rises_after_warmup(
    schedule: str, num_steps: int, warmup: int, decay: int, ratio: float
) -> None:
    warmup, decay = min(warmup, num_steps), min(decay, num_steps - min(warmup, num_steps))
    inner = InnerConfig(
        schedule=schedule, num_steps=num_steps, warmup_steps=warmup, decay_steps=decay, min_lr_ratio=ratio, lr=0.125
    )
    after = [learning_rate(step, inner) for step in range(warmup, num_steps)]
    assert all(0.125 * ratio - 1e-15 <= lr <= 0.125 for lr in after)
    assert all(later <= earlier for earlier, later in itertools.pairwise(after))


def test_depends_on_the_cumulative_step_only(tmp_path: Path, tiny_config: TinyConfig) -> None:
    traces = []
    for sync_interval in (1, 4, 12):
        config = tiny_config(tmp_path / str(sync_interval), outer={"sync_interval_steps": sync_interval})
        resolved = load_config([tmp_path / str(sync_interval) / "tiny.yaml"])
        whole = [learning_rate(step, config.inner) for step in range(12)]
        # A run that was killed after step 7 goes on with a configuration of its own.
        assert whole == [learning_rate(s, config.inner) for s in range(7)] + [
            learning_rate(s, resolved.inner) for s in range(7, 12)
        ]
        traces.append(whole)
    assert traces[0] == traces[1] == traces[2]
    assert len(set(traces[0])) == 12


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    model[1].bias.requires_grad_(False)
    optimizer = build_optimizer(model.named_parameters(), InnerConfig(weight_decay=0.5), on_cpu=False)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {id(model[0].weight): 0.5, id(model[0].bias): 0.0, id(model[1].weight): 0.0}
    assert decay == expected


def test_sgd_step_by_hand() -> None:
    weight = torch.nn.Parameter(torch.tensor([[2.0]]))
    optimizer = build_optimizer(
        [("weight", weight)], InnerConfig(optimizer="sgd", lr=0.5, weight_decay=0.25), on_cpu=False
    )
    weight.grad = torch.tensor([[1.0]])
    optimizer.step()
    assert weight.item() == 2.0 - 0.5 * (1.0 + 0.25 * 2.0)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), True),
        ("transformer.h.11.mlp.c_fc.weight", (64, 256), True),
        ("model.layers.0.input_layernorm.weight", (64,), False),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 64, 256), False),
        ("model.embed_tokens.weight", (96, 64), False),
        ("transformer.wpe.weight", (96, 64), False),
        ("lm_head.weight", (96, 64), False),
    ],
)
def test_muon_trains_the_matrices_inside_the_layers(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_muon_matrix(name, shape) is expected


def test_muon_beside_adamw_is_torch_s_two_optimizers(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path)
    inner = InnerConfig(optimizer="muon", lr=0.004, muon_lr=0.02, muon_momentum=0.8, weight_decay=0.5)
    ours, theirs = build_initial(config.model, 64), build_initial(config.model, 64)
    named = dict(theirs.named_parameters())
    hidden = {name for name, p in named.items() if is_muon_matrix(name, p.shape)}
    others = [{"params": p, "weight_decay": 0.5 * (p.ndim > 1)} for name, p in named.items() if name not in hidden]
    muon = torch.optim.Muon([named[name] for name in hidden], weight_decay=0.5, momentum=0.8)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95))
    optimizer = build_optimizer(ours.named_parameters(), inner, on_cpu=False)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        lr = inner.lr / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        muon.param_groups[0]["lr"] = 5 * lr  # muon_lr / lr
        for group in adamw.param_groups:
            group["lr"] = lr
        for parameter, own in zip(theirs.parameters(), ours.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            own.grad = parameter.grad.clone()
        for each in (optimizer, muon, adamw):
            each.step()
    assert hidden
    assert len(hidden) < len(named)
    for own, parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, parameter, rtol=1e-6, atol=1e-7)


def test_a_correction_is_added_to_gradients_after_they_are_counted() -> None:
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(values.clone()) for _ in range(2))
    inner = InnerConfig(optimizer="muon", lr=0.004, muon_lr=0.004)
    named = [("layers.0.up", ours), ("norm", torch.nn.Parameter(torch.zeros(1)))]
    optimizer = build_optimizer(named, inner, on_cpu=False, sums_gradients=True)
    muon = torch.optim.Muon([theirs], lr=0.004)
    gradients = [torch.full((4, 3), 8.0).tril(step) for step in range(3)]
    correction = torch.eye(4, 3)
    for step, gradient in enumerate(gradients):
        ours.grad, theirs.grad = gradient.clone(), gradient + correction * (step > 0)
        optimizer.step()
        muon.step()
        optimizer.state[ours]["correction"].copy_(correction)
    assert torch.equal(ours, theirs)
    assert torch.equal(optimizer.state[ours]["gradient_sum"], torch.stack(gradients).sum(0))


def test_muon_needs_layers() -> None:
    model = torch.nn.Embedding(4, 2)
    message = "inner.optimizer: 'muon' given; allowed for a model without matrices in numbered layers: adamw, sgd"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        build_optimizer(model.named_parameters(), InnerConfig(optimizer="muon"), on_cpu=False)


@pytest.mark.parametrize(
    ("key", "zero"),
    [
        ("offload_optimizer.ratio", {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}),
        (
            "offload_optimizer.super_offload",
            {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}},
        ),
        ("zenflow", {"stage": 3, "zenflow": {"topk_ratio": 0.1}}),
    ],
)
def test_muon_refuses_what_it_cannot_follow(
    tmp_path: Path, tiny_config: TinyConfig, key: str, zero: dict[str, object]
) -> None:
    settings = {"silo": {"deepspeed": {"zero_optimization": zero}}, "inner": {"optimizer": "adamw"}}
    tiny_config(tmp_path, **settings)  # AdamW may
    message = (
        f"inner.optimizer: 'muon' given with silos.alpha.deepspeed.zero_optimization.{key} at stage 3; "
        f"allowed: any stage, on the device or with offload_optimizer to cpu, without {key}"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load_config([tmp_path / "tiny.yaml"], ["inner.optimizer=muon"])


@pytest.mark.parametrize("zero", [{}, {"stage": 2}, {"stage": 3, "offload_optimizer": {"device": "cpu"}}])
def test_muon_serves_every_stage(tmp_path: Path, tiny_config: TinyConfig, zero: dict[str, object]) -> None:
    deepspeed = {"zero_optimization": zero}
    assert tiny_config(tmp_path, silo={"deepspeed": deepspeed}, inner={"optimizer": "muon"}).inner.muon_lr == 0.02


def test_muon_lr_is_above_0(tmp_path: Path, tiny_config: TinyConfig) -> None:
    with pytest.raises(ConfigError, match=r"^inner\.muon_lr: 0\.0 given; allowed: above 0$"):
        tiny_config(tmp_path, inner={"muon_lr": 0})


def test_fused_adamw_is_the_plain_one(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path)
    inner = InnerConfig(lr=0.004, weight_decay=0.5)
    models = {fused: build_initial(config.model, 64) for fused in (True, False)}
    initial = [parameter.detach().clone() for parameter in models[True].parameters()]
    generator = torch.Generator().manual_seed(0)
    optimizers = {
        fused: build_optimizer(model.named_parameters(), inner, on_cpu=False, fused=fused)
        for fused, model in models.items()
    }
    for _ in range(10):
        for parameters in zip(*(model.parameters() for model in models.values()), strict=True):
            gradient = torch.randn(parameters[0].shape, generator=generator)
            for parameter in parameters:
                parameter.grad = gradient.clone()
        for optimizer in optimizers.values():
            optimizer.step()
    assert all(group["fused"] is fused for fused, optimizer in optimizers.items() for group in optimizer.param_groups)
    for one, other, before in zip(models[True].parameters(), models[False].parameters(), initial, strict=True):
        assert (one - other).norm() < 1e-5 * (other - before).norm()  # of the way made
