"""What the formats of pretrain/outer/quantize.py cost in time, bytes and error.

    python -m benchmarks.codecs

One thread, a 4096 x 4096 fp32 tensor of normal data. Times are in copies: the time of `torch.Tensor.copy_` of the same
tensor in the same run. Copy, encode and decode-and-add take turns, so that a busy machine slows all alike; printed are
the ratio of the medians over the turns and, as "least", that of the fastest turns. The error is the root mean square
over that of the data. "Fewer bytes" is against a bf16 ring all-reduce at every step, where each of K silos sends
2 (K - 1) / K times 16 bits an element, for one coded copy every H = 100 steps.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from pretrain.outer.quantize import QUANTIZERS, decode

SYNC_INTERVAL_STEPS = 100


def seconds(action: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main() -> None:
    """Take turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    values = torch.randn(arguments.rows, 4096, generator=torch.Generator().manual_seed(1))
    target = torch.zeros_like(values)
    parts = {name: quantizer.encode(values) for name, quantizer in QUANTIZERS.items()}
    actions: dict[tuple[str, str], Callable[[], object]] = {("copy", ""): lambda: target.copy_(values)}
    for name, quantizer in QUANTIZERS.items():
        actions[name, "encode"] = partial(quantizer.encode, values)
        actions[name, "decode"] = partial(quantizer.decode_add, parts[name], target, 0.5)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in actions}
    for turn in range(arguments.turns + 1):
        for key, action in actions.items():
            taken = seconds(action)
            if turn:  # the first one warms up
                times[key].append(taken)

    copies = times["copy", ""]
    print(
        f"copy: {statistics.median(copies) * 1e3:.2f} ms, least {min(copies) * 1e3:.2f} ms, {values.numel():,} elements"
    )
    print("          encode  (least)  decode-and-add  (least)  bits an element   error     fewer bytes at K = 2, 4, 8")
    for name, quantizer in QUANTIZERS.items():
        ratios = [
            of(times[name, action]) / of(copies) for action in ("encode", "decode") for of in (statistics.median, min)
        ]
        bits = 8 * sum(part.nbytes for part in parts[name].values()) / values.numel()
        error = (decode(quantizer, parts[name], values.shape) - values).norm() / values.norm()
        fewer = [2 * (k - 1) / k * 16 * SYNC_INTERVAL_STEPS / bits for k in (2, 4, 8)]
        print(
            f"{name:<8}{ratios[0]:8.2f}{ratios[1]:9.2f}{ratios[2]:16.2f}{ratios[3]:9.2f}{bits:17.4f}{error:11.5f}"
            + "".join(f"{ratio:11,.0f}" for ratio in fewer)
        )


if __name__ == "__main__":
    main()
