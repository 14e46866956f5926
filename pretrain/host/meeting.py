"""How the processes of a silo on one node find each other, by what their environment says. No torch.

Through a file in a folder of their own: nothing listens but gloo and NCCL, for one another, and those on loopback.
"""

import sys
from pathlib import Path

MEETING_FILE = "ATOLL_MEETING_FILE"
"""Environment variable: the file through which the processes of one start find each other; unset if there is one."""
NUMA_BINDING = "ATOLL_NUMA_BINDING"
"""Environment variable: how a process binds itself to the cores near its GPU, where torchrun does not do it."""
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def on_one_node(rank: int, num_ranks: int, meeting_file: Path | None) -> dict[str, str]:
    """The environment of one of a silo's processes, all of which are on one node; a single one needs no file."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    return {
        **{name: str(number) for name, number in numbers.items()},
        MEETING_FILE: str(meeting_file or ""),
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "NCCL_SOCKET_IFNAME": LOOPBACK,
    }
