"""Run by torchrun: an adapter at every ZeRO stage beside peft and DeepSpeed alone; prints a JSON object per engine."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from pretrain.config.adapter import AdapterConfig
from pretrain.config.keys import InnerConfig, ModelConfig, SiloConfig
from pretrain.config.personal import PersonalConfig
from pretrain.silo.adapter import initial_factors
from pretrain.silo.checkpoint import Checkpoints, Progress
from pretrain.silo.engine import Engine
from pretrain.silo.model import build_initial, build_without_memory
from pretrain.silo.ranks import Ranks
from tests.distributed.engine_worker import BATCHES, MODEL, VOCAB_SIZE, read_all, steps

INNER = InnerConfig(lr=0.01, clip_norm=0.1, num_steps=6)  # so low that every gradient is clipped
TARGETS = ["q_proj", "v_proj", "down_proj"]


def reference(
    base: Path,
    stage: int,
    dtype: torch.dtype,
    ranks: Ranks,
    initial: dict[str, torch.Tensor],
    *,
    own: PersonalConfig | None = None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What peft and DeepSpeed alone make of the batches: this rank's losses, and the factors by Atoll's names.

    With a second adapter, `own`, both are trained at once.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    model = get_peft_model(model, settings, autocast_adapter_dtype=False)
    if own:
        settings = LoraConfig(r=own.rank, lora_alpha=own.alpha, target_modules=own.targets)  # type: ignore[arg-type]
        model.add_adapter("personal", settings, autocast_adapter_dtype=False)
        model.base_model.set_adapter(["default", "personal"])
    model = model.train()
    trained = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if p.requires_grad}

    def loss_of(engine: Any, one: torch.Tensor) -> torch.Tensor:
        logits = engine(input_ids=one[:, :-1], use_cache=False).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), one[:, 1:].flatten(), reduction="none").mean()

    return by_deepspeed(model, trained, loss_of, stage=stage, dtype=dtype, ranks=ranks, initial=initial)


def by_deepspeed(
    model: Any,
    trained: dict[str, torch.nn.Parameter],
    loss_of: Callable[[Any, torch.Tensor], torch.Tensor],
    *,
    stage: int,
    dtype: torch.dtype,
    ranks: Ranks,
    initial: dict[str, torch.Tensor],
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Steps of AdamW over the batches by DeepSpeed alone: this rank's losses, and what is trained in the end."""
    for name, parameter in trained.items():
        parameter.data.copy_(initial[name])
    groups = [[p for n, p in trained.items() if (".personal." in n) == is_own] for is_own in (True, False)]
    by_group = [{"params": group} for group in groups if group]
    optimizer = torch.optim.AdamW(by_group, lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    sequences, is_plain = 4 // ranks.num_ranks // 2, not stage and dtype == torch.float32
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": sequences,
            "gradient_clipping": 0.0 if is_plain else INNER.clip_norm,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    for state in optimizer.state.values():  # DeepSpeed allocates by a step of its own, hence without a learning rate
        state["step"] = torch.zeros_like(state["step"])
    for group in engine.optimizer.param_groups:
        group["lr"] = INNER.lr
    losses = []
    for batch in BATCHES:
        of_batch = []
        for one in batch.chunk(ranks.num_ranks)[ranks.rank].chunk(2):
            loss = loss_of(engine, one)
            engine.backward(loss)
            if is_plain and engine.is_gradient_accumulation_boundary():  # DeepSpeed's own rounds otherwise than torch's
                torch.nn.utils.clip_grad_norm_(trained.values(), INNER.clip_norm)
            engine.step()
            of_batch.append(loss.detach())
        losses.append(ranks.sum([torch.stack(of_batch).mean().item() / ranks.num_ranks])[0])
    return losses, {n: (safe_get_full_fp32_param(p) if stage else p).detach().float() for n, p in trained.items()}


def silo_of(stage: int, precision: str, ranks: Ranks) -> tuple[SiloConfig, torch.dtype]:
    """A silo of two micro batches a step, in bf16 with activations recomputed, and the type that it computes in."""
    silo = SiloConfig(
        global_batch_sequences=4,
        micro_batch_sequences=4 // ranks.num_ranks // 2,
        precision=precision,
        activation_checkpointing="layers" if precision == "bf16" else "none",
        deepspeed={"zero_optimization": {"stage": stage}} if stage else {},
    )
    return silo, torch.bfloat16 if precision == "bf16" else torch.float32


Steps = Callable[[Engine, Ranks, range], list[float]]


def synced_and_resumed(
    engine: Engine, resumed: Callable[[], Engine], take: Steps, ranks: Ranks, checkpoints: Checkpoints
) -> tuple[list[float], Engine, list[float]]:
    """Losses of six steps with a sync and a checkpoint in the middle; an engine that resumed there, and its losses."""
    losses = take(engine, ranks, range(3))
    merged = read_all(engine)  # a sync: what is read is written
    engine.write(iter(merged.items()) if ranks.is_leader else None)
    checkpoints.save(Progress(step=3, position=12), engine, ranks, {})
    losses += take(engine, ranks, range(3, 6))
    other = resumed()
    checkpoints.load(other, ranks, {})
    return losses, other, take(other, ranks, range(3, 6))


def print_each(ranks: Ranks, check: Callable[[int, str], dict[str, Any]]) -> None:
    """What is found of each stage and precision of the command line, and the end of the worker."""
    for case in sys.argv[2].split(","):
        stage, precision = case.split("-")
        row = check(int(stage), precision)
        if ranks.is_leader:
            print("RESULT", json.dumps(row), flush=True)
    ranks.close()


def check(stage: int, precision: str, model: ModelConfig, ranks: Ranks, directory: Path) -> dict[str, object]:
    """What the test asserts for one stage and precision."""
    assert model.checkpoint
    silo, dtype = silo_of(stage, precision, ranks)
    initial = initial_factors(build_without_memory(model, VOCAB_SIZE), 0)
    initial = {name: value.to(dtype).float() for name, value in initial.items()}  # peft's are in the model's precision

    def build() -> Engine:
        return Engine(model, silo, INNER, vocab_size=VOCAB_SIZE, ranks=ranks)

    expected_losses, expected = reference(Path(model.checkpoint), stage, dtype, ranks, initial)
    engine = build()
    engine.write(iter(initial.items()) if ranks.is_leader else None)
    checkpoints = Checkpoints(directory / f"{stage}-{precision}", keep=1, contract_sha256="c")
    losses, resumed, again = synced_and_resumed(engine, build, steps, ranks, checkpoints)
    found = read_all(engine)
    newest = checkpoints.newest
    assert newest
    base_bytes = sum(file.stat().st_size for file in Path(model.checkpoint).glob("*.safetensors"))
    rounded = {name: value.to(dtype).float() if stage == 0 else value for name, value in found.items()}
    return {
        "stage": stage,
        "precision": precision,
        "losses": losses,
        "expected_losses": expected_losses,
        "same_factors": all(torch.equal(rounded[name], expected[name].cpu()) for name in expected),
        "names": sorted(found) == sorted(expected),
        "moved": all(not torch.equal(found[name], initial[name]) for name in initial),
        "resumed": again == losses[3:] and all(torch.equal(read_all(resumed)[name], found[name]) for name in found),
        "checkpoint_bytes": sum(file.stat().st_size for file in newest.rglob("*.safetensors")),
        "factor_elements": sum(value.numel() for value in found.values()),
        "base_bytes": base_bytes,
        **check_turns(dataclasses.replace(model.adapter, merge="alternate"), model, silo, ranks, found),
    }


def check_turns(
    adapter: AdapterConfig, model: ModelConfig, silo: SiloConfig, ranks: Ranks, values: dict[str, torch.Tensor]
) -> dict[str, object]:
    """Whether the factor whose turn it is not stays to the last bit, and norms that do not count it."""
    turning = dataclasses.replace(model, adapter=adapter)
    engine, norms, rested = Engine(turning, silo, INNER, vocab_size=VOCAB_SIZE, ranks=ranks), list[float](), True
    for now in (1, 0, None):
        engine.write(iter(values.items()) if ranks.is_leader else None)
        engine.turns.now = now
        steps(engine, ranks, range(1), norms=norms)
        steps(engine, ranks, range(1, 3))
        after = read_all(engine)
        for name, fragment in engine.turns.of.items():
            rested &= torch.equal(after[name], values[name]) == (now is not None and fragment != now)
    of_b, of_a, of_all = norms
    return {"rested": rested, "turns_norms": (of_a**2 + of_b**2) ** 0.5, "all_norm": of_all}


def main() -> None:
    """Stages and precisions of the command line, in bf16 with activations recomputed."""
    ranks, directory = Ranks(), Path(sys.argv[1])
    base = directory / "base"
    if ranks.is_leader:
        build_initial(MODEL, VOCAB_SIZE).save_pretrained(base, max_shard_size="20KB")  # type: ignore[operator]
    ranks.barrier()
    adapter = AdapterConfig(kind="lora", rank=4, alpha=8.0, targets=TARGETS)
    model = ModelConfig(checkpoint=str(base), adapter=adapter)
    print_each(ranks, lambda stage, precision: check(stage, precision, model, ranks, directory))


if __name__ == "__main__":
    main()
