"""Somebody who does something to a store, again and again, while a federation runs."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from pretrain.config.keys import RunConfig
from tests.distributed.federation import Outcome, federate


def federate_beside(config: RunConfig, act: Callable[[Path], int]) -> tuple[Outcome, str]:
    """The run, and all that its processes said; `act` is given the store, and returns how often it did something."""
    over, num_done = threading.Event(), [0]

    def keep_on() -> None:
        store = Path(config.store_url)
        while not over.is_set():
            if (store / "contract.json").is_file():
                num_done[0] += act(store)
            time.sleep(0.02)

    stranger = threading.Thread(target=keep_on)
    stranger.start()
    try:
        run = federate(config)
    finally:
        over.set()
        stranger.join()
    assert num_done[0] > 50
    return run, "".join(path.read_text() for path in (Path(config.directory) / "logs" / "latest").glob("*.log"))
