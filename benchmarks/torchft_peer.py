"""One of two torchft replicas that sync with DiLoCo, or their lighthouse; started by sync_peers.py with torchft's own
interpreter, so it imports nothing of ours.

    python torchft_peer.py lighthouse
    python torchft_peer.py replica INDEX LIGHTHOUSE SHAPES NUM_SYNCS NUM_THREADS

SHAPES is JSON. Training is AdamW on made-up gradients, every second step ends with a sync. The last line printed is
JSON: seconds of each sync, without those of the step in it.
"""

import json
import os
import statistics
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

STEPS = 2  # from sync to sync
PATIENCE = timedelta(seconds=300)


def lighthouse() -> None:
    """Serve until killed; prints the address."""
    from torchft._torchft import LighthouseServer  # type: ignore[import-not-found]

    server = LighthouseServer(bind="127.0.0.1:0", min_replicas=2, join_timeout_ms=1000)
    print(server.address(), flush=True)
    while True:
        time.sleep(3600)


def replica(index: int, address: str, shapes: list[list[int]], num_syncs: int, num_threads: int) -> None:
    """Train and sync, then print."""
    from torchft import Manager, ProcessGroupGloo  # type: ignore[import-not-found]
    from torchft.local_sgd import DiLoCo  # type: ignore[import-not-found]

    torch.set_num_threads(num_threads)
    meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun would have one
    model = torch.nn.Module()
    model.weights = torch.nn.ParameterList([torch.randn(shape) * 0.02 for shape in shapes])
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=PATIENCE),
        load_state_dict=lambda state: model.load_state_dict(state["model"]),
        state_dict=lambda: {"model": model.state_dict()},
        min_replica_size=2,
        use_async_quorum=False,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=meeting.port,
        lighthouse_addr=address,
        replica_id=f"silo{index}",
        timeout=PATIENCE,
        quorum_timeout=PATIENCE,
    )
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    plain: list[float] = []
    with_sync: list[float] = []
    with DiLoCo(manager, [model], inner, outer, sync_every=STEPS):
        for step in range(STEPS * num_syncs):
            began = time.perf_counter()
            inner.step()
            (with_sync if step % STEPS == STEPS - 1 else plain).append(time.perf_counter() - began)
    step_seconds = statistics.median(plain)
    print(json.dumps([seconds - step_seconds for seconds in with_sync]), flush=True)
    manager.shutdown(wait=False)
    os._exit(0)  # its threads would wait for the lighthouse


if __name__ == "__main__":
    if sys.argv[1] == "lighthouse":
        lighthouse()
    else:
        replica(int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6]))
