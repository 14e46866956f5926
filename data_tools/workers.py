"""Work on many items in processes: results in order, few items in flight, nothing left running after the parent."""

import collections
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from pretrain.config.errors import ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Less text than this is done before worker processes have started.
SMALL_BYTES = 8_000_000
# Items in flight for each worker: one at work, one waiting, so that no worker waits for the parent.
ITEMS_PER_WORKER = 2


class StoppedError(Exception):
    """Asked to stop; all is saved, and the same command goes on."""


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_for(part_bytes: list[int]) -> int:
    """How many processes text in parts of so many bytes is worth, 0 being unknown: none, or one a core."""
    return 0 if all(part_bytes) and sum(part_bytes) < SMALL_BYTES else num_cores()


def begin_workers(num_workers: int, *modules: str) -> None:
    """Start the process that workers are forked from, which imports these modules while this one goes on.

    Without it `in_order` starts that process, and each worker imports on its own. Only the first call does anything,
    and none with 0 workers.
    """
    if num_workers:
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))
        multiprocessing.forkserver.ensure_running()


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    num_workers: int,
    start: Callable[..., None],
    arguments: tuple[Any, ...] = (),
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with `work(item)`, in the order of `items`, of which only a few are taken ahead.

    `start(*arguments)` runs once in every worker process; with `num_workers` 0 all happens in this process. Raises
    what `work` raises, and ConfigError when a worker was killed.
    """
    if num_workers == 0:
        start(*arguments)
        for item in items:
            yield item, work(item)
        return
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(start, arguments))
    rest = iter(items)
    in_flight: collections.deque[tuple[Item, Future[Result]]] = collections.deque()
    try:
        while True:
            for item in itertools.islice(rest, num_workers * ITEMS_PER_WORKER - len(in_flight)):
                in_flight.append((item, pool.submit(work, item)))
            if not in_flight:
                return
            item, future = in_flight.popleft()
            yield item, future.result()
    except BrokenProcessPool:
        raise ConfigError(
            "a worker process died (killed, or out of memory): lower --workers, or run the same command again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for every core already
    threading.Thread(target=_die_with_parent, daemon=True).start()
    start(*arguments)


def _die_with_parent() -> None:
    """A parent that was killed cannot end its workers, which would wait for it for ever."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)
