"""Where the tensors of an outer state lie: in memory, or in files, so that it may be larger than the memory.

A file is a tensor that is mapped: what reads or writes it is the same, to the last bit, and the system keeps in memory
what there is room for. The files have no names, as all truth is in the store: when their process ends, however it does,
they are gone, and no later one can take them for anything.
"""

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)


class InMemory:
    """fp32 tensors in memory."""

    def zeros(self, shape: torch.Size) -> Tensor:
        """A new one."""
        return torch.zeros(shape)

    def copy(self, value: Tensor) -> Tensor:
        """A new one with these values."""
        return value.clone()

    def let_go(self, tensors: Iterable[Tensor]) -> None:
        """Some will not be used for a while."""


class OnDisk(InMemory):
    """fp32 tensors in files of a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def zeros(self, shape: torch.Size) -> Tensor:
        """A new one. Raises OSError where there is no room: writing to it later needs no more."""
        with tempfile.NamedTemporaryFile(dir=self._folder) as file:
            self._reserve(file.fileno(), 4 * shape.numel())
            return torch.from_file(file.name, shared=True, size=shape.numel(), dtype=torch.float32).view(shape)

    def _reserve(self, descriptor: int, num_bytes: int) -> None:
        os.posix_fallocate(descriptor, 0, num_bytes)

    def copy(self, value: Tensor) -> Tensor:
        """A new one with these values. Raises OSError where there is no room."""
        return self.zeros(value.shape).copy_(value)

    def let_go(self, tensors: Iterable[Tensor]) -> None:
        """Take some out of this process's memory; the system writes them to their files when it likes."""
        for tensor in tensors:
            let_go_pages(tensor)


def let_go_pages(mapped: Tensor) -> None:
    """Take a file's mapped tensor, or a part of one, out of this process's memory, from its first whole page on.

    Nobody may have written to it but through a shared mapping: what is asked for again is what the file has.
    """
    start = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = mapped.data_ptr() + mapped.nbytes - start
    if length > 0 and _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), f"madvise: {os.strerror(ctypes.get_errno())}")
