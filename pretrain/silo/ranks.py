"""The ranks of one silo: who leads, and how they agree. Control travels over gloo, whatever the tensors use."""

import json
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from torch.numa.binding import AffinityMode, NumaOptions, _maybe_apply_numa_binding_to_current_process

from pretrain.host.meeting import MEETING_FILE, NUMA_BINDING

# DeepSpeed's all-reduce through shared memory is for inference alone. On a machine's first start it would be compiled,
# which takes a minute or more and a C++ compiler.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Ranks:
    """The process group of one silo; rank 0 is the leader, the only one that talks to the exchange."""

    def __init__(self, waits_for: Callable[[str], None] = lambda what: None) -> None:
        """`waits_for` is told what takes long, whoever of the silo does it."""
        self.waits_for = waits_for
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants it
        self.device = torch.device(get_accelerator().device_name(int(os.environ["LOCAL_RANK"])))
        if mode := os.environ.get(NUMA_BINDING):
            options = NumaOptions(affinity_mode=AffinityMode(mode))
            _maybe_apply_numa_binding_to_current_process(gpu_index=self.device.index or 0, numa_options=options)
        if self.device.type != "cpu":
            get_accelerator().set_device(self.device)
        # DeepSpeed calls collectives by names that torch has since renamed: one warning a parameter, none of them ours.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
        backend = "gloo" if self.device.type == "cpu" else get_accelerator().communication_backend_name()
        _meet(backend, self.device)
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

    def from_each(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, on every rank; all ranks must call it, with as many bytes."""
        if self.num_ranks == 1:
            return [data]
        found = torch.empty(self.num_ranks, len(data), dtype=torch.uint8)
        own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.all_gather(list(found.unbind()), own, group=self._control)
        return [bytes(one.numpy()) for one in found]

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


def _meet(backend: str, device: torch.device) -> None:
    """Make the process group, which DeepSpeed takes over: with nobody else, through a file, or through a TCPStore.

    torch's own way for a single process, or for several on one node, would listen on every interface.
    """
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    store: dist.Store
    if num_ranks == 1:
        store = dist.HashStore()
    elif path := os.environ.get(MEETING_FILE):
        store = dist.FileStore(path, num_ranks)
    else:
        store = _store_of_torchrun(num_ranks)
    is_bound = device.type == "cuda" and num_ranks > 1  # as DeepSpeed does it
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=num_ranks,
        timeout=default_pg_timeout,
        device_id=device if is_bound else None,
    )


def _store_of_torchrun(num_ranks: int) -> dist.Store:
    """The store that torchrun's agents serve for the workers, or rank 0 if they do not."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_host = not is_served and os.environ["RANK"] == "0"
    store = dist.TCPStore(host, port, num_ranks, is_host, timeout=default_pg_timeout, multi_tenant=True)
    # Else workers that are started again find the addresses of those before them, and wait for them for ever
    # (https://github.com/pytorch/pytorch/issues/135712).
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
