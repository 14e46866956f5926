"""Cut a fragment among those that merge it: pieces of tensors, each coded, sent and merged by itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from pretrain.outer.quantize import CHUNK


@dataclass(frozen=True)
class Piece:
    """A tensor, or a range of its elements as a flat tensor: what is coded, sent and merged by itself."""

    name: str
    start: int = 0
    stop: int | None = None
    """None: the whole tensor in its own shape."""

    @property
    def key(self) -> str:
        """Its name in a payload."""
        return self.name if self.stop is None else f"{self.name}[{self.start}:{self.stop}]"

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of a contiguous tensor, which it shares its memory with."""
        return tensor if self.stop is None else tensor.view(-1)[self.start : self.stop]


def cut_pieces(num_elements: Mapping[str, int], num_parts: int) -> list[list[Piece]]:
    """Cut the tensors, one behind the other in the order given, into parts of equal size, each with its pieces.

    Cuts are at multiples of top-k's chunk within a tensor, which all formats' blocks divide: a tensor cut in pieces
    decodes to the same bits as a whole one. So a part is off its share by half a chunk at either end.
    """
    total = sum(num_elements.values())
    parts: list[list[Piece]] = [[] for _ in range(num_parts)]
    offset = 0  # of the tensor in the row of all
    for name, size in num_elements.items():
        cuts = [total * part // num_parts - offset for part in range(1, num_parts)]
        cuts = [0, *(min(max(0, (cut + CHUNK // 2) // CHUNK * CHUNK), size) for cut in cuts), size]
        for part, (start, stop) in enumerate(pairwise(cuts)):
            if start < stop:
                parts[part].append(Piece(name, start, stop))
        offset += size
    return parts
