"""An adapter: two thin factors beside each targeted matrix of a frozen model; peft makes the layers."""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pretrain.config.adapter import ALL_LINEAR, AdapterConfig
from pretrain.config.errors import ConfigError, named
from pretrain.config.personal import PersonalConfig
from pretrain.host.foreign import shown
from pretrain.outer.fragments import FACTORS, cut_factors

ALWAYS = -1  # the turn of what takes none
BASE = ".base_layer."  # what peft puts into the names of a targeted layer's own parameters


def add_adapter(model: nn.Module, settings: AdapterConfig) -> None:
    """Put the factors beside the targeted layers, in place; all of the model's own parameters are frozen from then on.

    They are about to be overwritten. Raises ConfigError for targets that there are not, or without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(
            f"model.adapter.kind: {settings.kind!r} given; peft is not installed: pip install 'atoll[adapters]'"
        ) from None
    targets = find_targets(model, settings.targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it finds out by itself on which side GPT-2's layers multiply
        inject_adapter_in_model(LoraConfig(**lora_settings(settings, targets)), model)


def lora_settings(settings: AdapterConfig | PersonalConfig, targets: list[str]) -> dict[str, Any]:
    """The same as peft says it."""
    return {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": targets,
    }


def find_targets(model: Any, targets: list[str], key: str = "model.adapter.targets") -> list[str]:
    """Names of the targeted layers, which may have an adapter beside them already. Raises ConfigError, naming `key`."""
    multiply = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    linear = [name.removesuffix(BASE.rstrip(".")) for name in multiply if not any(of in name for of in FACTORS)]
    last = model.get_output_embeddings()
    if targets == [ALL_LINEAR]:
        found = [name for name in linear if model.get_submodule(name) is not last]
    else:
        found = []
        for target in targets:
            of_one = [name for name in linear if name == target or name.endswith(f".{target}")]
            if not of_one:
                ends = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
                raise ConfigError(
                    f"{key}: {shown(target)!r} given; no layer that multiplies by a matrix is "
                    f"called so; allowed: {ALL_LINEAR}, {named(ends)}"
                )
            found += of_one
    if not found:
        raise ConfigError(f"{key}: {targets} given; this model has no such layer")
    if last is not None and last.weight is model.get_input_embeddings().weight:
        tied = [name for name in found if model.get_submodule(name) is last]
        if tied:
            raise ConfigError(f"{key}: {tied[0]!r} given; its matrix is the embedding, too; allowed: other layers")
    return list(dict.fromkeys(found))


def plain_name(name: str) -> str:
    """What a parameter of the frozen model is called without an adapter."""
    return name.replace(BASE, ".")


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters, by the names that they have without an adapter."""
    return {plain_name(name): p for name, p in model.named_parameters() if not p.requires_grad}


def initial_factors(
    model: nn.Module, seed: int, place: Callable[[Tensor], Tensor] = lambda value: value
) -> dict[str, Tensor]:
    """Version 0 of an adapter, as peft begins: A uniform up to 1 / sqrt(its columns), B zero, so that nothing changes.

    A follows from the seed and its name alone. `model` may be without memory.
    """
    trained = ((name, parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name: place(initial_factor(name, shape, seed)) for name, shape in trained}


def initial_factor(name: str, shape: torch.Size, seed: int) -> Tensor:
    """One of them."""
    value = torch.zeros(shape)
    if FACTORS[0] in name:
        drawn = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
        bound = 1 / math.sqrt(shape[1])
        value.uniform_(-bound, bound, generator=torch.Generator().manual_seed(drawn))
    return value


class Turns:
    """Which of two factors trains, where they take turns; the other rests, to the last bit."""

    def __init__(self, model: nn.Module, settings: AdapterConfig) -> None:
        """Gradients of what rests are zero from here on, and count in no norm."""
        self.now: int | None = None
        """The fragment that trains; None: all do."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        fragments = cut_factors(trained) if settings.takes_turns else []
        self.of = {name: fragment for fragment, names in enumerate(fragments) for name in names}
        """Name to fragment; empty where all train at all times."""
        for name, fragment in self.of.items():
            trained[name].register_hook(partial(self._gradient, fragment))

    def trains(self, fragment: int) -> bool:
        """Whether it is a fragment's turn."""
        return self.now is None or fragment in (self.now, ALWAYS)

    def _gradient(self, fragment: int, gradient: Tensor) -> Tensor:
        return gradient if self.trains(fragment) else torch.zeros_like(gradient)


@torch.no_grad()
def merge_adapter(model: nn.Module) -> None:
    """Add each product to the matrix that it stands beside, in place: a plain model, without an adapter."""
    for name, layer in list(_adapted(model)):
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
