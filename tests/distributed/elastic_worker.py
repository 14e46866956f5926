"""Run by torchrun, once a leg: load the newest checkpoint, train, save; prints a JSON object an optimizer."""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import torch

from pretrain.config.keys import SiloConfig
from pretrain.silo.checkpoint import Checkpoints, Progress
from pretrain.silo.engine import Engine
from pretrain.silo.model import build_initial
from pretrain.silo.ranks import Ranks
from tests.distributed.engine_worker import BATCHES, INNER, MODEL, MUON, NUM_MICRO_BATCHES, VOCAB_SIZE, steps

KINDS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer", "exp_avg", "exp_avg_sq", "told")}


def digest(engine: Engine, optimizer: str) -> str:
    """Of all parameters and all that the optimizer remembers, whole."""
    found = hashlib.sha256()
    for name in engine.shapes:
        values = [engine.read(name)]
        for kind in KINDS[optimizer]:
            try:
                values.append(engine._read_state(name, kind, lambda _: 1.0))
            except KeyError:  # Muon trains this one, or does not
                continue
        for value in values:
            found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    """Arguments: directory, ZeRO stage, steps before this leg, those after it, and up to which it goes on, unsaved."""
    directory, (stage, first, last, until) = Path(sys.argv[1]), map(int, sys.argv[2:])
    ranks = Ranks()
    for settings in (INNER, MUON):
        silo = SiloConfig(
            global_batch_sequences=4,
            micro_batch_sequences=max(1, 4 // ranks.num_ranks // NUM_MICRO_BATCHES),
            deepspeed={"zero_optimization": {"stage": stage}} if stage else {},
        )
        inner = dataclasses.replace(settings, num_steps=len(BATCHES))
        engine = Engine(MODEL, silo, inner, vocab_size=VOCAB_SIZE, ranks=ranks, sums_gradients=True)
        checkpoints = Checkpoints(directory / inner.optimizer, keep=9, contract_sha256="c")
        loaded = checkpoints.load(engine, ranks, {})
        if loaded is None:
            initial = {name: p.detach() * 1.5 for name, p in build_initial(MODEL, VOCAB_SIZE).named_parameters()}
            engine.write(iter(initial.items()) if ranks.is_leader else None)
        assert (loaded.step if loaded else 0) == first
        before = digest(engine, inner.optimizer)
        losses = steps(engine, ranks, range(first, last))
        checkpoints.save(Progress(step=last, position=4 * last), engine, ranks, {})
        after = digest(engine, inner.optimizer)
        losses += steps(engine, ranks, range(last, until))
        row = {"optimizer": inner.optimizer, "before": before, "losses": losses, "after": after}
        if ranks.is_leader:
            print("RESULT", json.dumps(row), flush=True)
        torch.distributed.barrier()
    ranks.close()


if __name__ == "__main__":
    main()
