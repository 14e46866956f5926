"""Run by launch.start.workers: Muon's steps on whole matrices, and on flat partitions; prints what they come to."""

import hashlib
import itertools
import json
from typing import Any

import torch
import torch.distributed as dist

from pretrain.silo.muon import MuonAdamW, Piece
from pretrain.silo.ranks import Ranks

SHAPES = [(8, 8), (8, 8), (8, 20), (20, 8), (33, 17), (8, 8), (3, 40)]
NUM_STEPS = 3


def values(seed: int) -> torch.Tensor:
    """Of all matrices, one behind the other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(rows * columns for rows, columns in SHAPES), generator=generator)


def stepped(ranks: Ranks, *, is_flat: bool) -> torch.Tensor:
    """All matrices after some steps: every rank has all of them, or an uneven stretch of their elements."""
    shapes = [torch.Size(shape) for shape in SHAPES]
    starts = [0, *itertools.accumulate(shape.numel() for shape in shapes)]
    whole = values(0)
    # Of three ranks the first has 2 ** 0 / 2 ** 3 of the elements, so that a matrix lies on two, and on all three.
    bounds = [0, *(starts[-1] >> left for left in reversed(range(ranks.num_ranks)))]
    first, last = bounds[ranks.rank : ranks.rank + 2] if is_flat else (0, starts[-1])
    if is_flat:
        parameters = [torch.nn.Parameter(whole[first:last].clone())]
    else:
        split = whole.split([shape.numel() for shape in shapes])
        parameters = [torch.nn.Parameter(v.clone().view(s)) for v, s in zip(split, shapes, strict=True)]
    group = {"params": parameters, "muon": True, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}
    vector = torch.nn.Parameter(torch.zeros(2))
    adamw = torch.optim.AdamW([{"params": [vector], "muon": False}])
    optimizer = MuonAdamW(group, adamw)
    pieces = []
    for shape, start in zip(shapes, starts, strict=False):
        begin, end = max(first, start), min(last, start + shape.numel())
        span = {"start": begin - start, "offset": begin - first, "num_elements": end - begin}
        pieces.append(Piece(shape=shape, **(span if begin < end else dict.fromkeys(span, 0))))
    optimizer.place({parameters[0]: pieces} if is_flat else {}, ranks.device)
    for step in range(NUM_STEPS):
        gradient = values(step + 1)
        if is_flat:
            parameters[0].grad = gradient[first:last]
        else:
            for parameter, part in zip(parameters, gradient.split([s.numel() for s in shapes]), strict=True):
                parameter.grad = part.view(parameter.shape)
        optimizer.step()
    found = torch.zeros_like(whole)
    found[first:last] = torch.cat([parameter.detach().flatten() for parameter in parameters])
    if is_flat:
        dist.all_reduce(found)
    return found


def main() -> None:
    """Both, on every rank; one says what all have found, as lines of several would run into each other."""
    ranks, found = Ranks(), []
    for is_flat in (False, True):
        digest = hashlib.sha256(stepped(ranks, is_flat=is_flat).numpy().tobytes()).hexdigest()
        of_ranks: list[Any] = [None] * ranks.num_ranks
        dist.all_gather_object(of_ranks, (ranks.rank, is_flat, digest))
        found += of_ranks
    if ranks.is_leader:
        print("RESULT", json.dumps(found), flush=True)
    ranks.close()


if __name__ == "__main__":
    main()
