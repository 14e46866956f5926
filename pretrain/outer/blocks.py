"""One pass over a fragment: every block of elements is decoded, merged, stepped, coded and published in the cache.

What a commit does to an element is one loop over blocks; threads take ranges of them. So it is with what a silo does to
one before a commit (`code`) and after it (`adopt`). The stages of a block are fused.py's, compiled, or plain.py's where
numba is missing: slower, and the same to the last bit. So are all sums, which are of chunks in a fixed order, and exact
from there on (`math.fsum`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.outer.codec import check, check_layout
from pretrain.outer.optimizer import OuterOptimizer
from pretrain.outer.plain import Importance, array, arrays
from pretrain.outer.quantize import CHUNK, QUANTIZERS, Parts
from pretrain.outer.threads import in_threads

R = TypeVar("R")
Range = tuple[list[float], list[float], Tensor | None]
"""Sums of squares of a range's chunks, of update and of directions; and the scalar products in it."""

stages: Any
slower: str
"""Why merging is slower than it could be here, for whoever starts to say once; or ""."""
try:
    from pretrain.outer import fused as stages

    slower = "" if stages.CACHES else "numba finds no folder that can be written, and compiles anew (NUMBA_CACHE_DIR)"
except ImportError as missing:
    from pretrain.outer import plain as stages

    slower = f"numba is not here, so coding and merging take several times as long: {missing}"

BLOCK_ELEMENTS = 1 << 16  # smaller ones wait for Python's lock between their stages, larger ones leave the caches
RANGE_ELEMENTS = 1 << 20  # what a thread takes at a time


class OutOfRangeError(ValueError):
    """The outer step of a piece, whose number is given, leaves the range of fp32."""


class NotSentError(ValueError):
    """A change, whose number is given, has what does not travel; then comes the reason."""


def _ranges(num_elements: int) -> list[tuple[int, int]]:
    return [(start, min(start + RANGE_ELEMENTS, num_elements)) for start in range(0, num_elements, RANGE_ELEMENTS)]


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + BLOCK_ELEMENTS, stop)) for first in range(start, stop, BLOCK_ELEMENTS))


def _over_ranges(sizes: Sequence[int], function: Callable[[int, int, int], R], num_threads: int) -> list[list[R]]:
    """What `function` makes of each tensor's ranges, from the tensor's number, start and stop, in their order.

    Few elements are not worth a thread.
    """
    tasks = [(number, *bounds) for number, size in enumerate(sizes) for bounds in _ranges(size)]
    found: list[list[R]] = [[] for _ in sizes]
    num_useful = max(1, min(num_threads, sum(sizes) // RANGE_ELEMENTS))
    for (number, *_), one in zip(tasks, in_threads(lambda task: function(*task), tasks, num_useful), strict=True):
        found[number].append(one)
    return found


def _exact_sum(of_ranges: Iterable[Iterable[float]]) -> float:
    """Of the sums of all chunks."""
    return math.fsum(chain.from_iterable(of_ranges))


def _num_chunks(num_elements: int) -> int:
    return -(-num_elements // CHUNK)


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A silo's coded pseudo-gradient of a piece, and how it counts in the merge."""

    parts: Parts
    base: Tensor
    """What it was coded against, fp32 of the piece's shape."""
    weight: int = 1
    """0: it does not count."""
    factor: float = 1.0
    """What it is multiplied by."""
    unit: float = 0.0
    """One over the norm of the silo's whole pseudo-gradient, or 0."""
    importance: tuple[Tensor, Tensor, int] | None = None
    """Second moments of the tensor: factors of each row and column, fp32; and the piece's first element."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What is the same for all elements of a version."""

    codec: str
    """Of the deliveries."""
    downlink_codec: str
    optimizer: OuterOptimizer
    lr: float
    count: int
    """Outer steps of these parameters, this one included."""
    merge: Callable[[Tensor], Tensor] | None = None
    """(num_silos, elements) in float64 to what is merged of them; None: their weighted mean."""
    gram: bool = False
    """Whether scalar products of all pairs are asked for, (num_silos, num_silos), or the sum of units squared."""


@dataclass(kw_only=True)
class Stepped:
    """What came of a piece."""

    change: Parts
    """Of the published parameters, coded."""
    update_squared: list[float] = field(default_factory=list)
    """Of chunks of the update."""
    units_squared: list[float] = field(default_factory=list)
    """Of chunks of the sum of the silos' directions."""
    gram: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a piece's outer step changes in place: contiguous fp32."""

    published: Tensor
    target: Tensor
    """Where the outer steps have led; the published tensor itself if its codec leaves nothing out."""
    moments: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a silo is about to send of a piece: fp32 tensors of one shape, contiguous but for the value."""

    base: Tensor
    value: Tensor
    """What training made of it."""
    residual: Tensor | None = None
    """Error feedback: what was left out before, and afterwards what is; None: it is lost."""


def code(codec: str, changes: Sequence[Change], decay: float = 0.0, num_threads: int = 1) -> list[tuple[Parts, float]]:
    """Code what silos send: the parts of each change, and the squared norm of its difference `base - value`, without
    what was left out before.

    Parts and residual have the bits of `codec.encode`. Of fp32, the parts are the values themselves, uncopied where
    they are contiguous. Raises NotSentError; the residuals are of no use then.
    """
    works = [_ToSend(codec, number, change) for number, change in enumerate(changes)]

    def of_range(number: int, start: int, stop: int) -> list[float]:
        return works[number].of_range(start, stop, decay)

    sums = _over_ranges([len(work.base) for work in works], of_range, num_threads)
    return [(work.parts, _exact_sum(of_work)) for work, of_work in zip(works, sums, strict=True)]


class _ToSend:
    """One change's."""

    def __init__(self, codec: str, number: int, change: Change) -> None:
        self.codec, self.number, value = codec, number, change.value.contiguous()
        self.base, self.value = array(change.base), array(value)
        self.residual = None if change.residual is None or codec == "fp32" else array(change.residual)
        self.parts = {"values": value} if codec == "fp32" else _empty_parts(codec, value)
        self.coded = arrays(self.parts)

    def of_range(self, start: int, stop: int, decay: float) -> list[float]:
        """Code some elements: sums of squares of their differences."""
        found: list[float] = []
        scratch = np.empty(BLOCK_ELEMENTS, np.float32)
        for first, last in _blocks(start, stop):
            difference = scratch[: last - first]
            try:
                stages.code(
                    self.codec, self.base, self.value, self.residual, decay, first, last, difference, self.coded
                )
            except ValueError as error:
                raise NotSentError(self.number, str(error)) from None
            found += _sums(difference)
        return found


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """What is made of a published piece: contiguous fp32 tensors of one shape."""

    published: Tensor
    parts: Parts
    """What changes of it, checked."""
    new: Tensor
    """Where it goes; shares no memory with the published one."""


def adopt(codec: str, changes: Sequence[Adopted], num_threads: int = 1) -> None:
    """Write new tensors, what the parts make of the published ones, with the bits of `codec.apply_change`."""
    works = [(array(one.published), arrays(one.parts), array(one.new)) for one in changes]

    def of_range(number: int, start: int, stop: int) -> None:
        published, parts, new = works[number]
        for first, last in _blocks(start, stop):
            of_block = new[first:last]
            of_block[:] = (parts["values"] if codec == "fp32" else published)[first:last]
            if codec != "fp32":
                stages.subtract(codec, parts, of_block, first, last)

    _over_ranges([len(new) for _, _, new in works], of_range, num_threads)


def _empty_parts(codec: str, like: Tensor) -> Parts:
    """Memory for what is coded of a tensor; of fp32 it has the tensor's own shape."""
    if codec == "fp32":
        return {"values": torch.empty_like(like)}
    layout = QUANTIZERS[codec].layout(like.numel())
    return {part: torch.empty(length, dtype=dtype) for part, (dtype, length) in layout.items()}


def check_coded(codec: str, parts: Parts, shape: torch.Size) -> None:
    """Raise ValueError for parts of another party, in the words of `codec.check`."""
    check_layout(codec, parts, shape)
    if not stages.is_valid(codec, arrays(parts), shape.numel()):
        check(codec, parts, shape)


def squared_norms(codec: str, coded: Sequence[tuple[Parts, Tensor]], num_threads: int = 1) -> list[float]:
    """Squared norms of coded pseudo-gradients of tensors, each of which comes with what it was coded against."""
    works = [(arrays(parts), array(base)) for parts, base in coded]

    def of_range(number: int, start: int, stop: int) -> list[float]:
        found: list[float] = []
        scratch = np.empty(BLOCK_ELEMENTS)
        for first, last in _blocks(start, stop):
            stages.decode(codec, *works[number], first, last, value := scratch[: last - first])
            found += _sums(value)
        return found

    return [_exact_sum(sums) for sums in _over_ranges([len(base) for _, base in works], of_range, num_threads)]


def mean_of(codec: str, weighted: Sequence[tuple[int, Parts]], shape: torch.Size, num_threads: int = 1) -> Parts:
    """The weighted mean of coded differences of a tensor, in float64, rounded to fp32 and coded again."""
    of_silos = [(weight, arrays(parts)) for weight, parts in weighted]
    merged = torch.empty(shape)
    found = array(merged)

    def of_range(_: int, start: int, stop: int) -> None:
        scratch = np.empty((2, BLOCK_ELEMENTS))
        for first, last in _blocks(start, stop):
            value, mean = scratch[:, : last - first]
            mean.fill(0)
            divisor = 0
            for weight, parts in of_silos:
                divisor += weight
                stages.decode(codec, parts, None, first, last, value)
                stages.add_mean(value, weight / divisor, mean)
            found[first:last] = mean

    _over_ranges([len(found)], of_range, num_threads)
    [(parts, _)] = code(codec, [Change(base=merged, value=torch.zeros(shape))], num_threads=num_threads)
    return parts


def take_steps(rule: Rule, pieces: Sequence[tuple[Target, Sequence[Coded]]], num_threads: int = 1) -> list[Stepped]:
    """Merge what silos have delivered of each piece and take its outer step, in place.

    Raises OutOfRangeError if a step leaves the range of fp32; what is changed in place is of no use then.
    """
    works = [_Work(rule, number, target, coded) for number, (target, coded) in enumerate(pieces)]

    def of_range(number: int, start: int, stop: int) -> Range:
        return works[number].of_range(start, stop)

    found = _over_ranges([len(work.published) for work in works], of_range, num_threads)
    for work, of_work in zip(works, found, strict=True):
        for one in of_work:
            work.add(*one)
    return [work.stepped for work in works]


class _Work:
    """One piece's."""

    def __init__(self, rule: Rule, number: int, target: Target, coded: Sequence[Coded]) -> None:
        self.rule, self.number, self.coded = rule, number, coded
        self.published, self.target = array(target.published), array(target.target)
        self.moments = {kind: array(value) for kind, value in target.moments.items()}
        whole = rule.downlink_codec == "fp32"  # what is published is the change itself, and needs no second place
        change = {"values": target.published} if whole else _empty_parts(rule.downlink_codec, target.published)
        self.stepped, self.change = Stepped(change=change), arrays(change)
        self.of_silos = [(arrays(one.parts), array(one.base)) for one in coded]
        self.importances: list[Importance | None] = [
            one.importance and (one.importance[0].numpy(), one.importance[1].numpy(), one.importance[2])
            for one in coded
        ]

    def add(self, update_squared: list[float], units_squared: list[float], gram: Tensor | None) -> None:
        done = self.stepped
        done.update_squared += update_squared
        done.units_squared += units_squared
        if gram is not None:
            done.gram = gram if done.gram is None else done.gram + gram

    def of_range(self, start: int, stop: int) -> Range:
        """Take the steps of some elements: what `add` takes."""
        scratch = _Scratch(len(self.coded) if self.rule.merge or self.rule.gram else 1)
        update_squared: list[float] = []
        units_squared: list[float] = []
        gram = torch.zeros(len(self.coded), len(self.coded), dtype=torch.float64) if self.rule.gram else None
        for first, last in _blocks(start, stop):
            merged, units = self._merged(first, last, scratch, gram)
            update_squared += _sums(self._step(first, last, merged, scratch))
            units_squared += [] if self.rule.gram else _sums(units)
        return update_squared, units_squared, gram

    def _merged(self, start: int, stop: int, scratch: "_Scratch", gram: Tensor | None) -> tuple[NDArray, NDArray]:
        """A block's merged pseudo-gradient, and the sum of the silos' directions."""
        mean, total, units = (whole[: stop - start] for whole in scratch.sums)
        values, divisor = scratch.values[:, : stop - start], 0
        scratch.sums.fill(0)
        for index, (one, importance) in enumerate(zip(self.coded, self.importances, strict=True)):
            value = values[min(index, len(values) - 1)]
            stages.decode(self.rule.codec, *self.of_silos[index], start, stop, value)
            if one.unit:
                stages.add_scaled(value, one.unit, units)
            if one.factor != 1:
                value *= one.factor
            divisor += one.weight
            if one.weight and importance:
                stages.add_importance(value, importance, start, one.weight, mean, total)
            elif one.weight:
                stages.add_mean(value, one.weight / divisor, mean)
        of_silos = torch.from_numpy(values)
        if gram is not None:
            gram += of_silos @ of_silos.T
        return self.rule.merge(of_silos).numpy() if self.rule.merge else mean, units

    def _step(self, start: int, stop: int, merged: NDArray, scratch: "_Scratch") -> NDArray:
        """Take a block's outer step and publish it; returns its update."""
        new, update = (whole[: stop - start] for whole in scratch.steps)
        rule, published = self.rule, self.published
        of_tensor = (published, self.target, self.moments, start, stop)
        if not stages.step(rule.optimizer, merged, *of_tensor, new, update, lr=rule.lr, count=rule.count):
            raise OutOfRangeError(self.number)
        stages.publish(rule.downlink_codec, published, new, start, stop, self.change)
        if self.target is not published:
            self.target[start:stop] = new
        return update


class _Scratch:
    """What one thread needs for one block after another."""

    def __init__(self, num_values: int) -> None:
        self.values = np.empty((num_values, BLOCK_ELEMENTS))
        self.sums = np.empty((3, BLOCK_ELEMENTS))
        self.steps = np.empty((2, BLOCK_ELEMENTS), np.float32)


def _sums(value: NDArray) -> list[float]:
    """Sums of squares of its chunks."""
    sums = np.empty(_num_chunks(len(value)))
    stages.sums_of_squares(value, sums)
    return sums.tolist()
