"""Muon for the matrices inside the layers beside AdamW for the rest, with its work shared out over a silo's ranks."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Newton-Schulz as in torch.optim.Muon, which takes one matrix at a time: https://kellerjordan.github.io/posts/muon/
COEFFICIENTS, NUM_ITERATIONS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
BATCH_ELEMENTS = 1 << 22  # of matrices that a rank orthogonalizes at once; a larger one is by itself
CACHED_ELEMENTS = 1 << 17  # the same on a CPU, where products of small matrices alone gain by it (docs/log.md)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a rank's flat partition holds of a matrix, which may be nothing. Places are counted in elements."""

    shape: torch.Size
    """Of the whole matrix."""
    start: int
    """Where the piece begins in the flattened matrix."""
    offset: int
    """Where it begins in the partition."""
    num_elements: int

    @property
    def in_matrix(self) -> slice:
        """Its elements in the flattened matrix."""
        return slice(self.start, self.start + self.num_elements)

    @property
    def in_partition(self) -> slice:
        """Its elements in the partition."""
        return slice(self.offset, self.offset + self.num_elements)


@dataclass(frozen=True, kw_only=True)
class _Matrix:
    """One that is stepped: where this rank has its piece, and which elements of it every rank wants changed."""

    parameter: Tensor
    piece: Piece
    wanted: Sequence[slice]


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the group of matrices and AdamW for the rest, as the one optimizer that DeepSpeed takes.

    Muon needs whole matrices, and ZeRO hands its optimizer flat partitions; without ZeRO all ranks have all. Each rank
    orthogonalizes a share of the matrices, put together from all ranks' pieces, and hands every rank its piece of the
    change. What passes between ranks is in bf16, in which the iteration begins and ends, so nothing is lost by it.
    DeepSpeed's own Muon orthogonalizes the gradient before it is clipped, so that `clip_norm` would shrink the change
    itself.

    With `sums_gradients` a matrix's gradients are summed up, and a `correction` is added to each after that (control
    variates). Whoever takes the sum divides it, has the mean put down as `told`, and sets the correction.
    """

    def __init__(
        self, matrix_group: dict[str, Any], adamw: torch.optim.Optimizer, sums_gradients: bool = False
    ) -> None:
        """`matrix_group`: the parameters for Muon and their settings; `adamw` trains all others."""
        self._sums_gradients = sums_gradients
        self.matrices: list[nn.Parameter] = list(matrix_group["params"])
        self._adamw = adamw
        self._pieces: Mapping[Tensor, Sequence[Piece]] = {}
        self._wanted: dict[Tensor, list[list[slice]]] = {}
        self._device: torch.device | None = None
        self._rank, self._num_ranks = 0, 1
        super().__init__([matrix_group, *adamw.param_groups], {})

    def place(self, pieces: Mapping[Tensor, Sequence[Piece]], device: torch.device) -> None:
        """Share the work out over the ranks, all of which call this: say what each flat partition of this rank holds.

        All have the matrices in the same order. None are whole parameters, without ZeRO. `device` is where ranks talk
        and matrices are computed. Before, every rank does all, and a flat partition does not change.
        """
        self._pieces, self._device = pieces, device
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        own = [[piece.start, piece.num_elements] for found in pieces.values() for piece in found]
        if own:
            here = torch.tensor(own, device=device)
            everywhere = [torch.empty_like(here) for _ in range(self._num_ranks)]
            dist.all_gather(everywhere, here)
            spans = iter(torch.stack(everywhere, 1).tolist())
            for partition, found in pieces.items():
                of_partition = itertools.islice(spans, len(found))
                self._wanted[partition] = [[slice(i, i + n) for i, n in ranks] for ranks in of_partition]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all groups, all ranks together."""
        for group in self.param_groups:
            if group["muon"]:
                matrices = [matrix for p in group["params"] if p.grad is not None for matrix in self._matrices_of(p)]
                for by_owner in rounds([matrix.piece.shape for matrix in matrices], self._num_ranks):
                    self._step_muon([[matrices[i] for i in owned] for owned in by_owner], group)
        # DeepSpeed steps group by group and, when it loads a checkpoint, replaces groups and state.
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state = self.state
        self._adamw.step()

    def _matrices_of(self, parameter: Tensor) -> list[_Matrix]:
        """Those that a parameter is, or that a flat partition has pieces of."""
        kinds = ("momentum_buffer", *(("gradient_sum", "told", "correction") if self._sums_gradients else ()))
        for kind in kinds:
            if kind not in self.state[parameter]:
                self.state[parameter][kind] = torch.zeros_like(parameter)
        if parameter.ndim == 2:
            piece = Piece(shape=parameter.shape, start=0, offset=0, num_elements=parameter.numel())
            return [_Matrix(parameter=parameter, piece=piece, wanted=[piece.in_matrix] * self._num_ranks)]
        return [
            _Matrix(parameter=parameter, piece=piece, wanted=wanted)
            for piece, wanted in zip(self._pieces.get(parameter, ()), self._wanted.get(parameter, ()), strict=True)
        ]

    def _step_muon(self, by_owner: Sequence[Sequence[_Matrix]], group: Mapping[str, Any]) -> None:
        """Of some matrices, by the rank that orthogonalizes them."""
        directions = [[self._direction(matrix, group["momentum"]) for matrix in owned] for owned in by_owner]
        changes = self._orthogonalized(by_owner, directions)
        for matrix, change in zip(itertools.chain(*by_owner), itertools.chain(*changes), strict=True):
            rows, columns = matrix.piece.shape
            own = matrix.parameter.view(-1)[matrix.piece.in_partition]
            lr = group["lr"] * max(1.0, rows / columns) ** 0.5
            own.mul_(1 - group["lr"] * group["weight_decay"]).add_(change.to(own.device), alpha=-lr)

    def _direction(self, matrix: _Matrix, momentum: float) -> Tensor:
        """Where this rank's piece of a matrix should go, flat, bf16; takes the gradient up into the state."""
        assert matrix.parameter.grad is not None
        gradient = matrix.parameter.grad.reshape(-1)[matrix.piece.in_partition]
        state = {
            kind: value.view(-1)[matrix.piece.in_partition] for kind, value in self.state[matrix.parameter].items()
        }
        if self._sums_gradients:
            state["gradient_sum"].add_(gradient)
            gradient = gradient + state["correction"]
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum).to(device=self._device, dtype=torch.bfloat16)  # Nesterov

    def _orthogonalized(
        self, by_owner: Sequence[Sequence[_Matrix]], directions: Sequence[Sequence[Tensor]]
    ) -> list[list[Tensor]]:
        """This rank's piece of every matrix's orthogonal factor, flat, bf16, from all ranks' pieces of directions."""
        ranks, mine = range(self._num_ranks), by_owner[self._rank]
        if all(matrix.parameter.ndim == 2 for matrix in itertools.chain(*by_owner)):
            wholes = [
                found.view(matrix.piece.shape) for found, matrix in zip(directions[self._rank], mine, strict=True)
            ]
        else:
            wholes = [torch.empty(matrix.piece.shape, dtype=torch.bfloat16, device=self._device) for matrix in mine]
            self._exchange(directions, [_pieces_for(rank, mine, wholes) for rank in ranks])
        factors = orthogonalized(wholes)
        changes = [[torch.empty_like(direction) for direction in owned] for owned in directions]
        self._exchange([_pieces_for(rank, mine, factors) for rank in ranks], changes)
        return changes

    def _exchange(self, sent: Sequence[Sequence[Tensor]], places: Sequence[Sequence[Tensor]]) -> None:
        """Send each rank its tensors, and put what comes from each into its places; all are flat and bf16."""
        parts: Sequence[Tensor] = sent[0]
        into = list(itertools.chain(*places))
        if self._num_ranks > 1:
            to_each, from_each = ([sum(map(Tensor.numel, one)) for one in of_ranks] for of_ranks in (sent, places))
            incoming = torch.empty(sum(from_each), dtype=torch.bfloat16, device=self._device)
            outgoing = torch.cat([incoming[:0], *itertools.chain(*sent)])
            dist.all_to_all_single(incoming, outgoing, from_each, to_each)
            parts = incoming.split([place.numel() for place in into])
        for place, part in zip(into, parts, strict=True):
            place.copy_(part)


def _pieces_for(rank: int, matrices: Sequence[_Matrix], wholes: Sequence[Tensor]) -> list[Tensor]:
    """Flat, what a rank has or wants of each."""
    return [whole.reshape(-1)[matrix.wanted[rank]] for matrix, whole in zip(matrices, wholes, strict=True)]


def balanced(shapes: Sequence[torch.Size], num_ranks: int) -> list[list[int]]:
    """Which matrices each rank orthogonalizes: the costliest goes first, each to who has least to do."""
    costs = [shape.numel() * min(shape) for shape in shapes]
    loads, found = [0] * num_ranks, [list[int]() for _ in range(num_ranks)]
    for i in sorted(range(len(shapes)), key=lambda i: -costs[i]):
        rank = loads.index(min(loads))
        found[rank].append(i)
        loads[rank] += costs[i]
    return found


def rounds(shapes: Sequence[torch.Size], num_ranks: int) -> Iterator[list[list[int]]]:
    """The same in several rounds, so that no rank has more than a few at a time; those of one shape together."""
    parts = list[list[list[int]]]()
    for owned in balanced(shapes, num_ranks):
        of_rank = list[list[int]]()
        room = 0
        for i in sorted(owned, key=lambda i: (sorted(shapes[i]), i)):
            if (room := room - shapes[i].numel()) < 0:
                of_rank.append([])
                room = BATCH_ELEMENTS - shapes[i].numel()
            of_rank[-1].append(i)
        parts.append(of_rank)
    for together in itertools.zip_longest(*parts, fillvalue=list[int]()):
        yield list(together)


def orthogonalized(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The orthogonal factor of each matrix, bf16, by Newton-Schulz: those of one shape, or lying across, at once."""
    found: dict[int, Tensor] = {}
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(i)
    for (rows, columns), alike in by_shape.items():
        most = CACHED_ELEMENTS if matrices[0].device.type == "cpu" else BATCH_ELEMENTS
        at_once = max(1, most // (rows * columns))
        for some in (alike[first : first + at_once] for first in range(0, len(alike), at_once)):
            wide = [matrices[i].mT if len(matrices[i]) > rows else matrices[i] for i in some]
            factors = _newton_schulz(torch.stack(wide)) if len(wide) > 1 else [_newton_schulz(wide[0].contiguous())]
            for i, factor in zip(some, factors, strict=True):
                found[i] = factor.mT if len(matrices[i]) > rows else factor
    return [found[i] for i in range(len(matrices))]


def _newton_schulz(matrices: Tensor) -> Tensor:
    """(number, rows, columns) or one; no more rows than columns. What torch.optim.Muon makes of each, in bf16."""
    (a, b, c), added = COEFFICIENTS, torch.addmm if matrices.ndim == 2 else torch.baddbmm
    found = matrices.bfloat16()
    found = found / torch.linalg.matrix_norm(found, keepdim=True).clamp(min=EPS)
    for _ in range(NUM_ITERATIONS):
        gram = found @ found.mT
        found = added(found, added(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found
