"""The outer mathematics: golden numbers that can be checked by hand, and laws."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from pretrain.outer.digest import digest_rows, digest_tensors, tensor_hash, tensor_row
from pretrain.outer.merge import mean_cosine, weighted_mean
from pretrain.outer.optimizer import MOMENTS, OuterOptimizer
from tests.support import GOLDEN

OUTER_STEP = GOLDEN / "outer_step.json"
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
WEIGHTS = st.integers(1, 1 << 40)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and tensor_hash(a) == tensor_hash(b)


# ---- outer step


def history(case: dict[str, Any]) -> list[dict[str, float]]:
    """Parameter and moments after each outer step of a golden case."""
    parameter = torch.tensor([case["start"]], dtype=torch.float32)
    settings = {key: case[key] for key in ("momentum", "betas", "eps") if key in case}
    optimizer = OuterOptimizer(name=case["optimizer"], **settings)
    moments = {kind: torch.zeros(1) for kind in MOMENTS[case["optimizer"]]}
    rows = []
    for count, pseudo_gradient in enumerate(case["pseudo_gradients"], 1):
        parameter, moments = optimizer.step(parameter, double(pseudo_gradient), moments, lr=case["lr"], count=count)
        rows.append({"parameter": parameter.item()} | {kind: value.item() for kind, value in moments.items()})
    return rows


def test_golden_history() -> None:
    golden = json.loads(OUTER_STEP.read_text())
    found = {name: case | {"history": history(case)} for name, case in golden.items()}
    if os.environ.get("ATOLL_RENEW_GOLDEN") == "1":
        OUTER_STEP.write_text(json.dumps(found, indent=1) + "\n")
        pytest.skip("tests/golden/outer_step.json is renewed; look at the difference")
    assert found == golden


def test_golden_history_starts_as_by_hand() -> None:
    """lr 0.5, momentum 0.5, from 8, pseudo-gradients 1, 2: the file cannot have been renewed to something wrong."""
    # Step 1: v = 1, step = 1 + 0.5 * 1 = 1.5, 8 - 0.5 * 1.5 = 7.25
    # Step 2: v = 0.5 * 1 + 2 = 2.5, step = 2 + 0.5 * 2.5 = 3.25, 7.25 - 0.5 * 3.25 = 5.625
    case = {"optimizer": "nesterov", "start": 8.0, "lr": 0.5, "momentum": 0.5, "pseudo_gradients": [1.0, 2.0]}
    assert history(case) == [{"parameter": 7.25, "velocity": 1.0}, {"parameter": 5.625, "velocity": 2.5}]


REFERENCES: dict[str, Callable[[Tensor], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD([p], lr=0.7),
    "nesterov": lambda p: torch.optim.SGD([p], lr=0.7, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam([p], lr=0.7, betas=(0.8, 0.9), eps=0.1),
}
BUFFERS = {"velocity": "momentum_buffer", "mean": "exp_avg", "variance": "exp_avg_sq"}


@pytest.mark.parametrize("name", REFERENCES)
def test_follows_torch(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    reference = torch.nn.Parameter(torch.randn(50, generator=generator).double())
    theirs = REFERENCES[name](reference)
    ours = OuterOptimizer(name=name, momentum=0.9, betas=(0.8, 0.9), eps=0.1)
    parameter = reference.detach().float()
    moments = {kind: torch.zeros(50) for kind in MOMENTS[name]}
    for count in range(1, 21):
        pseudo_gradient = torch.randn(50, generator=generator, dtype=torch.float64)
        before = {"parameter": parameter, **moments}
        copies = {kind: value.clone() for kind, value in before.items()}
        reference.grad = pseudo_gradient
        theirs.step()
        parameter, moments = ours.step(parameter, pseudo_gradient, moments, lr=0.7, count=count)
        assert all(same_bits(before[kind], value) for kind, value in copies.items())  # the inputs are left as they are
        torch.testing.assert_close(parameter.double(), reference.detach(), rtol=0, atol=2e-5)
    assert tuple(moments) == MOMENTS[name]
    for kind, value in moments.items():
        torch.testing.assert_close(value.double(), theirs.state[reference][BUFFERS[kind]], rtol=0, atol=2e-6)


@given(FLOATS, FLOATS, st.floats(2**-6, 2), st.floats(0, 0.99))
def test_first_nesterov_step(start: float, gradient: float, lr: float, momentum: float) -> None:
    assume(abs(start) < 1e30 and abs(gradient) < 1e30)
    optimizer = OuterOptimizer(name="nesterov", momentum=momentum)
    new, moments = optimizer.step(torch.tensor([start]), double(gradient), {"velocity": torch.zeros(1)}, lr=lr, count=1)
    assert moments["velocity"].item() == gradient
    expected = start - lr * (1 + momentum) * gradient
    scale = abs(start) + abs(lr * (1 + momentum) * gradient)
    assert new.item() == pytest.approx(expected, rel=0, abs=2**-23 * scale + 2**-149)


# ---- merge


def test_weighted_mean_by_hand() -> None:
    mean, divisor = weighted_mean([(1, double(8.0, 0.0)), (3, double(4.0, -4.0))], torch.Size([2]))
    assert mean.tolist() == [5.0, -3.0]  # (8 + 3*4) / 4, (0 - 3*4) / 4
    assert (divisor, mean.dtype) == (4, torch.float64)


def test_mean_of_three_is_no_running_halving() -> None:
    for order in permutations([1.0, 2.0, 6.0]):
        mean, divisor = weighted_mean([(5, double(value)) for value in order], torch.Size([1]))
        assert (mean.item(), divisor) == (pytest.approx(3.0, abs=1e-15), 15)  # ((1 + 2) / 2 + 6) / 2 would be 3.75


def test_divisor_is_the_weight_of_those_present() -> None:
    """Of a roster of three with 10 tokens each, two came: their mean, and not two thirds of it."""
    mean, divisor = weighted_mean(iter([(10, double(3.0)), (10, double(5.0))]), torch.Size([1]))
    assert (mean.item(), divisor) == (4.0, 20)


@given(st.lists(WEIGHTS, min_size=1, max_size=7), st.floats(-1e30, 1e30), FLOATS)
@example([1, 2], 0.1, 0.1)
@example([3, 3, 3], 0.1, 1.0)
def test_identical_inputs_give_exactly_the_input(weights: list[int], wide: float, narrow: float) -> None:
    value = double(wide, narrow)
    mean, divisor = weighted_mean([(weight, value.clone()) for weight in weights], value.shape)
    assert mean.tolist() == value.tolist()
    assert divisor == sum(weights)


@given(st.lists(st.tuples(WEIGHTS, st.floats(-1e6, 1e6)), min_size=1, max_size=6), st.randoms())
def test_order_matters_only_through_rounding(silos: list[tuple[int, float]], random: Any) -> None:
    shuffled = random.sample(silos, len(silos))
    results = [weighted_mean([(w, double(v)) for w, v in rows], torch.Size([1])) for rows in (silos, shuffled)]
    largest = max(abs(value) for _, value in silos)
    exact = math.fsum(w * v for w, v in silos) / sum(w for w, _ in silos)
    for mean, divisor in results:
        assert divisor == sum(weight for weight, _ in silos)
        assert mean.item() == pytest.approx(exact, rel=0, abs=1e-14 * largest)


def test_inputs_are_left_as_they_are() -> None:
    inputs = [double(1.0, 2.0), double(3.0, 5.0)]
    weighted_mean([(1, inputs[0]), (2, inputs[1])], torch.Size([2]))
    assert [value.tolist() for value in inputs] == [[1.0, 2.0], [3.0, 5.0]]


@pytest.mark.parametrize("weights", [[], [0], [5, 0], [5, -5], [-1]])
def test_nobody_or_a_weight_of_nothing_is_an_error(weights: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*weight[^\n]*$"):
        weighted_mean([(weight, double(1.0)) for weight in weights], torch.Size([1]))


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ([(1, 0), (0, 1)], 0.0),
        ([(1, 0), (1, 0), (1, 0)], 1.0),
        ([(1, 0), (-1, 0)], -1.0),
        ([(1, 0), (0, 1), (-1, 0)], -1 / 3),  # pairs: 0, -1, 0
        ([(3, 4), (4, 3)], 24 / 25),
        ([(7, 7)], 1.0),
    ],
)
def test_mean_cosine_by_hand(vectors: list[tuple[int, int]], expected: float) -> None:
    units = [double(*vector) / math.hypot(*vector) for vector in vectors]
    squared = torch.stack(units).sum(0).square().sum().item()
    assert mean_cosine(squared, len(vectors)) == pytest.approx(expected, abs=1e-12)


# ---- digests


def test_digest_is_a_known_number() -> None:
    """Little-endian bytes of 1.0f are 00 00 80 3f; the rest is JSON: two lines of any language give the same."""
    assert blake3(b"").hexdigest() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"  # the paper's
    inner = f"blake3:{blake3(np.array([1.0], dtype='<f4').tobytes()).hexdigest()}"
    expected = hashlib.sha256(json.dumps([["a", "torch.float32", [1], inner]]).encode()).hexdigest()
    assert digest_tensors([("a", torch.tensor([1.0]))]) == expected


def test_digest_sees_name_shape_dtype_and_every_bit() -> None:
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    flipped = value.clone().view(torch.int32)
    flipped[1, 1] ^= 1
    others = [
        [("b", value)],
        [("a", value.reshape(4))],
        [("a", value.reshape(1, 2, 2))],
        [("a", value.double())],
        [("a", value.view(torch.int32))],  # the same bytes under another dtype
        [("a", flipped.view(torch.float32))],
        [("a", value.T)],
        [("a", value), ("b", torch.zeros(1))],
        [("a", value), ("b", torch.tensor([-0.0]))],
        [],
    ]
    digests = [digest_tensors(tensors) for tensors in [[("a", value)], *others]]
    assert len(set(digests)) == len(digests)


def test_digest_depends_on_neither_order_nor_memory_layout() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.tensor(2.0)
    assert digest_tensors([("a", a), ("b", b)]) == digest_tensors([("b", b.clone()), ("a", a.T.contiguous().T)])
    assert digest_tensors([("e", torch.zeros(0, 3))]) != digest_tensors([("e", torch.zeros(3, 0))])
    parameter = torch.nn.Parameter(a.clone())
    assert digest_tensors([("a", parameter)]) == digest_tensors([("a", a)])


def test_a_digest_of_rows_needs_only_the_tensors_that_have_changed() -> None:
    tensors = {"a": torch.arange(6.0), "b": torch.tensor(2.0), "c": torch.zeros(2, 2)}
    rows = {name: tensor_row(name, value) for name, value in tensors.items()}
    assert digest_rows(rows.values()) == digest_tensors(tensors.items())
    tensors["b"].add_(1)
    assert digest_rows(rows.values()) != digest_tensors(tensors.items())
    rows["b"] = tensor_row("b", tensors["b"])
    assert digest_rows(reversed(rows.values())) == digest_tensors(tensors.items())
