"""Which outer settings bring the demo's global model nearest to the central one, at equal tokens.

    python -m benchmarks.outer_sweep --directory runs/sweep [--corpora DIR] [key=value ...]

Trains one central model, each silo alone and one federation per setting, all on the same tokens per silo; a finished
run is not repeated. Prints the mean held-out loss of each and its ratio to the central model's.
"""

import argparse
import dataclasses
from pathlib import Path

from benchmarks.runs import finished, mean_loss, plain
from launch.demo import comparison_configs, federated_config, prepare_text
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


def main() -> None:
    """Run the sweep and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--corpora", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    packed, tokenizer = prepare_text(arguments.directory, arguments.corpora)
    overrides = ["wandb.mode=disabled", *arguments.overrides]
    config = plain(federated_config(arguments.directory, packed, tokenizer, overrides))
    central = 0.0

    def show(label: str, config: RunConfig) -> None:
        """Train it, if that was not done, and print a line."""
        nonlocal central
        summary = finished(config, arguments.directory / "launch.log")
        loss, tokens = mean_loss(summary), summary["tokens"]
        central = central or loss
        print(f"RESULT {label:40} {loss:.4f}  x{loss / central:.4f} of central  {tokens:,} tokens", flush=True)

    for label, other in comparison_configs(config).items():
        show(label, other)
    for sync_interval, optimizer, lr, momentum in SETTINGS:
        outer = dataclasses.replace(
            config.outer, sync_interval_steps=sync_interval, optimizer=optimizer, lr=lr, momentum=momentum
        )
        name = f"h{sync_interval}-{optimizer}-{lr}-{momentum}"
        show(name, dataclasses.replace(config, outer=outer, directory=str(arguments.directory / "outer" / name)))


if __name__ == "__main__":
    main()
