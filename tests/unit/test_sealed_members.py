"""Members and keys that change where payloads are sealed: the real aggregator, and silos' real exchanges."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import cli
from pretrain.config.keys import OPERATOR
from pretrain.exchange.sealed import given_group_key, take_group_key
from pretrain.exchange.store import StoreExchange
from pretrain.federation.contract import Agreed, rotate
from pretrain.sync.through_store import ThroughStore
from pretrain.trust.keys import PrivateKey, read_key
from pretrain.trust.ledger import RefusedError
from pretrain.trust.members import act_as
from pretrain.trust.seal import Sealer
from tests.conftest import TinyConfig
from tests.distributed.federation import assert_same_bits
from tests.unit.test_aggregate import start
from tests.unit.test_aggregate_restart import assert_same_state
from tests.unit.test_contract_amended import propose, sign
from tests.unit.test_members_added import RULES, add_gamma
from tests.unit.test_sealed import go_on, make, newest_parameters
from tests.unit.test_signed import as_member, begin


def test_who_comes_opens_all_and_who_goes_or_had_an_old_key_opens_nothing_new(
    tmp_path: Path, tiny_config: TinyConfig
) -> None:
    """From version 3 on alpha and the operator have other keys, and gamma is there; from 4 on gamma is not."""
    config = make(tiny_config, tmp_path / "sealed", membership=RULES)
    aggregator, state = begin(config)
    for silo in config.full_roster:
        as_member(config, silo).announce(silo, left=False, version=0)
    go_on(config, aggregator, state, ["alpha", "beta"])
    keys = Path(config.directory) / "keys"
    for member in ("alpha", OPERATOR):
        rotate(Agreed.at(config.store_url), member, keys, 3)
    own = add_gamma(config, 3)
    for silos in (["alpha", "beta"], ["alpha", "beta", "gamma"]):
        go_on(own, aggregator, state, silos)
        as_member(own, "gamma").announce("gamma", left=False, version=2)
    folder = Path(config.store_url) / "keys"
    assert sorted(path.name for path in (folder / "000003").iterdir()) == ["alpha.json", "beta.json", "gamma.json"]
    assert_same_state(start(config)[1], state)  # with deliveries to both of its keys
    for silo in ("alpha", "beta", "gamma"):
        through = ThroughStore(own, silo)
        through.join()
        assert_same_bits(newest_parameters(through._store, tmp_path / silo, 3), state.parameters)
        assert len({*through._store.members.sealer._group.values()}) == 4
        through.close("")
    thief = as_member(config, "alpha")
    stolen = read_key(keys / "alpha.key")
    assert isinstance(stolen, PrivateKey)
    thief.members.sealer = Sealer("alpha", lambda key: stolen, thief.members.epochs)
    with pytest.raises(RefusedError, match="the group's key cannot be opened"):
        take_group_key(thief)
    assert propose(config, "beta", 5, "trust.keys.gamma=").missing == ["alpha"]
    assert sign(config, "alpha", 4) == []
    aggregator, state = start(config)
    go_on(own, aggregator, state, ["alpha", "beta", "gamma"])
    go_on(own, aggregator, state, ["alpha", "beta"])
    gamma, beta = as_member(own, "gamma"), as_member(config, "beta")
    for exchange, config_of, name in ((gamma, own, "gamma"), (beta, config, "beta")):
        act_as(exchange.members, config_of, name)
        take_group_key(exchange)
    assert_same_bits(newest_parameters(beta, tmp_path / "beta-5", 5), state.parameters)
    with pytest.raises(RefusedError, match=r"keys/000004/gamma.json, .* is not there"):
        newest_parameters(gamma, tmp_path / "gamma-5", 5)
    said = CliRunner().invoke(cli.app, ["verify", config.store_url, "--key", str(keys / "aggregator.key")])
    assert said.exit_code == 0, said.output


def test_an_operator_that_dies_before_it_has_given_the_key_gives_it_at_its_next_start(
    tmp_path: Path, tiny_config: TinyConfig
) -> None:
    config = make(tiny_config, tmp_path / "sealed", membership=RULES)
    aggregator, state = begin(config)
    own = add_gamma(config, 2)
    go_on(config, aggregator, state, ["alpha", "beta"])
    given = Path(config.store_url) / "keys" / "000001"
    before = {path.name: path.read_bytes() for path in given.iterdir()}
    for path in given.iterdir():
        path.unlink()
    assert_same_state(start(config)[1], state)
    assert {path.name: path.read_bytes() for path in given.iterdir()} == before
    exchange = StoreExchange(own.store_url)
    exchange.read_contract()
    assert given_group_key(exchange, exchange.members.epochs()[-1], "gamma")
