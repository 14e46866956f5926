"""What `atoll plan` predicts against what is then measured behind thin links.

    python -m benchmarks.plan CORPORA [--rate 20mbit] [--directory DIR] [key=value ...]

In network namespaces as in benchmarks.links: first a few rounds of three ways to sync on links as fast as the machine,
which tell tokens per second and the work of a sync (as `atoll plan --measured` reads them), and a request to the
store on both kinds of link. Then the plan of every way for the thin links is written to predictions.json and printed,
and only then are these runs made. Printed is planned / measured: utilisation, the median wait of a sync (ways without
overlap), bytes sent by all silos, and the highest resident memory of a silo and of the aggregator, as the processes
themselves record it. Linux, as root.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.links import (
    S3_ENVIRONMENT,
    check_machine,
    configuration,
    inside,
    measured_mbit,
    namespaces,
    s3_server,
    trained,
)
from launch.demo import prepare_text
from launch.show.metrics import MetricsReader
from launch.show.plan import measured_run, tokens_per_second
from launch.show.run import Run
from pretrain.config.keys import RunConfig
from pretrain.plan.plan import make_plan
from pretrain.plan.seconds import Given, parse_bandwidth

# A way to the one that is run on fast links for it.
CALIBRATED_BY = {
    "store fp32": "store fp32",
    "store int4": "store int4",
    "store streaming overlap int4": "store int4",
    "collective int4": "collective int4",
}
CALIBRATION_ROUNDS = 6
NUM_SILOS = 2
ASK = (
    "import time\nfrom pretrain.exchange.objects import Objects\n"
    "objects, found = Objects('s3://benchmark/none', anchor='none'), []\n"
    "for _ in range(40):\n  began = time.monotonic(); objects.exists('none'); found.append(time.monotonic() - began)\n"
    "print(sorted(found)[20])"
)
Figures = dict[str, float]


def main() -> None:
    """Calibrate, predict, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path, help="folder of corpus folders")
    parser.add_argument("--rate", default="20mbit", help="of each direction of each link, as tc writes it")
    parser.add_argument("--directory", type=Path, default=Path("runs/plan"))
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_intermixed_args()
    check_machine()
    directory, rate = arguments.directory / arguments.rate, arguments.rate
    packed, tokenizer = prepare_text(arguments.directory, arguments.corpora)
    packed = dict(list(packed.items())[:NUM_SILOS])

    def config_of(way: str, prefix: str = "", *more: str) -> RunConfig:
        folder = directory / f"{prefix}{way.replace(' ', '-')}"
        return configuration(way, folder, packed, tokenizer, [*arguments.overrides, *more])

    with namespaces(list(packed), None) as (hub, spaces), s3_server(hub):
        fast_seconds = request_seconds(next(iter(spaces.values())))
        for way in dict.fromkeys(CALIBRATED_BY.values()):
            num_steps = CALIBRATION_ROUNDS * config_of(way).outer.sync_interval_steps
            say(f"fast links: {way}")
            trained(config_of(way, "fast-", f"inner.num_steps={num_steps}", "inner.warmup_steps=0"), hub, spaces)
    # A link of the world has no bucket of a megabit that it sends at once.
    with namespaces(list(packed), rate, burst="256kbit") as (hub, spaces), s3_server(hub):
        space = next(iter(spaces.values()))
        thin_seconds = request_seconds(space)
        requests = f"a request {1e3 * thin_seconds:.1f} ms, on fast links {1e3 * fast_seconds:.1f} ms"
        say(f"link {rate}, measured {measured_mbit(space, hub):.1f} Mbit/s; {requests}")
        configs = {way: config_of(way) for way in CALIBRATED_BY}
        added_seconds = max(0.0, thin_seconds - fast_seconds)
        planned = {
            way: planned_figures(
                config, directory / f"fast-{CALIBRATED_BY[way].replace(' ', '-')}", rate, added_seconds
            )
            for way, config in configs.items()
        }
        (directory / "predictions.json").write_text(json.dumps(planned, indent=2) + "\n")
        for way, figures in planned.items():
            say(f"planned: {way}: {', '.join(f'{what} {number:.4g}' for what, number in figures.items())}")
        for way, config in configs.items():
            say(f"thin links: {way}")
            trained(config, hub, spaces)
            print(compared(way, planned[way], measured_figures(config)), flush=True)


def say(words: str) -> None:
    """A line with the machine's load, which other programs share."""
    print(f"[load {os.getloadavg()[0]:.1f}] {words}", flush=True)


def request_seconds(space: str) -> float:
    """Median of requests to the store that carry nothing."""
    argv = inside(space, [sys.executable, "-c", ASK])
    found = subprocess.run(argv, env=os.environ | S3_ENVIRONMENT, check=True, capture_output=True, text=True)
    return float(found.stdout)


def planned_figures(config: RunConfig, earlier: Path, rate: str, latency_seconds: float) -> Figures:
    """As `atoll plan --measured EARLIER --bandwidth RATE --latency SECONDS` says them."""
    speeds, factor = measured_run(earlier)
    given = Given(
        link_bits_per_second=parse_bandwidth(rate),
        latency_seconds=latency_seconds,
        tokens_per_second=tokens_per_second(list(config.silos), None, speeds),
        work_factor=factor,
    )
    plan = make_plan(config, given)
    return {
        "utilisation": plan.pace.utilisation,
        "sync_seconds": 0.0 if config.outer.overlap_steps else plan.pace.sync_seconds,
        "sent_bytes": sum(plan.sent_bytes.values()),
        "silo_bytes": max(memory.cpu_bytes for memory in plan.memory.values()),
        "aggregator_bytes": plan.aggregator_memory_bytes,
        "tokens_per_second": statistics.mean(speeds.values()),
        "work_factor": factor,
    }


def measured_figures(config: RunConfig) -> Figures:
    """The same of a run that has ended."""
    run = Run.read(config)
    ends, syncs = run.records["summary"], run.records["sync"]
    training, waiting = (sum(end[f"seconds_{what}"] for end in ends) for what in ("training", "waiting"))
    waits = [sync["wait_seconds"] for sync in syncs if sync["version"] > 1]
    tokens = (
        config.inner.num_steps * config.sequence_tokens * sum(s.global_batch_sequences for s in config.silos.values())
    )
    records = MetricsReader(run.directory / "metrics.jsonl").read_new()
    aggregators = [record["peak_memory_bytes"] for record in records if record["kind"] == "aggregator"]
    return {
        "utilisation": training / (training + waiting),
        "sync_seconds": 0.0 if config.outer.overlap_steps else statistics.median(waits),
        "sent_bytes": sum(sync["bytes_sent"] for sync in syncs),
        "silo_bytes": max(end["peak_memory_bytes"] for end in ends),
        "aggregator_bytes": max(aggregators, default=0),
        "tokens_per_second": tokens / training,
    }


def compared(way: str, planned: Figures, measured: Figures) -> str:
    """One line: planned / measured = ratio of everything that is predicted."""
    units = {"utilisation": (1.0, ".3f"), "sync_seconds": (1.0, ".2f"), "sent_bytes": (1.0, ".0f")}
    units |= dict.fromkeys(("silo_bytes", "aggregator_bytes"), (float(1 << 20), ".0f"))
    units |= {"tokens_per_second": (1.0, ".0f")}
    found = [f"RESULT {way}:"]
    for what, (unit, form) in units.items():
        if not measured[what]:
            continue
        name = what.replace("_bytes", " MiB") if unit > 1 else what.replace("_", " ")
        both = f"{planned[what] / unit:{form}} / {measured[what] / unit:{form}}"
        found.append(f"{name} {both} = {planned[what] / measured[what]:.3f};")
    return "  ".join(found)


if __name__ == "__main__":
    main()
