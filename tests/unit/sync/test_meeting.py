"""Silos of a collective meet: who has another contract, or passes on what was not said, is found out."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain.config.check import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.exchange.board import Words
from pretrain.exchange.lane import PeerLostError
from pretrain.sync.among_silos import AmongSilos
from pretrain.sync.own_ledger import OwnLedger
from pretrain.trust.contract import build_contract
from pretrain.trust.members import with_keys
from tests.conftest import TinyConfig
from tests.support import free_port


@pytest.fixture
def config(tmp_path: Path, tiny_config: TinyConfig) -> RunConfig:
    exchange = {"kind": "collective", "url": f"tcp://127.0.0.1:{free_port()}", "dead_seconds": 5.0}
    return with_keys(tiny_config(tmp_path, exchange=exchange, trust={"directory": ""}), make=True)


def meet(configs: dict[str, RunConfig]) -> dict[str, Future[None]]:
    """All join, and leave whatever came of it. Their ledgers begin before: one process draws one model at a time."""
    for silo, config in configs.items():
        OwnLedger(config, silo).open(build_contract(config))

    def take_part(silo: str, config: RunConfig) -> None:
        among = AmongSilos(config, silo, None)
        try:
            among.join()
        except (ConfigError, PeerLostError):
            among.close("stopped")
            raise
        among.close("")

    with ThreadPoolExecutor(len(configs)) as pool:
        return {silo: pool.submit(take_part, silo, config) for silo, config in configs.items()}


def test_silos_with_one_contract_meet(config: RunConfig) -> None:
    assert sorted(config.trust.keys) == ["alpha", "beta"]  # nobody aggregates
    met = meet(dict.fromkeys(config.full_roster, config))
    assert [future.exception() for future in met.values()] == [None, None]


def test_another_contract_is_named_on_both_sides(config: RunConfig, tmp_path: Path, tiny_config: TinyConfig) -> None:
    other = tiny_config(
        tmp_path / "other", inner={"lr": 0.5}, exchange={"kind": "collective", "url": config.exchange.url}
    )
    other.trust.keys, other.trust.directory = config.trust.keys, str(config.key_file("beta").parent)
    met = meet({"alpha": config, "beta": other})
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
    met = meet(dict.fromkeys(config.full_roster, config))
    with pytest.raises(PeerLostError, match=r"^silo alpha passed on what silo beta has not said$"):
        met["alpha"].result()
    assert isinstance(met["beta"].exception(), PeerLostError)
