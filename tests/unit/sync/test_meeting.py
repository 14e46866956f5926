"""Silos of a collective meet: who has another contract, or passes on what was not said, is found out."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.exchange.board import Words
from pretrain.exchange.lane import PeerLostError
from tests.conftest import TinyConfig
from tests.unit.sync.together import among_silos, start


@pytest.fixture
def config(tmp_path: Path, tiny_config: TinyConfig) -> RunConfig:
    return among_silos(tiny_config, tmp_path)


def test_silos_with_one_contract_start(config: RunConfig) -> None:
    assert sorted(config.trust.keys) == ["alpha", "beta"]  # nobody aggregates
    met = start(dict.fromkeys(config.full_roster, config))
    assert [future.exception() for future in met.values()] == [None, None]


def test_another_contract_is_named_on_both_sides(config: RunConfig, tmp_path: Path, tiny_config: TinyConfig) -> None:
    other = tiny_config(
        tmp_path / "other", inner={"lr": 0.5}, exchange={"kind": "collective", "url": config.exchange.url}
    )
    other.trust.keys, other.trust.directory = config.trust.keys, str(config.key_file("beta").parent)
    met = start({"alpha": config, "beta": other})
    with pytest.raises(
        ConfigError, match=r"it holds a run with another contract: inner.lr is 0.5 here and 0.003 there"
    ):
        met["beta"].result()
    with pytest.raises(PeerLostError, match=r"^silo beta: it has agreed to another contract than this silo$"):
        met["alpha"].result()


def test_words_that_were_not_said_are_found_out(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[[Words, str], str | None] = Words.find

    def change(words: Words, key: str) -> str | None:
        said = find(words, key)
        return said + " " if said and key == "said/facts/beta" else said  # JSON still

    monkeypatch.setattr(Words, "find", change)
    met = start(dict.fromkeys(config.full_roster, config))
    with pytest.raises(PeerLostError, match=r"^silo alpha passed on what silo beta has not said$"):
        met["alpha"].result()
    assert isinstance(met["beta"].exception(), PeerLostError)
