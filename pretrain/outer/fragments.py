"""Cut the parameters into fragments: sets of whole tensors that are synced together, each at its own step.

Streaming DiLoCo, https://arxiv.org/abs/2501.18512: the layers are dealt out by depth ("strided"), so that every
fragment has shallow and deep ones; what is in no layer (embeddings, head, last norm) has fragments of its own.
"""

import re
from collections.abc import Iterable, Mapping


def cut_fragments(num_elements: Mapping[str, int], num_fragments: int) -> list[list[str]]:
    """Every name in exactly one fragment; the same for every party, whatever the order of `num_elements`.

    A tensor is in layer i if i is the first dotted part of its name that is a number (`model.layers.3.mlp.up.weight`).
    S fragments share the layers, in order of their numbers, one layer each in turn; the rest is dealt out to the other
    fragments, largest tensor first, each to the smallest so far. S is the largest number with which the largest
    fragment is within a sixteenth of the least that it can be, so that a small norm gets no fragment of its own. None
    is larger than the whole rest or ceil(layers / (num_fragments - 1)) of the largest layers, whichever is more.

    One fragment has everything. With more fragments than layers and one, or than layers if there is no rest, all
    tensors are dealt out by size: the largest and the smallest fragment differ by the largest tensor at most.

    Names are sorted as one counts (layer 2 before 10). Raises ValueError if there are fewer tensors than fragments.
    """
    if not 1 <= num_fragments <= len(num_elements):
        raise ValueError(
            f"outer.num_fragments: {num_fragments} given; allowed: 1 to {len(num_elements)}, the number of tensors"
        )
    layers: dict[int, list[str]] = {}
    rest: list[str] = []
    for name in num_elements:
        number = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        (rest if number is None else layers.setdefault(number, [])).append(name)
    candidates = [_deal(num_elements, num_elements, num_fragments)]
    if 1 < num_fragments <= len(layers) + bool(rest):
        by_depth = [layers[number] for number in sorted(layers)]
        candidates = [
            _stride(by_depth, num_fragments - apart) + _deal(num_elements, rest, apart)
            for apart in range(bool(rest), min(len(rest), num_fragments - 1) + 1)
        ]
    largest = [max(sum(num_elements[name] for name in names) for names in fragments) for fragments in candidates]
    best = next(i for i, size in enumerate(largest) if 16 * size <= 17 * min(largest))
    return [sorted(names, key=_as_counted) for names in candidates[best]]


FACTORS = (".lora_A.", ".lora_B.")


def cut_factors(names: Iterable[str]) -> list[list[str]]:
    """Two fragments of an adapter: all factors A, and all factors B. Each name is one of the two."""
    given = sorted(names, key=_as_counted)
    return [[name for name in given if factor in name] for factor in FACTORS]


def sync_offsets(num_fragments: int, sync_interval_steps: int) -> list[int]:
    """Fragment p is synced after every inner step t with t mod `sync_interval_steps` == offset p.

    Spread evenly, fragment 0 at 0: alone it is synced at every multiple of the interval, which is plain DiLoCo. Raises
    ValueError if there are more fragments than steps.
    """
    if not 1 <= num_fragments <= sync_interval_steps:
        raise ValueError(
            f"outer.num_fragments: {num_fragments} given; allowed: 1 to outer.sync_interval_steps={sync_interval_steps}"
        )
    return [fragment * sync_interval_steps // num_fragments for fragment in range(num_fragments)]


def _stride(layers: list[list[str]], num_fragments: int) -> list[list[str]]:
    return [[name for layer in layers[first::num_fragments] for name in layer] for first in range(num_fragments)]


def _deal(num_elements: Mapping[str, int], names: Iterable[str], num_fragments: int) -> list[list[str]]:
    """Largest first, each to the fragment that is smallest so far; ties go by name and index."""
    fragments: list[list[str]] = [[] for _ in range(num_fragments)]
    sizes = [0] * num_fragments
    for name in sorted(names, key=lambda name: (-num_elements[name], name)):
        smallest = sizes.index(min(sizes))
        fragments[smallest].append(name)
        sizes[smallest] += num_elements[name]
    return fragments


def _as_counted(name: str) -> tuple[list[tuple[str, int]], str]:
    """Sort key: digits as numbers."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", name)], name
