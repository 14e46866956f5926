"""What leaves a device for host memory is what it held when that began, whatever it computes meanwhile."""

import threading

import pytest
import torch

from pretrain.silo.copies import HostCopies


def test_on_a_cpu_they_are_plain_copies() -> None:
    copies, value = HostCopies(torch.device("cpu"), of_gathered=False), torch.arange(5.0)
    copy = copies.make(value)
    copies.wait()
    copies.hold()
    assert torch.equal(copy, value)
    assert copy.data_ptr() != value.data_ptr()
    assert copies.look(value) is value


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("of_gathered", [False, True])
def test_a_gpu_goes_on_and_the_copies_hold_what_was_there(*, of_gathered: bool) -> None:
    device = torch.device("cuda:0")
    copies, values = HostCopies(device, of_gathered=of_gathered), torch.randn(4, 1 << 24, device=device)
    expected = values.cpu()
    made = [copies.make(value.clone() if of_gathered else value) for value in values]
    arrived = copies.arrival()
    copies.hold()
    values.zero_()
    waiting = threading.Thread(target=arrived)
    waiting.start()
    waiting.join()
    assert all(one.is_pinned() for one in made)
    assert torch.equal(torch.stack(made), expected)
    assert not copies.look(values).any()
