"""The ranks of one silo: who leads, and how they agree. Control travels over gloo, whatever the tensors use."""

import json
import os
import warnings
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pretrain.silo.extensions import load_extension


class Ranks:
    """The process group of one silo; rank 0 is the leader, the only one that talks to the exchange."""

    def __init__(self) -> None:
        self.device = torch.device(get_accelerator().device_name(int(os.environ.get("LOCAL_RANK", "0"))))
        if self.device.type != "cpu":
            get_accelerator().set_device(self.device)
        # DeepSpeed calls collectives by names that torch has since renamed: one warning a parameter, none of them ours.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
        backend = "gloo" if self.device.type == "cpu" else get_accelerator().communication_backend_name()
        load_extension("ShareMemCommBuilder")
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self._control = dist.new_group(backend="gloo", timeout=timedelta(days=1))

    @property
    def is_leader(self) -> bool:
        """Whether this process talks to the exchange and writes the journal."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over the ranks; all ranks must call it."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.num_ranks > 1:
            dist.all_reduce(tensor, group=self._control)
        return tensor.tolist()

    def from_leader(self, value: Any = None) -> Any:
        """The leader's value (anything that JSON holds) on every rank; all ranks must call it."""
        if self.num_ranks == 1:
            return value
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        dist.broadcast(size, src=0, group=self._control)
        if not self.is_leader:
            data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, src=0, group=self._control)
        return json.loads(bytes(data.numpy()))

    def group(self, num_ranks: int) -> dist.ProcessGroup:
        """A gloo group of the first ranks for messages between any two of them; all ranks must call it."""
        return dist.new_group(range(num_ranks), backend="gloo", timeout=timedelta(days=1))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.num_ranks > 1:
            dist.barrier(group=self._control)

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()
