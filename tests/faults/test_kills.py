"""Kill anything at any step and start it again: bit-equal parameters, losses and ledger (design, exactness 6)."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.keys import RunConfig
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_same_bits, federate
from tests.faults.scripted import Faults, federate_with
from tests.support import TWO_RANKS, zero


def make_config(
    tiny_config: TinyConfig, directory: Path, exchange: dict[str, Any] | None = None, **outer: Any
) -> RunConfig:
    """Checkpoints at steps that are no multiple of H, so that a resume starts in the middle of a round.

    Here and in the other settings, of streaming and of the collective, every codec has its turn.
    """
    return tiny_config(
        directory,
        inner={"optimizer": "muon"},
        outer={"optimizer": "nesterov", "downlink_codec": "e3m0", "second_moments": "shared", "merge": "importance"}
        | {"control_variates": 0.5}
        | outer,
        silo={"checkpoint_interval_steps": 3},
        silos={"alpha": TWO_RANKS | zero(2)},
        exchange=exchange or {},
    )


def check_same(run: Outcome, undisturbed: Outcome) -> None:
    """The same parameters, ledger and loss curves, to the last bit."""
    last = run.config.schedule.num_versions
    assert_same_bits(run.parameters(last), undisturbed.parameters(last))
    for version in range(last + 1):
        assert run.exchange.commit_bytes(version) == undisturbed.exchange.commit_bytes(version)
    for silo in run.config.silos:
        for value in ("loss", "lr", "tokens", "grad_norm"):
            assert run.by_step(silo, value) == undisturbed.by_step(silo, value)
        assert run.held_out(silo) == undisturbed.held_out(silo)


DEATHS: dict[str, Faults] = {
    "silos": {
        "alpha": [("step", 5, 1), ("before_manifest", 2), ("saving", 9, 1)],  # a third element is the rank, else 0
        "beta": [("after_manifest", 1), ("adopting", 2), ("before_payload", 3)],
    },
    "aggregator": {
        "aggregator": [
            ("before_contract", 0),
            ("after_contract", 0),
            ("mid_publish", 0),
            ("before_merge", 0),
            ("after_merge", 1),
            ("mid_publish", 2),
            ("before_commit", 3),
            ("after_commit", 3),
        ]
    },
}


@pytest.mark.parametrize("who", ["silos", pytest.param("aggregator", marks=pytest.mark.soak)])
def test_killed_and_restarted_equals_undisturbed(
    undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig, who: str
) -> None:
    run = federate_with(DEATHS[who], make_config(tiny_config, tmp_path), tmp_path / "fired", max_restarts=20)
    check_same(run, undisturbed)


STREAMING = {
    "num_fragments": 2,
    "overlap_steps": 1,
    "mixing": 0.25,
    "codec": "int4",
    "downlink_codec": "e3m0",
    "error_feedback": 0.9,
}
# Seven versions: fragment 1 leaves at steps 2, 6, 10 and 12, fragment 0 at 4, 8 and 12. What left at step 6 is in
# flight when the checkpoint of step 6 is written.
STREAMING_DEATHS: dict[str, Faults] = {
    "in flight": {
        "alpha": [("step", 7, 1)],
        "beta": [("after_manifest", 3)],
        "aggregator": [("after_merge", 2)],
    },
    "anywhere": {
        "alpha": [("before_manifest", 2), ("saving", 9, 1), ("adopting", 6)],
        "beta": [("adopting", 3), ("before_payload", 5)],
        "aggregator": [("mid_publish", 0), ("before_commit", 3), ("after_commit", 6)],
    },
}


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("where", STREAMING_DEATHS)
def test_streaming_with_a_fragment_in_flight_resumes_exactly(
    tmp_path: Path, tiny_config: TinyConfig, where: str
) -> None:
    undisturbed = federate(make_config(tiny_config, tmp_path / "undisturbed", **STREAMING))
    config = make_config(tiny_config, tmp_path, **STREAMING)
    run = federate_with(STREAMING_DEATHS[where], config, tmp_path / "fired", max_restarts=20)
    check_same(run, undisturbed)


def test_a_corrupted_delivery_is_refused_and_delivered_again(
    undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    config = make_config(tiny_config, tmp_path)
    run = federate_with({"beta": [("corrupt_payload", 2)]}, config, tmp_path / "fired")
    refused = json.loads((Path(config.store_url) / "silos/beta/000002/refused-0.json").read_text())
    assert "corrupted" in refused["reason"]
    logs = Path(config.directory) / "logs" / "latest"
    assert "version 2: refused the delivery of silo beta: " in (logs / "aggregator.log").read_text()
    assert "version 2: the aggregator refused our delivery: " in (logs / "beta.log").read_text()
    check_same(run, undisturbed)
