"""One pass over a piece: the compiled stages have the plain ones' bits, whatever the threads."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.outer import blocks, plain
from pretrain.outer.blocks import Coded, OutOfRangeError, Rule, Stepped, Target, squared_norm, take_steps
from pretrain.outer.codec import CODECS, decoded, encode
from pretrain.outer.moments import SecondMoment
from pretrain.outer.optimizer import MOMENTS, OuterOptimizer
from pretrain.outer.robust import coordinate_median
from tests.support import ROOT
from tests.unit.outer.test_outer import same_bits

NESTEROV = OuterOptimizer(name="nesterov", momentum=0.9)
RULE = Rule(codec="int4", downlink_codec="int4", optimizer=NESTEROV, lr=0.7, count=3)
SHAPE = (301, 257)  # no whole block, chunk or range


def odd_values(seed: int, size: float) -> Tensor:
    """Normal, with zeros of both signs, a block of zeros, subnormal and large numbers."""
    value = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * size
    flat = value.view(-1)
    flat[::97], flat[1::89], flat[2::83], flat[3::7919] = 0.0, -0.0, 1e-41, 1e4
    flat[256:512] = 0.0
    return value


def work(rule: Rule, *, importance: bool = False, norms: bool = True) -> tuple[Target, list[Coded]]:
    published = odd_values(0, 0.02)
    moments = {kind: odd_values(1, 0.001).abs() for kind in MOMENTS[rule.optimizer.name]}
    target = published if rule.downlink_codec == "fp32" else published + odd_values(2, 1e-4)
    coded = []
    for seed in (3, 4, 5):
        told = SecondMoment(torch.Size(SHAPE))
        factors = told.factors(told.encode(odd_values(seed + 10, 1e-3).square()))
        coded.append(
            Coded(
                parts=encode(rule.codec, published, published - odd_values(seed, 1e-3)),
                base=published.clone(),
                weight=seed,
                factor=1.0 if seed == 3 else 1 / seed,
                unit=1 / seed if norms else 0.0,
                importance=(*factors, 0) if importance else None,
            )
        )
    return Target(published=published, target=target, moments=moments), coded


def bits(done: Stepped, target: Target) -> list[Any]:
    tensors = [*done.change.values(), target.published, target.target, *target.moments.values()]
    return [tensors, done.update_squared, done.units_squared, done.gram]


def assert_same(one: list[Any], other: list[Any]) -> None:
    assert all(same_bits(a, b) for a, b in zip(one[0], other[0], strict=True))
    assert one[1:3] == other[1:3]
    assert (one[3] is None and other[3] is None) or torch.equal(one[3], other[3])


def both_ways(monkeypatch: pytest.MonkeyPatch, rule: Rule, **how: Any) -> None:
    assert blocks.stages is not plain, "numba is missing"
    found = []
    for stages in (blocks.stages, plain):
        monkeypatch.setattr(blocks, "stages", stages)
        target, coded = work(rule, **how)
        found.append(bits(take_steps(rule, [(target, coded)])[0], target))
    assert_same(*found)


@pytest.mark.parametrize("downlink", CODECS)
@pytest.mark.parametrize("uplink", CODECS)
def test_every_pair_of_codecs(uplink: str, downlink: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both_ways(monkeypatch, replace(RULE, codec=uplink, downlink_codec=downlink))


@pytest.mark.parametrize(
    ("optimizer", "how"),
    [
        (OuterOptimizer(name="sgd"), {}),
        (OuterOptimizer(name="adam"), {}),
        (NESTEROV, {"importance": True}),
    ],
)
def test_every_optimizer_and_mean(
    optimizer: OuterOptimizer, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    both_ways(monkeypatch, replace(RULE, optimizer=optimizer), **how)


def test_a_robust_merge_and_products(monkeypatch: pytest.MonkeyPatch) -> None:
    both_ways(monkeypatch, replace(RULE, merge=coordinate_median, gram=True), norms=False)


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_change_no_bit(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "RANGE_ELEMENTS", blocks.BLOCK_ELEMENTS)
    found = []
    for threads in (1, num_threads):
        targets, coded = zip(*(work(RULE) for _ in range(3)), strict=True)
        done = take_steps(RULE, list(zip(targets, coded, strict=True)), threads)
        found.append([bits(one, target) for one, target in zip(done, targets, strict=True)])
    for one, other in zip(*found, strict=True):
        assert_same(one, other)


def test_the_mean_and_the_step_by_hand() -> None:
    """(1 x 4 + 3 x 8) / 4 = 7; velocity 7; 10 - 0.5 (7 + 0.5 x 7) = 4.75; directions 4 / 2 + 8 / 4 = 4."""
    rule = replace(RULE, codec="fp32", downlink_codec="fp32", optimizer=replace(NESTEROV, momentum=0.5), lr=0.5)
    published = torch.tensor([10.0])
    target = Target(published=published, target=published, moments={"velocity": torch.zeros(1)})
    coded = [
        Coded(parts={"values": torch.tensor([local])}, base=torch.tensor([10.0]), weight=weight, unit=unit)
        for local, weight, unit in ((6.0, 1, 1 / 2), (2.0, 3, 1 / 4))
    ]
    [done] = take_steps(rule, [(target, coded)])
    assert [published.item(), done.change["values"].item(), target.moments["velocity"].item()] == [4.75, 4.75, 7.0]
    assert [sum(done.update_squared), sum(done.units_squared)] == [5.25**2, 16.0]


@pytest.mark.parametrize("codec", CODECS)
def test_the_norm_is_that_of_what_is_decoded(codec: str) -> None:
    base = odd_values(0, 0.02)
    parts = encode(codec, base, base - odd_values(1, 1e-3))
    expected = math.fsum(value * value for value in decoded(codec, base, parts).view(-1).tolist())
    assert squared_norm(codec, parts, base, 2) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("codec", CODECS)
def test_an_outer_step_that_is_too_long_for_fp32_is_noticed(codec: str) -> None:
    """From 3e38 to -3e38: both are finite, the change is not."""
    rule = replace(RULE, codec="fp32", downlink_codec=codec, optimizer=OuterOptimizer(name="sgd"), lr=1.0)
    value, coded = torch.full((4,), 3e38), Coded(parts={"values": torch.full((4,), -3e38)}, base=torch.full((4,), 3e38))
    with pytest.raises(OutOfRangeError):
        take_steps(rule, [(Target(published=value, target=value.clone(), moments={}), [coded])])


def said_of(code: str, **environment: str) -> str:
    code += "; from pretrain.outer import blocks; print(blocks.slower)"
    command = [sys.executable, "-c", code]
    return subprocess.check_output(command, cwd=ROOT, env=os.environ | environment, text=True)


def test_without_numba_it_goes_on_and_says_so() -> None:
    said = said_of("import sys; sys.modules['numba'] = None")
    assert said.startswith("numba is not here, so coding and merging take several times as long: ")


def test_without_a_folder_for_machine_code_it_says_so() -> None:
    assert said_of("pass") == "\n"
    locators = "from numba.core.caching import CacheImpl; CacheImpl._locator_classes = []"
    assert said_of(locators).startswith("numba finds no folder that can be written, and compiles anew")
