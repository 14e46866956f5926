"""Memory and seconds of computing activations again: nothing, of every layer, of every second, or all but products.

    python -m benchmarks.activations [--hidden 512] [--layers 8] [--tokens 2048] [--turns 3]

A llama, forward and backward pass, fp32 and bf16, on one thread. Bytes: the peak of all tensors that the two passes
create, beyond the parameters' gradients. In turns, so that a busy machine slows all alike; of each time the median.
"""

import argparse
import statistics
import time

import torch

from benchmarks.device_memory import Created
from pretrain.config.keys import ModelConfig, SiloConfig
from pretrain.silo.activations import checkpoint_activations
from pretrain.silo.model import build_initial, token_losses

MIB = 1 << 20
SEQUENCE_TOKENS, VOCAB_SIZE = 512, 2048
WAYS = {
    "none": SiloConfig(),
    "layers": SiloConfig(activation_checkpointing="layers"),
    "layers, every 2nd": SiloConfig(activation_checkpointing="layers", activation_checkpointing_every=2),
    "selective": SiloConfig(activation_checkpointing="selective"),
}


def passes(model: torch.nn.Module, rows: torch.Tensor) -> tuple[int, float]:
    """Peak bytes beyond the gradients, and seconds of two more passes, which nobody counts."""
    model.zero_grad()
    with Created() as created:
        token_losses(model, rows, rows.roll(-1, 1)).mean().backward()
    model.zero_grad()
    began = time.perf_counter()
    token_losses(model, rows, rows.roll(-1, 1)).mean().backward()
    seconds = time.perf_counter() - began
    return created.peak_bytes - sum(p.grad.nbytes for p in model.parameters() if p.grad is not None), seconds


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro batch")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"hidden_size": arguments.hidden, "intermediate_size": arguments.hidden * 11 // 4, "num_attention_heads": 8}
    of = ModelConfig(config={"model_type": "llama", "num_hidden_layers": arguments.layers} | sizes)
    rows = torch.arange(arguments.tokens).view(-1, SEQUENCE_TOKENS) % VOCAB_SIZE
    for dtype in (torch.float32, torch.bfloat16):
        models = {way: build_initial(of, VOCAB_SIZE).to(dtype).train() for way in WAYS}
        for way, silo in WAYS.items():
            if silo.activation_checkpointing != "none":
                checkpoint_activations(models[way], silo)
        found: dict[str, list[tuple[int, float]]] = {way: [] for way in WAYS}
        for _ in range(arguments.turns):
            for way, model in models.items():
                found[way].append(passes(model, rows))
        plain_bytes, plain_seconds = found["none"][0][0], [seconds for _, seconds in found["none"]]
        for way, turns in found.items():
            num_bytes, seconds = max(b for b, _ in turns), [s for _, s in turns]
            ratio = statistics.median(own / plain for own, plain in zip(seconds, plain_seconds, strict=True))
            print(
                f"{str(dtype).removeprefix('torch.'):>8}  {way:<18}{num_bytes / MIB:7.0f} MiB = "
                f"{num_bytes / plain_bytes:.2f} of none's  {statistics.median(seconds):6.2f} s = {ratio:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
