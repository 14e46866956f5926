"""Moments that silos share, as the aggregator takes and publishes them; deliveries are written by hand."""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.aggregate import OuterState
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.exchange.payload import Tensors as PayloadTensors
from pretrain.merge.terms import shared_moments
from pretrain.outer.moments import MeanGradient, SecondMoment
from pretrain.silo.optim import is_muon_matrix
from tests.conftest import TinyConfig
from tests.unit.test_aggregate import GOOD, Hand, commit_of, one_version, refused_then_taken, start, stored, times

Tensors = dict[str, Tensor]
UNCLIPPED = {"clip_norm": 0}  # what is told here is longer than gradients that are clipped
SHARED = {"optimizer": "sgd", "lr": 1.0, "second_moments": "shared"}


def telling(state: OuterState, value: float, *, only: Callable[[str], bool] = lambda name: True) -> Hand:
    """A delivery whose second moments are all `value`."""
    told = {
        f"moment/{part}/{name}": tensor.contiguous()
        for name, parameter in state.parameters.items()
        if only(name)
        for part, tensor in SecondMoment(parameter.shape).encode(torch.full_like(parameter, value)).items()
    }
    return Hand(tensors=lambda tensors: tensors | told)


def after_one_version(config: RunConfig, alpha: float, beta: float, **more: Any) -> tuple[Tensors, OuterState, Tensors]:
    """Parameters before, the state after, and the payload, when alpha doubles its parameters and beta keeps them."""
    aggregator, state = start(config)
    before = {name: value.clone() for name, value in state.parameters.items()}
    telling(state, alpha, **more).deliver(config, "alpha", state, times(state, 2), tokens=100)
    telling(state, beta, **more).deliver(config, "beta", state, times(state, 1), tokens=300)
    one_version(aggregator, state)
    return before, state, stored(config, 1, "parameter-000.safetensors")


def test_averaged_by_tokens_and_published_beside_the_parameters(tmp_path: Path, tiny_config: TinyConfig) -> None:
    before, state, payload = after_one_version(tiny_config(tmp_path, inner=UNCLIPPED, outer=SHARED), 4.0, 0.0)
    told = {name: value for name, value in payload.items() if name.startswith("moment/")}
    assert {name.split("/", 2)[2] for name in told} == set(before)
    assert all(torch.equal(value, torch.ones_like(value)) for value in told.values())  # (100 * 4 + 300 * 0) / 400
    for name, value in before.items():  # merge=mean: by tokens alone
        assert torch.allclose(state.parameters[name], 1.25 * value)


def test_importance_gives_the_step_to_the_silo_that_has_a_say(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path, inner=UNCLIPPED, outer=SHARED | {"merge": "importance"})
    before, state, _ = after_one_version(config, 4.0, 0.0)
    for name, value in before.items():
        assert torch.allclose(state.parameters[name], 2 * value)
    other = tiny_config(tmp_path / "other", inner=UNCLIPPED, outer=SHARED | {"merge": "importance"})
    before, state, _ = after_one_version(other, 9.0, 1.0)  # roots 3 and 1: 100 * 3 of 100 * 3 + 300 * 1
    for name, value in before.items():
        assert torch.allclose(state.parameters[name], 1.5 * value)


def test_with_muon_only_what_adamw_trains(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path, inner=UNCLIPPED | {"optimizer": "muon"}, outer=SHARED | {"merge": "importance"})
    shapes = {name: value.shape for name, value in start(config)[1].parameters.items()}
    before, state, payload = after_one_version(config, 4.0, 0.0, only=lambda n: not is_muon_matrix(n, shapes[n]))
    matrices = {name for name in shapes if is_muon_matrix(name, shapes[name])}
    assert 0 < len(matrices) < len(shapes)
    assert {n.split("/", 2)[2] for n in payload if n.startswith("moment/")} == set(shapes) - matrices
    for name, value in before.items():
        assert torch.allclose(state.parameters[name], (1.25 if name in matrices else 2.0) * value)


def test_of_muons_matrices_mean_gradients(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(
        tmp_path,
        inner=UNCLIPPED | {"optimizer": "muon"},
        outer={"optimizer": "sgd", "lr": 1.0, "control_variates": 0.5},
    )
    aggregator, state = start(config)
    shapes = {name: value.shape for name, value in state.parameters.items()}
    agreed = shared_moments(config, shapes, shapes)
    assert set(agreed) == {name for name, shape in shapes.items() if is_muon_matrix(name, shape)} != set()

    def tell(silo: str, gradient: float, tokens: int) -> None:
        told = {
            f"moment/{part}/{name}": tensor
            for name, moment in agreed.items()
            for part, tensor in moment.encode(torch.full(moment.shape, gradient)).items()
        }
        Hand(tensors=lambda tensors: tensors | told).deliver(config, silo, state, times(state, 1), tokens=tokens)

    tell("alpha", 7.0, 100)  # levels are -7 to 7
    tell("beta", -7.0, 300)
    one_version(aggregator, state)
    published = PayloadTensors(Path(config.store_url) / "global" / "000001" / "parameter-000.safetensors").moments
    for name, moment in agreed.items():
        assert isinstance(moment, MeanGradient)
        assert torch.equal(moment.decode(published[name]), torch.full(moment.shape, -3.5))  # (100 * 7 - 300 * 7) / 400


@pytest.mark.parametrize(
    ("optimizer", "share", "allowed"),
    [("muon", 1.5, "0 to 1"), ("muon", -0.1, "0 to 1"), ("adamw", 0.5, "0 unless inner.optimizer=muon")],
)
def test_control_variates_that_cannot_be(
    tmp_path: Path, tiny_config: TinyConfig, optimizer: str, share: float, allowed: str
) -> None:
    message = f"outer.control_variates: {share} given; allowed: {allowed}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        tiny_config(tmp_path, inner={"optimizer": optimizer}, outer={"control_variates": share})


@pytest.mark.parametrize("merge", ["mean", "median"])
def test_what_a_silo_that_lies_does_to_them(tmp_path: Path, tiny_config: TinyConfig, merge: str) -> None:
    silos = {name: {} for name in ("alpha", "beta", "gamma")}
    config = tiny_config(tmp_path, inner=UNCLIPPED, outer=SHARED | {"merge": merge}, silos=silos)
    aggregator, state = start(config)
    for silo, value in (("alpha", 1.0), ("beta", 1.0), ("gamma", 1e30)):
        telling(state, value).deliver(config, silo, state, times(state, 1))
    one_version(aggregator, state)
    payload = stored(config, 1, "parameter-000.safetensors")
    told = torch.cat([value.flatten() for name, value in payload.items() if name.startswith("moment/")])
    assert bool((told == 1).all()) == (merge == "median")


NOT_AGREED = "it holds moments of other tensors than are agreed"
BAD: dict[str, tuple[Hand, str]] = {
    "none": (GOOD, NOT_AGREED),
    "one too few": (
        Hand(tensors=lambda t: {n: v for n, v in t.items() if n != max(k for k in t if k.startswith("moment/"))}),
        NOT_AGREED,
    ),
}


@pytest.mark.parametrize(("hand", "expected"), BAD.values(), ids=BAD)
def test_a_silo_that_does_not_tell_them_is_refused(
    tmp_path: Path, tiny_config: TinyConfig, hand: Hand, expected: str
) -> None:
    config = tiny_config(tmp_path, inner=UNCLIPPED, outer=SHARED)
    aggregator, state = start(config)
    good = telling(state, 1.0)
    spoilt = Hand(tensors=lambda tensors: hand.tensors(tensors if hand is GOOD else dict(good.tensors(tensors))))
    good.deliver(config, "beta", state, times(state, 1))
    spoilt.deliver(config, "alpha", state, times(state, 1))
    folder = Path(config.store_url) / "silos" / "alpha" / "000001"
    over = threading.Event()
    assert (
        aggregator._collector._look("alpha", 1, lambda s, d, v, _: aggregator._merger.verify(s, d, state, v), over)
        is None
    )
    assert expected in (folder / "refused-0.json").read_text()


def test_a_silo_that_tells_what_was_not_asked_is_refused(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path, outer={"optimizer": "sgd", "lr": 1.0, "num_fragments": 2}, inner={"num_steps": 8})
    refused_then_taken(Hand(tensors=lambda tensors: tensors | {"moment/values/x": torch.ones(1)}), NOT_AGREED, config)


@pytest.mark.parametrize(("power", "share"), [(1.0, 9 / 10), (0.5, 3 / 4), (0.0, 1 / 2)])
def test_small_silos_may_count_for_more_than_their_tokens(
    tmp_path: Path, tiny_config: TinyConfig, power: float, share: float
) -> None:
    config = tiny_config(tmp_path, outer={"optimizer": "sgd", "lr": 1.0, "weight_power": power, "max_share": 1})
    aggregator, state = start(config)
    before = {name: value.clone() for name, value in state.parameters.items()}
    GOOD.deliver(config, "alpha", state, times(state, 2), tokens=900)
    GOOD.deliver(config, "beta", state, times(state, 1), tokens=100)
    one_version(aggregator, state)
    for name, value in before.items():
        assert torch.allclose(state.parameters[name], (1 + share) * value)
    assert commit_of(config, 1)["contributors"][0]["weight"] / commit_of(config, 1)["divisor"] == pytest.approx(share)
