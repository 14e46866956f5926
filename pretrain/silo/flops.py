"""Floating point operations that training takes, by the usual count, so that MFU can be compared with others'."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from pretrain.silo.cards import summed_peak_flops

if TYPE_CHECKING:
    from pretrain.silo.ranks import Ranks

# What configurations of `transformers` call the number of experts of a layer.
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Kinds of layer that attend, and the key of the window of tokens that each looks back at.
WINDOWS = {"full_attention": None, "sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def flops_per_token(model: nn.Module, sequence_tokens: int) -> int | None:
    """Operations of the forward and backward pass for one token: 6 N + 12 L H Q T; 4 for each frozen parameter of N.

    That is appendix B of PaLM (https://arxiv.org/abs/2204.02311), as nanoGPT and torchtitan count, too. N: parameters
    that a token meets in a product; an embedding that is looked up does not count, unless the output layer is the same
    matrix, and of experts those count that a token goes to. L, H, Q: layers, query heads (also where several share keys
    and values), size of a head. T: tokens of the sequence, or of a layer's window if that is less; it counts whole,
    though half of it is masked, and whether documents are kept apart or not. What is computed again to save memory does
    not count. None for a model whose configuration does not tell all of this. `model` is one of `transformers`; its
    parameters may be partitioned, or without memory.
    """
    config: Any = model.config
    share, attended = _share_of_experts(config), _attended_tokens(config, sequence_tokens)
    heads = getattr(config, "num_attention_heads", None)
    if attended is None or not isinstance(heads, int):
        return None
    trained = frozen = 0.0
    for name, parameter in _multiplied(model):
        is_expert = "experts" in name.split(".")
        if is_expert and share is None:
            return None
        met = getattr(parameter, "ds_shape", parameter.shape).numel() * (share or 0.0 if is_expert else 1.0)
        trained, frozen = (trained + met, frozen) if parameter.requires_grad else (trained, frozen + met)
    return round(6 * trained + 4 * frozen + 6 * heads * _head_sizes(config) * attended)


def _multiplied(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a token meets in a product, by name."""
    head = model.get_output_embeddings()
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    looked_up.discard(id(getattr(head, "weight", None)))
    for name, parameter in model.named_parameters():
        if id(parameter) not in looked_up:
            yield name, parameter


def _share_of_experts(config: Any) -> float | None:
    """Which share of the experts a token goes to."""
    active = getattr(config, "num_experts_per_tok", None)
    number = next((found for name in NUM_EXPERTS if (found := getattr(config, name, None))), None)
    return active / number if isinstance(active, int) and isinstance(number, int) else None


def _attended_tokens(config: Any, sequence_tokens: int) -> int | None:
    """Tokens that a token looks at, summed over the layers; None where a layer does something else."""
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return None
    uses_window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if uses_window else "full_attention"] * layers
    if not {*kinds} <= WINDOWS.keys():
        return None
    windows = [getattr(config, WINDOWS[kind] or "", None) or sequence_tokens for kind in kinds]
    return sum(min(window, sequence_tokens) for window in windows)


def _head_sizes(config: Any) -> int:
    """Of a query and of a value, together."""
    if hasattr(config, "qk_nope_head_dim"):  # multi-head latent attention (https://arxiv.org/abs/2405.04434)
        return config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return 2 * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def peak_tokens_per_second(model: nn.Module, sequence_tokens: int, ranks: "Ranks") -> float | None:
    """What a silo would train on if its cards did nothing but these operations, at their peak.

    None where the cards or the operations are not known. All ranks must call it.
    """
    peak, operations = summed_peak_flops(ranks), flops_per_token(model, sequence_tokens)
    return peak / operations if peak and operations else None
