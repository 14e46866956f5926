"""The processes of a silo on one node. A single one is started as it is; several by this, and not by torchrun.

    python -m launch.start.workers --num-processes 2 -- python -m pretrain.train --config run.yaml --silo law

torchrun's agents meet at a port that is open on every interface, and unpickle what they find there, whoever wrote it.
Here processes meet through a file (`pretrain/host/meeting.py`). All are told to stop when one has failed or stopped;
exit code: that of the first to fail, 2 a user's mistake, 75 stopped with everything saved.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from launch.start.processes import die_with
from pretrain.config.keys import RunConfig
from pretrain.host.meeting import NUMA_BINDING, on_one_node
from pretrain.host.stopping import STOPPED

# Activations are freed and allocated at every step; glibc's default hands them back to the kernel each time, which
# costs training on a CPU up to a fifth of its speed (docs/benchmarks.md). Keep blocks up to 64 MiB, 256 MiB in all.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(64 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
SAVE_SECONDS = 30.0
"""How long a stop waits for what is being saved."""
SAVE_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Environment variable that says otherwise, as to torchrun."""
FAILED_SECONDS = 10.0
"""How long the others may take when one has failed: they can save nothing without it."""
POLL_SECONDS = 0.05
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def train_command(
    config: RunConfig, silo: str, config_path: Path, *, overrides: Sequence[str] = (), numa: str | None = None
) -> tuple[list[str], dict[str, str]]:
    """Program and arguments, and environment, of each of a silo's processes on one node."""
    environment = {"OMP_NUM_THREADS": str(config.silos[silo].num_threads), **KEEP_FREED_MEMORY}
    environment |= {NUMA_BINDING: numa} if numa else {}
    argv = [sys.executable, "-m", "pretrain.train", "--config", str(config_path), "--silo", silo, *overrides]
    return argv, environment


def silo_command(
    config: RunConfig, silo: str, config_path: Path, *, max_restarts: int = 0
) -> tuple[list[str], dict[str, str]]:
    """Program and arguments, and environment, that run a silo on one node; `max_restarts` is after crashes."""
    settings, (argv, environment) = config.silos[silo], train_command(config, silo, config_path)
    if settings.processes_per_node == 1 and not max_restarts:
        return argv, environment | on_one_node(0, 1, None)
    several = ["--num-processes", str(settings.processes_per_node), "--max-restarts", str(max_restarts)]
    return [sys.executable, "-m", "launch.start.workers", *several, "--", *argv], environment


class Asked:
    """Signals that ask to stop: they are noted from when this is made. Make it in the main thread."""

    def __init__(self) -> None:
        self.first: int | None = None
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.first = self.first or number


def run_workers(
    argv: Sequence[str],
    num_processes: int,
    environment: dict[str, str],
    asked: Asked,
    *,
    max_restarts: int = 0,
    save_seconds: float = SAVE_SECONDS,
) -> int:
    """Run a program as each of a node's processes until all have ended, and once more after a crash, so often.

    `environment` is added to our own; a signal that asks us to stop reaches them as SIGTERM, and what is left
    `save_seconds` later is killed. Returns the exit code.
    """
    for start in range(1, max_restarts + 2):
        with tempfile.TemporaryDirectory(prefix="atoll-") as folder:  # that nobody else can open
            meeting = Path(folder) / "meeting" if num_processes > 1 else None
            workers = [
                subprocess.Popen(
                    argv,
                    env=os.environ | environment | on_one_node(rank, num_processes, meeting),
                    start_new_session=True,
                    preexec_fn=die_with(os.getpid()),  # noqa: PLW1509 - we have one thread
                )
                for rank in range(num_processes)
            ]
            code = _watch(workers, asked, save_seconds)
        if code in (0, 2, STOPPED) or asked.first or start > max_restarts:
            break
        print(f"--- crashed (exit {code}); start {start + 1} of {max_restarts + 1} ---", flush=True)
    return code


def _watch(workers: list[subprocess.Popen[bytes]], asked: Asked, save_seconds: float) -> int:
    code, told, deadline = 0, False, float("inf")
    while None in [worker.poll() for worker in workers]:  # all are asked, so that all are known
        if not code and (code := _first_code(workers)):
            deadline = min(deadline, time.monotonic() + (save_seconds if code == STOPPED else FAILED_SECONDS))
        if not told and (asked.first or code not in (0, STOPPED)):
            told, deadline = True, min(deadline, time.monotonic() + save_seconds)
            for worker in workers:
                worker.terminate()
        if time.monotonic() > deadline:
            for worker in workers:
                worker.kill()
        time.sleep(POLL_SECONDS)
    return code or _first_code(workers)


def _first_code(workers: list[subprocess.Popen[bytes]]) -> int:
    """The exit code of who has failed or stopped, 0 if nobody; of several, of one that says why. Prints who failed."""
    ended = {rank: worker.returncode for rank, worker in enumerate(workers) if worker.returncode}
    if not ended:
        return 0
    rank, code = min(ended.items(), key=lambda pair: (pair[1] != 2, pair[1] != STOPPED, pair[0]))
    if code != STOPPED:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit status {code}"
        print(f"rank {rank} (process {workers[rank].pid}) {how}", file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-processes", type=int, required=True)
    parser.add_argument("--max-restarts", type=int, default=0, help="how often they are started again after a crash")
    parser.add_argument("program", nargs="+")
    arguments = parser.parse_args()
    return run_workers(
        arguments.program,
        arguments.num_processes,
        {},
        Asked(),
        max_restarts=arguments.max_restarts,
        save_seconds=float(os.environ.get(SAVE_VARIABLE, SAVE_SECONDS)),
    )


if __name__ == "__main__":
    sys.exit(main())
