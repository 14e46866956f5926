"""What a run will take before it starts: bytes, seconds and memory, and ways to sync that keep the silos busier.

Bytes are counted in bytes.py, seconds in seconds.py, memory in memory.py; docs/plan.md explains them.
"""

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config.check import check_config
from pretrain.config.errors import ConfigError
from pretrain.config.keys import OuterConfig, RunConfig
from pretrain.merge.terms import snapshot_versions
from pretrain.plan.bytes import (
    Shapes,
    Traffic,
    aggregator_run_bytes,
    fragments,
    frozen_elements,
    model_shapes,
    payload_bytes,
    run_bytes,
    traffic,
    vocabulary,
)
from pretrain.plan.memory import SiloMemory, aggregator_bytes, scratch_bytes, silo_memory, state_disk_bytes
from pretrain.plan.requests import Requests, aggregator_requests, silo_requests
from pretrain.plan.seconds import Given, Pace, run_pace, step_seconds
from pretrain.silo.architecture import model_config
from pretrain.silo.model import check_shapes
from pretrain.silo.personal import personal_shapes


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """Another way to sync, and what it would change."""

    changes: dict[str, Any]
    """Keys of the configuration and their values."""
    sent_bytes: int
    """By a silo in the run, the first of the file."""
    received_bytes: int
    pace: Pace
    loss: str
    """What was measured of its price, in words; empty where nothing was."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that `atoll plan` says."""

    config: RunConfig
    num_parameters: int
    """Trained ones."""
    num_frozen: int
    """Those beneath an adapter."""
    tokens: int
    """Of all silos in the run."""
    budget_tokens: int
    """For which `budget_days` are."""
    budget_days: float
    step_seconds: dict[str, float]
    traffic: dict[str, list[Traffic]]
    """By silo of the configuration and fragment."""
    sent_bytes: dict[str, int]
    """By silo, in the run."""
    received_bytes: dict[str, int]
    first_bytes: int
    """Received once, as version 0; in a collective nothing."""
    aggregator_sent_bytes: int
    """In the run, snapshots included; in a collective 0, as all of the aggregator's."""
    aggregator_received_bytes: int
    snapshot_versions: int
    """Outer steps of a fragment from one snapshot to the next."""
    requests: dict[str, Requests]
    """To a store in the run, by silo of the configuration; to a collective there are none."""
    aggregator_requests: Requests
    pace: Pace
    neighbours: list[Neighbour]
    memory: dict[str, SiloMemory]
    aggregator_memory_bytes: int
    aggregator_disk_bytes: tuple[int, int]
    """In the aggregator's run directory: the outer state, if it is on disk, and what passes through on its way."""


def make_plan(config: RunConfig, given: Given, *, budget_tokens: int | None = None) -> Plan:
    """Plan a run. Raises ConfigError where the configuration does not fit itself, or nothing is exchanged."""
    if config.exchange.kind == "none":
        raise ConfigError("exchange.kind: 'none' given; nothing is exchanged; allowed: store, collective")
    vocab_size = vocabulary(config)
    check_shapes(config.model, vocab_size, config.sequence_tokens)
    shapes, hugging_face = model_shapes(config, vocab_size), model_config(config.model, vocab_size)
    frozen = frozen_elements(config, vocab_size) if config.model.adapter.is_on else 0
    adapters = {name: silo.personal_adapter for name, silo in config.silos.items() if silo.personal_adapter.is_on}
    own = {name: personal_shapes(config.model, vocab_size, adapter) for name, adapter in adapters.items()}
    moved = {silo: traffic(config, shapes, silo) for silo in config.silos}
    in_run = {silo: run_bytes(config, of) for silo, of in moved.items()}
    pace = run_pace(config, shapes, given)
    # A silo that another site describes is taken for one like ours.
    batch = statistics.mean(silo.global_batch_sequences for silo in config.silos.values()) * len(config.full_roster)
    tokens = round(batch * config.sequence_tokens * config.inner.num_steps)
    budget, is_store = budget_tokens or tokens, config.exchange.kind == "store"
    written, read = aggregator_run_bytes(config, shapes) if is_store else (0, 0)
    return Plan(
        config=config,
        num_parameters=sum(shape.numel() for shape in shapes.values()),
        num_frozen=frozen,
        tokens=tokens,
        budget_tokens=budget,
        budget_days=pace.seconds * budget / tokens / 86_400,
        step_seconds=step_seconds(config, given),
        traffic=moved,
        sent_bytes={silo: sent for silo, (sent, _) in in_run.items()},
        received_bytes={silo: received for silo, (_, received) in in_run.items()},
        first_bytes=sum(payload_bytes("fp32", part) for part in fragments(config, shapes)) if is_store else 0,
        aggregator_sent_bytes=written,
        aggregator_received_bytes=read,
        snapshot_versions=snapshot_versions(config),
        requests={silo: silo_requests(config, shapes, pace, silo) for silo in config.silos} if is_store else {},
        aggregator_requests=aggregator_requests(config, shapes, pace) if is_store else Requests(),
        pace=pace,
        neighbours=better_neighbours(config, shapes, given, pace),
        memory={
            name: silo_memory(config, name, shapes, hugging_face, frozen=frozen, own=own.get(name))
            for name in config.silos
        },
        aggregator_memory_bytes=aggregator_bytes(config, shapes) if is_store else 0,
        aggregator_disk_bytes=(state_disk_bytes(config, shapes), scratch_bytes(config, shapes, is_new=True))
        if is_store
        else (0, 0),
    )


# ---- neighbours


# docs/benchmarks.md, "Ways to sync": four silos whose texts have nothing in common, against fp32 all at once at H = 20.
LOSS = {
    "int8": "int8 -0.19 % ± 0.03",
    "int4": "int4 +0.04 % ± 0.09",
    "e3m0": "e3m0 +0.32 % ± 0.37, with feedback 1",
    "topk": "topk +10.25 % ± 0.38, at a quarter of the H -0.11 % ± 0.22",
    "fragments": "3 fragments -1.02 % ± 0.44",
    "streaming": "3 fragments, overlap 2, int4, mixing 0.5 -2.06 % ± 0.19",
    # docs/benchmarks.md, "Outer settings of the demo", plain averaging.
    "longer": "H 25 to 50 +1.0 %",
    "shorter": "H 25 to 10 -1.5 %",
}
H, CODEC, DOWNLINK = "outer.sync_interval_steps", "outer.codec", "outer.downlink_codec"
FRAGMENTS, OVERLAP = "outer.num_fragments", "outer.overlap_steps"
MAX_NEIGHBOURS = 6


def better_neighbours(config: RunConfig, shapes: Shapes, given: Given, pace: Pace) -> list[Neighbour]:
    """The ways to sync near the configured one that would raise the utilisation most, at most MAX_NEIGHBOURS.

    Of those that are within a hundredth of each other the one with the fewest changes comes first.
    """
    found = []
    for changes in _candidates(config.outer):
        changed = _changed(config, changes)
        if changed is None:
            continue
        sent, received = run_bytes(changed, traffic(changed, shapes, next(iter(changed.silos))))
        found.append(
            Neighbour(
                changes=changes,
                sent_bytes=sent,
                received_bytes=received,
                pace=run_pace(changed, shapes, given),
                loss=_price(config.outer, changes),
            )
        )
    better = [n for n in found if n.pace.utilisation > pace.utilisation + 0.001]
    better.sort(key=lambda n: (-round(n.pace.utilisation, 2), len(n.changes), -n.pace.utilisation))
    return better[:MAX_NEIGHBOURS]


def _candidates(outer: OuterConfig) -> list[dict[str, Any]]:
    """One change each, fragments with overlap, and each of them with int8 or int4 both ways."""
    now = outer.sync_interval_steps
    intervals: list[dict[str, Any]] = [{H: steps} for steps in (now * 2, now * 4, now // 2)]
    blocks: list[dict[str, Any]] = [{CODEC: codec, DOWNLINK: codec} for codec in ("int8", "int4")]
    codecs = [*blocks, {CODEC: "e3m0", DOWNLINK: "e3m0"}, {CODEC: "topk", DOWNLINK: "int4"}]
    ways: list[dict[str, Any]] = [{FRAGMENTS: 3}, {OVERLAP: 1}, {OVERLAP: 5}]
    ways += [{FRAGMENTS: 3, OVERLAP: steps} for steps in (1, 5)]
    both = [codec | other for codec in blocks for other in [*intervals, *ways]]
    found: list[dict[str, Any]] = []
    for changes in [*intervals, *codecs, *ways, *both]:
        real = {key: value for key, value in changes.items() if getattr(outer, key.removeprefix("outer.")) != value}
        if real and real not in found:
            found.append(real)
    return found


def _changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig | None:
    """The configuration with these changes, or None if it does not allow them."""
    values: dict[str, Any] = {key.removeprefix("outer."): value for key, value in changes.items()}
    if CODEC in changes:
        values["error_feedback"] = None
    changed = dataclasses.replace(config, outer=dataclasses.replace(config.outer, **values))
    try:
        check_config(changed)
    except ConfigError:
        return None
    return changed


def _price(outer: OuterConfig, changes: Mapping[str, Any]) -> str:
    """What is known of the loss that these changes cost."""
    if {FRAGMENTS, OVERLAP} <= changes.keys() and changes.get(CODEC, outer.codec) == "int4":
        return LOSS["streaming"]
    known = [LOSS[changes[CODEC]]] if CODEC in changes else []
    known += [LOSS["fragments"]] if changes.get(FRAGMENTS) == 3 and OVERLAP not in changes else []
    known += [LOSS["longer" if changes[H] > outer.sync_interval_steps else "shorter"]] if H in changes else []
    return "; ".join(known)
