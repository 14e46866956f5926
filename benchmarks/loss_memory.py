"""Memory and seconds of the loss with a large vocabulary: whole logits against chunks of them (silo.loss_chunk_tokens).

    python -m benchmarks.loss_memory [--vocabulary 128256] [--tokens 4096] [--chunks 512 256 128] [--turns 3]

A llama of one layer, forward and backward pass of `token_losses`, fp32 and bf16, on one thread. Bytes: the peak of all
tensors that the two passes create, beyond the parameters' gradients, which both ways need. Of each time the median.
"""

import argparse
import statistics
import time

import torch

from benchmarks.device_memory import Created
from pretrain.config.keys import ModelConfig
from pretrain.silo.model import build_initial, token_losses

MIB = 1 << 20
SEQUENCE_TOKENS = 512
LLAMA = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": SEQUENCE_TOKENS}


def passes(model: torch.nn.Module, rows: torch.Tensor, chunk_tokens: int) -> tuple[int, float]:
    """Peak bytes beyond the gradients, and seconds."""
    model.zero_grad()
    began = time.perf_counter()
    with Created() as created:
        token_losses(model, rows, rows.roll(-1, 1), chunk_tokens=chunk_tokens).mean().backward()
    seconds = time.perf_counter() - began
    return created.peak_bytes - sum(p.grad.nbytes for p in model.parameters() if p.grad is not None), seconds


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro batch")
    parser.add_argument("--chunks", type=int, nargs="+", default=[512, 256, 128])
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.tokens // SEQUENCE_TOKENS, SEQUENCE_TOKENS)
    rows = torch.randint(0, arguments.vocabulary, shape, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        model = build_initial(ModelConfig(config=LLAMA | HEADS), arguments.vocabulary).to(dtype)
        found = {
            chunk: [passes(model, rows, chunk) for _ in range(arguments.turns)] for chunk in (0, *arguments.chunks)
        }
        whole_bytes, whole_seconds = max(b for b, _ in found[0]), statistics.median(s for _, s in found[0])
        for chunk, turns in found.items():
            num_bytes, seconds = max(b for b, _ in turns), statistics.median(s for _, s in turns)
            print(
                f"{str(dtype).removeprefix('torch.'):>8}  {f'chunks of {chunk}' if chunk else 'whole logits':<14}"
                f"{num_bytes / MIB:8.0f} MiB = {num_bytes / whole_bytes:.3f} of whole logits'  "
                f"{seconds:6.2f} s = {seconds / whole_seconds:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
