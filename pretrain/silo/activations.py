"""What a forward pass does not keep for the backward pass, which computes it again."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from pretrain.config.errors import ConfigError
from pretrain.config.keys import SiloConfig

# Products with matrices, and fused attention on any device: nearly all of a layer's work, and less than half of what
# it keeps. Not bmm, which attention that is not fused has its scores from.
KEPT = (
    *("mm", "addmm", "_grouped_mm"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
)


def checkpoint_activations(model: nn.Module, silo: SiloConfig) -> None:
    """Have some of the model's layers computed again, wholly or but for products; gradients have the same bits.

    Raises ConfigError for a type of model that has no layers which can.
    """
    module: Any = model
    can = getattr(module, "supports_gradient_checkpointing", False)
    if not can or not any(isinstance(layer, GradientCheckpointingLayer) for layer in module.modules()):
        raise ConfigError(
            f"silo.activation_checkpointing: {silo.activation_checkpointing!r} given; allowed for this type of model: "
            "none"
        )
    settings: dict[str, Any] = {"use_reentrant": False}
    if silo.activation_checkpointing == "selective":
        kept = [getattr(torch.ops.aten, name).default for name in KEPT]
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
    module.activation_checkpointing_enable(settings, every_n_layers=silo.activation_checkpointing_every)
