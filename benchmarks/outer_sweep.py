"""Which outer settings bring the demo's global model nearest to the central one, at equal tokens.

    python -m benchmarks.outer_sweep --directory runs/sweep [--corpora DIR] [key=value ...]

Trains one central model, each silo alone and one federation per setting, all on the same tokens per silo; a finished
run is not repeated. Prints the mean held-out loss of each and its ratio to the central model's.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from launch.demo import comparison_configs, federated_config, prepare_text
from launch.start.local import launch_local
from pretrain.config.keys import RunConfig

# (sync interval in steps, outer optimizer, lr, momentum)
SETTINGS = [
    (25, "sgd", 1.0, 0.0),
    (25, "nesterov", 0.7, 0.9),
    (25, "nesterov", 0.7, 0.5),
    (25, "nesterov", 0.9, 0.3),
    (25, "nesterov", 1.0, 0.2),
    (25, "sgd", 1.2, 0.0),
    (10, "sgd", 1.0, 0.0),
    (50, "sgd", 1.0, 0.0),
    (50, "nesterov", 0.9, 0.3),
    (50, "nesterov", 0.7, 0.9),
    (20, "nesterov", 0.9, 0.3),
    (20, "nesterov", 0.8, 0.4),
    (10, "nesterov", 0.9, 0.3),
    (10, "nesterov", 0.7, 0.5),
]
# One process a silo and no ZeRO: the same arithmetic with less overhead than the demo's mixed layout.
PLAIN = ["processes_per_node=1", "micro_batch_sequences=16", "deepspeed.zero_optimization.stage=0"]


def mean_loss(config: RunConfig) -> tuple[float, int]:
    """Train `config` to the end unless that was done; returns mean held-out loss over the corpora, and tokens."""
    directory = Path(config.directory)
    if not (directory / "summary.json").exists():
        code = launch_local(config)
        if code:
            sys.exit(code)
    summary = json.loads((directory / "summary.json").read_text())
    losses = summary["val_loss"].values()
    return sum(losses) / len(losses), summary["tokens"]


def main() -> None:
    """Run the sweep and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--corpora", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    packed, tokenizer = prepare_text(arguments.directory, arguments.corpora)
    plain = [f"silos.{name}.{setting}" for name in packed for setting in PLAIN] + ["wandb.mode=disabled"]
    config = federated_config(arguments.directory, packed, tokenizer, [*plain, *arguments.overrides])
    central = 0.0
    for label, other in comparison_configs(config).items():
        loss, tokens = mean_loss(other)
        central = central or loss
        print(f"RESULT {label:40} {loss:.4f}  x{loss / central:.4f} of central  {tokens:,} tokens", flush=True)
    for sync_interval, optimizer, lr, momentum in SETTINGS:
        outer = dataclasses.replace(
            config.outer, sync_interval_steps=sync_interval, optimizer=optimizer, lr=lr, momentum=momentum
        )
        name = f"h{sync_interval}-{optimizer}-{lr}-{momentum}"
        loss, tokens = mean_loss(
            dataclasses.replace(config, outer=outer, directory=str(arguments.directory / "outer" / name))
        )
        print(f"RESULT {name:40} {loss:.4f}  x{loss / central:.4f} of central  {tokens:,} tokens", flush=True)


if __name__ == "__main__":
    main()
