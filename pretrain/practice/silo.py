"""A silo's practice between two rounds, as a process that its leader starts.

python -m pretrain.practice.silo --config FILE --silo NAME --parameters FILE --output DIR --rounds N ...
"""

import argparse
import os
import signal
import sys
import zlib
from pathlib import Path

import torch
from safetensors import safe_open

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config
from pretrain.federation.export import empty_model, finished
from pretrain.federation.generate import Sampling, Speaker
from pretrain.practice.confine import dies_with_parent
from pretrain.practice.rollout import Plan, Trier, rollout
from pretrain.practice.verifier import Limits
from pretrain.silo.exported import with_tokenizer


def trier_of(config: RunConfig, parameters: Path, name: str) -> Trier:
    """The model of a run with trained parameters from a file."""
    model, trained = empty_model(config)
    with torch.no_grad(), safe_open(parameters, framework="pt") as tensors:
        for one in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
            trained[one].copy_(tensors.get_tensor(one))
    whole = finished(model, config)
    tokenizer = with_tokenizer(whole, config.tokenizer_file, config.template_file)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Trier(
        speaker=Speaker(
            model=whole.to(device),  # type: ignore[arg-type]
            tokenizer=tokenizer,
            name=name,
            trained_tokens=config.sequence_tokens,
            begins_with=None,
        ),
        tokenizer=config.tokenizer_file,
        template=config.template_file,
        sequence_tokens=config.sequence_tokens,
        prompt_tokens=config.model.adapter.prompt_tokens,
    )


def plan_of(config: RunConfig, silo: str, rounds: int) -> Plan:
    """What a silo's section says; each practice draws other tries."""
    own = config.silos[silo].practice
    seed = zlib.crc32(f"{config.model.seed}/{silo}/{rounds}".encode())
    return Plan(
        tasks=Path(own.tasks),
        verifier=own.verifier,
        samples=own.samples,
        keep=own.keep,
        sampling=Sampling(num_tokens=own.num_tokens, temperature=own.temperature, top_k=0, seed=seed),
        batch_sequences=own.batch_sequences,
        limits=Limits(seconds=own.time_limit_seconds, memory_bytes=own.memory_mib << 20, network=own.network),
    )


def main() -> int:
    """Command line; returns the exit code: 0 done, 2 a user's mistake, which is then in the file of `--error`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--config", "--silo", "--parameters", "--output", "--error", "--rounds", "--parent"):
        parser.add_argument(option, required=True)
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGUSR1):  # who started this process is asked as well, and ends it
        signal.signal(number, signal.SIG_IGN)
    dies_with_parent(signal.SIGKILL)
    if os.getppid() != int(given.parent):
        return 1  # it has ended before we could say so
    try:
        config = load_config([given.config])
        trier = trier_of(config, Path(given.parameters), f"silo {given.silo} after {given.rounds} rounds")
        plan = plan_of(config, given.silo, int(given.rounds))
        rollout(
            trier,
            plan,
            Path(given.output),
            say=lambda line: print(f"practice  {line}", flush=True),
            key=lambda name: f"silos.{given.silo}.practice.{name}",
        )
    except ConfigError as error:
        Path(given.error).write_text(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
