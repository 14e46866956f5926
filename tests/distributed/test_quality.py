"""A floor of quality in whole runs: three silos through a store, and among themselves, to the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_same_bits, federate
from tests.distributed.test_collective import collective
from tests.support import TinyText, tiny_silo


@pytest.mark.soak
def test_the_collective_judges_as_the_aggregator_does(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    """With a floor of 1 nobody counts whose loss is above the median of the others'. Norms are the members' own."""

    def run(directory: Path, exchange: dict[str, Any]) -> Outcome:
        silos = {"gamma": tiny_silo(tiny_text, "gamma")}
        terms = {"outer": {"quality_floor": 1.0}, "trust": {"metrics": {"pseudo_gradient_norm": "member"}}}
        return federate(tiny_config(directory, exchange=exchange, silos=silos, **terms))

    stored, among = run(tmp_path / "store", {}), run(tmp_path / "among", collective())
    last, left_out = among.config.schedule.num_versions, 0
    assert_same_bits(among.parameters(last), stored.parameters(last))
    for version in range(1, last + 1):
        ours, theirs = among.commit(version), stored.commit(version)
        assert ours.parameters_digest == theirs.parameters_digest
        assert ours.contributors[0].tokens == theirs.contributors[0].tokens
        weights = [one.weight for one in ours.contributors]
        assert weights == [one.weight for one in theirs.contributors]
        losses = {name: loss for name, loss in ours.metrics.items() if name.startswith("loss/")}
        assert len(losses) == 3
        assert losses == {name: loss for name, loss in theirs.metrics.items() if name.startswith("loss/")}
        left_out += weights.count(0)
    assert 0 < left_out <= last
    for outcome in (stored, among):
        logs = "".join(file.read_text() for file in (Path(outcome.config.directory) / "logs").rglob("*.log"))
        assert " does not count: its loss is " in logs
    manifests = [*Path(stored.config.store_url).glob("silos/*/*/manifest.json")]
    assert len(manifests) == 3 * last
    assert all(json.loads(file.read_bytes())["metrics"].keys() == {"loss", "epochs"} for file in manifests)
