"""Run by torchrun: every ZeRO stage in fp32 and bf16, one engine after another; prints one JSON object per engine."""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import torch

from benchmarks.device_memory import Created
from pretrain.config.keys import InnerConfig, ModelConfig, SiloConfig
from pretrain.silo.batch import Batch
from pretrain.silo.checkpoint import Checkpoints, Progress
from pretrain.silo.engine import Engine
from pretrain.silo.flops import flops_per_token
from pretrain.silo.model import build_empty, build_initial, token_losses
from pretrain.silo.optim import MEAN_STEPS, build_optimizer, is_muon_matrix
from pretrain.silo.ranks import Ranks

VOCAB_SIZE = 97  # odd sizes: two ranks have no equal parts of most parameters, which ZeRO-3 pads
MODEL = ModelConfig(
    config={
        "model_type": "llama",
        "hidden_size": 33,
        "num_hidden_layers": 3,  # so that ZeRO 1 and 2 cut a matrix in two
        "num_attention_heads": 3,
        "head_dim": 8,
        "intermediate_size": 51,
        "tie_word_embeddings": True,
    }
)
INNER = InnerConfig(lr=0.01, clip_norm=1.0, num_steps=6)
MUON = dataclasses.replace(INNER, optimizer="muon", muon_lr=0.03)
BATCHES = torch.randint(0, VOCAB_SIZE, (6, 4, 13), generator=torch.Generator().manual_seed(1))
NUM_MICRO_BATCHES = 2  # of a rank's part of a batch
END = 0  # the end-of-text token, where documents are kept apart
DOCUMENTS = torch.where(BATCHES < VOCAB_SIZE // 5, END, BATCHES)


def plain_optimizers(model: torch.nn.Module, inner: InnerConfig) -> list[torch.optim.Optimizer]:
    """What torch alone has."""
    if inner.optimizer != "muon":
        return [build_optimizer(model.named_parameters(), inner, on_cpu=False)]
    named = dict(model.named_parameters())
    matrices = {name for name, p in named.items() if ".layers." in name and p.ndim == 2}
    vectors = [p for p in named.values() if p.ndim == 1]
    others = [p for name, p in named.items() if name not in matrices and p.ndim == 2]
    groups = [{"params": others, "weight_decay": inner.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon([named[name] for name in matrices], lr=inner.muon_lr, weight_decay=inner.weight_decay),
        torch.optim.AdamW(groups, lr=inner.lr, betas=(inner.betas[0], inner.betas[1]), eps=inner.eps),
    ]


def plain_loop(
    values: dict[str, torch.Tensor],
    num_steps: int,
    batches: torch.Tensor = BATCHES,
    mask_at: int | None = None,
    *,
    inner: InnerConfig = INNER,
    moments: dict[str, torch.Tensor] | None = None,
    gradients: dict[str, torch.Tensor] | None = None,
    norms: list[float] | None = None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A plain loop: transformers and torch alone, fp32, from `values`; losses and final parameters.

    `moments` is filled with the bias-corrected second moments of what AdamW trains, `gradients` with the
    means of all clipped gradients, `norms` with their norms before.
    """
    model = build_initial(MODEL, VOCAB_SIZE)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(values[name])
    optimizers, losses = plain_optimizers(model, inner), []
    for batch in batches[:num_steps]:
        model.zero_grad()
        loss = token_losses(model, batch[:, :-1], batch[:, 1:], mask_at).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), inner.clip_norm)
        if norms is not None:
            norms.append(norm.item())
        for name, parameter in model.named_parameters() if gradients is not None else ():
            gradients[name] = gradients.get(name, 0) + parameter.grad / num_steps
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    for optimizer in optimizers if moments is not None else ():
        for name, parameter in model.named_parameters():
            if "exp_avg_sq" in optimizer.state.get(parameter, {}):
                state = optimizer.state[parameter]
                moments[name] = state["exp_avg_sq"] / (1 - inner.betas[1] ** state["step"].item())
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def way_off(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], initial: dict[str, torch.Tensor]
) -> float:
    """The largest distance of a tensor to where it should be, as a share of the way it should have made."""
    return max(((found[n] - expected[n]).norm() / (expected[n] - initial[n]).norm()).item() for n in initial)


def plain_loss(values: dict[str, torch.Tensor], dtype: torch.dtype, batch: torch.Tensor) -> float:
    """Loss of a plain transformers model holding `values` rounded to `dtype`."""
    model = build_empty(MODEL, VOCAB_SIZE, dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(values[name])
    with torch.no_grad():
        return token_losses(model, batch[:, :-1], batch[:, 1:]).mean().item()


def steps(
    engine: Engine,
    ranks: Ranks,
    numbers: range,
    batches: torch.Tensor = BATCHES,
    *,
    norms: list[float] | None = None,
) -> list[float]:
    """Inner steps on this rank's part of the batches, in two micro batches where there is more than one sequence.

    Returns the losses of the whole batches; `norms` is filled with the gradients'.
    """
    losses = []
    for number in numbers:
        part = batches[number].chunk(ranks.num_ranks)[ranks.rank]
        micro_batches = part.chunk(NUM_MICRO_BATCHES)
        loss, norm = engine.step([Batch(one[:, :-1], one[:, 1:]) for one in micro_batches], INNER.lr)
        losses.append(ranks.sum([loss / ranks.num_ranks])[0])
        if norms is not None:
            norms.append(norm)
    return losses


def read_all(engine: Engine) -> dict[str, torch.Tensor]:
    """Every fp32 parameter."""
    return {name: engine.read(name).cpu().clone() for name in engine.shapes}


def most_held_bytes(engine: Engine, values: dict[str, torch.Tensor], ranks: Ranks) -> int:
    """Device memory beside the engine's own that reading all parameters, one at a time, and writing them takes."""
    with Created(patience_seconds=0.1) as created:
        engine.write(iter(values.items()) if ranks.is_leader else None)  # what it keeps is counted from here on
        own_bytes = created.peak_bytes = created.num_bytes
        for name in engine.shapes:
            engine.read(name)
        engine.write(iter(values.items()) if ranks.is_leader else None)
    return created.peak_bytes - own_bytes


def check_moments(engine: Engine, expected: dict[str, torch.Tensor], ranks: Ranks) -> dict[str, object]:
    """How far off the second moments are at most, as a share of them, and whether others are read as written.

    And which share of them stays where zeros are written: the gradients of the first moment are in the second, too.
    """
    found = {name: engine.read_second_moment(name).cpu() for name in expected}
    off = max(((found[name] - moment).norm() / moment.norm()).item() for name, moment in expected.items())

    def after_writing(factor: float) -> dict[str, torch.Tensor]:
        for name, value in found.items():
            engine.write_second_moment(name, value * factor if ranks.is_leader else None)
        return {name: engine.read_second_moment(name).cpu() for name in found}

    back = all(torch.allclose(after, found[name] * 4) for name, after in after_writing(4.0).items())
    least = after_writing(0.0)
    never_more = all((least[name] <= value * 1.001).all() for name, value in found.items())
    after_writing(1.0)
    return {
        "num_moments": len(expected),
        "moments_off": off,
        "moments_back": back and never_more,
        "moments_least": min((least[name].sum() / value.sum()).item() for name, value in found.items()),
    }


def check_gradients(engine: Engine, expected: dict[str, torch.Tensor], ranks: Ranks) -> dict[str, object]:
    """How far off the matrices' mean gradients are at most, as a share, and whether corrections are as asked for.

    They stay, for the steps that follow.
    """
    expected = {name: mean for name, mean in expected.items() if is_muon_matrix(name, mean.shape)}
    found = {name: engine.take_mean_gradient(name, 2).cpu() * (MEAN_STEPS / 2) for name in expected}
    off = max(((found[name] - mean).norm() / mean.norm()).item() for name, mean in expected.items())
    for name, value in found.items():
        engine.correct_gradients(name, value if ranks.is_leader else None)
    corrections = {name: engine._read_state(name, "correction", lambda _: 1.0).cpu() for name in found}
    right = all(torch.equal(corrections[name], value) for name, value in found.items())
    anew = all(not engine._read_state(name, "gradient_sum", lambda _: 1.0).any() for name in found)
    return {"num_gradients": len(expected), "gradients_off": off, "corrected": right and anew}


def check_first_steps(
    engine: Engine, inner: InnerConfig, ranks: Ranks, initial: dict[str, torch.Tensor]
) -> dict[str, object]:
    """Two steps beside those of a plain loop: losses, gradients' norms, parameters, and what is told of gradients."""
    norms, expected_norms = list[float](), list[float]()
    losses = steps(engine, ranks, range(2), norms=norms)
    moments, gradients = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    expected_losses, expected = plain_loop(
        initial, 2, inner=inner, moments=moments, gradients=gradients, norms=expected_norms
    )
    row = {
        "before_merge": losses,
        "expected_before_merge": expected_losses,
        "norms": norms,
        "expected_norms": expected_norms,
        "way_off": way_off(read_all(engine), expected, initial),
    }
    told = check_moments(engine, moments, ranks)
    return row | told | (check_gradients(engine, gradients, ranks) if inner.optimizer == "muon" else {})


def check(stage: int, precision: str, inner: InnerConfig, ranks: Ranks, directory: Path) -> dict[str, object]:
    """What the test asserts for one stage, precision and optimizer."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    silo = SiloConfig(
        global_batch_sequences=4,
        micro_batch_sequences=4 // ranks.num_ranks // NUM_MICRO_BATCHES,
        precision=precision,
        deepspeed={"zero_optimization": {"stage": stage}} if stage else {},
    )

    def build() -> Engine:
        return Engine(MODEL, silo, inner, vocab_size=VOCAB_SIZE, ranks=ranks, sums_gradients=True)

    initial = {name: p.detach() * 1.5 for name, p in build_initial(MODEL, VOCAB_SIZE).named_parameters()}
    engine = build()
    engine.write(iter(initial.items()) if ranks.is_leader else None)
    held_bytes = most_held_bytes(engine, initial, ranks)
    written_back = all(torch.equal(engine.read(name).cpu(), initial[name]) for name in engine.shapes)
    first_row = check_first_steps(engine, inner, ranks, initial)
    # A merge in the middle of training: new parameters in, and the very next loss is theirs.
    merged = {name: value * 0.75 + 0.01 for name, value in read_all(engine).items()}
    engine.write(iter(merged.items()) if ranks.is_leader else None)
    merged_back = all(torch.equal(engine.read(name).cpu(), merged[name]) for name in engine.shapes)
    parts = BATCHES[2].chunk(ranks.num_ranks * NUM_MICRO_BATCHES)
    expected_next = sum(plain_loss(merged, dtype, part) for part in parts) / len(parts)
    after_merge = steps(engine, ranks, range(2, 3))
    checkpoints = Checkpoints(directory / f"{inner.optimizer}-{stage}-{precision}", keep=1, contract_sha256="c")
    saved = Progress(step=3, position=12)
    checkpoints.save(saved, engine, ranks, {"global": initial})
    uninterrupted = steps(engine, ranks, range(3, 6))
    final = read_all(engine)
    resumed_engine, global_parameters = build(), dict[str, torch.Tensor]()
    progress = checkpoints.load(resumed_engine, ranks, {"global": global_parameters})
    resumed = steps(resumed_engine, ranks, range(3, 6))
    return {
        "optimizer": inner.optimizer,
        "stage": stage,
        "precision": precision,
        "written_back": written_back,
        "flops": flops_per_token(engine.module, BATCHES.shape[-1]),
        "held_bytes": held_bytes,
        "largest_bytes": max(4 * shape.numel() for shape in engine.shapes.values()),
        "merged_back": merged_back,
        **first_row,
        "next_loss": after_merge[0],
        "expected_next_loss": expected_next,
        "progress_restored": progress is not None and dataclasses.asdict(progress) == dataclasses.asdict(saved),
        "global_restored": not ranks.is_leader or all(torch.equal(global_parameters[n], initial[n]) for n in initial),
        "uninterrupted": uninterrupted,
        "resumed": resumed,
        "parameters_equal": all(torch.equal(resumed_engine.read(n).cpu(), final[n]) for n in final),
        "num_skipped_steps": engine.num_skipped_steps,
    }


def check_masking(ranks: Ranks) -> dict[str, object]:
    """Losses with documents kept apart, in chunks, at ZeRO-3 with activations recomputed, and those of a plain loop."""
    silo = SiloConfig(
        global_batch_sequences=4,
        micro_batch_sequences=4 // ranks.num_ranks // NUM_MICRO_BATCHES,
        activation_checkpointing="layers",
        loss_chunk_tokens=7,
        deepspeed={"zero_optimization": {"stage": 3}},
    )
    initial = {name: p.detach() * 1.5 for name, p in build_initial(MODEL, VOCAB_SIZE).named_parameters()}
    engine = Engine(MODEL, silo, INNER, vocab_size=VOCAB_SIZE, ranks=ranks, mask_at=END)
    engine.write(iter(initial.items()) if ranks.is_leader else None)
    engine.check_sight()
    return {
        "losses": steps(engine, ranks, range(3), DOCUMENTS),
        "expected": plain_loop(initial, 3, DOCUMENTS, END)[0],
        "without": plain_loop(initial, 3, DOCUMENTS)[0],
    }


def main() -> None:
    """All stages and precisions, and masking."""
    ranks = Ranks()
    for inner, stage, precision in itertools.product((INNER, MUON), (0, 1, 2, 3), ("fp32", "bf16")):
        result = check(stage, precision, inner, ranks, Path(sys.argv[1]))
        everywhere = ranks.sum([float(result["parameters_equal"] is True), float(result["written_back"] is True)])
        result["ranks_agree"] = everywhere == [ranks.num_ranks] * 2
        if ranks.is_leader:
            print("RESULT", json.dumps(result), flush=True)
    masking = check_masking(ranks)
    if ranks.is_leader:
        print("MASKING", json.dumps(masking), flush=True)
    ranks.close()


if __name__ == "__main__":
    main()
