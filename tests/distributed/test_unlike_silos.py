"""Silos whose machines have nothing in common follow one contract, which knows nothing of how they compute."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TinyConfig
from tests.distributed.federation import federate
from tests.support import TWO_RANKS, zero

# What says how a machine computes: number formats, kernels, layouts, devices.
OF_A_MACHINE = (
    r"fp32|fp16|bf16|fp8|float|half|sdpa|eager|flash|flex|attn|attention\b|compile|kernel|fused|cuda|cpu|zero_|stage"
)
ALPHA = TWO_RANKS | zero(2) | {"attention": "documents", "activation_checkpointing": "selective"}
BETA = {"precision": "bf16", "attention": "eager", "fused_adamw": False, "loss_chunk_tokens": 16}
COMPILED = {"compile": True, "attention": "sdpa", "activation_checkpointing": "layers"}
KINDS = [zero(3), pytest.param(zero(1) | COMPILED, marks=pytest.mark.timeout(500))]


@pytest.mark.soak
@pytest.mark.parametrize("changes", KINDS, ids=["eager", "compiled"])
def test_silos_that_compute_in_different_ways_agree(
    tmp_path: Path, tiny_config: TinyConfig, changes: dict[str, Any]
) -> None:
    # The same text in the same order, so that losses differ by how they are computed alone.
    text = tiny_config(tmp_path / "text").silos["alpha"]
    same = {"data": text.data, "valid": text.valid, "data_seed": 1}
    run = federate(
        tiny_config(
            tmp_path,
            document_masking=True,
            sequence_tokens=48,
            outer={"codec": "int8", "downlink_codec": "int8"},  # its own is the one format that a contract names
            silos={"alpha": ALPHA | same, "beta": BETA | same | changes},
        )
    )
    store = Path(run.config.store_url)
    contract = json.loads((store / "contract.json").read_bytes())
    del contract["software"]  # what its writer has installed is a record and no term
    assert contract["outer"]["codec"] == "int8"
    assert re.findall(OF_A_MACHINE, json.dumps(contract)) == []

    for version in (2, 3):  # each tells which commit it has adopted, and the digest of the parameters that it then held
        files = (store / "silos" / silo / f"{version:06d}" / "manifest.json" for silo in ("alpha", "beta"))
        alpha, beta = (json.loads(file.read_bytes()) for file in files)
        assert alpha["base_digest"] == beta["base_digest"] == run.commit(version - 1).parameters_digest
        assert alpha["cosigned"] == beta["cosigned"]
    assert run.held_out("beta")[3]["alpha"] == pytest.approx(run.held_out("alpha")[3]["alpha"], rel=5e-3)
    losses, others = run.by_step("alpha", "loss"), run.by_step("beta", "loss")
    assert len(losses) == 12
    assert others == pytest.approx(losses, rel=5e-3)
    assert others != losses
