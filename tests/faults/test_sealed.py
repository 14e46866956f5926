"""A launch whose deliveries are sealed, killed at any step: the bits of one that is neither, and the same manifests."""

import dataclasses
from pathlib import Path

from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_same_bits
from tests.faults.scripted import Faults, federate_with
from tests.faults.test_kills import make_config

DEATHS: Faults = {"beta": [("after_manifest", 1)], "aggregator": [("after_merge", 2)]}


def test_killed_and_sealed_equals_undisturbed_and_open(
    undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    config = make_config(tiny_config, tmp_path)
    config = dataclasses.replace(config, trust=dataclasses.replace(config.trust, seal=True))
    run = federate_with(DEATHS, config, tmp_path / "fired", max_restarts=20)
    last = config.schedule.num_versions
    assert_same_bits(run.parameters(last), undisturbed.parameters(last))
    for silo in config.silos:
        assert run.by_step(silo, "loss") == undisturbed.by_step(silo, "loss")
        assert run.held_out(silo) == undisturbed.held_out(silo)
    payloads = [file.read_bytes() for file in Path(config.store_url).rglob("*.safetensors")]
    assert payloads
    assert all(payload.startswith(b"atoll/1 sealed\n") for payload in payloads)
    # Beta had delivered version 1 when it was killed, and came to the same manifest: else it would say so.
    said = [file.read_text() for file in (Path(config.directory) / "logs").rglob("*.log")]
    assert len(said) >= 3
    assert not [text for text in said if "differs from the one delivered" in text or "refused" in text]
