"""What a run will move, to the byte: the payloads that silos and aggregator write, without a tensor in memory.

Manifests and commits, a few kB of JSON for each version, and what the link adds are not counted; neither does a run's
`bytes_sent` count them.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.exchange.payload import PARAMETER, header
from pretrain.merge.terms import delivered_moments, shared_moments, snapshot_kinds, snapshot_versions
from pretrain.outer.moments import MOMENT, Moment
from pretrain.outer.pieces import cut_pieces
from pretrain.outer.quantize import QUANTIZERS
from pretrain.outer.summed import SummedMoment
from pretrain.silo.model import build_without_memory
from pretrain.silo.vocabulary import vocabulary_size
from pretrain.sync.packing import num_bytes

Shapes = Mapping[str, torch.Size]
"""Name to shape of trained parameters."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The payloads of one version of one fragment, as one silo sees them."""

    num_elements: int
    """Of the fragment."""
    before: tuple[int, int]
    """Bytes sent and received until the merge; both go at the same time."""
    after: tuple[int, int]
    """The same, of what was merged."""

    @property
    def sent_bytes(self) -> int:
        """Before and after the merge."""
        return self.before[0] + self.after[0]

    @property
    def received_bytes(self) -> int:
        """Before and after the merge."""
        return self.before[1] + self.after[1]


def vocabulary(config: RunConfig) -> int:
    """The tokenizer's size; before there is one, `model.config.vocab_size`. Raises ConfigError without either."""
    if config.tokenizer and config.tokenizer_file.is_file():
        return vocabulary_size(config.tokenizer_file)
    given = config.model.config.get("vocab_size", 0)
    if not config.model.checkpoint and not given:
        raise ConfigError(
            f"tokenizer: {config.tokenizer!r} given; allowed: a tokenizer.json, or, before there is one, "
            "model.config.vocab_size"
        )
    return given


def model_shapes(config: RunConfig, vocab_size: int) -> dict[str, torch.Size]:
    """Name to shape of every trained parameter, as the silos and the aggregator name them; takes no memory."""
    model = build_without_memory(config.model, vocab_size)
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


def frozen_elements(config: RunConfig, vocab_size: int) -> int:
    """Elements of the parameters beneath an adapter, which stay where they are."""
    model = build_without_memory(config.model, vocab_size)
    return sum(p.numel() for p in model.parameters() if not p.requires_grad)


def fragments(config: RunConfig, shapes: Shapes) -> list[dict[str, torch.Size]]:
    """The tensors of each fragment. Raises ConfigError if there are fewer tensors than fragments."""
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    try:
        cut = config.cut(sizes)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return [{name: shapes[name] for name in names} for names in cut]


def payload_bytes(
    codec: str, shapes: Shapes, moments: Mapping[str, Moment | SummedMoment] | None = None, *, kind: str = PARAMETER
) -> int:
    """Bytes of the file that `payload.save_tensors` makes of these tensors in a codec, and of `moments`."""
    layout: dict[str, tuple[torch.dtype, list[int]]] = {}
    for name, shape in shapes.items():
        for part, (dtype, length) in QUANTIZERS[codec].layout(shape.numel()).items():
            layout[f"{kind}/{part}/{name}"] = dtype, list(shape) if codec == "fp32" else [length]
    for name, moment in (moments or {}).items():
        for part, (dtype, size) in moment.layout.items():
            layout[f"{MOMENT}/{part}/{name}"] = dtype, list(size)
    return len(header(layout)) + sum(dtype.itemsize * math.prod(size) for dtype, size in layout.values())


def traffic(config: RunConfig, shapes: Shapes, silo: str) -> list[Traffic]:
    """What a silo sends and receives for a version of each fragment."""
    outer, roster, found = config.outer, config.full_roster, []
    for part in fragments(config, shapes):
        if config.exchange.kind == "store":
            before = (payload_bytes(outer.codec, part, delivered_moments(config, part, part)), 0)
            after = (0, payload_bytes(outer.downlink_codec, part, shared_moments(config, part, part)))
        else:
            shares = cut_pieces({name: part[name].numel() for name in sorted(part)}, len(roster))
            ups = [num_bytes(outer.codec, pieces) for pieces in shares]
            downs = [num_bytes(outer.downlink_codec, pieces) for pieces in shares]
            mine, others = roster.index(silo), len(roster) - 1
            told = sum(moment.num_bytes for moment in shared_moments(config, part, part).values()) * others
            before = (sum(ups) - ups[mine] + told, ups[mine] * others + told)
            after = (downs[mine] * others, sum(downs) - downs[mine])
        num_elements = sum(shape.numel() for shape in part.values())
        found.append(Traffic(num_elements=num_elements, before=before, after=after))
    return found


def run_bytes(config: RunConfig, moved: list[Traffic]) -> tuple[int, int]:
    """What a silo sends and receives in the whole run; version 0, which it receives besides, is not in it."""
    times = _num_versions(config)
    return (
        sum(one.sent_bytes * times[fragment] for fragment, one in enumerate(moved)),
        sum(one.received_bytes * times[fragment] for fragment, one in enumerate(moved)),
    )


def aggregator_run_bytes(config: RunConfig, shapes: Shapes) -> tuple[int, int]:
    """What the aggregator of a store writes in the whole run, snapshots included and version 0 not, and what it reads.

    That is all that the store grows by, before pruning.
    """
    outer, times, every = config.outer, _num_versions(config), snapshot_versions(config)
    sent = received = 0
    for fragment, part in enumerate(fragments(config, shapes)):
        told, num_versions = delivered_moments(config, part, part), times[fragment]
        sent += num_versions * payload_bytes(outer.downlink_codec, part, shared_moments(config, part, part))
        sent += num_versions // every * sum(payload_bytes("fp32", part, kind=kind) for kind in snapshot_kinds(outer))
        received += num_versions * len(config.full_roster) * payload_bytes(outer.codec, part, told)
    return sent, received


def _num_versions(config: RunConfig) -> Counter[int]:
    """How many versions of the run each fragment has."""
    schedule = config.schedule
    return Counter(schedule.fragment(version) for version in range(1, schedule.num_versions + 1))
