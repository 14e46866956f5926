"""How fast silos train on this machine: some steps of each in a process of their own, of which nothing is kept."""

import dataclasses
import math
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console

from launch.show.metrics import MetricsReader
from launch.start.local import log_tail, new_attempt, silo_child
from launch.start.processes import POLL_SECONDS, Child
from pretrain.config.errors import ConfigError
from pretrain.config.gate import GateConfig
from pretrain.config.keys import ExchangeConfig, MembershipConfig, OuterConfig, RunConfig, WandbConfig
from pretrain.config.load import CONFIG_FILE, save_config
from pretrain.config.trust import TrustConfig
from pretrain.federation.preflight import check_model, check_silo

NUM_STEPS = 20
ENOUGH_SECONDS, FEWEST_STEPS = 120.0, 3
"""Of a model whose steps are so long that fewer have to do."""
FOR_EVER = 1_000_000_000  # steps: it is ended before
OPTION = "--tokens-per-second: neither it nor --measured nor --card given"


def measure_silos(config: RunConfig, console: Console | None = None) -> dict[str, float]:
    """Tokens per second of each silo of the configuration, one after another; silos that differ in text alone once.

    The first step, which starts everything, does not count. Raises ConfigError where that cannot be measured here.
    """
    console, found = console or Console(stderr=True), dict[str, float]()
    for name in config.silos:
        like = next((other for other in found if _alike(config, name, other)), None)
        found[name] = found[like] if like else _measure(config, name, console)
    return found


def _alike(config: RunConfig, one: str, other: str) -> bool:
    first, second = (
        dataclasses.replace(config.silos[name], data=[], data_weights=[], valid={}, data_seed=None)
        for name in (one, other)
    )
    return first == second


def _measure(config: RunConfig, name: str, console: Console) -> float:
    if config.silos[name].num_nodes != 1:
        raise ConfigError(f"{OPTION}, and silo {name} has {config.silos[name].num_nodes} nodes; allowed: one of them")
    try:
        check_silo(_alone(config, name, config.directory), name)
        check_model(config)
    except ConfigError as error:
        raise ConfigError(f"{OPTION}, and silo {name} cannot be measured here: {error}") from None
    # No checkpoint is written, but a silo asks for room for some before it trains: where the run will have them.
    place = next(folder for folder in Path(config.directory).absolute().parents if folder.is_dir())
    with (
        tempfile.TemporaryDirectory(prefix="atoll-plan-", dir=place) as folder,
        console.status(f"measuring {NUM_STEPS} steps of silo {name}: starting") as status,
    ):
        alone = _alone(config, name, folder)
        save_config(alone, Path(folder) / CONFIG_FILE)
        command = silo_child(alone, name, Path(folder) / CONFIG_FILE)
        child = Child(command, new_attempt(Path(folder)) / f"{name}.log")
        metrics, speeds, began = MetricsReader(Path(folder) / "metrics.jsonl"), list[float](), math.inf
        try:
            while len(speeds) <= NUM_STEPS and not (
                len(speeds) > FEWEST_STEPS and time.monotonic() > began + ENOUGH_SECONDS
            ):
                time.sleep(POLL_SECONDS)
                speeds += [float(one["tokens_per_second"]) for one in metrics.read_new() if one["kind"] == "step"]
                if speeds:
                    began = min(began, time.monotonic())
                    status.update(f"measuring {NUM_STEPS} steps of silo {name}: {len(speeds) - 1}")
                if child.returncode is not None:
                    raise ConfigError(f"{OPTION}, and silo {name} did not train here: {_why(child)}")
        finally:
            child.kill()
    return statistics.harmonic_mean(speeds[1:])


def _why(child: Child) -> str:
    return child.error_line() or next(reversed(log_tail(child.log_path)), f"exit status {child.returncode}")


def _alone(config: RunConfig, name: str, directory: str) -> RunConfig:
    """The silo by itself, as it trains between two syncs: no rounds, evaluations, checkpoints."""
    settings = dataclasses.replace(
        config.silos[name], valid={}, checkpoint_interval_steps=FOR_EVER, log_interval_steps=1
    )
    return dataclasses.replace(
        config,
        directory=directory,
        inner=dataclasses.replace(config.inner, num_steps=FOR_EVER),
        outer=OuterConfig(sync_interval_steps=FOR_EVER),
        membership=MembershipConfig(),
        gate=GateConfig(),
        exchange=ExchangeConfig(kind="none"),
        trust=TrustConfig(),
        wandb=WandbConfig(mode="disabled"),
        silos={name: settings},
        roster=[],
    )
