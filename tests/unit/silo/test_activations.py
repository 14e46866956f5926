"""Activations that are computed again: gradients of the same bits, less memory, and which work is done twice."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.device_memory import Created
from pretrain.config.errors import ConfigError
from pretrain.config.keys import ModelConfig, SiloConfig
from pretrain.plan.memory import activation_bytes
from pretrain.silo.activations import KEPT, checkpoint_activations
from pretrain.silo.architecture import model_config
from pretrain.silo.model import build_initial, compile_layers, token_losses
from tests.conftest import TinyConfig
from tests.support import zero

VOCAB_SIZE, NUM_LAYERS = 48, 2
SIZES = {"hidden_size": 64, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", "intermediate_size": 176, "num_key_value_heads": 2} | SIZES
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 64}
ROWS = torch.randint(0, VOCAB_SIZE, (2, 64), generator=torch.Generator().manual_seed(0))
KEPT_OPERATIONS = {getattr(torch.ops.aten, name).default for name in KEPT}


class Products(TorchDispatchMode):
    """Counts products and attention."""

    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += function in KEPT_OPERATIONS
        return function(*args, **(kwargs or {}))


def passes(model: dict[str, Any], silo: SiloConfig, dtype: torch.dtype) -> tuple[list[torch.Tensor], int, int]:
    """Gradients, number of products, and bytes that the forward pass leaves for the backward pass."""
    built = build_initial(ModelConfig(config=model), VOCAB_SIZE).to(dtype)
    built.train()
    if silo.activation_checkpointing != "none":
        checkpoint_activations(built, silo)
    torch.manual_seed(0)  # gpt2 has dropout
    with Products() as products, Created() as created:
        loss = token_losses(built, ROWS, ROWS.roll(-1, 1)).mean()
        left = created.num_bytes
        loss.backward()
    return [p.grad for p in built.parameters() if p.grad is not None], products.number, left


@pytest.mark.parametrize(
    ("model", "of_a_layer", "dtype"), [(LLAMA, 7, torch.float32), (GPT2, 4, torch.bfloat16)], ids=["llama", "gpt2"]
)
def test_gradients_have_the_same_bits_for_less_memory(
    model: dict[str, Any], of_a_layer: int, dtype: torch.dtype
) -> None:
    gradients, number, most = passes(model, SiloConfig(), dtype)
    left = []
    for kind, every, again in (
        ("layers", 1, NUM_LAYERS * of_a_layer),  # all products of a layer but the last, whose result nothing needs
        ("layers", 2, NUM_LAYERS // 2 * of_a_layer),
        ("selective", 1, 0),
    ):
        silo = SiloConfig(activation_checkpointing=kind, activation_checkpointing_every=every)
        own, own_number, own_bytes = passes(model, silo, dtype)
        assert all(torch.equal(one, other) for one, other in zip(own, gradients, strict=True))
        assert own_number == number + again
        left.append(own_bytes)
    assert left[0] < left[1] < most
    assert left[0] < left[2] < most


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "every"), [("layers", 2), ("selective", 1)])
def test_the_plan_knows_what_is_left(kind: str, every: int, precision: str) -> None:
    plain = SiloConfig(micro_batch_sequences=len(ROWS), precision=precision)
    less = dataclasses.replace(plain, activation_checkpointing=kind, activation_checkpointing_every=every)

    def planned(silo: SiloConfig, num_layers: int = NUM_LAYERS) -> int:
        of = model_config(ModelConfig(config=LLAMA | {"num_hidden_layers": num_layers}), VOCAB_SIZE)
        return activation_bytes(of, {}, silo, ROWS.shape[1])

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    (*_, counted), (*_, counted_less) = (passes(LLAMA, silo, dtype) for silo in (plain, less))
    # At the peak, in the backward pass, one layer is there anew.
    anew = planned(plain) - planned(plain, NUM_LAYERS - 1)
    assert planned(plain) - planned(less) + anew == pytest.approx(counted - counted_less, rel=0.03)


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_compiled_layers_do_it_too() -> None:
    gradients, *_ = passes(LLAMA, SiloConfig(), torch.float32)
    for kind in ("layers", "selective"):
        torch._dynamo.reset()
        counters.clear()
        model = build_initial(ModelConfig(config=LLAMA), VOCAB_SIZE)
        model.train()
        checkpoint_activations(model, SiloConfig(activation_checkpointing=kind))
        compile_layers(model)
        token_losses(model, ROWS, ROWS.roll(-1, 1)).mean().backward()
        assert counters["stats"]["unique_graphs"] > 0
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert (parameter.grad - gradient).norm() < 1e-5 * gradient.norm()


def test_what_cannot_be_is_one_line(tmp_path: Path, tiny_config: TinyConfig) -> None:
    key, kinds = "silos.alpha.activation_checkpointing", "none, layers, and selective at ZeRO stages 0, 1 and 2"
    for changes, message in (
        ({"activation_checkpointing": True}, f"{key}: 'True' given; allowed: {kinds}"),
        ({"activation_checkpointing": "selective"} | zero(3), f"{key}: 'selective' given; allowed: {kinds}"),
        ({"activation_checkpointing_every": 2}, f"{key}_every: 2 given; allowed: 1, or with layers or selective more"),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            tiny_config(tmp_path, silo=changes)
    message = "silo.activation_checkpointing: 'layers' given; allowed for this type of model: none"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        checkpoint_activations(torch.nn.Linear(2, 2), SiloConfig(activation_checkpointing="layers"))
