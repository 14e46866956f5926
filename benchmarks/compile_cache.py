"""How long the first step of compiled layers takes: at the first start, and at later ones, which find what it kept.

    python -m benchmarks.compile_cache [--turns 3] [--hidden 256] [--layers 4]

Each start is a process of its own: a llama is built, its layers are compiled (`silo.compile`), and it goes forward and
backward twice. Told are the first turn's seconds less the second's. In turns: with an empty folder, with what that
start left there, and without compiling, for what a first step takes by itself.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("empty", "kept", "eager")


def start(hidden: int, layers: int, *, compiled: bool) -> None:
    """In a process of its own: print the seconds."""
    import torch
    from torch._dynamo.utils import counters

    from pretrain.config.keys import ModelConfig
    from pretrain.silo.model import build_initial, compile_layers, token_losses

    torch.set_num_threads(1)
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers}
    model = build_initial(ModelConfig(config={"model_type": "llama", "num_attention_heads": 4} | sizes), 2048)
    rows = torch.zeros(2, 256, dtype=torch.long)
    if compiled:
        compile_layers(model)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        token_losses(model, rows, rows).mean().backward()
        seconds.append(time.perf_counter() - began)
    found = counters["inductor"]
    print("RESULT", seconds[0] - seconds[1], found["fxgraph_cache_hit"], found["fxgraph_cache_miss"])


def measured(way: str, folder: str, arguments: argparse.Namespace) -> list[float]:
    """Seconds, graphs found, graphs not found."""
    sizes = ["--hidden", str(arguments.hidden), "--layers", str(arguments.layers)]
    command = [sys.executable, "-m", "benchmarks.compile_cache", "--way", way, *sizes]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return [float(part) for part in said.split("RESULT")[1].split()]


def main() -> None:
    """Take turns and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--way", choices=WAYS, help="one start, which the others are made of")
    arguments = parser.parse_args()
    if arguments.way:
        start(arguments.hidden, arguments.layers, compiled=arguments.way != "eager")
        return
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.turns):
        with tempfile.TemporaryDirectory() as folder:
            for way in WAYS:
                found[way].append(measured(way, str(Path(folder) / "cache"), arguments))
    for way, turns in found.items():
        seconds, hits, misses = (list(column) for column in zip(*turns, strict=True))
        print(
            f"{way:<6}{statistics.median(seconds):7.2f} s ({min(seconds):.2f} to {max(seconds):.2f}) before a first "
            f"step, {hits[-1]:.0f} graphs found and {misses[-1]:.0f} not",
            flush=True,
        )


if __name__ == "__main__":
    main()
