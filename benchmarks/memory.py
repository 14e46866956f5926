"""Host memory of a silo and of the aggregator against the size of the model, with more and more silos.

    python -m benchmarks.memory [--silos 2 4] [key=value ...]

Starts real federations (and three silos that train alone, the reference) and samples each process's memory every few
milliseconds from the end of its first step on. Counted is anonymous memory (RssAnon in /proc): mapped files of shards
and safetensors can be dropped by the kernel at any time and are shown apart.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.proc import status_bytes
from benchmarks.silo_overhead import make_text
from launch.show.metrics import MetricsReader
from launch.start.local import local_commands
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config, save_config

SAMPLE_SECONDS = 0.005
MIB = 1 << 20


@dataclass(kw_only=True)
class Peak:
    """Highest sums over one child's process tree, in bytes."""

    process: subprocess.Popen[bytes]
    anonymous_bytes: int = 0
    mapped_bytes: int = 0
    tree: list[psutil.Process] = field(default_factory=list)

    def sample(self) -> None:
        """Read /proc once; a process that has just ended counts nothing."""
        anonymous = mapped = 0
        for process in self.tree:
            sizes = status_bytes(process.pid)
            anonymous += sizes.get("RssAnon", 0)
            mapped += sizes.get("RssFile", 0)
        self.anonymous_bytes = max(self.anonymous_bytes, anonymous)
        self.mapped_bytes = max(self.mapped_bytes, mapped)


def measure(config: RunConfig) -> tuple[dict[str, Peak], int]:
    """Run `config` to the end; peaks by process name, from when every silo has done its first step; parameters."""
    directory = Path(config.directory)
    save_config(config, directory / "config.yaml")
    peaks = {}
    for command in local_commands(config, directory / "config.yaml"):
        log = (directory / f"{command.name}.log").open("wb")
        environment = {**psutil.Process().environ(), **command.environment}
        process = subprocess.Popen(command.argv, stdout=log, stderr=log, env=environment)
        peaks[command.name] = Peak(process=process)
    reader, started, records = MetricsReader(directory / "metrics.jsonl"), set[str](), []
    while any(peak.process.poll() is None for peak in peaks.values()):
        if any(peak.process.returncode for peak in peaks.values()):
            break  # the others would wait for it
        if len(started) < len(config.silos):
            new = reader.read_new()
            records += new
            started |= {record["silo"] for record in new if record["kind"] == "step"}
            time.sleep(0.1)
            for peak in peaks.values():
                # torchrun's agent is not part of the silo's state: its children are.
                root = psutil.Process(peak.process.pid)
                peak.tree = root.children(recursive=True) or [root]
            continue
        for peak in peaks.values():
            peak.sample()
        time.sleep(SAMPLE_SECONDS)
    failed = [name for name, peak in peaks.items() if peak.process.returncode]
    if failed:
        for peak in peaks.values():
            peak.process.terminate()
        raise SystemExit(f"{failed} failed; see {directory}")
    records += reader.read_new()
    return peaks, next(record["parameters"] for record in records if record["kind"] == "summary")


def configuration(directory: Path, text: Path, num_silos: int, overrides: list[str]) -> RunConfig:
    """A model of some 40 million parameters and as many equal silos as asked; none trains alone."""
    names = [f"silo{index}" for index in range(num_silos or 3)]
    settings = {
        "directory": directory,
        "tokenizer": text / "tokenizer",
        "sequence_tokens": 32,
        "model.config": "{model_type: llama, hidden_size: 512, intermediate_size: 1408, num_hidden_layers: 12, "
        "num_attention_heads: 8, num_key_value_heads: 8}",
        "inner.num_steps": 16,
        "outer.sync_interval_steps": 8,
        "outer.optimizer": "nesterov",
        "outer.num_fragments": 8,
        "exchange.kind": "store" if num_silos else "none",
        "wandb.mode": "disabled",
        "silo.global_batch_sequences": 1,
        "silo.micro_batch_sequences": 1,
        "silo.checkpoint_interval_steps": 1000,
        "silo.data": f"[{text / 'packed' / 'train'}]",
    }
    given = [f"{key}={value}" for key, value in settings.items()] + [f"silos.{name}={{}}" for name in names]
    return load_config([], given + overrides)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silos", type=int, nargs="+", default=[2, 4])
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text"
        make_text(text)
        alone = 0
        for num_silos in (0, *arguments.silos):
            config = configuration(Path(scratch) / f"run{num_silos}", text, num_silos, arguments.overrides)
            peaks, num_parameters = measure(config)
            model_bytes = 4 * num_parameters
            silos = sorted(peak.anonymous_bytes for name, peak in peaks.items() if name in config.silos)
            silo = int(statistics.median(silos))
            alone = alone or silo
            print(
                f"RESULT {num_silos or 'no'} federated silos, {num_parameters:,} parameters "
                f"({model_bytes / MIB:.0f} MiB fp32): a silo {silo / MIB:.0f} MiB (median of {len(silos)}, "
                f"{silos[0] / MIB:.0f} to {silos[-1] / MIB:.0f}), "
                f"{(silo - alone) / num_parameters:+.2f} bytes a parameter against training alone; "
                f"a fragment is {4 / config.outer.num_fragments:.2f} bytes a parameter",
                flush=True,
            )
            if "aggregator" in peaks:
                peak = peaks["aggregator"]
                print(
                    f"RESULT {num_silos} federated silos: aggregator {peak.anonymous_bytes / MIB:.0f} MiB "
                    f"({peak.anonymous_bytes / num_parameters:.2f} bytes a parameter), "
                    f"and {peak.mapped_bytes / MIB:.0f} MiB of mapped files",
                    flush=True,
                )


if __name__ == "__main__":
    main()
