"""What merging takes, whoever merges: the deliveries' terms, the outer optimizer, the commit's contributors."""

from pretrain.config import OuterConfig, RunConfig
from pretrain.outer.optimizer import OuterOptimizer
from pretrain.trust.ledger import Contributor, Manifest, RefusedError, sha256_bytes


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
        "codec": config.outer.codec,
        "steps": schedule.steps(version),
    }
    for term, value in expected.items():
        if getattr(manifest, term) != value:
            raise RefusedError(f"its {term} is {getattr(manifest, term)!r}, not {value!r}")
    if manifest.tokens < 1:
        raise RefusedError(f"it counts {manifest.tokens} tokens")
    fragment = schedule.fragment(version)
    if [payload.fragment for payload in manifest.payloads] != [fragment]:
        raise RefusedError(f"it has not just fragment {fragment}")
    return manifest


def contributor(manifest: Manifest, manifest_bytes: bytes) -> Contributor:
    """A delivery's part in its commit: its weight is the tokens behind it."""
    return Contributor(
        silo=manifest.silo,
        manifest_sha256=sha256_bytes(manifest_bytes),
        tokens=manifest.tokens,
        tokens_total=manifest.tokens_total,
        steps=manifest.steps,
        weight=manifest.tokens,
    )


def outer_optimizer(outer: OuterConfig) -> OuterOptimizer:
    """The outer optimizer of a configuration."""
    first, second = outer.betas
    return OuterOptimizer(name=outer.optimizer, momentum=outer.momentum, betas=(first, second), eps=outer.eps)
