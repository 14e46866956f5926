"""Copies of a device's tensors in host memory, made beside what the device computes. On a CPU they are plain copies.

A GPU writes them into pinned memory, by a stream of its own: its work and the host's go on, and who reads a copy waits
first.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class HostCopies:
    """Those of one silo's leader."""

    def __init__(self, device: torch.device, *, of_gathered: bool) -> None:
        """`of_gathered`: what is copied was made for it, and there is to be room for two such tensors at most."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._of_gathered = of_gathered
        self._last: torch.cuda.Event | None = None

    def make(self, value: Tensor) -> Tensor:
        """Begin a copy. It is there after `wait`; `hold` comes before any change of `value`."""
        if self._stream is None or not value.is_cuda:
            return value.to("cpu", copy=True)
        if self._of_gathered and self._last:
            self._last.synchronize()
        copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(self._stream):
            copy.copy_(value, non_blocking=True)
        value.record_stream(self._stream)
        self._last = torch.cuda.Event(blocking=True)
        self._last.record(self._stream)
        return copy

    def look(self, value: Tensor) -> Tensor:
        """In host memory at once; itself where it is there."""
        if not value.is_cuda:
            return value.cpu()
        copy = self.make(value)
        self.wait()
        return copy

    def wait(self) -> None:
        """Until all copies begun by now are there."""
        self.arrival()()

    def arrival(self) -> Callable[[], object]:
        """What does so, for another thread."""
        return self._last.synchronize if self._last else lambda: None

    def hold(self) -> None:
        """What the device computes from here on comes after all copies begun by now."""
        if self._last:
            torch.cuda.current_stream().wait_event(self._last)
