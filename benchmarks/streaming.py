"""Bytes and held-out loss of ways to sync, at equal tokens, against plain averaging in fp32 in the same run.

    python -m benchmarks.streaming FOLDER [--directory DIR] [--only NAME ...] [key=value ...]

Each corpus folder (train and valid text) in FOLDER is a silo. Every setting trains the demo's model on the same batches
from the same initial parameters; shown are the mean held-out loss over the corpora of the final global model, its
difference to the first setting, and the bytes that one silo sent and received in payload files, as how many times fewer
than bf16 gradients in a ring all-reduce at every step. A setting that has finished in DIR is not run again.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from launch.demo import federated_config, prepare_text
from launch.local import launch_local

SETTINGS: dict[str, list[str]] = {
    "fp32": ["outer.codec=fp32"],
    "int8": ["outer.codec=int8", "outer.downlink_codec=int8"],
    "int4": ["outer.codec=int4", "outer.downlink_codec=int4"],
    "e3m0": ["outer.codec=e3m0", "outer.downlink_codec=e3m0"],
    "streaming": ["outer.codec=fp32", "outer.num_fragments=3"],
    "streaming int4": ["outer.codec=int4", "outer.downlink_codec=int4", "outer.num_fragments=3"],
    "streaming int4 overlap": [
        "outer.codec=int4",
        "outer.downlink_codec=int4",
        "outer.num_fragments=3",
        "outer.overlap_steps=2",
    ],
    "topk": ["outer.codec=topk", "outer.downlink_codec=int4"],
}


def main() -> None:
    """Print one line a setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path, help="folder of corpus folders")
    parser.add_argument("--directory", type=Path, default=Path("runs/streaming"))
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments, reference = parser.parse_intermixed_args(), None
    packed, tokenizer = prepare_text(arguments.directory, arguments.corpora)
    for name in arguments.only:
        directory = arguments.directory / name.replace(" ", "-")
        config = federated_config(directory, packed, tokenizer, [*arguments.overrides, *SETTINGS[name]])
        if not (directory / "summary.json").exists():
            with (arguments.directory / "launch.log").open("a") as log:
                if launch_local(config, console=Console(file=log, width=120)):
                    raise SystemExit(f"{name} failed: see {directory}")
        summary = json.loads((directory / "summary.json").read_text())
        loss = sum(summary["val_loss"].values()) / len(summary["val_loss"])
        reference = reference or loss
        fewer = [summary["bytes_data_parallel"] / summary[key] for key in ("bytes_sent", "bytes_received")]
        print(
            f"{name:<24} loss {loss:.4f}  {loss / reference - 1:+.2%}  times fewer bytes sent {fewer[0]:8.1f}  "
            f"received {fewer[1]:8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
