"""A silo's own adapter beside the shared one: trained with it, kept in the silo's checkpoints, and told to nobody.

Its factors have names of their own (`...lora_A.personal.weight`), which no version, delivery or commit knows.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config.adapter import AdapterConfig
from pretrain.config.keys import ModelConfig
from pretrain.config.personal import PersonalConfig
from pretrain.outer.fragments import FACTORS
from pretrain.silo.adapter import ALWAYS, find_targets, initial_factor, lora_settings
from pretrain.silo.model import build_without_memory

NAME, SHARED = "personal", "default"  # of the two adapters, as peft has them
KEY = "personal_adapter"


class Personal:
    """The second adapter of a model that computes; without one, nothing."""

    def __init__(self, model: nn.Module, settings: PersonalConfig, key: str = f"silo.{KEY}") -> None:
        """Put its factors beside the targeted layers, in place; they are about to be overwritten.

        Raises ConfigError for targets that there are not.
        """
        self.words = settings.words
        self._layers: list[Any] = []
        self.names: set[str] = set()
        """Of its factors; no other party knows them."""
        if not settings.is_on:
            return
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        targets = find_targets(model, settings.targets, f"{key}.targets")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is another adapter already
            inject_adapter_in_model(LoraConfig(**lora_settings(settings, targets)), model, adapter_name=NAME)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.set_adapter([SHARED, NAME])  # both compute, and both are trained
                if NAME in layer.scaling:
                    self._layers.append(layer)
        self.names = {name for name, _ in model.named_parameters() if any(f"{of}{NAME}." in name for of in FACTORS)}

    @property
    def turns(self) -> dict[str, int]:
        """It takes none, whatever the shared factors do; so the optimizer has it in groups of its own."""
        return dict.fromkeys(self.names, ALWAYS)

    def initial(self, shapes: Mapping[str, torch.Size], seed: int) -> Iterator[tuple[str, Tensor]]:
        """What its factors begin with, as the shared ones: B is zero, so that nothing changes."""
        return ((name, initial_factor(name, shape, seed)) for name, shape in shapes.items())

    @contextmanager
    def away(self) -> Iterator[None]:
        """Within, the model computes as without it: each product counts 0 times."""
        for layer in self._layers:
            layer.set_scale(NAME, 0)
        yield
        for layer in self._layers:
            layer.set_scale(NAME, 1)


def personal_shapes(
    model: ModelConfig, vocab_size: int, settings: PersonalConfig, key: str = f"silo.{KEY}"
) -> dict[str, torch.Size]:
    """Name to shape of its factors beside such a model; takes no memory. Raises ConfigError as `Personal` does."""
    module = build_without_memory(model, vocab_size)
    with torch.device("meta"):
        names = Personal(module, settings, key).names
    return {name: parameter.shape for name, parameter in module.named_parameters() if name in names}


def both_in_one(
    shared: AdapterConfig, own: PersonalConfig, factors: Mapping[str, Tensor]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """One adapter whose product is the sum of the products of two, whose `factors` are given.

    Its A is theirs one below the other, its B theirs side by side, each times its alpha / rank; where a layer has but
    one of them, the rest is zero.
    """
    layers = list(dict.fromkeys(name.partition(FACTORS[0])[0] for name in factors if FACTORS[0] in name))
    found: dict[str, Tensor] = {}
    for layer in layers:
        first, second = (f"{layer}{factor}{{}}.weight" for factor in FACTORS)
        there = {
            of: (factors[first.format(of)], factors[second.format(of)])
            for of in (SHARED, NAME)
            if first.format(of) in factors
        }
        (columns,), (rows,) = {a.shape[1] for a, _ in there.values()}, {b.shape[0] for _, b in there.values()}
        parts = []
        for of, settings in ((SHARED, shared), (NAME, own)):
            a, b = there.get(of) or (torch.zeros(settings.rank, columns), torch.zeros(rows, settings.rank))
            parts.append((a, b * (settings.alpha / settings.rank)))
        found[first.format(SHARED)] = torch.cat([a for a, _ in parts])
        found[second.format(SHARED)] = torch.cat([b for _, b in parts], dim=1)
    rank = shared.rank + own.rank
    return AdapterConfig(kind=shared.kind, rank=rank, alpha=float(rank), targets=layers), found
