"""Several lanes: the leader deals its bytes out to the first ranks of its silo, each of which passes its share on."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config.errors import ConfigError
from pretrain.exchange.lane import Lane, PeerLostError

OVER = -1


class Lanes:
    """All lanes of a silo, seen from its leader, rank 0, who carries lane 0 itself."""

    def __init__(self, first: Lane, num_lanes: int, group: dist.ProcessGroup | None) -> None:
        """`group` has the silo's ranks 0 to `num_lanes` - 1, for these messages alone; unused with one lane."""
        self._first, self._num_lanes, self._group = first, num_lanes, group
        self.leaves: Callable[[int, int], None] = lambda index, num_bytes: None
        """Is told how many bytes go to which silo of the roster, before they do."""

    def swap(self, out: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> list[Tensor]:
        """Send every silo its bytes, `out`, and return theirs, of `sizes`; ours stay out.

        What is sent to one may lie in several places. Raises PeerLostError.
        """
        for index, parts in enumerate(out):
            if parts:
                self.leaves(index, sum(map(len, parts)))
        into = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        shares = [
            ([_share(parts, i, self._num_lanes) for parts in out], [_share([t], i, self._num_lanes) for t in into])
            for i in range(self._num_lanes)
        ]
        for lane, (mine, theirs) in enumerate(shares[1:], 1):
            counts = [sum(map(len, parts)) for parts in (*mine, *theirs)]
            dist.send(torch.tensor(counts), lane, self._group)
            _send(torch.cat([part for parts in mine for part in parts]), lane, self._group)
        self._first.swap(shares[0][0], [share for (share,) in shares[0][1]])
        for lane, (_, theirs) in enumerate(shares[1:], 1):
            failed = torch.empty(1, dtype=torch.int64)
            dist.recv(failed, lane, self._group)
            if failed:
                raise PeerLostError(bytes(_receive(int(failed), lane, self._group).numpy()).decode())
            for (share,) in theirs:
                if len(share):
                    dist.recv(share, lane, self._group)
        return into

    def close(self, num_silos: int) -> None:
        """Tell the other ranks that it is over, and let go of the other silos."""
        for lane in range(1, self._num_lanes):
            dist.send(torch.full((2 * num_silos,), OVER), lane, self._group)
        self._first.close()


def carry(make_lane: Callable[[], Lane], group: dist.ProcessGroup, num_silos: int) -> None:
    """What a rank other than the leader does: pass on what the leader deals out, until it is over.

    The lane is made when there is something to pass; whatever goes wrong with it, the leader is told.
    """
    lane = None
    while True:
        sizes = torch.empty(2 * num_silos, dtype=torch.int64)
        dist.recv(sizes, 0, group)
        if sizes[0] == OVER:
            if lane:
                lane.close()
            return
        out_sizes, in_sizes = sizes[:num_silos].tolist(), sizes[num_silos:].tolist()
        out = _receive(sum(out_sizes), 0, group).split(out_sizes)
        into = [torch.empty(size, dtype=torch.uint8) for size in in_sizes]
        error = b""
        try:
            lane = lane or make_lane()
            lane.swap([[data] for data in out], into)
        except (PeerLostError, ConfigError) as lost:
            error = str(lost).encode()
        dist.send(torch.tensor([len(error)]), 0, group)
        for data in [torch.frombuffer(bytearray(error), dtype=torch.uint8)] if error else into:
            _send(data, 0, group)


def _share(parts: Sequence[Tensor], lane: int, num_lanes: int) -> list[Tensor]:
    """What a lane has of bytes that lie one behind the other; one piece of each place, which may be empty."""
    total, before, found = sum(map(len, parts)), 0, []
    first, last = total * lane // num_lanes, total * (lane + 1) // num_lanes
    for part in parts:
        found.append(part[max(0, first - before) : max(0, last - before)])
        before += len(part)
    return found


def _send(data: Tensor, rank: int, group: dist.ProcessGroup | None) -> None:
    if len(data):
        dist.send(data, rank, group)


def _receive(size: int, rank: int, group: dist.ProcessGroup | None) -> Tensor:
    data = torch.empty(size, dtype=torch.uint8)
    if size:
        dist.recv(data, rank, group)
    return data
