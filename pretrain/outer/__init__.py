"""Between institutions: pure functions on tensors, no I/O, no torch.distributed."""
