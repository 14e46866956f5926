"""One pass over a piece: the compiled stages have the plain ones' bits, whatever the threads.

So has what a silo sends and takes over.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.outer import blocks, plain
from pretrain.outer.blocks import (
    Adopted,
    Change,
    Coded,
    NotSentError,
    OutOfRangeError,
    Rule,
    Stepped,
    Target,
    adopt,
    check_coded,
    code,
    squared_norms,
    take_steps,
)
from pretrain.outer.codec import CODECS, apply_change, check, decoded, encode
from pretrain.outer.moments import SecondMoment
from pretrain.outer.optimizer import MOMENTS, OuterOptimizer
from pretrain.outer.quantize import Parts
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
    assert squared_norms(codec, [(parts, base)], 2)[0] == pytest.approx(expected, rel=1e-14)


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


# ---- what a silo sends and takes over


def to_send(seed: int, *, feedback: bool) -> Change:
    base = odd_values(seed, 0.02)
    residual = odd_values(seed + 1, 1e-3) if feedback else None
    return Change(base=base, value=base - odd_values(seed + 2, 1e-3), residual=residual)


def coded_bits(changes: list[Change], found: list[tuple[Parts, float]]) -> list[Tensor]:
    residuals = [change.residual for change in changes if change.residual is not None]
    norms = [torch.tensor(squared, dtype=torch.float64) for _, squared in found]
    return [*(value for parts, _ in found for _, value in sorted(parts.items())), *residuals, *norms]


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("decay", [None, 1.0, 0.95])
@pytest.mark.parametrize("codec", CODECS)
def test_what_is_sent_has_the_bits_of_encode(
    codec: str, decay: float | None, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert blocks.stages is not plain, "numba is missing"
    monkeypatch.setattr(blocks, "RANGE_ELEMENTS", blocks.BLOCK_ELEMENTS)
    found = []
    for stages in (blocks.stages, plain):
        monkeypatch.setattr(blocks, "stages", stages)
        changes = [to_send(seed, feedback=decay is not None) for seed in (3, 7)]
        found.append(coded_bits(changes, code(codec, changes, decay or 0.0, num_threads)))
    changes, expected = [to_send(seed, feedback=decay is not None) for seed in (3, 7)], []
    for change in changes:
        parts = encode(codec, change.base, change.value, residual=change.residual, decay=decay or 0.0)
        squares = math.fsum(one * one for one in (change.base - change.value).double().view(-1).tolist())
        expected.append((parts, squares))
    for one, other, wanted in zip(*found, coded_bits(changes, expected), strict=True):
        assert same_bits(one, other)
        assert one.item() == pytest.approx(wanted.item(), rel=1e-14) if wanted.ndim == 0 else same_bits(one, wanted)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(1,), (128,), (3, 129), (2, 1 << 14)])
def test_any_size_is_sent(codec: str, shape: tuple[int, ...]) -> None:
    """Of values that lie in memory in another order."""
    value = torch.randn(shape[::-1], generator=torch.Generator().manual_seed(1))
    value = value.permute(*range(value.ndim - 1, -1, -1))
    [(parts, _)] = code(codec, [Change(base=torch.zeros(shape), value=value)])
    assert all(same_bits(parts[part], wanted) for part, wanted in encode(codec, torch.zeros(shape), value).items())


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("stages", ["fused", "plain"])
@pytest.mark.parametrize("codec", CODECS)
def test_what_is_not_finite_is_never_sent(
    codec: str, stages: str, place: int, feedback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "stages", plain if stages == "plain" else blocks.stages)
    for bad in (math.inf, math.nan):
        changes = [to_send(seed, feedback=feedback) for seed in (3, 7)]
        changes[1].value.view(-1)[place] = bad
        with pytest.raises(NotSentError) as caught:
            code(codec, changes, 0.5)
        number, reason = caught.value.args
        assert number == 1
        assert re.fullmatch(r"[^\n]*infinite or NaN[^\n]*; allowed: finite values", reason)


@pytest.mark.parametrize("stages", ["fused", "plain"])
@pytest.mark.parametrize("codec", CODECS)
def test_what_is_refused_is_what_the_format_refuses(codec: str, stages: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever byte of a tensor's parts is spoilt, in the same words; and each byte is looked at."""
    monkeypatch.setattr(blocks, "stages", plain if stages == "plain" else blocks.stages)
    shape, num_refused = torch.Size((5, 27)), 0  # one block and 7 elements more, half a byte behind them
    parts = encode(codec, torch.zeros(shape), odd_values(3, 1.0)[:5, :27].contiguous())
    for part, value in parts.items():
        for place in range(value.numel() * value.itemsize):
            for byte in (0x00, 0x08, 0x7F, 0x80, 0x88, 0xFF):
                spoilt = value.clone()
                spoilt.view(-1).view(torch.uint8)[place] = byte
                given = parts | {part: spoilt}
                expected, found = refusal(check, codec, given, shape), refusal(check_coded, codec, given, shape)
                assert found == expected
                num_refused += bool(found)
    assert num_refused > 4 * (codec != "e3m0")
    assert refusal(check_coded, codec, parts, torch.Size((5, 28))) == refusal(check, codec, parts, torch.Size((5, 28)))


def refusal(checks: Callable[[str, Parts, torch.Size], None], codec: str, parts: Parts, shape: torch.Size) -> str:
    try:
        checks(codec, parts, shape)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "fp32"])
def test_feedback_that_leads_out_of_range_is_never_sent(codec: str) -> None:
    """All three are finite, their sum is not."""
    whole = [torch.full((256,), value) for value in (1e38, -2e38, 3e38)]
    with pytest.raises(NotSentError, match="infinite or NaN"):
        code(codec, [Change(base=whole[0], value=whole[1], residual=whole[2])], 1.0)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("codec", CODECS)
def test_what_is_taken_over_has_the_bits_of_apply_change(
    codec: str, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "RANGE_ELEMENTS", blocks.BLOCK_ELEMENTS)
    changes, expected = [], []
    for seed in (3, 7):
        published = odd_values(seed, 0.02)
        parts = encode(codec, published, published - odd_values(seed + 1, 1e-3))
        if "scales" in parts:
            parts["scales"][5] = 0.0  # none of ours sends it, and it is allowed
        changes.append((published, parts))
        expected.append(published.clone())
        apply_change(codec, expected[-1], parts)
    for stages in (blocks.stages, plain):
        monkeypatch.setattr(blocks, "stages", stages)
        works = [Adopted(published=p, parts=parts, new=torch.full(SHAPE, math.nan)) for p, parts in changes]
        adopt(codec, works, num_threads)
        assert all(same_bits(one.new, wanted) for one, wanted in zip(works, expected, strict=True))
        assert all(same_bits(one.published, odd_values(seed, 0.02)) for one, seed in zip(works, (3, 7), strict=True))


def test_half_numbers_at_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Largest and smallest of fp32 and bf16, and what lies between two."""
    one = torch.tensor([3.4028235e38, 3.3895314e38, 3.394e38, 1e-45, 9.2e-41, 2**-126, 1.00390625, 1.01171875, 0.0])
    value = torch.cat([one, -one])
    found = []
    for stages in (blocks.stages, plain):
        monkeypatch.setattr(blocks, "stages", stages)
        changes = [Change(base=torch.zeros(18), value=value, residual=torch.full((18,), -0.0))]
        found.append(coded_bits(changes, code("bf16", changes, 1.0)))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
