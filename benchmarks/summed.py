"""What a secure sum does to the loss where silos tell of their gradients: with it, without it, and with nothing told.

    python -m benchmarks.summed [--directory runs/summed] [--corpora DIR] [--seeds 0 1 2] [key=value ...]

Silos of different text (atoll demo's, or a folder of corpora), a model of 0.1 million parameters, 100 steps, at every
sync interval: AdamW with second moments shared, and Muon with mean gradients besides. Each is trained with plain fp32
deliveries and with `outer.secure_sum`, all else alike, and with a secure sum to which nothing is told beside the
parameters. Prints the mean held-out loss of all text, and for each seed by how much a secure sum changes it. A finished
run is not repeated.
"""

import argparse
import dataclasses
from pathlib import Path

from benchmarks.runs import finished, mean_loss, plain
from launch.compare.compare import all_held_out
from launch.demo import federated_config, prepare_text
from launch.start.local import local_commands
from pretrain.config.check import check_config
from pretrain.config.keys import RunConfig
from tests.distributed.federation import warm

SMALL = [
    *("model.config.hidden_size=32", "model.config.intermediate_size=64", "model.config.num_hidden_layers=2"),
    *("model.config.num_attention_heads=2", "sequence_tokens=32", "inner.num_steps=100", "inner.warmup_steps=10"),
    *("silo.eval_interval_rounds=0", "silo.checkpoint_interval_steps=1000000"),
    *("outer.merge=mean", "outer.max_share=1.0", "outer.codec=fp32", "outer.downlink_codec=fp32"),
    *("trust.metrics.pseudo_gradient_norm=member", "exchange.poll_seconds=0.02", "wandb.mode=disabled"),
]
INNER = {
    "AdamW": ["inner.optimizer=adamw", "inner.lr=0.006", "outer.control_variates=0.0"],
    "Muon": [],
}
SUM = "outer.secure_sum=true"
NOTHING = ["outer.second_moments=local", "outer.control_variates=0.0"]
ARMS = {"plain": [], "secure sum": [SUM], "secure sum, nothing told": [SUM, *NOTHING]}


def main() -> None:
    """Train what has not been trained yet, print a line for each optimizer, interval and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("runs/summed"))
    parser.add_argument("--corpora", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--intervals", type=int, nargs="+", default=[5, 20])
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    packed, tokenizer = prepare_text(arguments.directory, arguments.corpora)

    def loss(arm: str, inner: str, interval: int, seed: int) -> float:
        name = "-".join([*f"{arm} {inner}".replace(",", "").split(), str(interval), str(seed)])
        directory = arguments.directory / "arms" / name
        settings = [*SMALL, *INNER[inner], *ARMS[arm], f"outer.sync_interval_steps={interval}", f"model.seed={seed}"]
        config = federated_config(directory, packed, tokenizer, [*settings, *arguments.overrides])
        return mean_loss(
            finished(of_seed(plain(config), seed), arguments.directory / "launch.log", warm(local_commands))
        )

    for inner in INNER:
        for interval in arguments.intervals:
            for seed in arguments.seeds:
                found = {arm: loss(arm, inner, interval, seed) for arm in ARMS}
                print(
                    f"RESULT {inner}, H {interval}, seed {seed}: "
                    + "  ".join(f"{arm} {found[arm]:.6f} ({found[arm] / found['plain'] - 1:+.4%})" for arm in ARMS),
                    flush=True,
                )


def of_seed(config: RunConfig, seed: int) -> RunConfig:
    """Every silo reads in another order; the first evaluates for all."""
    first, held_out = min(config.silos), all_held_out(config)
    silos = {
        name: dataclasses.replace(silo, data_seed=100 * seed + place, valid=held_out if name == first else {})
        for place, (name, silo) in enumerate(sorted(config.silos.items()))
    }
    config = dataclasses.replace(config, silos=silos)
    check_config(config)
    return config


if __name__ == "__main__":
    main()
