"""Run by torchrun: a silo's own adapter at every ZeRO stage beside peft and DeepSpeed alone; prints JSON objects."""

import dataclasses
import sys
from pathlib import Path

import torch

from pretrain.config.adapter import AdapterConfig
from pretrain.config.errors import ConfigError
from pretrain.config.keys import ModelConfig, SiloConfig
from pretrain.config.personal import PersonalConfig
from pretrain.silo.adapter import initial_factors
from pretrain.silo.batch import Batch
from pretrain.silo.checkpoint import Checkpoints, Progress
from pretrain.silo.engine import Engine
from pretrain.silo.model import build_initial, build_without_memory
from pretrain.silo.personal import Personal
from pretrain.silo.ranks import Ranks
from tests.distributed.adapter_worker import INNER, TARGETS, print_each, reference, silo_of, synced_and_resumed
from tests.distributed.engine_worker import BATCHES, MODEL, VOCAB_SIZE, read_all, steps

OWN = PersonalConfig(rank=3, alpha=6.0, targets=["v_proj", "o_proj"])
Factors = dict[str, torch.Tensor]


def read_own(engine: Engine) -> Factors:
    """The silo's own factors."""
    return {name: engine.read(name).cpu().clone() for name in sorted(engine.personal.names)}


def loss_of(engine: Engine) -> float:
    """Of one batch, on every rank all of it."""
    engine.evaluating(True)
    with torch.no_grad():
        found = engine.token_losses(Batch(BATCHES[0][:, :-1], BATCHES[0][:, 1:])).mean().item()
    engine.evaluating(False)
    return found


def check(stage: int, precision: str, model: ModelConfig, ranks: Ranks, directory: Path) -> dict[str, object]:
    """What the test asserts for one stage and precision."""
    assert model.checkpoint
    without, dtype = silo_of(stage, precision, ranks)
    silo = dataclasses.replace(without, personal_adapter=OWN)
    module = build_without_memory(model, VOCAB_SIZE)
    shared = initial_factors(module, 0)
    Personal(module, OWN)
    initial = {name: value.to(dtype).float() for name, value in initial_factors(module, 0).items()}

    def build(settings: SiloConfig) -> Engine:
        return Engine(model, settings, INNER, vocab_size=VOCAB_SIZE, ranks=ranks)

    expected_losses, expected = reference(Path(model.checkpoint), stage, dtype, ranks, initial, own=OWN)
    engine = build(silo)
    engine.write(iter((name, initial[name]) for name in shared) if ranks.is_leader else None)
    own_names = sorted(engine.personal.names)  # rounded, as peft's are in the model's precision
    engine.write(iter((name, initial[name]) for name in own_names) if ranks.is_leader else None, own_names)
    begins = loss_of(engine)
    checkpoints = Checkpoints(directory / f"{stage}-{precision}", keep=1, contract_sha256="c")
    losses, resumed, again = synced_and_resumed(engine, lambda: build(silo), steps, ranks, checkpoints)
    found, own = read_all(engine), read_own(engine)
    plain = build(without)
    plain.write(iter(found.items()) if ranks.is_leader else None)
    with engine.personal.away():
        away = loss_of(engine)
    refused = ""
    try:
        checkpoints.load(plain, ranks, {})
    except ConfigError as error:
        refused = str(error)
    rounded = {name: value.to(dtype).float() if stage == 0 else value for name, value in (found | own).items()}
    return {
        "stage": stage,
        "losses": losses,
        "expected_losses": expected_losses,
        "same_factors": all(torch.equal(rounded[name], expected[name].cpu()) for name in expected),
        "names": {*found} == {*shared} and {*expected} == {*own, *found},
        "moved": all(not torch.equal(own[name], initial[name]) for name in own),
        "resumed": again == losses[3:] and same(read_all(resumed), found) and same(read_own(resumed), own),
        "away": [away, loss_of(plain)],
        "differs": loss_of(engine) != away and begins != away,
        "refused": refused,
        **begins_later(build(silo), plain, checkpoints, ranks),
    }


def same(left: Factors, right: Factors) -> bool:
    """Equal bits."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in right)


def begins_later(engine: Engine, plain: Engine, checkpoints: Checkpoints, ranks: Ranks) -> dict[str, object]:
    """A checkpoint without it is gone on from: it begins there, the rest is as it was."""
    initial = read_own(engine)
    steps(plain, ranks, range(2))
    checkpoints.save(Progress(step=9, position=36), plain, ranks, {})
    checkpoints.load(engine, ranks, {})
    begun = same(read_own(engine), initial) and all(value.any() == ("_A." in name) for name, value in initial.items())
    return {"begins_later": begun and same(read_all(engine), read_all(plain)) and loss_of(engine) == loss_of(plain)}


def main() -> None:
    """Stages and precisions of the command line."""
    ranks, directory = Ranks(), Path(sys.argv[1])
    base = directory / "base"
    if ranks.is_leader:
        build_initial(MODEL, VOCAB_SIZE).save_pretrained(base)  # type: ignore[operator]
    ranks.barrier()
    model = ModelConfig(checkpoint=str(base), adapter=AdapterConfig(kind="lora", rank=4, alpha=8.0, targets=TARGETS))
    print_each(ranks, lambda stage, precision: check(stage, precision, model, ranks, directory))


if __name__ == "__main__":
    main()
