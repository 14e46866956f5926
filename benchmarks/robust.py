"""What one malicious silo of five does to the global model, with each way to merge; table of held-out losses.

    python -m benchmarks.robust CORPORA [key=value ...] [--directory DIR] [--seeds 0] [--only WAY ...]

Each corpus folder in CORPORA is a silo; one more, the intruder, holds the first one's text, so that the honest silos
have all text between them. It trains as the others do, and spoils what it sends in every round: `flip` sends the
opposite of its pseudo-gradient, `scale` a hundred times it, `noise` adds normal noise of a hundred times its size.
Printed are the mean held-out loss over the corpora of the final global model, and its difference to the run whose five
silos are honest and whose merge is the weighted mean. A run that has finished in DIR is not repeated.
"""

import argparse
import statistics
from pathlib import Path

from benchmarks.runs import finished, plain
from launch.demo import federated_config, prepare_text
from tests.faults.scripted import Faults, check_struck, with_faults

INTRUDER = "intruder"
ATTACKS = {"honest": 0.0, "flip": 0.0, "scale": 100.0, "noise": 100.0}
WAYS = {
    "mean": "outer.merge=mean",
    "mean, norms guarded": "outer.merge=mean membership.max_norm_ratio=3 membership.quorum=4",
    "clip": "outer.merge=clip",
    "trimmed_mean": "outer.merge=trimmed_mean outer.num_malicious=1",
    "median": "outer.merge=median",
    "krum": "outer.merge=krum outer.num_malicious=1",
}
SETTINGS = [
    "inner.num_steps=240",
    "outer.sync_interval_steps=20",
    "outer.optimizer=sgd",
    "outer.lr=1.0",
    "silo.eval_interval_rounds=0",
    "exchange.poll_seconds=0.05",
    "wandb.mode=disabled",
]


def main() -> None:
    """Run what has not run yet; print a line a run, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path, help="folder of corpus folders")
    parser.add_argument("--directory", type=Path, default=Path("runs/robust"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_intermixed_args()
    packed, tokenizer = prepare_text(arguments.directory, arguments.corpora)
    corpora = list(packed)
    everybody = packed | {INTRUDER: packed[corpora[0]]}

    def loss(way: str, attack: str, seed: int) -> float:
        folder = arguments.directory / f"{way.replace(', ', '-').replace(' ', '-')}-{attack}-seed{seed}"
        seeded = [f"model.seed={seed}", f"silo.data_seed={seed}"]
        overrides = [*SETTINGS, *seeded, *WAYS[way].split(), *arguments.overrides]
        config = plain(federated_config(folder, everybody, tokenizer, overrides))
        config.silos[INTRUDER].data_seed = seed + 1  # other batches than the silo with the same text
        fired = folder.with_name(f"{folder.name}.fired")
        faults: Faults = {INTRUDER: [("sending", 1, 0, attack, ATTACKS[attack])] if attack != "honest" else []}
        try:
            losses = finished(config, arguments.directory / "launch.log", with_faults(faults, fired))["val_loss"]
        except SystemExit:  # the model is so bad that nothing can be merged any more
            losses = dict.fromkeys(corpora, float("inf"))
        check_struck(faults, fired)
        found = statistics.mean(losses[corpus] for corpus in corpora)
        print(f"{way:<20} {attack:<8} seed {seed}  loss {found:.4f}", flush=True)
        return found

    found = {
        (way, attack): [loss(way, attack, seed) for seed in arguments.seeds]
        for way in arguments.only
        for attack in ATTACKS
    }
    print("\n" + f"{'':<20}" + "".join(f"{attack:>20}" for attack in ATTACKS))
    reference = found[arguments.only[0], "honest"]
    for way in arguments.only:
        print(f"{way:<20}" + "".join(f"{cell(found[way, attack], reference):>20}" for attack in ATTACKS))


def cell(losses: list[float], references: list[float]) -> str:
    """Mean loss, and how far it is from the reference, seed by seed."""
    shares = [loss / reference - 1 for loss, reference in zip(losses, references, strict=True)]
    return f"{statistics.mean(losses):.4f} ({statistics.mean(shares):+.1%})"


if __name__ == "__main__":
    main()
