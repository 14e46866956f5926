"""The last line of every batch script: whether its job is done, goes back into the queue, or has failed.

    python -m launch.requeue --config run/config.yaml --name law --max-crashes 3

Exit code 0: done, or back in the queue; 2: a user's mistake, which another start would only repeat; 1: crashed once too
often. A job that somebody cancels is never put back.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from launch.local import process_directory
from launch.metrics import read_status
from launch.slurm import job_state
from pretrain.config import load_config


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--name", required=True, help="the silo, or aggregator")
    parser.add_argument("--max-crashes", type=int, required=True)
    arguments = parser.parse_args()
    directory = process_directory(load_config([arguments.config]), arguments.name)
    directory.mkdir(parents=True, exist_ok=True)
    phase, crashes_file = read_status(directory / "status.json").phase, directory / "crashes.json"
    if phase == "finished":
        return 0
    if (directory / "error.txt").is_file():
        return 2
    num_crashes = json.loads(crashes_file.read_text()) if crashes_file.is_file() else 0
    job = os.environ["SLURM_JOB_ID"]
    if phase == "stopped":
        print(f"{arguments.name} has saved and stopped: job {job} goes back into the queue", flush=True)
    else:
        num_crashes += 1
        crashes_file.write_text(json.dumps(num_crashes))
        if num_crashes > arguments.max_crashes:
            print(f"{arguments.name} has crashed {num_crashes} times: job {job} ends", flush=True)
            return 1
        print(f"{arguments.name} has crashed {num_crashes} times: job {job} goes back into the queue", flush=True)
    if job_state(job) == "RUNNING":  # else it was cancelled, or is put back already
        subprocess.run(["scontrol", "requeue", job], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
