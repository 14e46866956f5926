"""Several lanes: the leader deals its bytes out to the first ranks of its silo, each of which passes its share on."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.exchange.collective import Lane, PeerLostError

OVER = -1


class Lanes:
    """All lanes of a silo, seen from its leader, rank 0, who carries lane 0 itself."""

    def __init__(self, first: Lane, num_lanes: int, group: dist.ProcessGroup | None) -> None:
        """`group` has the silo's ranks 0 to `num_lanes` - 1, for these messages alone; unused with one lane."""
        self._first, self._num_lanes, self._group = first, num_lanes, group

    def swap(self, out: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send every silo its bytes, `out`, and return theirs, of `sizes`; ours stay out.

        Raises PeerLostError.
        """
        into = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        shares = [
            ([_share(t, i, self._num_lanes) for t in out], [_share(t, i, self._num_lanes) for t in into])
            for i in range(self._num_lanes)
        ]
        for lane, (mine, theirs) in enumerate(shares[1:], 1):
            dist.send(torch.tensor([len(t) for t in (*mine, *theirs)]), lane, self._group)
            _send(torch.cat(mine), lane, self._group)
        self._first.swap(*shares[0])
        for lane, (_, theirs) in enumerate(shares[1:], 1):
            failed = torch.empty(1, dtype=torch.int64)
            dist.recv(failed, lane, self._group)
            if failed:
                raise PeerLostError(bytes(_receive(int(failed), lane, self._group).numpy()).decode())
            arrived = _receive(sum(map(len, theirs)), lane, self._group)
            for share, part in zip(theirs, arrived.split([len(t) for t in theirs]), strict=True):
                share.copy_(part)
        return into

    def close(self, num_silos: int) -> None:
        """Tell the other ranks that it is over."""
        for lane in range(1, self._num_lanes):
            dist.send(torch.full((2 * num_silos,), OVER), lane, self._group)


def carry(make_lane: Callable[[], Lane], group: dist.ProcessGroup, num_silos: int) -> None:
    """What a rank other than the leader does: pass on what the leader deals out, until it is over.

    The lane is made when there is something to pass; whatever goes wrong with it, the leader is told.
    """
    lane = None
    while True:
        sizes = torch.empty(2 * num_silos, dtype=torch.int64)
        dist.recv(sizes, 0, group)
        if sizes[0] == OVER:
            return
        out_sizes, in_sizes = sizes[:num_silos].tolist(), sizes[num_silos:].tolist()
        out = _receive(sum(out_sizes), 0, group).split(out_sizes)
        into = torch.empty(sum(in_sizes), dtype=torch.uint8)
        error = b""
        try:
            lane = lane or make_lane()
            lane.swap(out, into.split(in_sizes))
        except (PeerLostError, dist.DistError) as lost:
            error = str(lost).encode()
        dist.send(torch.tensor([len(error)]), 0, group)
        _send(torch.frombuffer(bytearray(error), dtype=torch.uint8) if error else into, 0, group)


def _share(data: Tensor, lane: int, num_lanes: int) -> Tensor:
    cuts = [len(data) * part // num_lanes for part in range(num_lanes + 1)]
    return data[cuts[lane] : cuts[lane + 1]]


def _send(data: Tensor, rank: int, group: dist.ProcessGroup | None) -> None:
    if len(data):
        dist.send(data, rank, group)


def _receive(size: int, rank: int, group: dist.ProcessGroup | None) -> Tensor:
    data = torch.empty(size, dtype=torch.uint8)
    if size:
        dist.recv(data, rank, group)
    return data
