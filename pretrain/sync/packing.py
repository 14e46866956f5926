"""What silos pass on among themselves: coded pieces and moments as bytes, whose layout both ends know, and words."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.exchange.lane import PeerLostError
from pretrain.host.foreign import loads, shown
from pretrain.outer.blocks import check_coded
from pretrain.outer.moments import Moment
from pretrain.outer.pieces import Piece
from pretrain.outer.quantize import QUANTIZERS, Parts


def num_bytes(codec: str, pieces: Sequence[Piece]) -> int:
    """Bytes of coded pieces."""
    return sum(size for piece in pieces for _, _, size in _layout(codec, piece))


def _layout(codec: str, piece: Piece) -> list[tuple[str, torch.dtype, int]]:
    """Name, dtype and bytes of each part of a coded piece, in the order in which they are sent."""
    assert piece.stop is not None
    layout = QUANTIZERS[codec].layout(piece.stop - piece.start)
    return [(part, dtype, number * dtype.itemsize) for part, (dtype, number) in sorted(layout.items())]


def pack(coded: Sequence[Parts]) -> list[Tensor]:
    """Coded pieces as bytes, where they are: they are sent one behind the other."""
    return [parts[part].contiguous().view(torch.uint8).view(-1) for parts in coded for part in sorted(parts)]


def length(data: Sequence[Tensor]) -> int:
    """Bytes of tensors of bytes."""
    return sum(map(len, data))


def unpack(data: Tensor, codec: str, pieces: Sequence[Piece]) -> list[Parts]:
    """Coded pieces from bytes, whose memory they keep; but for what lies where its type cannot."""
    layouts = [_layout(codec, piece) for piece in pieces]
    chunks = iter(data.split([size for layout in layouts for _, _, size in layout]))
    return [{part: _typed(next(chunks), dtype) for part, dtype, _ in layout} for layout in layouts]


def _typed(data: Tensor, dtype: torch.dtype) -> Tensor:
    return (data.clone() if data.storage_offset() % dtype.itemsize else data).view(dtype)


def joined(pieces: Iterable[Sequence[Piece]], coded: Iterable[Sequence[Parts]]) -> dict[str, Parts]:
    """Whole coded tensors from the pieces of all silos' parts, which are cut where every format's blocks end."""
    found: dict[str, list[tuple[int, Parts]]] = {}
    for of_silo, parts_of_silo in zip(pieces, coded, strict=True):
        for piece, parts in zip(of_silo, parts_of_silo, strict=True):
            found.setdefault(piece.name, []).append((piece.start, parts))
    whole = {name: [parts for _, parts in sorted(of, key=lambda row: row[0])] for name, of in found.items()}
    return {name: {part: torch.cat([one[part] for one in of]) for part in of[0]} for name, of in whole.items()}


def unpack_moments(data: Tensor, moments: Mapping[str, Moment]) -> dict[str, Parts]:
    """Moments from bytes, as `pack` lays them out."""
    chunks = iter(data.split([size for moment in moments.values() for _, _, size in _moment_layout(moment)]))
    return {
        name: {part: next(chunks).clone().view(dtype).view(shape) for part, (dtype, shape), _ in _moment_layout(moment)}
        for name, moment in moments.items()
    }


def _moment_layout(moment: Moment) -> list[tuple[str, tuple[torch.dtype, tuple[int, ...]], int]]:
    """Name, dtype and shape, and bytes of each part, in the order in which they are sent."""
    return [
        (part, (dtype, shape), dtype.itemsize * math.prod(shape))
        for part, (dtype, shape) in sorted(moment.layout.items())
    ]


def as_bytes(data: bytes) -> Tensor:
    """Bytes as a tensor of them."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def heard(silo: str, words: bytes, kinds: Mapping[str, type]) -> dict[str, Any]:
    """What another silo said, if it has just the keys of `kinds`, each of its type. Raises PeerLostError."""
    try:
        given = loads(words)
    except ValueError as error:
        raise PeerLostError(f"silo {silo}: what it said is not JSON: {shown(error)}") from None
    if not isinstance(given, dict) or {key: type(value) for key, value in given.items()} != dict(kinds):
        raise PeerLostError(f"silo {silo}: what it said is {shown(given)}; allowed: {', '.join(kinds)}")
    return given


def check_parts(silo: str, codec: str, parts: Parts, piece: Piece) -> None:
    """Raise PeerLostError unless what another silo sent of a piece is of the codec and finite."""
    assert piece.stop is not None
    try:
        check_coded(codec, parts, torch.Size([piece.stop - piece.start]))
    except ValueError as error:
        raise PeerLostError(f"silo {silo} sent a {piece.name} that cannot be used: {error}") from None
