"""A silo's own adapter: trained beside the shared one to the bits of peft, kept through kills, and only at home."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from launch.model import export as export_command
from pretrain.config.keys import RunConfig
from pretrain.federation.export import export_global_model
from pretrain.federation.personal import export_personal_model
from pretrain.silo.data import PackedTokens
from pretrain.silo.model import token_losses
from pretrain.silo.named_state import SavedState, complete_checkpoints
from pretrain.trust.egress import egress_file
from tests.adapters import adapter_model, save_base
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_same_bits, federate
from tests.faults.scripted import Faults, federate_with
from tests.faults.test_kills import check_same
from tests.support import CORPORA, TWO_RANKS, TinyText, one_line_error, tiny_silo, torchrun, zero
from tests.unit.federation.test_verify import verified
from tests.unit.summing import SECURE, TIERS

WORKER = Path(__file__).parent / "personal_worker.py"
OWN = {"rank": 3, "alpha": 6.0, "targets": ["q_proj", "down_proj"]}


def engines(directory: Path, cases: str) -> None:
    """One torchrun of two ranks for stages and precisions, as 0-fp32,3-bf16: what holds at every one of them."""
    lines = torchrun(WORKER, directory, cases, num_ranks=2, timeout=500).splitlines()
    rows = [json.loads(line.removeprefix("RESULT")) for line in lines if line.startswith("RESULT")]
    assert len(rows) == len(cases.split(","))
    for row in rows:
        assert row["losses"] == row["expected_losses"]
        assert row["same_factors"]
        assert row["names"]
        assert row["moved"]
        assert row["resumed"]
        assert row["away"][0] == row["away"][1]
        assert row["differs"]
        assert (
            "it was written with personal_adapter of rank 3, alpha 6, beside v_proj, o_proj, and this is none"
            in (row["refused"])
        )
        assert row["begins_later"]


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_both_are_trained_as_by_peft_and_deepspeed_alone_to_the_last_bit(tmp_path: Path) -> None:
    engines(tmp_path, ",".join(f"{stage}-{of}" for of in ("fp32", "bf16") for stage in range(4)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_text: TinyText) -> Path:
    """The frozen model."""
    return save_base(tmp_path_factory.mktemp("base"), tiny_text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig, base: Path) -> Outcome:
    """Silo alpha has an adapter of its own, beta has none."""
    settings = {
        "model": adapter_model(base, targets=["q_proj", "v_proj"]),
        "inner": {"lr": 0.02},
        "outer": {"optimizer": "sgd", "lr": 1.0},
        "silos": {"alpha": {"personal_adapter": OWN}},
        "exchange": {"keep_versions": 9},
    }
    return federate(tiny_config(tmp_path_factory.mktemp("run"), **settings))


def own_factors(run: Outcome) -> dict[str, torch.Tensor]:
    """Those of alpha's newest checkpoint, flat."""
    saved = SavedState(complete_checkpoints(run.config.silo_directory("alpha") / "checkpoints")[-1] / "engine")
    elements = {32: 3 * 32, 64: 3 * 64}  # of this tiny llama: hidden and intermediate size
    found = {}
    for layer in range(2):
        for part, (columns, rows) in {"self_attn.q_proj": (32, 32), "mlp.down_proj": (64, 32)}.items():
            for factor, width in (("A", columns), ("B", rows)):
                name = f"model.layers.{layer}.{part}.lora_{factor}.personal.weight"
                found[name] = saved.read("parameter", name, 0, elements[width])
    return found


def files_that_are_not_its_own(run: Outcome) -> Iterator[Path]:
    """All of the run, but for alpha's folder, and what configures and records alpha on this machine."""
    home = run.config.silo_directory("alpha")
    for path in Path(run.config.directory).rglob("*"):
        if path.is_file() and not path.is_relative_to(home) and path.name not in ("config.yaml", "metrics.jsonl"):
            yield path


def test_nothing_of_it_leaves_the_silo(run: Outcome) -> None:
    factors = own_factors(run)
    assert all(value.any() for value in factors.values())
    needles = [b"lora_A.personal", b"lora_B.personal", b"personal_loss"]
    needles += [value.numpy().tobytes()[:64] for value in factors.values()]
    home = b"".join(path.read_bytes() for path in (run.config.silo_directory("alpha")).rglob("*.safetensors"))
    assert all(needle in home for needle in needles if needle != b"personal_loss")
    looked_at = list(files_that_are_not_its_own(run))
    assert {"contract.json", "manifest.json", "commit.json", "alpha.jsonl"} <= {path.name for path in looked_at}
    for path in looked_at:
        data = path.read_bytes()
        if path.is_relative_to(run.config.store_url) or path == egress_file(run.config.directory, "alpha"):
            assert b"personal" not in data, path
        assert not [needle for needle in needles if needle in data], path
    assert run.parameters(3).keys() == run.delivered("alpha", 3).keys() == run.delivered("beta", 3).keys()
    assert not [name for name in run.parameters(3) if "personal" in name]


def held_out(run: Outcome, model: Any) -> float:
    """Of a plain model on the sequences that silo alpha evaluates on."""
    tokens = PackedTokens([Path(run.config.silos["alpha"].valid["alpha"])], sequence_tokens=16)
    input_ids, targets, *_ = tokens.batch([i * tokens.num_sequences // 8 for i in range(8)])
    with torch.no_grad():
        return token_losses(model.eval(), input_ids, targets).mean().item()


def test_the_exported_models_have_the_losses_that_the_silo_says(run: Outcome, tmp_path: Path, base: Path) -> None:
    records = [one for one in run.records if one["kind"] == "eval" and one["silo"] == "alpha"]
    assert not [one for one in run.records if one.get("silo") != "alpha" and "personal_loss" in one]
    shared, own = records[-1]["val_loss"]["alpha"], records[-1]["personal_loss"]["alpha"]
    assert own < shared - 0.001
    assert records[0]["personal_loss"] == records[0]["val_loss"]  # it begins as nothing
    export_global_model(run.config, tmp_path / "shared", form="merged")
    provenance = export_personal_model(run.config, tmp_path / "own", form="merged")
    export_command(Path(run.config.directory), output=tmp_path / "beside", adapter=True, personal=True)
    plain = AutoModelForCausalLM.from_pretrained
    assert held_out(run, plain(tmp_path / "shared")) == pytest.approx(shared, abs=1e-6)
    assert held_out(run, plain(tmp_path / "own")) == pytest.approx(own, abs=1e-6)
    assert held_out(run, PeftModel.from_pretrained(plain(base), tmp_path / "beside")) == pytest.approx(own, abs=1e-6)
    assert provenance["personal"] == {
        "silo": "alpha",
        "step": 12,
        "adapter": "of rank 3, alpha 6, beside q_proj, down_proj",
    }
    card = (tmp_path / "beside" / "README.md").read_text()
    assert (
        "| personal adapter | of rank 3, alpha 6, beside q\\_proj, down\\_proj; trained by alpha alone, at step 12 |"
        in card
    )
    assert f"| alpha | {own:.4f} (of 8 of " in card
    lines = (Path(run.config.directory) / "logs/latest/alpha.log").read_text().splitlines()
    assert any(line.startswith("round     3  held-out alpha ") for line in lines)
    assert any(line.startswith(f"round     3  with its own adapter alpha {own:.4f} (8 of ") for line in lines)


def test_an_export_that_cannot_be_is_one_line(run: Outcome, tmp_path: Path) -> None:
    directory, out = Path(run.config.directory), tmp_path / "out"

    def said(**options: Any) -> str:
        return one_line_error(export_command, directory, output=out, **options)

    assert said(personal=True).startswith("atoll export: neither --merged nor --adapter given")
    assert said(personal=True, merged=True, version=2).startswith(
        "--version: 2 given with --personal; allowed: without"
    )
    assert said(silo="alpha", merged=True) == "--silo: given without --personal; allowed: with it"
    assert said(silo="beta", merged=True, personal=True) == (
        "--silo: 'beta' given; allowed: alpha, which have a personal_adapter"
    )
    assert not out.exists()


def test_a_checkpoint_that_is_not_as_it_should_be_is_one_line(run: Outcome, tmp_path: Path) -> None:
    copied = replace(run.config, exchange=replace(run.config.exchange, url=run.config.store_url))
    copied.directory = str(shutil.copytree(run.config.directory, tmp_path / "copy"))

    def said(config: RunConfig, **own: Any) -> str:
        alpha = config.silos["alpha"]
        alpha = replace(alpha, personal_adapter=replace(alpha.personal_adapter, **own))
        config = replace(config, silos=config.silos | {"alpha": alpha})
        return one_line_error(export_personal_model, config, tmp_path / "out", form="adapter")

    assert said(copied, rank=0) == (
        "--personal: given; no silo of this run directory has a personal_adapter; allowed: without it"
    )
    assert said(copied, rank=2).endswith(
        "step-00000012: it was written with personal_adapter of rank 3, alpha 6, beside q_proj, down_proj, and this is "
        "of rank 2, alpha 6, beside q_proj, down_proj; allowed: the same"
    )
    newest = complete_checkpoints(copied.silo_directory("alpha") / "checkpoints")[-1]
    older = newest.with_name("step-00000008") / "global.safetensors"
    shutil.copy(older, newest / older.name)
    assert said(copied).endswith(
        "step-00000012: its shared adapter is not that of version 3; delete it, and an older one counts"
    )
    copied.directory = str(tmp_path / "nothing")
    assert said(copied).startswith("--personal: given; there is no checkpoint in ")
    assert not (tmp_path / "out").exists()


IN_FLIGHT = {"num_fragments": 2, "overlap_steps": 1, "mixing": 0.25, "codec": "int4", "downlink_codec": "int4"}
DEATHS: Faults = {
    "alpha": [("step", 2), ("after_manifest", 2), ("step", 7, 1), ("saving", 9, 1), ("adopting", 5)],
    "aggregator": [("after_merge", 3)],
}


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("merge", ["factors", "alternate"])
def test_kills_change_nothing(tmp_path: Path, tiny_config: TinyConfig, base: Path, merge: str) -> None:
    settings = {
        "model": adapter_model(base, targets=["q_proj", "v_proj"], merge=merge),
        "outer": {"num_fragments": 2} if merge == "alternate" else IN_FLIGHT,
        "silo": {"checkpoint_interval_steps": 3},
        "silos": {"alpha": {"personal_adapter": OWN | {"dropout": 0.1}} | TWO_RANKS | zero(3)},
    }
    undisturbed = federate(tiny_config(tmp_path / "undisturbed", **settings))
    killed = federate_with(DEATHS, tiny_config(tmp_path / "killed", **settings), tmp_path / "fired", max_restarts=20)
    check_same(killed, undisturbed)
    assert_same_bits(own_factors(killed), own_factors(undisturbed))
    losses = [
        {r["step"]: r["personal_loss"] for r in one.records if r["kind"] == "eval" and "personal_loss" in r}
        for one in (killed, undisturbed)
    ]
    assert losses[0] == losses[1]


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_beside_a_secure_sum(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, base: Path) -> None:
    silos = {name: tiny_silo(tiny_text, name) for name in CORPORA}
    silos["alpha"] |= {"personal_adapter": OWN}
    settings = {"silos": silos, "model": adapter_model(base), "exchange": {"keep_versions": 100}}
    run = federate(tiny_config(tmp_path / "sum", **settings, outer=SECURE, trust={"metrics": TIERS}))
    assert not verified(run.config, tmp_path / "scratch").findings
    assert not [name for name in run.parameters(3) if "personal" in name]
    (last,) = [one for one in run.records if one["kind"] == "eval" and one["round"] == 3 and "personal_loss" in one]
    assert last["personal_loss"] != last["val_loss"]
