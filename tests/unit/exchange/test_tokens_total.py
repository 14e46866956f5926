"""How much of its text a silo has in the commits: what it goes on from when it has no checkpoint."""

from pathlib import Path

import pytest

from pretrain.exchange.store import REQUESTS_AT_ONCE, StoreExchange, version_path
from pretrain.trust.ledger import Commit, Contributor, RefusedError


def contributed(silo: str, version: int, tokens_total: int) -> Contributor:
    """A silo's part: the version that it delivered for, and what it had trained on then."""
    return Contributor(
        silo=silo,
        version=version,
        manifest_sha256="0" * 64,
        tokens=10,
        tokens_total=tokens_total,
        steps=1,
        weight=10,
    )


def commit(exchange: StoreExchange, version: int, *contributors: Contributor) -> None:
    record = Commit(
        contract_sha256="",
        version=version,
        previous=None,
        codec="fp32",
        payloads=[],
        contributors=list(contributors),
        divisor=10 * len(contributors),
        parameters_digest="",
        outer_digest="",
    )
    exchange.objects.write(f"{version_path(version)}/commit.json", record.to_bytes())


def test_the_newest_part_is_found_however_long_ago(tmp_path: Path) -> None:
    exchange = StoreExchange(str(tmp_path))
    commit(exchange, 0)
    newest = 3 * REQUESTS_AT_ONCE
    for version in range(1, newest + 1):
        early = [contributed("early", version, 10 * version)] if version <= 3 else []
        commit(exchange, version, contributed("always", version, 100 * version), *early)
    assert exchange.tokens_total("always", newest) == 100 * newest
    assert exchange.tokens_total("always", 7) == 700
    assert exchange.tokens_total("early", newest) == 30
    assert exchange.tokens_total("early", newest, above=2) == 30
    assert exchange.tokens_total("early", newest, above=3) == 0
    assert exchange.tokens_total("never", newest) == exchange.tokens_total("always", 0) == 0
    (tmp_path / version_path(2) / "commit.json").unlink()
    with pytest.raises(RefusedError, match=r"^commit 2 is missing: .*000002/commit\.json"):
        exchange.tokens_total("never", newest)


def test_one_that_came_too_late_is_not_the_newest(tmp_path: Path) -> None:
    """The newest commit holds what was delivered late for 3; a commit long before it holds that for 4, in time."""
    exchange = StoreExchange(str(tmp_path))
    for version in range(REQUESTS_AT_ONCE + 5):
        commit(exchange, version, *([contributed("law", 4, 190)] if version == 4 else []))
    commit(exchange, REQUESTS_AT_ONCE + 5, contributed("law", 3, 180))
    assert exchange.tokens_total("law", REQUESTS_AT_ONCE + 5) == 190
