"""Several things at once, where what works on them gives up Python's lock. No torch."""

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_threads(function: Callable[[T], R], items: Collection[T], num_threads: int) -> list[R]:
    """The results in the order of the items."""
    if num_threads == 1 or len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(num_threads, len(items))) as pool:
        return list(pool.map(function, items))
