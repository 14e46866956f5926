"""A private step gives no more away than it promised; one with less noise than that is found out."""

import pytest

pytest.importorskip("dp_accounting")

from dp_accounting import get_epsilon_gaussian, get_sigma_gaussian

from benchmarks.leak_audit import epsilon_bound
from benchmarks.private_audit import Audited

DELTA = 1e-5


@pytest.mark.soak  # an engine in this process changes what DeepSpeed is to tests that follow
def test_what_an_attacker_proves_of_steps_is_less_than_they_promised() -> None:
    audited = Audited(64)
    promised = 1.0
    noise = float(get_sigma_gaussian(promised, DELTA))
    kept, broken = (epsilon_bound(audited.scores(of, steps=4), DELTA) for of in (noise, noise / 20))
    assert kept < promised < broken < get_epsilon_gaussian(noise / 20, DELTA)
