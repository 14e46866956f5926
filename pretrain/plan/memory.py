"""How much memory a run will take: a device by ZeRO stage, a silo's leader and its node, the aggregator.

What is kept, and what is gone again after a backward pass or a step, in bytes a parameter as DeepSpeed keeps it (the
method of https://arxiv.org/abs/1910.02054, the numbers counted tensor by tensor: docs/plan.md).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from pretrain.config.keys import RunConfig, SiloConfig
from pretrain.merge.terms import snapshot_kinds
from pretrain.outer.codec import FEEDBACK_DECAY
from pretrain.outer.fragments import FACTORS
from pretrain.outer.quantize import QUANTIZERS
from pretrain.outer.state import kept_kinds
from pretrain.plan.bytes import Shapes, fragments
from pretrain.silo.optim import is_muon_matrix

# Resident memory with a model of 40 thousand parameters, on a CPU.
SILO_BYTES, AGGREGATOR_BYTES = 558 << 20, 511 << 20
CLIENT_BYTES, BLOCK_BYTES = 32 << 20, 50 << 20  # what a client of an object store adds, and the most it reads at once
HEAP_SHARE = 0.8  # of the activations' bytes: what glibc's heap keeps beside what lives in it, where they are on a CPU
# Of a private silo, bytes a parameter: one sequence's gradients, also in fp32, and the sum of all.
PRIVATE_BYTES = {"fp32": 8, "bf16": 10}
REDUCE_BUCKET, LIVE_PARAMETERS = 500_000_000, 1_000_000_000  # DeepSpeed's defaults, in elements
# What a step of the optimizer needs beside what is kept, gradients with it, bytes a parameter of this rank's share, by
# stage; and AdamW besides, of a flat partition, where it is one operation after another.
STEP_BYTES, NOT_FUSED_BYTES = {"fp32": (8, 13, 13, 8), "bf16": (6, 8, 8, 7)}, 6


@dataclass(frozen=True, kw_only=True)
class SiloMemory:
    """Of one silo, at its peaks."""

    stage: int
    """As configured."""
    device_bytes: list[int]
    """Of one rank's device at ZeRO stages 0, 1, 2, 3."""
    leader_bytes: int
    """Host memory of the leader's process for syncing, and of the process itself."""
    node_bytes: int
    """Host memory of the leader's node: all its processes, and what is offloaded."""
    cpu_bytes: int
    """Of the leader's process where the CPU is the device."""


def silo_memory(
    config: RunConfig, name: str, shapes: Shapes, hugging_face: Any, *, frozen: int = 0, own: Shapes | None = None
) -> SiloMemory:
    """Memory of a silo; `hugging_face` is the model's `transformers` configuration, `frozen` the elements beneath an
    adapter, `own` what is trained here and travels nowhere."""
    silo, stage, trained = config.silos[name], config.silos[name].zero_stage, {**shapes, **(own or {})}
    device = [_device_bytes(config, silo, stage, trained, hugging_face, frozen=frozen) for stage in range(4)]
    leader, others = SILO_BYTES + _sync_bytes(config, shapes), silo.processes_per_node - 1
    offloaded = _offloaded_bytes(config, silo, trained)
    heap = round(HEAP_SHARE * activation_bytes(hugging_face, shapes, silo, config.sequence_tokens))
    return SiloMemory(
        stage=stage,
        device_bytes=device,
        leader_bytes=leader,
        node_bytes=leader + others * SILO_BYTES + silo.processes_per_node * offloaded,
        cpu_bytes=leader + offloaded + device[stage] + heap,
    )


# ---- a device


def _device_bytes(
    config: RunConfig, silo: SiloConfig, stage: int, shapes: Shapes, hugging_face: Any, *, frozen: int
) -> int:
    """What is kept, and the larger of forward pass and optimizer's step, which follow one another."""
    zero, width, num_elements = _zero(silo), _width(silo), _num_elements(shapes)
    share = num_elements / (_num_ranks(silo) if stage else 1)
    states_offloaded, parameters_offloaded = _offloads(silo) if stage else (False, False)
    states = 0.0 if states_offloaded else states_bytes(config, silo, stage, shapes) * share / num_elements
    step = 0.0 if states_offloaded else STEP_BYTES[silo.precision][stage] * share
    if step and stage and not silo.fused_adamw:
        step += NOT_FUSED_BYTES * share
    if config.inner.optimizer == "sgd" and not stage and silo.precision == "fp32":
        step /= 2  # gradients alone
    at_once = replace(silo, micro_batch_sequences=1) if silo.is_private else silo
    backward = float(activation_bytes(hugging_face, shapes, at_once, config.sequence_tokens))
    backward += PRIVATE_BYTES[silo.precision] * num_elements if silo.is_private else 0.0
    bucket = zero.get("reduce_bucket_size", REDUCE_BUCKET)
    bucket_bytes = width * (bucket if isinstance(bucket, int | float) else REDUCE_BUCKET)
    parameters = float(width * (num_elements + frozen))
    accumulates = silo.global_batch_sequences > silo.micro_batch_sequences * _num_ranks(silo)
    accumulated = float(width * num_elements) if accumulates else 0.0
    if stage == 3:
        # Parameters and gradients are this rank's share, and so are fp32 masters, of fp32 parameters, too.
        states += width * share + bucket_bytes
        backward += width * min(num_elements + frozen, zero.get("stage3_max_live_parameters", LIVE_PARAMETERS))
        whole = 0.0 if parameters_offloaded else 1.0
        parameters, accumulated = whole * width * (share + frozen / _num_ranks(silo)), 0.0
    elif stage:
        backward += bucket_bytes * (2 if zero.get("overlap_comm") else 1)
        accumulated /= _num_ranks(silo) if stage == 2 else 1
    return round(parameters + states + max(backward + accumulated, step))


def _zero(silo: SiloConfig) -> dict[str, Any]:
    return silo.deepspeed.get("zero_optimization") or {}


def _num_ranks(silo: SiloConfig) -> int:
    return silo.fewest_nodes * silo.processes_per_node  # with which each has most to keep


def _width(silo: SiloConfig) -> int:
    return 2 if silo.precision == "bf16" else 4


def _num_elements(shapes: Shapes) -> int:
    return sum(shape.numel() for shape in shapes.values())


def _offloads(silo: SiloConfig) -> tuple[bool, bool]:
    """Whether optimizer and parameters are on the host."""
    optimizer, parameters = ((_zero(silo).get(f"offload_{of}") or {}).get("device") for of in ("optimizer", "param"))
    return optimizer == "cpu", parameters == "cpu"


def states_bytes(config: RunConfig, silo: SiloConfig, stage: int, shapes: Shapes) -> int:
    """fp32 masters and moments of the whole model. Without ZeRO fp32 parameters are their own masters."""
    masters = 4 if silo.precision == "bf16" or stage else 0
    return masters * _num_elements(shapes) + moments_bytes(config, shapes)


def moments_bytes(config: RunConfig, shapes: Shapes) -> int:
    """What the inner optimizer remembers of gradients, fp32."""
    optimizer, found = config.inner.optimizer, 0
    for name, shape in shapes.items():
        moments = 0 if optimizer == "sgd" else 8
        if optimizer == "muon" and is_muon_matrix(name, shape):
            moments = 16 if config.outer.control_variates else 4  # momentum; gradients' sum and mean, correction
        found += shape.numel() * moments
    return found


def activation_bytes(hugging_face: Any, shapes: Shapes, silo: SiloConfig, sequence_tokens: int) -> int:
    """What the forward pass of one micro batch leaves for the backward pass, and what the loss needs besides.

    The method of https://arxiv.org/abs/2205.05198, section 4: add up what every operation keeps. Attention keeps no
    scores, as fused kernels do. Of models with RMSNorm and a gated MLP (llama, mistral, qwen, ...) all of it is
    counted; of others, the paper's 34 bytes per hidden element in 16 bit.
    """
    width, of = _width(silo), hugging_face
    hidden, heads, layers = of.hidden_size, of.num_attention_heads, of.num_hidden_layers
    norm = 2 * 4 if width == 4 else 4 + 2  # computed in fp32, an element: what came in, and what is scaled
    if hasattr(of, "rms_norm_eps"):
        head = getattr(of, "head_dim", None) or hidden // heads
        key_values = getattr(of, "num_key_value_heads", None) or heads
        normed = 2 * hidden + (head * (heads + key_values) if any(".q_norm." in name for name in shapes) else 0)
        attention = width * (hidden + 2 * head * (heads + key_values)) + 4 * heads
        layer = norm * normed + 8 + attention + width * (hidden + 4 * of.intermediate_size)
        layer -= _spared_bytes(of, shapes, width, norm * normed - 4 * normed)
        results = attention + 2 * width * (hidden + of.intermediate_size)
    else:
        layer = 34 * hidden if width == 2 else 66 * hidden
        results = 11 * width * hidden
    kept = layers * layer
    if silo.activation_checkpointing != "none":  # its input, or the results of products, too; and one layer anew
        left = results if silo.activation_checkpointing == "selective" else width * hidden
        again = math.ceil(layers / silo.activation_checkpointing_every)
        kept = (layers - again) * layer + again * left + layer
    loss = of.vocab_size * (4 + (4 if width == 4 else 6))  # log-probabilities; gradients of them, and in bf16
    tokens = silo.micro_batch_sequences * sequence_tokens
    whole = min(tokens, silo.loss_chunk_tokens or tokens)  # of which there are logits at once
    # The last norm and what goes into the head, and the head's gradient. Beside an adapter these are frozen; and the
    # first norm's input, which is about as much as the last one's, has no gradient.
    ends = 0 if _factors(shapes) else tokens * (norm + width) * hidden + width * hidden * of.vocab_size
    return tokens * kept + whole * loss + ends


def _factors(shapes: Shapes) -> list[str]:
    """The names of an adapter's factors A."""
    return [name for name in shapes if FACTORS[0] in name]


def _spared_bytes(of: Any, shapes: Shapes, width: int, scaled: int) -> int:
    """What a layer beneath an adapter keeps less a token, of a model with RMSNorm and a gated MLP: what is `scaled` by
    frozen norms, and what goes into layers without factors (but for attention's output, which attention keeps). Of each
    factor A it keeps the results."""
    if not (factors := _factors(shapes)):
        return 0
    inputs = (
        (of.hidden_size, ("q_proj", "k_proj", "v_proj")),
        (of.hidden_size, ("gate_proj", "up_proj")),
        (of.intermediate_size, ("down_proj",)),
    )
    spared = sum(size for size, into in inputs if not any(f".{name}." in one for name in into for one in factors))
    ranks = sum(shapes[name][0] for name in factors) / of.num_hidden_layers
    return scaled + round(width * (spared - ranks))


# ---- hosts


def _sync_bytes(config: RunConfig, shapes: Shapes) -> int:
    """The client, the leader's fp32 copy of the model, error feedback, and the versions in flight, both ways."""
    outer, num_elements = config.outer, _num_elements(shapes)
    decay = FEEDBACK_DECAY[outer.codec] if outer.error_feedback is None else outer.error_feedback
    kept = 4 * num_elements * (2 if decay else 1)
    in_flight = min(outer.num_fragments, 1 + outer.overlap_steps * outer.num_fragments // outer.sync_interval_steps)
    coded = (QUANTIZERS[outer.codec].bits + QUANTIZERS[outer.downlink_codec].bits) / 8
    held = 4 * (2 if outer.overlap_steps else 1)  # what was sent, while what came before is adopted
    passing = in_flight * _largest_fragment(config, shapes) * (held + coded)
    if config.exchange.kind == "collective":  # version 0 passes through at the start; a part of the outer state stays
        passing = max(passing, 4 * num_elements * 3)
        kept += 4 * num_elements * len(kept_kinds(outer.optimizer, outer.downlink_codec)) // len(config.full_roster)
    return round(_client_bytes(config, shapes) + kept + passing)


def _largest_fragment(config: RunConfig, shapes: Shapes) -> int:
    return max(_num_elements(part) for part in fragments(config, shapes))


def _client_bytes(config: RunConfig, shapes: Shapes) -> int:
    """Of an object store's client, with the payload that passes through it, of version 0 in fp32."""
    if config.exchange.kind != "store" or "://" not in config.store_url:
        return 0
    return CLIENT_BYTES + min(BLOCK_BYTES, 4 * _largest_fragment(config, shapes))


def _offloaded_bytes(config: RunConfig, silo: SiloConfig, shapes: Shapes) -> int:
    """Of one rank: masters, moments and their gradients; at stage 3 parameters, if asked for."""
    stage, (optimizer, parameters) = silo.zero_stage, _offloads(silo)
    if not stage:
        return 0
    found = states_bytes(config, silo, stage, shapes) + 4 * _num_elements(shapes) if optimizer else 0
    found += _width(silo) * _num_elements(shapes) if parameters and stage == 3 else 0
    return found // _num_ranks(silo)


def aggregator_bytes(config: RunConfig, shapes: Shapes) -> int:
    """The outer state, the silos' deliveries and the change of one fragment, what is merged, the process.

    With `outer.state: disk` the outer state and the deliveries, mapped files, count nothing: they take what room there
    is, and give it back.
    """
    outer, num_silos, fragment = config.outer, len(config.full_roster), _largest_fragment(config, shapes)
    on_disk = outer.state == "disk"
    largest = max(shape.numel() for shape in shapes.values())
    change = fragment * QUANTIZERS[outer.downlink_codec].bits / 8
    late = 8 * fragment if config.membership.stale_weight else 0  # coded against that, before and after a change
    whole = 16 * num_silos * largest if outer.merge == "krum" else 0  # of one tensor, decoded
    merging = change + late + whole
    if on_disk:
        loaded = 8 * largest if config.model.checkpoint else 0  # one tensor after another, as it lies there and in fp32
        return round(AGGREGATOR_BYTES + _client_bytes(config, shapes) + max(merging, loaded))
    # Deliveries are mapped files, and count as long as there is room. Version 0 is a model before it is a state.
    merging += fragment * num_silos * QUANTIZERS[outer.codec].bits / 8
    return round(
        AGGREGATOR_BYTES
        + _client_bytes(config, shapes)
        + whole_bytes(config, shapes)
        + max(merging, 4 * _num_elements(shapes))
    )


# ---- the aggregator's disk


def whole_bytes(config: RunConfig, shapes: Shapes) -> int:
    """The outer state: parameters and what is kept of each besides, fp32."""
    kinds = kept_kinds(config.outer.optimizer, config.outer.downlink_codec)
    return 4 * (1 + len(kinds)) * _num_elements(shapes)


def parameters_bytes(shapes: Shapes) -> int:
    """All parameters, fp32: what version 0 is."""
    return 4 * _num_elements(shapes)


def state_disk_bytes(config: RunConfig, shapes: Shapes) -> int:
    """What the outer state takes in the aggregator's run directory."""
    return whole_bytes(config, shapes) if config.outer.state == "disk" else 0


def scratch_bytes(config: RunConfig, shapes: Shapes, *, is_new: bool) -> int:
    """What comes and goes through the aggregator's run directory: deliveries, and the newest version on its way out.

    A version is a coded change and the snapshot of a fragment; version 0, where there is none yet (`is_new`), is all
    parameters.
    """
    outer, fragment = config.outer, _largest_fragment(config, shapes)
    first = parameters_bytes(shapes) if is_new else 0
    deliveries = fragment * len(config.full_roster) * QUANTIZERS[outer.codec].bits / 8
    version = fragment * (QUANTIZERS[outer.downlink_codec].bits / 8 + 4 * len(snapshot_kinds(outer)))
    return round(deliveries + max(version, first))
