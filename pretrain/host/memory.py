"""Memory that the C library keeps when it was freed. No torch."""

import ctypes
from contextlib import suppress


def give_back_memory() -> None:
    """Give back what a thread has freed and other threads, each with a heap of its own, would not find.

    Where the library is another one than glibc, nothing is done.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
