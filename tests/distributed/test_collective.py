"""Silos among themselves: the same bits as through a store, the promised bytes, and nobody's death unnoticed."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.keys import RunConfig
from pretrain.exchange.payload import Tensors
from pretrain.exchange.store import StoreExchange
from pretrain.federation.verify import StoreVerifier
from pretrain.outer.digest import digest_tensors
from pretrain.silo.model import build_initial
from pretrain.trust.ledger import sha256_bytes
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_evaluated_last, assert_same_bits, federate
from tests.support import TWO_RANKS, VOCAB_SIZE, TinyText, free_port, tiny_silo, zero


def collective(**exchange: Any) -> dict[str, Any]:
    """The section of a collective that notices a death within seconds."""
    return {"kind": "collective", "url": f"tcp://127.0.0.1:{free_port()}", "dead_seconds": 5.0, **exchange}


WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"optimizer": "nesterov", "second_moments": "shared", "merge": "importance", "weight_power": 0.5}
    | {"control_variates": 0.6},
    "streaming int4": {
        "optimizer": "adam",
        "lr": 0.1,
        "num_fragments": 2,
        "overlap_steps": 1,
        "mixing": 0.25,
        "codec": "int4",
        "downlink_codec": "int4",
        "error_feedback": 0.9,
    },
}


@pytest.mark.parametrize(("way", "num_lanes"), [pytest.param("fp32", 2, marks=pytest.mark.soak), ("streaming int4", 1)])
def test_the_same_bits_as_through_a_store(tmp_path: Path, tiny_config: TinyConfig, way: str, num_lanes: int) -> None:
    def run(directory: Path, exchange: dict[str, Any]) -> Outcome:
        silos = dict.fromkeys(("alpha", "beta"), TWO_RANKS | zero(2)) if num_lanes == 2 else {}
        inner = {"optimizer": "muon"} if WAYS[way].get("control_variates") else {}
        return federate(tiny_config(directory, inner=inner, outer=WAYS[way], exchange=exchange, silos=silos))

    stored, among = run(tmp_path / "store", {}), run(tmp_path / "among", collective(num_lanes=num_lanes))
    last = among.config.schedule.num_versions
    assert_same_bits(among.parameters(last), stored.parameters(last))
    for version in range(1, last + 1):
        ours, theirs = among.commit(version), stored.commit(version)
        assert ours.parameters_digest == theirs.parameters_digest
        assert (ours.divisor, [c.silo for c in ours.contributors]) == (theirs.divisor, ["alpha", "beta"])
        assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-6)
    for silo in among.config.silos:
        assert among.by_step(silo, "loss") == stored.by_step(silo, "loss")
        ledger = StoreExchange(among.config.ledger_url(silo))
        assert ledger.commit_bytes(last) == among.exchange.commit_bytes(last)
        found = StoreVerifier(ledger, tmp_path, tell=lambda line: None).verify()
        assert (found.findings, found.is_signed, found.num_manifests) == ([], True, 2 * last)
        assert last in found.compared
    assert among.commit(last).outer_digest == outer_digest(among.config, last)
    assert_evaluated_last(among)


def outer_digest(config: RunConfig, version: int) -> str:
    """Of what each silo keeps of its part."""
    found = []
    for silo in config.full_roster:
        kept = {}
        for file in sorted((config.silo_directory(silo) / "kept").glob(f"{version:06d}-*.safetensors")):
            kind = file.stem.partition("-")[2]
            tensors = Tensors(file, kind)
            kept |= {f"{kind}/{key}": tensors.parts(key)["values"] for key in tensors.names}
        assert kept
        found.append(digest_tensors(kept.items()))
    return sha256_bytes(json.dumps(found).encode())


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig, tiny_text: TinyText) -> RunConfig:
    """Three silos, int4 both ways."""
    return tiny_config(
        tmp_path_factory.mktemp("three"),
        outer={"codec": "int4", "downlink_codec": "int4"},
        exchange=collective(),
        silos={"gamma": tiny_silo(tiny_text, "gamma")},
    )


def test_a_silo_sends_two_thirds_of_a_coded_model_twice(three: RunConfig) -> None:
    run = federate(three)
    model = build_initial(three.model, VOCAB_SIZE)
    elements = sum(p.numel() for p in model.parameters())
    whole = elements / 2 + elements / 128 * 2  # nibbles, and a bf16 scale a block of 128
    syncs = [record for record in run.records if record["kind"] == "sync"]
    assert len(syncs) == 3 * three.num_rounds
    for sync in syncs:
        # parts end at multiples of 4,096 values within a tensor, so they are not quite equal
        assert sync["bytes_sent"] == pytest.approx(2 * 2 / 3 * whole, abs=4096)
    for version in range(1, three.num_rounds + 1):
        of_one = [sync for sync in syncs if sync["version"] == version]
        assert sum(sync["bytes_sent"] for sync in of_one) == sum(sync["bytes_received"] for sync in of_one)
