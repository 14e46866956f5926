"""What a gate keeps of a run in which one silo is poisoned: a table of its versions, with the gate and without.

    python -m benchmarks.gate [key=value ...] [--corpora CORPORA] [--directory DIR] [--poisoned tests]

Each corpus is a silo of the demo; the poisoned one shuffles the tokens of all that it trains on from the step on that
makes version 5, and has most of the tokens. With the gate every version is a candidate: the silos' mean may be up to
0.05 nats above that of the current one, each silo's own loss up to 0.1. Printed are, for each version, what each silo
has found its held-out loss to be and what was decided; then what `atoll export --current` gives away and what `atoll
export` does of the same run without a gate, and bytes and seconds of both. A run that has finished in DIR is not
repeated.
"""

import argparse
import dataclasses
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.runs import finished, plain
from launch.demo import federated_config, prepare_text
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_run
from pretrain.exchange.gated import Gated
from pretrain.exchange.store import StoreExchange
from pretrain.federation.current import current_version
from pretrain.federation.preflight import gate_splits
from tests.faults.scripted import Faults, check_struck, with_faults

CLEAN_VERSIONS = 4
RULE = {"every_versions": 1, "max_mean_rise": 0.05, "max_silo_rise": 0.1}
SETTINGS = ["inner.num_steps=160", "outer.sync_interval_steps=20", "silo.eval_interval_rounds=0", "wandb.mode=disabled"]
SEQUENCES = 4  # of a step; of the poisoned silo four times as many


def main() -> None:
    """Run what has not run yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, help="folder of corpus folders; default: the installed Python's text")
    parser.add_argument("--directory", type=Path, default=Path("runs/gate"))
    parser.add_argument("--poisoned", default="tests", help="which silo")
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_intermixed_args()
    packed, tokenizer = prepare_text(arguments.directory, arguments.corpora)

    def run(name: str, gate: dict[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
        """One with a gate, or without; the poisoned silo has two thirds of the tokens of three."""
        folder = arguments.directory / name
        config = plain(federated_config(folder, packed, tokenizer, [*SETTINGS, *arguments.overrides]))
        for silo, settings in config.silos.items():
            sequences = 4 * SEQUENCES if silo == arguments.poisoned else SEQUENCES
            settings.global_batch_sequences = settings.micro_batch_sequences = sequences
        config.gate = dataclasses.replace(config.gate, **gate)
        first = CLEAN_VERSIONS * config.outer.sync_interval_steps
        faults: Faults = {arguments.poisoned: [("reading", first, 0, "shuffle", 0)]}
        fired = folder.with_name(f"{name}.fired")
        summary = finished(config, arguments.directory / "launch.log", with_faults(faults, fired))
        check_struck(faults, fired)
        return load_run(folder), summary

    data = gate_splits(federated_config(arguments.directory, packed, tokenizer, SETTINGS))[0]
    gated, with_gate = run("gated", RULE | {"data": data})
    free, without = run("off", {})
    losses = show_versions(gated)
    kept, newest = current_version(gated, opened(gated)), free.schedule.num_versions
    print(f"\nexport --current: version {kept}, mean {fmean(losses[kept].values()):.4f}")
    bad = fmean(without["val_loss"].values())
    print(f"export without a gate: version {newest}, mean {bad:.4f}, {bad - fmean(losses[kept].values()):+.4f}")
    for name, config, summary in (("with the gate", gated, with_gate), ("without", free, without)):
        seconds = sum(summary[f"seconds_{what}"] for what in ("training", "waiting", "evaluating"))
        print(
            f"{name:<14} {summary['bytes_sent']:,} bytes of payloads sent, {summary['seconds_evaluating']:.1f} s of "
            f"{seconds:.1f} s evaluating, digest {opened(config).read_commit(newest).parameters_digest[:12]}"
        )


def opened(config: RunConfig) -> StoreExchange:
    """The store of a run."""
    exchange = StoreExchange(config.store_url)
    exchange.read_contract()
    return exchange


def show_versions(config: RunConfig) -> dict[int, dict[str, float]]:
    """Print what was found and decided; version and silo to loss."""
    exchange = opened(config)
    gated, found = Gated(exchange, config.gate), dict[int, dict[str, float]]()
    silos = sorted(config.silos)
    print(f"{'version':<9}" + "".join(f"{silo:>10}" for silo in silos) + f"{'mean':>10}  decision")
    for decision in gated.decisions(exchange.newest_version()):
        losses = found[decision.version] = gated.losses_of(decision)
        said = "current" if decision.is_current else f"{decision.current} stays: {'; '.join(decision.reasons)}"
        cells = [*(losses[silo] for silo in silos), fmean(losses.values())]
        print(f"{decision.version:<9}" + "".join(f"{cell:>10.4f}" for cell in cells) + f"  {said}")
    return found


if __name__ == "__main__":
    main()
