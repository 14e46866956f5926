"""`atoll verify`, on stores of the real aggregator: what is as it should be passes, and every change is found."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch import cli
from pretrain.aggregate import Aggregator, OuterState
from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.history import History
from pretrain.exchange.store import StoreExchange
from pretrain.federation.verify import StoreVerifier, Verified
from pretrain.trust.ledger import Commit, Manifest, sha256_bytes
from pretrain.trust.members import own_signer, with_keys
from tests.conftest import TinyConfig
from tests.unit.test_aggregate import one_version
from tests.unit.test_signed import as_member, begin, deliver, manifest_file

INT4 = {"codec": "int4", "downlink_codec": "int4", "lr": 0.5, "momentum": 0.5}
WAYS: dict[str, dict[str, Any]] = {
    "int4": INT4,
    "fp32, three fragments": {"num_fragments": 3},
    "clip, three fragments, overlap": INT4 | {"merge": "clip", "num_fragments": 3, "overlap_steps": 1},
    "median, a hundredth fewer bytes down": {"merge": "median", "codec": "int8", "downlink_codec": "topk"},
}


def signed(tiny_config: TinyConfig, directory: Path, **settings: Any) -> RunConfig:
    usual = {"exchange": {"snapshot_versions": 2}, "inner": {"num_steps": 40}}
    trust = {"directory": ""} | settings.pop("trust", {})
    return with_keys(tiny_config(directory, trust=trust, **usual | settings), make=True)


def advance(config: RunConfig, num_versions: int) -> tuple[Aggregator, OuterState]:
    aggregator, state = begin(config)
    while state.version < num_versions:
        for factor, silo in enumerate(config.full_roster, start=2):
            deliver(config, state, silo, factor=1 + 0.01 * factor)
        one_version(aggregator, state)
    return aggregator, state


def verified(config: RunConfig, scratch: Path) -> Verified:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return StoreVerifier(StoreExchange(config.store_url), scratch, tell=lambda line: None).verify()


@pytest.mark.parametrize("way", WAYS)
def test_a_store_as_it_should_be_is_merged_again_from_the_beginning(
    way: str, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    three = {"silos": {"gamma": {}}} if "merge" in WAYS[way] else {}
    config = signed(tiny_config, tmp_path, outer=WAYS[way], **three)
    advance(config, 7)
    before = files(config)
    found = verified(config, tmp_path / "scratch")
    assert found.findings == []
    num_deliveries = 7 * len(config.silos)
    assert (found.is_signed, found.num_versions, found.num_manifests, found.num_pruned) == (True, 8, num_deliveries, 0)
    assert found.merged == list(range(1, 8))
    assert files(config) == before


def files(config: RunConfig) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(Path(config.store_url).rglob("*")) if file.is_file()}


def test_what_is_pruned_is_counted_and_the_rest_is_merged_again(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = signed(tiny_config, tmp_path, outer=INT4, exchange={"snapshot_versions": 2, "keep_versions": 1})
    aggregator, state = advance(config, 4)
    for silo in config.full_roster:
        as_member(config, silo).mark_resumable(silo, 9)
        deliver(config, state, silo)
    one_version(aggregator, state)  # and prunes up to the snapshot of version 4
    found = verified(config, tmp_path / "scratch")
    assert (found.findings, found.merged) == ([], [5])
    assert found.num_pruned == 4 + 3 * 2  # parameters and changes, and what was delivered


def test_deliveries_are_kept_as_long_as_the_contract_says(tmp_path: Path, tiny_config: TinyConfig) -> None:
    few = {"snapshot_versions": 1, "keep_versions": 1}
    config = signed(tiny_config, tmp_path, exchange=few, trust={"keep_deliveries": 3})
    advance(config, 1)
    for silo in config.full_roster:
        as_member(config, silo).mark_resumable(silo, 9)
    advance(config, 6)
    found = verified(config, tmp_path / "scratch")
    assert (found.findings, found.merged) == ([], [4, 5, 6])
    History(as_member(config, OPERATOR), 1).prune([], 6, 1)  # more than the contract allows
    (finding,) = verified(config, tmp_path / "scratch").findings
    assert (finding.version, finding.name) == (6, "deliveries")
    assert finding.what == "version 4 to 6 cannot be merged again, but trust.keep_deliveries in the contract is 3"


# ---- an aggregator that lies


def lied(config: RunConfig, tmp_path: Path, lie: Callable[[Aggregator, OuterState], None]) -> list[str]:
    """What is found after a lie in version 3 of 4."""
    aggregator, state = advance(config, 2)
    lie(aggregator, state)
    for silo in config.full_roster:
        deliver(config, state, silo)
    one_version(aggregator, state)
    found = verified(config, tmp_path / "scratch")
    assert found.merged[:2] == [1, 2]
    return [finding.what for finding in found.findings]


def test_one_silo_scaled_by_a_thousandth_is_found(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """The aggregator merges 1.001 times what alpha has delivered, and names alpha's delivery in its commit."""
    config = signed(tiny_config, tmp_path)

    def lie(aggregator: Aggregator, state: OuterState) -> None:
        deliver(config, state, "alpha", factor=1.02 * 1.001)
        deliver(config, state, "beta", factor=1.03)
        deliveries = aggregator.collect(state)
        deliver(config, state, "alpha", factor=1.02)
        data = manifest_file(config, "alpha", 3).read_bytes()
        alpha = next(one for one in deliveries if one.manifest.silo == "alpha")
        alpha.manifest, alpha.manifest_bytes = Manifest.from_bytes(data), data
        aggregator.commit(state, deliveries, aggregator.merge(state, deliveries))

    (line,) = lied(config, tmp_path, lie)
    assert line.startswith("version 3: from its deliveries come other parameters than those of its commit")


def test_weights_that_the_contract_does_not_give_are_found(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = signed(tiny_config, tmp_path)

    def lie(aggregator: Aggregator, state: OuterState) -> None:
        for silo in config.full_roster:
            deliver(config, state, silo)
        deliveries = aggregator.collect(state)
        merged = aggregator.merge(state, deliveries)
        aggregator.commit(state, deliveries, dataclasses.replace(merged, weights=[100, 99]))

    assert lied(config, tmp_path, lie) == ["version 3: its weights are [100, 99]; by the contract they are [100, 100]"]


# ---- what somebody has changed


def resigned(config: RunConfig, version: int, **changes: Any) -> None:
    """The operator himself writes history anew, and signs it."""
    file = Path(config.store_url) / "global" / f"{version:06d}" / "commit.json"
    members = as_member(config, OPERATOR).members
    commit = dataclasses.replace(Commit.from_bytes(file.read_bytes()), **changes)
    file.write_bytes(members.sign(commit).to_bytes())


def test_history_that_the_operator_has_written_anew_is_found(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = signed(tiny_config, tmp_path)
    advance(config, 4)
    resigned(config, 2, divisor=7)
    names = [(finding.version, finding.name) for finding in verified(config, tmp_path / "scratch").findings]
    assert names == [(2, "global/000002/commit.json"), (3, "global/000003/commit.json")]  # 3 follows another 2


def test_history_written_anew_up_to_its_end_has_not_the_silos_signatures(
    tmp_path: Path, tiny_config: TinyConfig
) -> None:
    """Every link and signature of the operator's fits; what silos have cosigned does not."""
    config = signed(tiny_config, tmp_path)
    advance(config, 4)
    previous = as_member(config, "alpha").read_commit(2).previous
    for version in (2, 3, 4):
        resigned(config, version, previous=previous, metrics={})
        previous = sha256_bytes(as_member(config, "alpha").commit_bytes(version))
    found = [one for one in verified(config, tmp_path / "scratch").findings if one.name.startswith("silos/")]
    assert [(finding.version, finding.name) for finding in found] == [
        (version, f"silos/{silo}/{version:06d}/manifest.json") for version in (3, 4) for silo in config.full_roster
    ]
    assert all("it was shown another history" in finding.what for finding in found)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda store: (store / "global/000002/commit.json").unlink(), "it is missing"),
        (lambda store: (store / "silos/beta/000002/manifest.json").unlink(), "manifest.json is missing"),
        (lambda store: (store / "signatures/beta.json").unlink(), "beta has not signed the contract"),
        (lambda store: shutil.copy(*(store / f"silos/{s}/000002/manifest.json" for s in ("alpha", "beta"))), "is not"),
    ],
)
def test_what_was_removed_or_moved_is_named(
    spoil: Callable[[Path], object], expected: str, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    config = signed(tiny_config, tmp_path)
    advance(config, 3)
    spoil(Path(config.store_url))
    whats = [finding.what for finding in verified(config, tmp_path / "scratch").findings]
    assert any(expected in what for what in whats), whats


@pytest.mark.parametrize("num_flips", [40, pytest.param(1000, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])])
def test_any_flipped_bit_is_found(num_flips: int, tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Seeded, every object in turn: contract, signatures, commits, changes, snapshots, manifests, payloads."""
    config = signed(tiny_config, tmp_path, outer=INT4)
    advance(config, 4)
    rng, whole = random.Random(num_flips), files(config)
    kinds = {str(file.relative_to(config.store_url)).split("/")[0] for file in whole}
    assert kinds == {"contract.json", "signatures", "global", "snapshots", "silos"}
    for flip in range(num_flips):
        file, data = list(whole.items())[flip % len(whole)]
        spoiled, bit = bytearray(data), rng.randrange(8 * len(data))
        spoiled[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(spoiled))
        assert is_found(config, tmp_path / "scratch", file), f"bit {bit} of {file}"
        file.write_bytes(data)
    assert verified(config, tmp_path / "scratch").findings == []


def is_found(config: RunConfig, scratch: Path, file: Path) -> bool:
    """A damaged contract may be none at all, which is one line."""
    try:
        return bool(verified(config, scratch).findings)
    except ConfigError:
        return file.name == "contract.json"


# ---- the command


def test_the_command_says_it_to_people_and_to_programs(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = signed(tiny_config, tmp_path)
    advance(config, 2)
    said = CliRunner().invoke(cli.app, ["verify", config.directory])
    assert (said.exit_code, said.stdout) == (
        0,
        "contract    signed by every member\n"
        "versions    3 in one chain, 2 merged again from their deliveries\n"
        f"deliveries  4 manifests; {3 + 4 + 1} files have their hash\n"
        "all is as it should be\n",
    )
    manifest_file(config, "beta", 1).unlink()
    said = CliRunner().invoke(cli.app, ["verify", config.store_url, "--json"])
    found = json.loads(said.stdout)
    assert said.exit_code == 1
    first = found["findings"][0]
    assert (first["version"], first["name"]) == (1, "silos/beta/000001/manifest.json")


def test_an_unsigned_store_is_verified_as_far_as_that_goes(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = dataclasses.replace(signed(tiny_config, tmp_path), trust=dataclasses.replace(tiny_config(tmp_path).trust))
    assert own_signer(config, "alpha") is None
    from tests.unit.test_aggregate_replay import advance as advance_unsigned

    advance_unsigned(config, 3)
    found = verified(config, tmp_path / "scratch")
    assert (found.findings, found.is_signed, found.merged) == ([], False, [1, 2, 3])
    assert History(StoreExchange(config.store_url), 1).snapshots() == [2]
