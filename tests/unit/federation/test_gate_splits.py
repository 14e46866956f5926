"""What is said of a gate's splits before anything starts: at join, at a start, and by `atoll contract gate`."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.federation.preflight import check_public, check_run, check_silo
from tests.conftest import TinyConfig
from tests.gates import commanded, gate_data, split_sha256
from tests.support import TinyText, one_line_error, tiny_settings, tiny_silo
from tests.unit.test_aggregate import start


@pytest.fixture
def gate(tiny_text: TinyText) -> dict[str, Any]:
    return {"every_versions": 1, "max_worst": 9.0, "data": gate_data(tiny_text, "alpha", "beta")}


def test_a_split_that_is_not_here_is_said_at_join(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, gate: dict[str, Any]
) -> None:
    """By the command that a member types: one line, exit code 2, nothing written."""
    there = tiny_config(tmp_path / "there", gate=gate)
    start(there)
    settings = tiny_settings(tmp_path / "here", tiny_text)
    own = {key: settings[key] for key in ("directory", "tokenizer", "silo", "wandb")}
    own["silos"] = {"beta": tiny_silo(tiny_text, "beta")}
    wanted = gate["data"]["beta/beta"][:12]
    gone, others = str(tmp_path / "gone"), str(tiny_text.packed["gamma"] / "valid")
    cases = {
        gone: f"silos.beta.valid.beta: '{gone}' given; it is not on this disk, and the contract's gate judges by it; "
        f"allowed: the directory of the packed split whose text is {wanted}",
        others: f"silos.beta.valid.beta: '{others}' given, whose text is {split_sha256(Path(others))[:12]}; allowed: "
        f"the one of the contract's gate, {wanted}",
    }
    path = tmp_path / "silo.yaml"
    command = ("launch", "join", there.store_url, "--config", path, "--dry-run")
    for place, message in cases.items():
        own["silos"]["beta"]["valid"] = {"beta": place}
        path.write_text(yaml.safe_dump(own))
        assert commanded(*command) == (2, message)
    own["silos"]["beta"]["valid"] = {}
    path.write_text(yaml.safe_dump(own))
    code, said = commanded(*command)
    assert code == 2
    assert said.startswith(
        "silos.beta.valid.beta: none given, and the contract's gate.data has beta/beta; allowed: the"
    )
    assert not (tmp_path / "here").exists()
    own["silos"]["beta"] = tiny_silo(tiny_text, "beta")
    path.write_text(yaml.safe_dump(own))
    assert commanded(*command)[0] == 0


def test_a_policy_that_keeps_results_is_said(tmp_path: Path, tiny_config: TinyConfig, gate: dict[str, Any]) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("metrics: [loss, tokens]\n")
    config = tiny_config(tmp_path, gate=gate, trust={"policy": str(policy)})
    message = one_line_error(check_silo, config, "alpha")
    assert message.startswith(
        f"trust.policy: {policy} given; it keeps held_out with its silo, and the contract's gate.data"
    )


def test_a_public_split_that_is_not_here_is_said(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, gate: dict[str, Any]
) -> None:
    public = {"shared": split_sha256(tiny_text.packed["gamma"] / "valid")}
    config = tiny_config(tmp_path, gate=gate | {"public": public})
    message = "gate.places.shared: none given; allowed: the directory of this split of the contract's gate.public"
    assert one_line_error(check_public, config) == message
    assert one_line_error(start, config) == message
    assert not Path(config.store_url, "contract.json").exists()
    config = tiny_config(tmp_path, gate=gate | {"public": public, "places": {"shared": str(tmp_path / "gone")}})
    assert one_line_error(check_run, config).startswith(
        f"gate.places.shared: '{tmp_path}/gone' given; it is not on this"
    )


def test_a_command_says_the_hashes(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> None:
    tiny_config(tmp_path)
    code, said = commanded("contract", "gate", "--config", tmp_path / "tiny.yaml")
    assert code == 0
    assert yaml.safe_load(said) == {"gate": {"data": gate_data(tiny_text, "alpha", "beta")}}
