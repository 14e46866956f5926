"""Pieces: every element once, parts of equal size, and the same bits as whole tensors in every format."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.outer.codec import CODECS, apply_change, decoded, encode
from pretrain.outer.merge import mean_cosine, unit_sum_squared
from pretrain.outer.pieces import Piece, cut_pieces
from pretrain.outer.quantize import CHUNK

SIZES = st.lists(st.integers(1, 5 * CHUNK), min_size=1, max_size=6)


@given(SIZES, st.integers(1, 5))
def test_pieces_cover_every_element_once(sizes: list[int], num_parts: int) -> None:
    num_elements = {f"t{index}": size for index, size in enumerate(sizes)}
    parts = cut_pieces(num_elements, num_parts)
    assert len(parts) == num_parts
    seen = {name: torch.zeros(size) for name, size in num_elements.items()}
    for part in parts:
        for piece in part:
            piece.of(seen[piece.name]).add_(1)
            assert piece.start % CHUNK == 0
    assert all((times == 1).all() for times in seen.values())
    # A part is off its share by half a chunk at either end.
    shares = [sum(piece.stop - piece.start for piece in part) for part in parts]
    assert max(abs(share - sum(sizes) / num_parts) for share in shares) <= CHUNK + 1


def test_pieces_by_hand() -> None:
    assert cut_pieces({"a": 3 * CHUNK, "b": CHUNK}, 2) == [
        [Piece("a", 0, 2 * CHUNK)],
        [Piece("a", 2 * CHUNK, 3 * CHUNK), Piece("b", 0, CHUNK)],
    ]
    assert Piece("a", 0, 2 * CHUNK).key == "a[0:8192]"
    whole = torch.ones(2, 3)
    assert Piece("a").of(whole) is whole
    assert Piece("a").key == "a"


@pytest.mark.parametrize("codec", CODECS)
def test_a_tensor_in_pieces_decodes_to_the_same_bits(codec: str) -> None:
    generator = torch.Generator().manual_seed(3)
    base, value = (torch.randn(3, 5000, generator=generator) for _ in range(2))
    parts = encode(codec, base, value)
    whole, changed = decoded(codec, base, parts), base.clone()
    apply_change(codec, changed, parts)
    for part in cut_pieces({"t": base.numel()}, 4):
        for piece in part:
            coded = encode(codec, piece.of(base), piece.of(value))
            assert torch.equal(decoded(codec, piece.of(base), coded), piece.of(whole))
            after = piece.of(base).clone()
            apply_change(codec, after, coded)
            assert torch.equal(after, piece.of(changed))


def test_cosines_from_scalar_products() -> None:
    rows = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    # by hand: cosines 0, 1/sqrt(2), 1/sqrt(2); their mean is sqrt(2)/3
    assert mean_cosine(unit_sum_squared(rows @ rows.T), 3) == pytest.approx(2**0.5 / 3)
    with_zero = torch.cat([rows[:2], torch.zeros(1, 2, dtype=torch.float64)])
    assert unit_sum_squared(with_zero @ with_zero.T) == pytest.approx(2.0)  # a zero has no direction
