"""Fragments by depth: laws, and models that can be dealt out by hand."""

from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.outer.fragments import cut_fragments, sync_offsets


def model(layer_sizes: list[int], rest_sizes: list[int]) -> dict[str, int]:
    """Layers of two tensors (norm 1), and what is in no layer."""
    layers = {f"model.layers.{i}.mlp.weight": size for i, size in enumerate(layer_sizes)}
    norms = {f"model.layers.{i}.norm.weight": 1 for i in range(len(layer_sizes))}
    return {f"model.rest_{chr(97 + i)}.weight": size for i, size in enumerate(rest_sizes)} | layers | norms


def layers_of(fragment: list[str]) -> list[int]:
    return sorted({int(name.split(".")[2]) for name in fragment if ".layers." in name})


def totals(sizes: dict[str, int], fragments: list[list[str]]) -> list[int]:
    return [sum(sizes[name] for name in fragment) for fragment in fragments]


MODELS = st.builds(
    model, st.lists(st.integers(1, 1000), max_size=14), st.lists(st.integers(1, 9000), max_size=4)
).filter(bool)


def test_layers_are_dealt_out_by_depth_and_the_rest_is_apart() -> None:
    fragments = cut_fragments(model([100] * 12, [90, 80, 1]), 4)  # 3 for layers: 404 each; 2 would have 606
    assert [layers_of(fragment) for fragment in fragments] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11], []]
    assert fragments[3] == ["model.rest_a.weight", "model.rest_b.weight", "model.rest_c.weight"]
    assert fragments[1][-2:] == ["model.layers.10.mlp.weight", "model.layers.10.norm.weight"]  # counted: after 7


def test_large_embeddings_and_head_get_a_fragment_each_and_a_norm_none() -> None:
    sizes = model([100] * 12, [1000, 1000, 1])
    fragments = cut_fragments(sizes, 8)
    assert totals(sizes, fragments) == [202] * 6 + [1001, 1000]
    assert fragments[6] == ["model.rest_a.weight", "model.rest_c.weight"]


def test_one_fragment_has_everything() -> None:
    sizes = model([5, 5], [3])
    assert cut_fragments(sizes, 1) == [sorted(sizes)]


def test_few_layers_are_cut_by_size() -> None:
    sizes = model([50, 40], [30, 20])
    assert len(cut_fragments(sizes, 3)) == 3  # two layers and the rest
    assert totals(sizes, cut_fragments(sizes, 4)) == [50, 40, 30, 22]  # largest first; both norms to the 20
    assert totals(sizes, cut_fragments(sizes, 6)) == [50, 40, 30, 20, 1, 1]


@given(MODELS, st.data(), st.randoms())
def test_every_tensor_once_balanced_and_alike_for_everybody(
    sizes: dict[str, int], data: st.DataObject, random: Any
) -> None:
    num_fragments = data.draw(st.integers(1, len(sizes)))
    fragments = cut_fragments(sizes, num_fragments)
    assert len(fragments) == num_fragments
    assert all(fragments)
    assert sorted(name for fragment in fragments for name in fragment) == sorted(sizes)
    assert cut_fragments(dict(random.sample(sorted(sizes.items()), len(sizes))), num_fragments) == fragments

    found = totals(sizes, fragments)
    layer_sizes = [size + 1 for name, size in sizes.items() if name.endswith("mlp.weight")]
    rest = [size for name, size in sizes.items() if ".layers." not in name]
    if 1 < num_fragments <= len(layer_sizes) + bool(rest):
        of_layers = [fragment for fragment in fragments if layers_of(fragment)]
        stride = len(of_layers)
        assert [layers_of(f) for f in of_layers] == [list(range(i, len(layer_sizes), stride)) for i in range(stride)]
        assert all(len(f) == 2 * len(layers_of(f)) for f in of_layers)  # whole layers and nothing else
        shared = ceil(len(layer_sizes) / (num_fragments - bool(rest)))
        assert max(found) <= max(sum(rest), shared * max(layer_sizes))
        if rest:
            apart = found[stride:]
            assert max(apart) - min(apart) <= max(rest)
    else:
        assert num_fragments == 1 or max(found) - min(found) <= max(sizes.values())


@pytest.mark.parametrize("num_fragments", [0, 7, -1])
def test_as_many_fragments_as_tensors_at_most(num_fragments: int) -> None:
    with pytest.raises(ValueError, match="given") as caught:
        cut_fragments(model([5, 5], [3, 3]), num_fragments)
    assert str(caught.value) == f"outer.num_fragments: {num_fragments} given; allowed: 1 to 6, the number of tensors"


def test_offsets_by_hand() -> None:
    assert sync_offsets(1, 100) == [0]  # every multiple of 100: plain DiLoCo
    assert sync_offsets(4, 100) == [0, 25, 50, 75]
    assert sync_offsets(3, 10) == [0, 3, 6]
    assert sync_offsets(3, 3) == [0, 1, 2]


@given(st.integers(1, 500), st.data())
def test_offsets_are_spread_evenly(sync_interval_steps: int, data: st.DataObject) -> None:
    num_fragments = data.draw(st.integers(1, sync_interval_steps))
    offsets = sync_offsets(num_fragments, sync_interval_steps)
    gaps = [after - before for before, after in zip(offsets, [*offsets[1:], sync_interval_steps], strict=True)]
    assert offsets[0] == 0
    assert len(offsets) == num_fragments
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("num_fragments", [0, 11])
def test_as_many_fragments_as_steps_at_most(num_fragments: int) -> None:
    with pytest.raises(ValueError, match="given") as caught:
        sync_offsets(num_fragments, 10)
    assert str(caught.value) == (
        f"outer.num_fragments: {num_fragments} given; allowed: 1 to outer.sync_interval_steps=10"
    )
