"""A silo whose delivery was refused, as its end of the store has it."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain.exchange.base import Outgoing
from pretrain.exchange.objects import StopWaitingError
from pretrain.exchange.store import StoreExchange
from pretrain.sync.through_store import ThroughStore
from pretrain.trust.ledger import Manifest
from tests.conftest import TinyConfig
from tests.unit.test_aggregate import GOOD, start, times
from tests.waiting import wait_for


def test_a_refusal_that_comes_before_the_silo_looks_is_said_and_answered(
    tmp_path: Path, tiny_config: TinyConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path)
    _, state = start(config)
    GOOD.deliver(config, "alpha", state, times(state, 1))
    folder = Path(config.store_url) / "silos" / "alpha" / "000001"
    file = Path(shutil.move(folder / "000001.safetensors", tmp_path))
    sent = Outgoing(Manifest.from_bytes((folder / "manifest.json").read_bytes()), file)
    (folder / "manifest.json").unlink()
    silo = ThroughStore(config, "alpha")
    silo.deliver(sent)
    StoreExchange(config.store_url).refuse("alpha", 1, sent.manifest.to_bytes(), "it was corrupted")
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(silo.receive, 1, sent, state.parameters)
        wait_for((folder / "manifest.json").exists)
        silo.close("")
        with pytest.raises(StopWaitingError):
            received.result()
    assert "version 1: the aggregator refused our delivery: it was corrupted\n" in capsys.readouterr().out
