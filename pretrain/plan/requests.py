"""How often a run will ask its store for something, and what S3 takes for that: of a run without trouble.

Counted in the code that asks (`tests/unit/merge/test_requests.py` counts a version's at the bucket); docs/plan.md says
what is in it.
"""

import math
from dataclasses import dataclass

from pretrain.config.keys import RunConfig
from pretrain.exchange.beats import BEATS_PER_LEASE
from pretrain.exchange.client import FIRST_BYTES, PART_BYTES, part_bytes_of
from pretrain.merge.collect import POLLS_PER_LOOK
from pretrain.merge.terms import delivered_moments, shared_moments, snapshot_kinds, snapshot_versions
from pretrain.plan.bytes import Shapes, fragments, payload_bytes
from pretrain.plan.seconds import Pace

# US dollars, S3 Standard, us-east-1; what is deleted is free: https://aws.amazon.com/s3/pricing/
WRITE_DOLLARS = LIST_DOLLARS = 0.005 / 1000
READ_DOLLARS = 0.0004 / 1000


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Of one party in a run, parts of large objects one by one."""

    writes: float = 0
    lists: float = 0
    reads: float = 0

    def __add__(self, other: "Requests") -> "Requests":
        return Requests(
            writes=self.writes + other.writes, lists=self.lists + other.lists, reads=self.reads + other.reads
        )

    def __mul__(self, times: float) -> "Requests":
        return Requests(writes=self.writes * times, lists=self.lists * times, reads=self.reads * times)

    @property
    def dollars(self) -> float:
        """In S3, at list price."""
        return self.writes * WRITE_DOLLARS + self.lists * LIST_DOLLARS + self.reads * READ_DOLLARS


def writes_of(num_bytes: int) -> int:
    """Requests that send an object: one, or its parts, one before and one after them."""
    part_bytes = part_bytes_of(num_bytes)
    return 1 if num_bytes < 2 * part_bytes else 2 + math.ceil(num_bytes / part_bytes)


def reads_of(num_bytes: int) -> int:
    """Requests that fetch an object: its first part, and of a larger one its size and other parts."""
    return 1 if num_bytes < FIRST_BYTES else 2 + math.ceil((num_bytes - FIRST_BYTES) / PART_BYTES)


def silo_requests(config: RunConfig, shapes: Shapes, pace: Pace, silo: str) -> Requests:
    """What a silo asks in the whole run."""
    up, down = _largest(config, shapes)
    num_polls = pace.sync_seconds / config.exchange.poll_seconds
    a_version = Requests(
        writes=writes_of(up) + 1,
        # Whether anything was refused, before (s3fs asks twice where nothing is) and after; or amended.
        lists=2 + 1 + bool(config.trust.keys),
        # Whether it is delivered, or committed without us; then commit, the next one, both ends of a link, payload.
        reads=1 + config.membership.is_elastic + 2 * num_polls + 2 + 2 + reads_of(down),
    )
    a_checkpoint = Requests(writes=1, lists=1)
    num_checkpoints = config.inner.num_steps // config.silos[silo].checkpoint_interval_steps + 1
    return (
        a_version * config.schedule.num_versions
        + a_checkpoint * num_checkpoints
        + Requests(writes=1) * _beats(config, pace)
    )


def aggregator_requests(config: RunConfig, shapes: Shapes, pace: Pace) -> Requests:
    """What the aggregator of a store asks in the whole run; every silo delivers at the end of a version's time."""
    up, down = _largest(config, shapes)
    num_silos, num_versions = len(config.full_roster), config.schedule.num_versions
    num_polls = pace.seconds / num_versions / config.exchange.poll_seconds
    whole = max(payload_bytes("fp32", part) for part in fragments(config, shapes))
    snapshots = 1 / snapshot_versions(config)  # a version
    kinds = len(snapshot_kinds(config.outer)) * snapshots
    num_objects = 2 + kinds + snapshots  # before each of which the lease is looked at
    a_version = (
        Requests(reads=1 + reads_of(up)) * num_silos
        + Requests(reads=num_silos) * num_polls
        + Requests(reads=1, lists=2) * (num_polls / POLLS_PER_LOOK)  # whether the newest commit is there, and whole
        + Requests(
            writes=1 + writes_of(down) + kinds * writes_of(whole) + snapshots,
            lists=5 + bool(config.trust.keys),
            reads=2,
        )
        + Requests(lists=1, reads=1) * num_objects
    )
    steps = min(silo.checkpoint_interval_steps for silo in config.silos.values())
    is_signed = bool(config.trust.keys)  # a mark is read, then
    checkpoints = Requests(lists=num_silos, reads=num_silos * is_signed) * (config.inner.num_steps // steps + 1)
    return a_version * num_versions + checkpoints + Requests(writes=1, lists=1, reads=1) * _beats(config, pace)


def _largest(config: RunConfig, shapes: Shapes) -> tuple[int, int]:
    """Bytes of the largest fragment's payload, up and down."""
    outer, parts = config.outer, fragments(config, shapes)
    up = max(payload_bytes(outer.codec, part, delivered_moments(config, part, part)) for part in parts)
    down = max(payload_bytes(outer.downlink_codec, part, shared_moments(config, part, part)) for part in parts)
    return up, down


def _beats(config: RunConfig, pace: Pace) -> float:
    return pace.seconds * BEATS_PER_LEASE / config.exchange.lease_seconds
