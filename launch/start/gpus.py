"""The GPUs of one machine, and which of its silos has which. No torch: CUDA_VISIBLE_DEVICES is what tells a process."""

import os
import re
import subprocess
from collections.abc import Sequence
from itertools import islice, takewhile

from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import RunConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"
GPU_NAME = re.compile(r"\d+|(GPU|MIG)-.+")  # CUDA passes over what follows another word, such as -1


def num_gpus() -> int:
    """GPUs as nvidia-smi counts them; 0 without it."""
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in said.splitlines())


def gpus_here() -> list[str]:
    """By name, those of this machine that our own environment leaves us; none where all compute on the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not (num := num_gpus()):
        return []
    stated = os.environ.get(VISIBLE)
    names = [str(number) for number in range(num)] if stated is None else stated.split(",")
    return list(takewhile(GPU_NAME.fullmatch, names))


def share_gpus(config: RunConfig, gpus: Sequence[str]) -> dict[str, dict[str, str]]:
    """Silo to environment: a GPU for each of its processes, in the order of the configuration; empty where none is.

    Raises ConfigError where there are some, but too few.
    """
    num_processes = sum(silo.processes_per_node for silo in config.silos.values())
    if not gpus:
        return {}
    if num_processes > len(gpus):
        raise ConfigError(
            f"silos: {num_processes} processes of {named(list(config.silos))} given; allowed: one for each GPU that "
            f"{VISIBLE} leaves of this machine, up to {len(gpus)}; one named there twice is shared, and {VISIBLE}= has "
            "all compute on the CPU"
        )
    left = iter(gpus)
    return {name: {VISIBLE: ",".join(islice(left, silo.processes_per_node))} for name, silo in config.silos.items()}


def check_gpus(silo: str, num_processes: int, num_gpus: int, where: str) -> None:
    """Raise ConfigError if there are GPUs, but fewer than processes; where there are none, CPUs compute."""
    if 0 < num_gpus < num_processes:
        raise ConfigError(
            f"silos.{silo}.processes_per_node: {num_processes} given; allowed: up to {num_gpus}, the GPUs {where}"
        )
