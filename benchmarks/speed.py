"""A silo that is four times slower than the rest: how long rounds take with equal and with speed-proportional steps.

    python -m benchmarks.speed [key=value ...] [--directory DIR]

Three silos train a small model; each waits in every inner step, so that the time of a step is nearly what it waits, on
any machine. In the first run all are equal; in the other two the last silo waits four times as long, first with
`membership.steps: equal`, then with `speed`. Printed are the median time between two commits, from the fourth on, its
ratio to that of the first run, and each silo's inner steps in the last commit.
"""

import argparse
import json
import statistics
from itertools import pairwise
from pathlib import Path

from benchmarks.runs import finished, plain
from launch.demo import federated_config, prepare_text
from pretrain.exchange.store import StoreExchange
from tests.faults.scripted import Faults, with_faults

STEP_SECONDS, TIMES_SLOWER, SKIPPED_COMMITS = 0.25, 4, 3
RUNS = {
    "equal silos": (1, "equal"),
    "one slower": (TIMES_SLOWER, "equal"),
    "one slower, by speed": (TIMES_SLOWER, "speed"),
}
SETTINGS = [
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "inner.num_steps=200",
    "outer.sync_interval_steps=20",
    "silo.eval_interval_rounds=0",
    "silo.checkpoint_interval_steps=200",
    "exchange.poll_seconds=0.05",
    "wandb.mode=disabled",
]


def main() -> None:
    """Run what has not run yet; print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("runs/speed"))
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_intermixed_args()
    packed, tokenizer = prepare_text(arguments.directory, None)
    reference = 0.0
    for name, (times_slower, steps) in RUNS.items():
        folder = arguments.directory / name.replace(", ", "-").replace(" ", "-")
        overrides = [*SETTINGS, f"membership.steps={steps}", *arguments.overrides]
        config = plain(federated_config(folder, packed, tokenizer, overrides))
        waits = dict.fromkeys(config.silos, STEP_SECONDS) | {max(config.silos): STEP_SECONDS * times_slower}
        faults: Faults = {silo: [("step", 0, 0, "slow", seconds)] for silo, seconds in waits.items()}
        build = with_faults(faults, folder.with_suffix(".fired"))
        finished(config, arguments.directory / "launch.log", build)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        times = [record["time"] for record in records if record["kind"] == "commit"][SKIPPED_COMMITS:]
        seconds = statistics.median(later - earlier for earlier, later in pairwise(times))
        reference = reference or seconds
        store = StoreExchange(config.store_url)
        store.read_contract()
        last = store.read_commit(config.schedule.num_versions)
        shown = ", ".join(f"{contributor.silo} {contributor.steps}" for contributor in last.contributors)
        print(f"{name:<22} {seconds:6.2f} s a round  ratio {seconds / reference:.3f}  inner steps {shown}", flush=True)


if __name__ == "__main__":
    main()
