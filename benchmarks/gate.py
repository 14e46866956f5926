"""What a gate keeps of a run in which one silo is poisoned: a table of its versions, with the gate and without.

    python -m benchmarks.gate [--directory DIR]

Three silos train a tiny model on made-up text. The one that has two thirds of the tokens shuffles those of all that it
trains on from the step on that makes version 5. Every version is a candidate: the silos' mean may be up to 0.1 nats
above that of the current one, each silo's own loss up to 0.2. Printed are, for each version, what each silo has found
its held-out loss to be and what was decided; then what `atoll export --current` gives away and what `atoll export` does
of the same run without a gate, and bytes and digest of both. A run that has finished in DIR is not repeated.
"""

import argparse
from pathlib import Path
from statistics import fmean

from benchmarks.runs import finished, mean_loss
from pretrain.config.keys import RunConfig
from pretrain.exchange.gated import Gated
from pretrain.exchange.store import StoreExchange
from pretrain.federation.current import current_version
from tests.faults.scripted import check_struck, with_faults
from tests.gates import poisoned
from tests.support import CORPORA, TinyText, make_tiny_text


def main() -> None:
    """Run what has not run yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("runs/gate"))
    directory = parser.parse_args().directory.absolute()
    text = _text(directory / "text")
    runs = {}
    for name in ("gated", "off"):
        config, faults = poisoned(directory / name, text, is_gated=name == "gated")
        fired = directory / name / "fired"
        runs[name] = config, finished(config, directory / "launch.log", with_faults(faults, fired))
        check_struck(faults, fired)
    (gated, _), (free, without) = runs["gated"], runs["off"]
    losses, kept, newest = show_versions(gated), current_version(gated, opened(gated)), free.schedule.num_versions
    good, bad = fmean(losses[kept].values()), mean_loss(without)
    print(f"\natoll export --current: version {kept}, mean {good:.4f}")
    print(f"atoll export without a gate: version {newest}, mean {bad:.4f}, {bad - good:+.4f}")
    for name, (config, summary) in runs.items():
        digest = opened(config).read_commit(newest).parameters_digest
        print(f"{name:<6} {summary['bytes_sent']:,} bytes sent, version {newest} has digest {digest[:12]}")


def _text(directory: Path) -> TinyText:
    if not directory.exists():
        return make_tiny_text(directory)
    packed = {name: directory / "packed" / name for name in CORPORA}
    return TinyText(tokenizer=directory / "tokenizer" / "tokenizer.json", packed=packed)


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
