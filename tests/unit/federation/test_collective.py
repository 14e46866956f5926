"""`atoll verify` and `atoll exit` of a silo's ledger of a collective: every change of what all have signed is found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from launch import cli
from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config
from pretrain.exchange.store import StoreExchange
from pretrain.federation.bundle import BundleVerifier, Exit
from pretrain.federation.exit import write_bundle
from pretrain.federation.verify import StoreVerifier, Verified
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.sync.together import among_silos, run

OUTER = {"optimizer": "nesterov", "codec": "int4", "downlink_codec": "int4", "num_fragments": 2}
NUM_VERSIONS = 4
NONE_MERGED = "payloads of deliveries: a collective's pass from silo to silo, so that no version is merged again"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> RunConfig:
    """Two silos that have merged four versions, and a bundle of alpha's beside the run."""
    config = among_silos(tiny_config, tmp_path_factory.mktemp("done"), outer=OUTER)
    run(config, NUM_VERSIONS)
    write_bundle(config, "alpha", Path(config.directory).parent / "alpha", tell=lambda line: None)
    return config


@pytest.fixture
def ledger(done: RunConfig, tmp_path: Path) -> Path:
    """Alpha's, on another machine, to spoil."""
    return shutil.copytree(done.ledger_url("alpha"), tmp_path / "ledger")


def verified(ledger: Path) -> Verified:
    scratch = ledger.parent / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return StoreVerifier(StoreExchange(str(ledger)), scratch, tell=lambda line: None).verify()


def test_a_ledger_as_it_should_be_is_what_all_have_signed(ledger: Path) -> None:
    found = verified(ledger)
    assert found.findings == []
    assert (found.is_signed, found.is_collective, found.num_versions) == (True, True, NUM_VERSIONS + 1)
    assert (found.num_manifests, found.merged) == (2 * NUM_VERSIONS, [])
    assert found.compared == list(range(NUM_VERSIONS + 1))
    said = CliRunner().invoke(cli.app, ["verify", str(ledger)])
    assert said.exit_code == 0
    assert "5 in one chain, each signed by every silo; parameters of 5 have their digest; " in said.output
    assert "none is merged again: a collective keeps no deliveries" in said.output


def of_json(name: str, key: str, value: object) -> Callable[[Path], object]:
    """A key of a record has another value, in the one form that records have."""

    def change(ledger: Path) -> None:
        record = json.loads((ledger / name).read_text())
        assert record[key] != value
        (ledger / name).write_text(json.dumps(record | {key: value}, sort_keys=True, indent=1) + "\n")

    return change


def other_parameters(ledger: Path) -> None:
    """The newest version's, with the hash of its file in the commit: only the signed digest tells."""
    (file,) = (ledger / "global" / "000004").glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, file)
    commit = json.loads((ledger / "global/000004/commit.json").read_text())
    payload = StoreExchange(str(ledger)).objects.download(
        f"global/000004/{file.name}", ledger.parent / "f", limit_bytes=1 << 30
    )
    commit["payloads"][0] |= {"blake3": payload[0], "num_bytes": payload[1]}
    (ledger / "global/000004/commit.json").write_text(json.dumps(commit, sort_keys=True, indent=1) + "\n")


CHANGES: dict[str, tuple[Callable[[Path], object], int | None, str]] = {
    "tokens": (of_json("silos/beta/000002/manifest.json", "tokens", 1024), 2, "silos/beta/000002/manifest.json: "),
    "outcome": (of_json("silos/beta/000003/outcome.json", "kept_digest", "0" * 64), 3, "signature of the outcome"),
    "digest": (of_json("global/000004/commit.json", "parameters_digest", "0" * 64), 4, "it is of another commit"),
    "metrics": (of_json("global/000004/commit.json", "metrics", {"update_norm": 1.0, "cosine_mean": 1.0}), 4, "norm"),
    "outer state": (of_json("global/000004/commit.json", "outer_digest", ""), 4, "its outer_digest or metrics"),
    "old commit": (of_json("global/000001/commit.json", "metrics", {}), 2, "commit 2 follows "),
    "agreement": (lambda ledger: (ledger / "signatures/beta.json").unlink(), None, "beta has not signed"),
    "no manifest": (lambda ledger: (ledger / "silos/beta/000001/manifest.json").unlink(), 1, "it is missing"),
    "no outcome": (lambda ledger: (ledger / "silos/beta/000001/outcome.json").unlink(), 1, "it is missing"),
    "parameters": (other_parameters, 4, "its parameters have digest"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_found(ledger: Path, change: str) -> None:
    spoil, version, what = CHANGES[change]
    spoil(ledger)
    findings = verified(ledger).findings
    assert any(finding.version == version and what in finding.what for finding in findings), findings
    assert CliRunner().invoke(cli.app, ["verify", str(ledger)]).exit_code == 1 if change == "tokens" else True


def test_without_keys_all_but_the_signatures_is_checked(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = among_silos(tiny_config, tmp_path, keys=False, outer=OUTER)
    run(config, 1)
    ledger = Path(config.ledger_url("beta"))
    found = verified(ledger)
    assert (found.findings, found.is_signed, found.is_collective) == ([], False, True)
    of_json("silos/beta/000001/manifest.json", "tokens", 1024)(ledger)
    (finding,) = verified(ledger).findings
    assert (finding.version, finding.what) == (
        1,
        "silos/beta/000001/manifest.json: the commit says something else of it",
    )


def test_a_member_leaves_with_a_bundle(done: RunConfig, tmp_path: Path) -> None:
    bundle = shutil.copytree(Path(done.directory).parent / "alpha", tmp_path / "bundle")
    record = Exit.from_bytes((bundle / "exit.json").read_bytes())
    assert (record.member, record.version, record.missing) == ("alpha", NUM_VERSIONS, [NONE_MERGED])
    assert record.signature
    (tmp_path / "scratch").mkdir()
    found = BundleVerifier(bundle, tmp_path / "scratch", tell=lambda line: None).verify()
    assert found.findings == []
    assert found.store
    assert (found.store.is_collective, NUM_VERSIONS in found.store.compared) == (True, True)
    (bundle / "store/silos/beta/000002/outcome.json").unlink()
    assert [finding.version for finding in BundleVerifier(bundle, tmp_path / "scratch").verify().findings] == [None, 2]


def test_what_is_missing_for_a_bundle_is_one_line(done: RunConfig, tmp_path: Path, tiny_config: TinyConfig) -> None:
    nothing = among_silos(tiny_config, tmp_path / "nothing", outer=OUTER)
    assert one_line_error(write_bundle, nothing, "alpha", tmp_path / "alpha") == (
        f"run directory: {nothing.ledger_url('alpha')} given; there is no run in it (no contract.json)"
    )
    shutil.copytree(done.directory, tmp_path / "run")
    spoilt = among_silos(tiny_config, tmp_path, outer=OUTER)
    (Path(spoilt.ledger_url("alpha")) / "silos/beta/000002/outcome.json").unlink()
    message = one_line_error(write_bundle, spoilt, "alpha", tmp_path / "alpha", tell=lambda line: None)
    assert message == (
        f"run directory: {spoilt.ledger_url('alpha')} given; its chain is broken: version 2: global/000002: "
        "silos/beta/000002/outcome.json: it is missing; nothing is written"
    )
    assert not (tmp_path / "alpha").exists()


def test_a_run_directory_says_where_its_ledgers_are(done: RunConfig) -> None:
    save_config(done, Path(done.directory) / "config.yaml")
    message = one_line_error(CliRunner().invoke, cli.app, ["verify", done.directory], catch_exceptions=False)
    assert message.endswith(f"allowed: {done.directory}/silos/NAME/ledger, a silo's own")
