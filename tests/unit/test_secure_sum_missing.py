"""A secure sum without one of its silos, whenever that dies, and with an aggregator that dies, too.

Nobody missing, and a silo that is at another phase than another one: test_secure_sum.py; real processes that are killed
at every phase: tests/faults/test_secure_sum.py.
"""

from pathlib import Path

import pytest
import torch

from pretrain.aggregate import OuterState
from pretrain.exchange.sums import answer_path
from pretrain.trust.ledger import Commit
from tests.conftest import TinyConfig
from tests.support import TinyText
from tests.unit.federation.test_verify import verified
from tests.unit.summing import Silo, advance, commit_bytes, four, plain_step, summed
from tests.unit.test_aggregate import start
from tests.unit.test_signed import as_member, begin, manifest_file


def silent(silo: Silo, state: OuterState) -> None:
    """It dies before it has delivered."""


def shares_alone(silo: Silo, state: OuterState) -> None:
    """It dies between its shares and its manifest."""
    sent = silo.coded(state)
    silo.sum.deliver(silo.through._store.members.sign(sent.manifest), sent.file)


def delivered_alone(silo: Silo, state: OuterState) -> None:
    """It dies before it is asked."""
    silo.deliver(state)


DEATHS = {
    "before it delivers": (silent, False),
    "before its manifest": (shares_alone, False),
    "before it is asked": (delivered_alone, False),
    "before its answer is heard": (delivered_alone, True),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_silo_may_die_at_each_phase_and_the_aggregator_too(
    death: str, tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    """Beta is gone for the first version and comes back for the second; the aggregator dies when it has asked."""
    config, (before_it, is_noted) = four(tiny_config, tiny_text, tmp_path), DEATHS[death]
    aggregator, state = begin(config)
    for silo in config.full_roster:
        as_member(config, silo).announce(silo, left=False, version=0)
    silos = {name: Silo(config, name) for name in config.full_roster}
    for name in ("alpha", "delta", "gamma"):
        silos[name].deliver(state)
    before_it(silos["beta"], state)
    has_part = before_it is delivered_alone
    taking_part = ["alpha", *["beta"] * has_part, "delta", "gamma"]
    wanted = plain_step(config, state, taking_part)
    deliveries = [aggregator._merger.verify(n, manifest_file(config, n, 1).read_bytes(), state, 1) for n in taking_part]
    assert aggregator._merger.unmasker
    aggregator._merger.unmasker.decide(1, deliveries, lambda: None)
    aggregator.stop()
    if is_noted:
        silos["beta"].sum.answer(1)
        (Path(config.store_url) / answer_path("beta", 1)).unlink()
    silos["beta"].through.close("")
    aggregator, state = start(config)
    for name in ("alpha", "delta", "gamma"):
        silos[name].sum.answer(1)
    summed(aggregator, state)
    assert [c.silo for c in Commit.from_bytes(commit_bytes(config, 1)).contributors] == taking_part
    assert all(torch.equal(state.parameters[name], value) for name, value in wanted.items())
    for silo in ("alpha", "delta", "gamma"):
        silos[silo].through.close("")
    assert [c.silo for c in advance(config, aggregator, state).contributors] == config.full_roster
    aggregator.stop()
    found = verified(config, tmp_path / "scratch")
    assert (found.findings, found.merged) == ([], [1, 2])
