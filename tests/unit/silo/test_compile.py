"""Compiled layers compute what they computed before, packed documents too, and are not compiled anew for other text."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from pretrain.config.keys import ModelConfig
from pretrain.silo.model import build_initial, compile_layers, go_by_documents, target_losses, token_losses

END = 0
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {"intermediate_size": 48, "initializer_range": 0.3}


def packed(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 90, (3, 40), generator=generator)
    rows[torch.rand(rows.shape, generator=generator) < 0.15] = END
    return rows


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("mask_at", "by_documents"),
    [(None, False), (END, False), (END, True)],
    ids=["one text", "masked", "each by itself"],
)
def test_compiled_layers_have_the_same_losses_and_gradients(mask_at: int | None, by_documents: bool) -> None:
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (build_initial(ModelConfig(config=LLAMA | SIZES), vocab_size=90) for _ in range(2))
    if by_documents:
        assert not any(go_by_documents(model, END, torch.device("cpu")) for model in (plain, compiled))
    compile_layers(compiled)
    cross_entropy = {plain: target_losses, compiled: torch.compile(target_losses, dynamic=False)}

    def passed(model: Any, rows: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        losses = token_losses(model, rows, rows.roll(-1, 1), mask_at, cross_entropy=cross_entropy[model])
        losses.mean().backward()
        return losses.detach(), [p.grad.clone() for p in model.parameters()]

    num_graphs = []
    for seed in range(3):
        (losses, gradients), (own_losses, own) = (passed(model, packed(seed)) for model in (plain, compiled))
        torch.testing.assert_close(own_losses, losses, rtol=1e-5, atol=1e-5)
        assert all((one - other).norm() < 1e-5 * other.norm() for one, other in zip(own, gradients, strict=True))
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs[0] > 0
    assert len(set(num_graphs)) == 1  # other documents, the same graphs
