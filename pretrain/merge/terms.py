"""What merging takes, whoever merges: the deliveries' terms, the outer optimizer, the commit's contributors."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pretrain.config.keys import OuterConfig, RunConfig
from pretrain.exchange.payload import PARAMETER
from pretrain.outer.fixed_point import scale
from pretrain.outer.moments import MeanGradient, Moment, SecondMoment
from pretrain.outer.optimizer import OuterOptimizer
from pretrain.outer.quantize import QUANTIZERS
from pretrain.outer.state import kept_kinds
from pretrain.outer.summed import SummedMoment
from pretrain.silo.optim import is_muon_matrix
from pretrain.trust.ledger import Commit, Contributor, Manifest, Payload, RefusedError, sha256_bytes
from pretrain.trust.quality import check_metrics, not_counted
from pretrain.trust.seal import opened_bytes

HEADER_BYTES = 256  # of a payload's header, for each part of a tensor beside its name

PAYLOADS_A_SNAPSHOT = 5  # bytes of payloads for each byte of outer state that is written

MOST_TOKENS = 1 << 36  # of one delivery; weights made of them stay far below 2^53, which every reader can hold
LONGEST_NORM = 2.0**60  # of a pseudo-gradient: what is shorter stays in the range of fp32, squared by Adam, too


def read_delivery(
    data: bytes, *, silo: str, version: int, base_digest: str, config: RunConfig, contract_sha256: str
) -> Manifest:
    """The manifest of a silo's delivery for a version; raises RefusedError for whatever is not as agreed."""
    manifest, schedule = Manifest.from_bytes(data), config.schedule
    expected = {
        "silo": silo,
        "version": version,
        "base_version": schedule.base(version),
        "base_digest": base_digest,
        "contract_sha256": contract_sha256,
        "codec": config.outer.sent_codec,
    }
    most, rules = schedule.steps(version), config.membership
    if not rules.is_elastic and rules.steps == "equal":
        expected["steps"] = most
    for term, value in expected.items():
        if getattr(manifest, term) != value:
            raise RefusedError(f"its {term} is {getattr(manifest, term)!r}, not {value!r}")
    if not 1 <= manifest.steps <= most:
        raise RefusedError(f"it counts {manifest.steps} steps, not 1 to {most}")
    if rules.steps == "speed" and not manifest.metrics.get("seconds_per_step", 0) > 0:
        raise RefusedError("it does not say its seconds_per_step")
    if config.outer.quality_floor is not None and not manifest.metrics.get("loss", -1) >= 0:
        raise RefusedError("it does not say its loss, which outer.quality_floor needs, as a number of 0 or more")
    check_metrics(manifest, config.trust.metrics)
    if not 1 <= manifest.tokens <= most_tokens(config, version):
        batch = config.outer.max_batch_sequences
        why = "" if batch is None else f": {most} steps of outer.max_batch_sequences={batch}"
        raise RefusedError(f"it counts {manifest.tokens} tokens, not 1 to {most_tokens(config, version)}{why}")
    fragment = schedule.fragment(version)
    if [payload.fragment for payload in manifest.payloads] != [fragment]:
        raise RefusedError(f"it has not just fragment {fragment}")
    return manifest


def most_tokens(config: RunConfig, version: int) -> int:
    """The most that a delivery for a version may count."""
    batch, steps = config.outer.max_batch_sequences, config.schedule.steps(version)
    return MOST_TOKENS if batch is None else min(MOST_TOKENS, steps * batch * config.sequence_tokens)


def sum_share(config: RunConfig, version: int, tokens: int) -> float:
    """Of a secure sum: the weight of a delivery behind which are so many tokens, as a share of the largest."""
    weight, most = (merge_weight(n, config.outer.weight_power) for n in (tokens, most_tokens(config, version)))
    return weight / most


def sum_factor(config: RunConfig, version: int, tokens: int) -> float:
    """Of a secure sum: what a delivery's values, behind which are so many tokens, are multiplied by, to be rounded."""
    return scale(len(config.full_roster), config.outer.sum_range) * sum_share(config, version, tokens)


def check_payload_size(
    payload: Payload,
    codec: str,
    shapes: Mapping[str, torch.Size],
    moments: Mapping[str, Moment | SummedMoment],
    *,
    is_sealed: bool = False,
) -> int:
    """Raise RefusedError for a payload that is larger than its tensors and moments, before a byte of it is read.

    Returns the most bytes that its header may have.
    """
    found = opened_bytes(payload.num_bytes) if is_sealed else payload.num_bytes
    num_bytes = sum(moment.num_bytes for moment in moments.values())
    header_bytes = HEADER_BYTES
    for name, shape in shapes.items():
        layout = QUANTIZERS[codec].layout(shape.numel())
        num_bytes += sum(dtype.itemsize * length for dtype, length in layout.values())
        header_bytes += HEADER_BYTES * len(layout) + len(json.dumps(name)) * (len(layout) + 3)
    header_bytes += 3 * HEADER_BYTES * len(moments)
    if found > num_bytes + header_bytes:
        raise RefusedError(f"its payload has {found} bytes; allowed: {num_bytes} and names")
    return header_bytes


def contributor(manifest: Manifest, manifest_bytes: bytes, weight: int) -> Contributor:
    """A delivery's part in its commit."""
    return Contributor(
        silo=manifest.silo,
        version=manifest.version,
        manifest_sha256=sha256_bytes(manifest_bytes),
        tokens=manifest.tokens,
        tokens_total=manifest.tokens_total,
        steps=manifest.steps,
        weight=weight,
    )


def check_norm(norm: float) -> None:
    """Raise ValueError if a pseudo-gradient is so long that outer steps of it would leave the range of fp32."""
    if norm > LONGEST_NORM:
        raise ValueError(f"its pseudo-gradient has norm {norm:.4g}; allowed: up to {LONGEST_NORM:.4g}")


def merge_weight(tokens: int, power: float) -> int:
    """A silo's weight in a merge: its tokens, or a thousand times a lower power of them."""
    return tokens if power == 1 else round(1000 * tokens**power)


def shared_moments(config: RunConfig, names: Iterable[str], shapes: Mapping[str, torch.Size]) -> dict[str, Moment]:
    """What silos tell each other of the gradients of a fragment's tensors, as the contract says."""
    moments: dict[str, Moment] = {}
    for name in names:
        if config.inner.optimizer == "muon" and is_muon_matrix(name, shapes[name]):
            if config.outer.control_variates:
                moments[name] = MeanGradient(shapes[name])
        elif config.outer.second_moments == "shared":
            moments[name] = SecondMoment(shapes[name])
    return moments


def summed_moments(
    config: RunConfig, names: Iterable[str], shapes: Mapping[str, torch.Size]
) -> dict[str, SummedMoment]:
    """The same as whole numbers of a secure sum."""
    clip_norm, num_silos = config.inner.clip_norm, len(config.full_roster)
    return {
        name: SummedMoment(moment=moment, clip_norm=clip_norm, num_silos=num_silos)
        for name, moment in shared_moments(config, names, shapes).items()
    }


def delivered_moments(
    config: RunConfig, names: Iterable[str], shapes: Mapping[str, torch.Size]
) -> Mapping[str, Moment | SummedMoment]:
    """The same as a delivery has it."""
    return (summed_moments if config.outer.secure_sum else shared_moments)(config, names, shapes)


def outer_optimizer(outer: OuterConfig) -> OuterOptimizer:
    """The outer optimizer of a configuration."""
    first, second = outer.betas
    return OuterOptimizer(name=outer.optimizer, momentum=outer.momentum, betas=(first, second), eps=outer.eps)


def snapshot_versions(config: RunConfig) -> int:
    """A fragment's outer state is written at every so many of its outer steps: as configured, or by bytes.

    Payloads are counted without names and moments. Where the payloads are all there is to write, every step has it.
    """
    outer, down = config.outer, QUANTIZERS[config.outer.downlink_codec]
    payload_bytes = (len(config.full_roster) * QUANTIZERS[outer.codec].bits + down.bits) / 8  # a parameter, as all here
    if not (kinds := snapshot_kinds(outer)):
        return 1
    by_bytes = math.ceil(PAYLOADS_A_SNAPSHOT * 4 * len(kinds) / payload_bytes)
    return config.exchange.snapshot_versions or max(1, by_bytes)


def snapshot_kinds(outer: OuterConfig) -> tuple[str, ...]:
    """What a snapshot writes, fp32: the outer state, and the parameters where payloads have but their changes."""
    return kept_kinds(outer.optimizer, outer.downlink_codec) + ((PARAMETER,) if outer.downlink_codec != "fp32" else ())


def commit_record(config: RunConfig, commit: Commit) -> dict[str, Any]:
    """What metrics.jsonl says of a commit."""
    return {
        "version": commit.version,
        "round": config.round_of(commit.version),
        "fragment": config.schedule.fragment(commit.version),
        "silos": [contributor.silo for contributor in commit.contributors],
        "weights": [contributor.weight for contributor in commit.contributors],
        "divisor": commit.divisor,
        **({"not_counted": left_out} if (left_out := not_counted(commit)) else {}),
        **commit.metrics,
        "digest": commit.parameters_digest,
    }
