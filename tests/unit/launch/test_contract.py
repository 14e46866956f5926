"""`atoll contract` and `atoll keys rotate|revoke`: a run that is proposed, signed and amended by its commands."""

import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from launch import cli
from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR
from pretrain.config.load import load_config
from pretrain.trust.keys import new_key
from tests.support import TinyText, write_settings
from tests.unit.test_aggregate import start


@pytest.fixture
def own(tmp_path: Path, tiny_text: TinyText) -> dict[str, str]:
    """The file of each member's own configuration, who has a directory of keys of its own."""
    members = ("alpha", "beta", OPERATOR)
    keys = {name: new_key(_directory(tmp_path, name) / f"{name}.key", name).text for name in members}
    quorum = {"quorum": 1, "deadline_floor_seconds": 0.0, "deadline_ceiling_seconds": 1.0}
    found = {}
    for name in keys:
        trust = {"keys": keys, "directory": str(tmp_path / name)}
        path = write_settings(tmp_path / name, tiny_text, trust=trust, membership=quorum, inner={"num_steps": 40})
        exchange = {"url": str(tmp_path / "store"), "poll_seconds": 0.05}
        settings = yaml.safe_load(path.read_text()) | {"exchange": exchange}
        if name == OPERATOR:  # who has no text: a roster does
            settings |= {"silos": {}, "roster": ["alpha", "beta"]}
        path.write_text(yaml.safe_dump(settings))
        found[name] = str(path)
    return found


def _directory(parent: Path, name: str) -> Path:
    (parent / name).mkdir(mode=0o700)
    return parent / name


def atoll(*arguments: str, code: int = 0) -> str:
    """What a command prints; a mistake is one line of it."""
    found = CliRunner().invoke(cli.app, list(arguments))
    if isinstance(found.exception, ConfigError):
        assert code == 2, found.exception
        assert "\n" not in str(found.exception)
        return str(found.exception)
    assert found.exit_code == code, (found.output, found.exception)
    return found.output


def test_a_contract_is_proposed_signed_and_amended_by_commands(own: dict[str, str], tmp_path: Path) -> None:
    store, sign = str(tmp_path / "store"), ["contract", "sign", str(tmp_path / "store")]
    assert "there is no run in it" in atoll("contract", "show", store, code=2)
    said = atoll("contract", "propose", "--config", own[OPERATOR])
    assert said.count("has not signed\n") == 3
    assert not (tmp_path / "store" / "global").exists()
    assert "there is a contract in it already" in atoll("contract", "propose", "--config", own[OPERATOR], code=2)
    said = atoll("contract", "check", store, "--config", own["alpha"])
    assert said == (
        "missing     the signature of aggregator, alpha, beta under the contract\n"
        "the contract says what this configuration says\n"
    )
    said = atoll("contract", "check", store, "--config", own["alpha"], "outer.lr=0.1", "membership.quorum=2", code=1)
    assert said.splitlines()[:2] == [
        "differs     membership.quorum is 2 here and 1 there",
        "differs     outer.lr is 0.1 here and 0.7 there",
    ]
    line = atoll(*sign, "--config", own["alpha"], "--silo", "alpha", "outer.lr=0.1", code=2)
    assert line == f"store: {store!r} given; nothing is signed, as outer.lr is 0.1 here and 0.7 there"
    assert " there is no " in atoll(*sign, "--config", own["alpha"], "--silo", "beta", code=2)
    assert "--silo: 'delta' given; allowed: aggregator, alpha, beta" in atoll(
        *sign, "--config", own["alpha"], "--silo", "delta", code=2
    )
    for name, rest in (("alpha", "aggregator, beta is missing"), ("beta", "aggregator is missing")):
        said = atoll(*sign, "--config", own[name], "--silo", name)
        assert said.splitlines()[-1] == f"signed      the contract, as {name}; the signature of {rest}"
        waits = rest.removesuffix(" is missing")
        assert f"waiting for the signature of {waits} under the contract" in atoll("status", store)
        (tmp_path / "store" / "signatures" / "aggregator.json").unlink(missing_ok=True)
        if name == "alpha":  # its signature is none of the operator's
            shutil.copy(*(tmp_path / "store" / "signatures" / f"{who}.json" for who in ("alpha", "aggregator")))
    assert start(load_config([own[OPERATOR]]))[1].version == 0, "the aggregator finds it, signs, and goes on"
    assert "has not signed" not in atoll("contract", "show", store)
    amend = ["contract", "amend", store, "--config", own["alpha"], "--silo", "alpha", "--from"]
    said = atoll(*amend, "3", "membership.quorum=2", "outer.lr=0.5")
    assert said.splitlines()[0] == (
        "amendment 1  from version 3 on: membership.quorum=2, outer.lr=0.5; proposed by alpha; waits for the signature "
        "of beta"
    )
    said = atoll(*sign, "--config", own["beta"], "--silo", "beta", "--amendment", "1")
    assert said.splitlines()[-1] == "signed      amendment 1, as beta; all that are needed have signed"
    said = atoll("keys", "rotate", "beta", store, "--from", "4", "--directory", str(tmp_path / "beta"))
    assert said.splitlines()[0] == f"private key  {tmp_path / 'beta' / 'beta.key.1'}"
    assert "; proposed by beta; all that are needed have signed: it holds with the aggregator's next commit" in said
    said = atoll("keys", "revoke", "beta", store, "--config", own["alpha"], "--silo", "alpha", "--from", "5")
    assert "the key of beta counts no more; proposed by alpha; waits for the signature of aggregator" in said
    shown = atoll("contract", "show", store).splitlines()
    assert [line.split()[1] for line in shown if line.startswith("amendment")] == ["1", "2", "3"]
    assert sorted(path.name for path in (tmp_path / "beta").glob("*.key*")) == ["beta.key", "beta.key.1"]


def test_who_has_no_silo_starts_the_aggregator_alone(own: dict[str, str]) -> None:
    assert atoll("aggregate", "--config", own[OPERATOR], "--dry-run").splitlines()[1:] == [
        f"aggregator: 10 rounds of H = 4, 2 silos, in {load_config([own[OPERATOR]]).store_url}",
        "dry run: nothing was started",
    ]
    for command in ("launch local", "launch slurm --site cpu --no-aggregator", "plan --bandwidth 1gbit"):
        line = atoll(*command.split(), "--config", own[OPERATOR], code=2)
        assert line == "silos: {} given; allowed: at least one silo"


def test_a_mistake_is_one_line(own: dict[str, str], tmp_path: Path) -> None:
    atoll("contract", "propose", "--config", own[OPERATOR])
    as_alpha = "{store} -c {alpha} --silo alpha"
    for command, line in {
        "contract show /nowhere": "store: '/nowhere' given; there is no run in it (no contract.json)",
        f"contract sign {as_alpha} --amendment 1": "--amendment: 1 given; allowed: none, as there is no amendment",
        f"contract amend {as_alpha} --from 3 outer.lr=1": "--from: 3 given; the run has no version yet; allowed: ",
        "keys rotate delta {store} --from 3": "name: 'delta' given; allowed: aggregator, alpha, beta",
        "keys rotate beta {store} --from 3": "--from: 3 given; the run has no version yet; allowed: ",
    }.items():
        words = command.format(store=tmp_path / "store", alpha=own["alpha"]).split()
        assert atoll(*words, code=2).startswith(line)
