"""The frozen model beneath an adapter: every party reads it from its own copy of the checkpoint."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pretrain.silo.adapter import frozen_parameters, plain_name
from pretrain.silo.model import load_checkpoint
from pretrain.silo.weights import checkpoint_files, tensors_of


@torch.no_grad()
def fill_base(model: nn.Module, checkpoint: str, *, reads: bool = True, is_partitioned: bool = False) -> None:
    """Fill the frozen parameters, one after another. Raises ConfigError for a checkpoint that does not.

    At ZeRO-3 (`is_partitioned`) all ranks call this together, the leader `reads`, and each takes its part of a tensor.
    Else the leader's are enough: DeepSpeed hands its parameters to all ranks when it starts.
    """
    parameters = frozen_parameters(model)
    values = _values(model, Path(checkpoint), parameters) if reads else iter(())
    for parameter in parameters.values():
        with _gathered(parameter) if is_partitioned else nullcontext():
            if reads:
                parameter.data.copy_(next(values))


def _gathered(parameter: nn.Parameter) -> AbstractContextManager[None]:
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def _values(model: nn.Module, directory: Path, parameters: Mapping[str, nn.Parameter]) -> Iterator[Tensor]:
    """In the order of `parameters`. One tensor is in memory at a time where the files have the model's own names;
    where `transformers` makes these of others (experts, say), the whole model is, on the host.
    """
    files = [file for file in checkpoint_files(directory) if file.suffix == ".safetensors"]
    places = {name: file for file in files for name in tensors_of(file)}
    buffers = {plain_name(name) for name, _ in model.named_buffers()} & places.keys()
    if places.keys() != parameters.keys() | buffers or not _shapes_fit(parameters, places):
        whole = dict(load_checkpoint(directory).named_parameters())
        return (whole[name].detach() for name in parameters)
    return (_read(places[name], name) for name in parameters)


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _shapes_fit(parameters: Mapping[str, nn.Parameter], places: Mapping[str, Path]) -> bool:
    for name, parameter in parameters.items():
        with safe_open(places[name], framework="pt") as tensors:
            if tensors.get_slice(name).get_shape() != list(getattr(parameter, "ds_shape", parameter.shape)):
                return False
    return True
