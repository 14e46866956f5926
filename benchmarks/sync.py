"""Held-out loss and bytes of ways to sync, at equal tokens, each with the outer settings that suit it best.

    python -m benchmarks.sync CORPORA [key=value ...] [--directory DIR] [--seeds 0 1 2] [--only WAY ...]

Each corpus folder (train and valid text) in CORPORA is a silo. All ways train the demo's model on the same batches from
the same initial parameters. For each way every candidate of outer settings runs with the first seed (of parameters and
order of the text), and the best with the others too. Printed and plotted are the mean held-out loss of the final global
model over the corpora, its difference to the first way, seed by seed (mean and standard error), and how many times
fewer bytes one silo sends and receives than bf16 gradients in a ring all-reduce at every step. A run that has finished
in DIR is not repeated.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.runs import finished, mean_loss, plain
from launch.demo import comparison_configs, federated_config, prepare_text

CENTRAL = "central"
BOTH_WAYS = "outer.codec={0} outer.downlink_codec={0}"
AVERAGING = "outer.optimizer=sgd outer.lr=1.0"
NESTEROV = "outer.optimizer=nesterov outer.lr=0.9 outer.momentum=0.3"
FRAGMENTS = "outer.num_fragments=3"
# A way, what it is, and the candidates of its outer settings.
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fp32": (BOTH_WAYS.format("fp32"), (AVERAGING, NESTEROV)),
    "int8": (BOTH_WAYS.format("int8"), (AVERAGING, NESTEROV)),
    "int4": (BOTH_WAYS.format("int4"), (AVERAGING, NESTEROV)),
    "e3m0": (BOTH_WAYS.format("e3m0"), (AVERAGING, NESTEROV, f"{AVERAGING} outer.error_feedback=1.0")),
    "streaming": (f"{BOTH_WAYS.format('fp32')} {FRAGMENTS}", (AVERAGING, NESTEROV)),
    "streaming overlap int4": (
        f"{BOTH_WAYS.format('int4')} {FRAGMENTS} outer.overlap_steps=2",
        (AVERAGING, NESTEROV, f"{AVERAGING} outer.mixing=0.5"),
    ),
    "sparse": (
        "outer.codec=topk outer.downlink_codec=int4",
        (AVERAGING, "outer.optimizer=sgd outer.lr=2.0", f"{AVERAGING} outer.error_feedback=1.0"),
    ),
    "sparse h5": (
        "outer.codec=topk outer.downlink_codec=int4 outer.sync_interval_steps=5",
        (AVERAGING, "outer.optimizer=sgd outer.lr=2.0"),
    ),
    "muon": (
        f"{BOTH_WAYS.format('fp32')} inner.optimizer=muon",
        (f"{AVERAGING} inner.muon_lr=0.02", f"{AVERAGING} inner.muon_lr=0.01", f"{NESTEROV} inner.muon_lr=0.02"),
    ),
    "muon int4": (
        f"{BOTH_WAYS.format('int4')} inner.optimizer=muon",
        (f"{AVERAGING} inner.muon_lr=0.02", f"{NESTEROV} inner.muon_lr=0.02"),
    ),
}


def main() -> None:
    """Run what has not run yet, print one line a run and the table, write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path, help="folder of corpus folders")
    parser.add_argument("--directory", type=Path, default=Path("runs/sync"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[*WAYS, CENTRAL], choices=[*WAYS, CENTRAL])
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_intermixed_args()
    directory, seeds = arguments.directory, arguments.seeds
    packed, tokenizer = prepare_text(directory, arguments.corpora)

    def run(way: str, settings: str, seed: int) -> dict[str, Any]:
        folder = directory / way.replace(" ", "-") / f"{'_'.join(settings.split()) or 'only'}_seed{seed}"
        seeded = [f"model.seed={seed}", f"silo.data_seed={seed}", "silo.eval_interval_rounds=0", "wandb.mode=disabled"]
        overrides = [*seeded, *arguments.overrides, *settings.split()]
        config = federated_config(folder, packed, tokenizer, [*overrides, *WAYS.get(way, ("",))[0].split()])
        config = comparison_configs(config)[CENTRAL] if way == CENTRAL else plain(config)
        summary = finished(config, directory / "launch.log")
        print(f"{way:<24} seed {seed}  loss {mean_loss(summary):.4f}  {settings}", flush=True)
        return summary

    results: dict[str, list[dict[str, Any]]] = {}
    chosen: dict[str, str] = {}
    for way in arguments.only:
        candidates = WAYS[way][1] if way in WAYS else ("",)
        first = {settings: run(way, settings, seeds[0]) for settings in candidates}
        chosen[way] = min(first, key=lambda settings: mean_loss(first[settings]))
        results[way] = [first[chosen[way]], *(run(way, chosen[way], seed) for seed in seeds[1:])]
    print()
    for way, summaries in results.items():
        print(row(way, summaries, results[arguments.only[0]]) + f"  {chosen[way]}")
    plot(results, directory / "sync.svg")


def times_fewer(summary: dict[str, Any], key: str) -> float:
    """bf16 data-parallel's bytes divided by ours in one direction; 0 where nothing travels."""
    return summary["bytes_data_parallel"] / summary[key] if summary[key] else 0.0


def row(way: str, summaries: list[dict[str, Any]], references: list[dict[str, Any]]) -> str:
    """One line of the table."""
    losses = [mean_loss(summary) for summary in summaries]
    shares = [loss / mean_loss(reference) - 1 for loss, reference in zip(losses, references, strict=True)]
    error = statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else float("nan")
    fewer = "  ".join(f"{times_fewer(summaries[0], key):8.1f}" for key in ("bytes_sent", "bytes_received"))
    return f"{way:<24} {statistics.mean(losses):.4f}  {statistics.mean(shares):+7.2%} ± {error:.2%}  fewer {fewer}"


def plot(results: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Loss over bytes sent: every seed a dot, ways that send nothing left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for way, summaries in results.items():
        sent = [times_fewer(summary, "bytes_sent") for summary in summaries]
        if all(sent):
            axes.scatter(sent, [mean_loss(summary) for summary in summaries], label=way)
        else:
            axes.axhline(statistics.mean(map(mean_loss, summaries)), linestyle="--", color="grey", label=way)
    axes.set(
        xscale="log", xlabel="times fewer bytes sent than bf16 data-parallel", ylabel="held-out loss, nats a token"
    )
    axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()
