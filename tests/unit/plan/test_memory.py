"""What `atoll plan` says of memory: activations against autograd, ZeRO and offload by hand."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from pretrain.config.adapter import AdapterConfig
from pretrain.config.keys import RunConfig
from pretrain.plan.bytes import model_shapes
from pretrain.plan.memory import activation_bytes, silo_memory
from pretrain.silo.activations import checkpoint_activations
from pretrain.silo.adapter import add_adapter
from pretrain.silo.architecture import model_config
from tests.unit.plan.test_plan import LLAMA, written


def saved_bytes(config: RunConfig, dtype: torch.dtype, adapter: AdapterConfig | None = None) -> int:
    """What a forward pass and its loss really keep for the backward pass."""
    silo, of = config.silos["one"], model_config(config.model, 0)
    of.use_cache = False
    model = AutoModelForCausalLM.from_config(of, dtype=dtype).train()
    if adapter:
        add_adapter(model, adapter)
    if silo.activation_checkpointing != "none":
        checkpoint_activations(model, silo)
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.zeros(silo.micro_batch_sequences, config.sequence_tokens, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "model",
    [
        {"num_key_value_heads": 2},
        {"model_type": "qwen3", "head_dim": 64, "num_key_value_heads": 2},
        {"model_type": "gpt_neox", "intermediate_size": 1024},
    ],
    ids=str,
)
def test_activations_are_what_autograd_keeps(model: dict[str, Any], precision: str) -> None:
    config = written(LLAMA | model, "sequence_tokens=64", f"silo.precision={precision}")
    dtype, width = (torch.float32, 4) if precision == "fp32" else (torch.bfloat16, 2)
    silo, shapes, of = config.silos["one"], model_shapes(config, 0), model_config(config.model, 0)
    loss_after = 4096 * (8 * 64 * (4 if width == 4 else 6) + 256 * width)  # the gradients of logits and of the head
    tolerance = 0.12 if of.model_type == "gpt_neox" else 0.01
    planned = activation_bytes(of, shapes, silo, 64) - loss_after
    assert planned == pytest.approx(saved_bytes(config, dtype), rel=tolerance)

    again = dataclasses.replace(silo, activation_checkpointing="layers")
    # Of the one layer that is computed again nothing is kept yet at the end of the forward pass.
    one_layer = (planned - activation_bytes(of, shapes, again, 64) + loss_after + 8 * 64 * width * 256 * 6) / 5
    less = activation_bytes(of, shapes, again, 64) - loss_after - one_layer
    kept = saved_bytes(dataclasses.replace(config, silos={"one": again}), dtype)
    assert less == pytest.approx(kept, rel=tolerance)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "v_proj"], ["k_proj", "up_proj", "down_proj"]], ids=str)
def test_beneath_an_adapter_less_is_kept(targets: list[str], precision: str, dtype: torch.dtype) -> None:
    config = written(LLAMA | {"num_key_value_heads": 2}, "sequence_tokens=64", f"silo.precision={precision}")
    adapter, of = AdapterConfig(kind="lora", rank=16, targets=targets), model_config(config.model, 0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(of)
        add_adapter(model, adapter)
    factors = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = 4096 * 8 * 64 * (4 if precision == "fp32" else 6)  # of the logits; the head has none
    planned = activation_bytes(of, factors, config.silos["one"], 64) - gradients
    assert planned == pytest.approx(saved_bytes(config, dtype, adapter), rel=0.01)


def test_zero_shares_out_and_offload_moves() -> None:
    zero, halves = "silo.deepspeed.zero_optimization", "silo.precision=bf16"
    small = [f"{zero}.reduce_bucket_size=1000", f"{zero}.stage3_max_live_parameters=1000"]
    small += [f"{zero}.stage=3", "sequence_tokens=16", halves]
    four = [*small, "silo.processes_per_node=4", "silo.micro_batch_sequences=2", "silo.global_batch_sequences=8"]
    two_sequences = ["silo.micro_batch_sequences=2", "silo.global_batch_sequences=2"]
    shapes, of = model_shapes(written(LLAMA), 4096), model_config(written(LLAMA).model, 4096)
    number = sum(shape.numel() for shape in shapes.values())
    alone = silo_memory(written(LLAMA, *small, *two_sequences), "one", shapes, of).device_bytes
    memory = silo_memory(written(LLAMA, *four), "one", shapes, of)
    shared = memory.device_bytes
    assert shared[0] == alone[0] > shared[1] == shared[2] > shared[3]
    # bf16 parameters, fp32 masters, two moments, gradients: 16 bytes, of which three quarters are with other ranks.
    assert alone[3] - shared[3] >= 3 / 4 * 16 * number

    offload = [f"{zero}.offload_optimizer.device=cpu", f"{zero}.offload_param.device=cpu"]
    moved = silo_memory(written(LLAMA, *four, *offload), "one", shapes, of)
    # Masters, moments, their gradients and the parameters, of all four ranks.
    assert moved.node_bytes - memory.node_bytes == pytest.approx((12 + 4 + 2) * number, abs=4)
    assert moved.device_bytes[3] < shared[3]
    assert moved.leader_bytes == memory.leader_bytes
