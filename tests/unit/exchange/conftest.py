"""Stores of every kind."""

import uuid
from pathlib import Path

import pytest

from pretrain.exchange.store import StoreExchange

KINDS = ("directory", "memory", "s3")


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh store of each kind."""
    if request.param == "directory":
        return str(tmp_path / "store")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    return f"{request.getfixturevalue('s3_url')}/{uuid.uuid4().hex}"


@pytest.fixture
def exchange(url: str) -> StoreExchange:
    return StoreExchange(url)
