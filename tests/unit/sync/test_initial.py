"""What a silo without a checkpoint starts from, in a run of a fixed roster that has gone on."""

from pathlib import Path

from pretrain.config.keys import RunConfig
from pretrain.exchange.history import History
from pretrain.exchange.rollback import roll_back
from pretrain.sync.delivered import Delivered
from pretrain.sync.through_store import ThroughStore
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.exchange.test_rollback import advance, opened
from tests.unit.test_aggregate import start


def by_hand(config: RunConfig) -> None:
    """What lies in the store as alpha's is not known here, as in a run directory whose list was deleted."""
    Delivered(config.silo_directory("alpha") / "delivered.txt").begin(99)


def test_from_version_0_while_it_is_there_and_else_from_the_newest(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path, inner={"num_steps": 24}, exchange={"keep_versions": 9})
    aggregator, state = start(config)
    by_hand(config)
    for _ in range(4):
        advance(config, aggregator, state)
    store = opened(Path(config.store_url))

    def starts_from() -> int:
        """As a new process does each time: what was said before is not remembered."""
        exchange = ThroughStore(config, "alpha")
        exchange._store.read_contract()
        received = exchange.initial()
        assert received.values.keys() == state.parameters.keys()
        return received.commit.version

    assert starts_from() == 0, "every round can be made again as it was"
    History(store, 1).prune([], 4, 2)
    assert starts_from() == 4
    roll_back(store, 1, to=3)
    assert starts_from() == 3
    assert starts_from() == 3, "also if it was killed before its first checkpoint"


def test_after_a_rollback_from_the_version_gone_back_to(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path, inner={"num_steps": 24}, exchange={"keep_versions": 9})
    aggregator, state = start(config)
    by_hand(config)
    for _ in range(3):
        advance(config, aggregator, state)
    roll_back(opened(Path(config.store_url)), 1, to=2)
    exchange = ThroughStore(config, "alpha")
    exchange._store.read_contract()
    assert exchange.initial().commit.version == 2
    assert exchange.rollbacks() == [
        {"number": 1, "from_version": 3, "to_version": 2, "step": 8, "round": 2, "reason": ""}
    ]
    (Path(config.store_url) / "rollbacks/000001.json").write_bytes(b"{")
    message = one_line_error(exchange.rollbacks)
    assert message.startswith(
        "silo alpha: the record of a rollback in the store cannot be used: rollbacks/000001.json: "
    )
    assert one_line_error(exchange.join) == message
