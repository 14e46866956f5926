"""The last line of every batch script: whether its job is done, goes back into the queue, or has failed.

    python -m launch.start.requeue --config run/config.yaml --name law --attempt run/logs/attempt-001 --code 1 ...

Exit code 0: done, stopped, or back in the queue; 2: a user's mistake, which another start would only repeat; 1: crashed
once too often. A job that somebody cancels, or stops with `atoll stop`, is never put back. A node on which crashes
begin is left out of later starts.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.show.display import AGGREGATOR
from launch.show.metrics import read_status
from launch.start.local import WHOLE, process_directory
from launch.start.node import notes_directory
from launch.start.processes import STOP_SIGNALS
from launch.start.slurm import STOP_FILE, job_state, run_command
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config

TRY_SECONDS = 15
UPDATE_TRIES = 20


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--name", required=True, help=f"the silo, aggregator, or {WHOLE}")
    parser.add_argument("--attempt", type=Path, required=True, help="folder of the launch's logs")
    parser.add_argument("--code", type=int, required=True, help="srun's exit code")
    parser.add_argument("--max-crashes", type=int, required=True)
    parser.add_argument("--exclude-after", type=int, required=True)
    arguments = parser.parse_args()
    config, name, job = load_config([arguments.config]), arguments.name, os.environ["SLURM_JOB_ID"]
    directory = process_directory(config, name)
    directory.mkdir(parents=True, exist_ok=True)
    os.listdir(directory)  # has NFS look again
    phase, excluded = _phase(config, name, arguments.code), list[str]()
    if phase == "finished":
        return 0
    if phase != "stopped" and ((directory / "error.txt").is_file() or arguments.code == 2):
        return 2
    if (arguments.attempt / STOP_FILE).exists():
        print(f"{name} has {'saved and ' if phase == 'stopped' else ''}stopped: job {job} ends", flush=True)
        return 0
    if _patiently(lambda: job_state(job, f"{config.name}-{name}")) != "RUNNING":
        return 0  # it was cancelled, or is put back already
    if phase == "stopped":
        said = "has saved and stopped"
    else:
        found = _count_crash(directory, notes_directory(config, name), job, _saved(config, name))
        said = f"has crashed {found['crashes']} times"
        if found["crashes"] > arguments.max_crashes:
            print(f"{name} {said}: job {job} ends", flush=True)
            return 1
        excluded = [node for node, number in found["nodes"].items() if number >= arguments.exclude_after]
    without = f", without {', '.join(excluded)}" if excluded else ""
    print(f"{name} {said}: job {job} goes back into the queue{without}", flush=True)
    _requeue(job, excluded)
    return 0


def _patiently(ask: Callable[[], str]) -> str:
    """What SLURM answers; its controller may be away for as long as the job lives."""
    while True:
        try:
            return ask()
        except ConfigError as error:
            print(error, flush=True)
            time.sleep(TRY_SECONDS)


def _phase(config: RunConfig, name: str, code: int) -> str:
    """finished, stopped, or another: as the process says, and of a whole run as its launch's exit code does."""
    if name != WHOLE:
        return read_status(process_directory(config, name) / "status.json").phase
    stopped = {128 + number for number in (*STOP_SIGNALS, signal.SIGUSR1)}
    return "stopped" if code in stopped else "failed" if code else "finished"


def _count_crash(directory: Path, notes: Path, job: str, saved: str) -> dict[str, Any]:
    """Crashes of this job since anything was last saved, and how many of all began on each node: where it was the
    first to fail.
    """
    file = directory / "crashes.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if found.get("job") != job:
        found = {"job": job, "crashes": 0, "nodes": {}}
    if found.get("saved") != saved:
        found |= {"saved": saved, "crashes": 0}
    found["crashes"] += 1
    with suppress(OSError):
        first = os.readlink(notes / f"{job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}")
        found["nodes"] = Counter(found["nodes"]) + Counter([first])
    file.write_text(json.dumps(found))
    return found


def _saved(config: RunConfig, name: str) -> str:
    """What tells one state of progress from another: a silo's newest checkpoint, the aggregator's newest commit."""
    if name == WHOLE:
        return " ".join(_saved(config, one) for one in (AGGREGATOR, *config.silos))
    directory = process_directory(config, name)
    newest = directory / "newest.json"
    checkpoints = [path.parent.name for path in (directory / "checkpoints").glob("step-*/state.json")]
    return newest.read_text() if newest.is_file() else max(checkpoints, default="")


def _requeue(job: str, excluded: list[str]) -> None:
    """Put the job back; it can be told to avoid nodes only afterwards, while SLURM already ends this script."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    shown = _patiently(lambda: run_command(["scontrol", "show", "job", job, "--oneliner"]))
    before = [nodes for nodes in re.findall(r" ExcNodeList=(\S+)", shown) if nodes != "(null)"]
    _patiently(lambda: run_command(["scontrol", "requeue", job]))
    if not excluded:
        return
    update = ["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join([*before, *excluded])}"]
    for _ in range(UPDATE_TRIES):
        with suppress(ConfigError):
            run_command(update)
            return
        time.sleep(0.5)
    print(f"job {job} may start on {', '.join(excluded)} again", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(f"launch.start.requeue: {error}")
