"""Keys that are replaced while a run goes on, with processes that are killed around it: the bits of one without."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain.config.keys import OPERATOR
from pretrain.exchange.store import StoreExchange
from pretrain.federation.contract import Agreed, rotate
from pretrain.federation.verify import StoreVerifier
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_same_bits
from tests.faults.scripted import Faults, federate_with
from tests.faults.test_kills import make_config
from tests.waiting import wait_for

DEATHS: Faults = {
    "alpha": [("after_manifest", 2), ("before_manifest", 3)],
    "aggregator": [("after_commit", 2), ("before_commit", 3)],
}


@pytest.mark.soak
def test_a_rotation_in_the_middle_changes_no_bit(undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Alpha's key and the operator's from version 3 on; both are killed before it, and at it."""
    config = make_config(tiny_config, tmp_path)
    config.trust.directory = str(tmp_path / "keys")

    def rotate_both() -> None:
        wait_for((Path(config.store_url) / "global" / "000000" / "commit.json").exists)
        agreed = Agreed.at(config.store_url)
        for member in ("alpha", OPERATOR):
            assert not rotate(agreed, member, tmp_path / "keys", 3)[0].missing

    with ThreadPoolExecutor(1) as pool:
        rotating = pool.submit(rotate_both)
        run = federate_with(DEATHS, config, tmp_path / "fired", max_restarts=20)
        rotating.result()
    last = config.schedule.num_versions
    assert_same_bits(run.parameters(last), undisturbed.parameters(last))
    for silo in config.silos:
        assert run.by_step(silo, "loss") == undisturbed.by_step(silo, "loss")
    terms = run.exchange.members.terms_at(last)
    assert terms
    assert (terms.from_version, terms.number, run.commit(last).contract_sha256) == (3, 2, terms.sha256)
    found = StoreVerifier(StoreExchange(config.store_url), tmp_path / "scratch", tell=lambda line: None).verify()
    assert (found.findings, found.num_amendments, found.merged) == ([], 2, [1, 2, 3])
