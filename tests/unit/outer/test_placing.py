"""Tensors in files: their values, what they take of memory, and a disk without room."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.outer.placing import InMemory, OnDisk, let_go_pages
from tests.support import mounted


def resident_bytes(tensor: Tensor) -> tuple[str, int]:
    """Of a tensor that is a mapping of its own: the file's path, and what this process holds of it."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"{tensor.data_ptr():x}-"))
    resident = next(line for line in lines[start:] if line.startswith("Rss:"))
    return lines[start].split(maxsplit=5)[-1], 1024 * int(resident.split()[1])


def test_a_file_has_the_values_and_gives_its_memory_back(tmp_path: Path) -> None:
    place, value = OnDisk(tmp_path / "state"), torch.arange(1 << 20).float().view(1 << 10, 1 << 10)
    num_open = len(os.listdir("/proc/self/fd"))
    held, zeros = place.copy(value), place.zeros(value.shape)
    assert len(os.listdir("/proc/self/fd")) == num_open  # there may be thousands of tensors
    assert list((tmp_path / "state").iterdir()) == []
    file, resident = resident_bytes(held)
    assert file.startswith(f"{tmp_path / 'state'}/")
    assert resident == 4 << 20
    held += 1
    zeros[3] = 7
    place.let_go([held, zeros])
    assert resident_bytes(held)[1] == resident_bytes(zeros)[1] == 0
    assert torch.equal(held, value + 1)
    assert zeros.sum() == 7 << 10
    assert torch.equal(InMemory().copy(value), value)


def test_a_file_without_room_is_an_error_and_no_signal(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", num_bytes=1 << 20) as disk:
        place = OnDisk(disk)
        held = place.zeros(torch.Size([1 << 17])).fill_(1)
        with pytest.raises(OSError, match="No space left on device"):
            place.zeros(torch.Size([1 << 18]))
        assert held.sum() == 1 << 17


def test_what_is_let_go_of_a_file_is_not_in_memory_and_comes_again(tmp_path: Path) -> None:
    """In parts that begin anywhere, as a payload's tensors do."""
    written = torch.arange(1 << 22, dtype=torch.int32)
    (file := tmp_path / "payload").write_bytes(b"head" + written.numpy().tobytes())
    whole = torch.from_file(str(file), shared=False, size=written.nbytes + 4, dtype=torch.uint8)
    mapped = whole[4:].view(torch.int32)
    assert torch.equal(mapped, written)
    held = resident_bytes(whole)[1]
    for part in mapped.split(100_001):
        let_go_pages(part)
    assert resident_bytes(whole)[1] < 0.05 * held
    assert torch.equal(mapped, written)
