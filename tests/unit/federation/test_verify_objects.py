"""`atoll verify` on what lies beside the chain: words, amendments, rollbacks, revocations, and what no run writes."""

import dataclasses
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import cli
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.agreement import propose_amendment
from pretrain.exchange.lease import Lease
from pretrain.exchange.revocation import Revocation, sign
from pretrain.exchange.rollback import roll_back_store
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.words import Beat, Evaluation, TermSign
from pretrain.federation.verify import Finding, StoreVerifier
from pretrain.trust.ledger import sha256_bytes
from pretrain.trust.members import with_keys
from tests.conftest import TinyConfig
from tests.unit.test_aggregate import one_version, start
from tests.unit.test_contract_amended import deliver as deliver_amended
from tests.unit.test_contract_amended import sign as sign_amendment
from tests.unit.test_signed import as_member, begin, manifest_file

KINDS = (
    *("amendments", "aggregator", "contract.json", "damaged", "global", "revocations", "rollbacks", "rolled-back"),
    *("signatures", "silos", "snapshots", "waiting"),
)


def evaluation(version: int, digest: str) -> Evaluation:
    return Evaluation(version=version, parameters_digest=digest, losses={"law": 2.5}, sequences={"law": 8})


def say_all(config: RunConfig) -> None:
    """As its members: every word of a run; the lease is the second, after a rollback's."""
    for silo in config.full_roster:
        member = as_member(config, silo)
        member.claim_name(silo, f"of {silo}")
        member.announce(silo, left=False, version=0)
        member.mark_resumable(silo, 1)
        member.say(f"silos/{silo}/beats/000003", Beat(lease_seconds=30.0), silo)
        member.say_damaged(silo, 2, "the disk is full")
        member.tell_evaluation(silo, evaluation(1, member.read_commit(1).parameters_digest))
    member.tell_evaluation(silo, evaluation(2, "0" * 64))  # of what was taken back
    operator = as_member(config, OPERATOR)
    operator.say_waiting(3, ["alpha"], deadline_seconds=None)
    lease = Lease(operator, seconds=30)
    lease.release()
    operator.say("aggregator/000002.beat-000009", TermSign(nonce=lease._sign.nonce), OPERATOR)


def revoked(config: RunConfig, member: str, last: int) -> Revocation:
    exchange = as_member(config, "alpha")
    return Revocation(
        contract_sha256=exchange.contract_sha256,
        member=member,
        from_version=1,
        to_version=last,
        commit_sha256=sha256_bytes(exchange.commit_bytes(last)),
        parameters_digest="0" * 64,
        reason="consent withdrawn",
        signer="",
    )


@pytest.fixture(scope="module")
def whole(tiny_config: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that has everything in it, rolled back once; nobody may change it."""
    settings = {"exchange": {"snapshot_versions": 2}, "inner": {"num_steps": 40}, "trust": {"directory": ""}}
    config = with_keys(tiny_config(tmp_path_factory.mktemp("whole"), **settings), make=True)
    aggregator, state = begin(config)
    operator = as_member(config, OPERATOR)
    propose_amendment(as_member(config, "alpha"), config, "alpha", from_version=3, changes=["outer.lr=0.25"])
    sign_amendment(config, "beta")

    def make_version() -> None:
        for silo in config.full_roster:
            deliver_amended(config, state, silo, 3)
        if state.version == 1:
            operator.refuse("beta", 2, manifest_file(config, "beta", 2).read_bytes(), "too long")
            deliver_amended(config, state, "beta", 3)
        one_version(aggregator, state)

    for _ in range(2):
        make_version()
    aggregator.stop()
    roll_back_store(StoreExchange(config.store_url), to=1, reason="a bad round", key=config.key_file(OPERATOR))
    aggregator, state = start(config)
    for _ in range(2):
        make_version()
    deliver_amended(config, state, "alpha", 3)  # no commit names it
    say_all(config)
    sign(as_member(config, "alpha"), revoked(config, "beta", 3), "alpha")
    return config


@pytest.fixture
def store(whole: RunConfig, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.store_url, tmp_path / "store"))


def findings(store: Path) -> list[Finding]:
    scratch = store.parent / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return StoreVerifier(StoreExchange(str(store)), scratch, tell=lambda line: None).verify().findings


def objects(store: Path) -> list[Path]:
    return [file for file in sorted(store.rglob("*")) if file.is_file()]


def test_a_store_with_everything_is_as_it_should_be(store: Path) -> None:
    assert {str(file.relative_to(store)).split("/")[0] for file in objects(store)} == {*KINDS}
    said = CliRunner().invoke(cli.app, ["verify", str(store)])
    assert said.exit_code == 0, said.stdout
    assert "words       24, each by its author\n" in said.stdout


@pytest.mark.parametrize("num_turns", [1, pytest.param(30, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])])
def test_a_flipped_bit_of_anything_is_found(num_turns: int, store: Path) -> None:
    """Seeded; what the chain names is flipped in test_verify.py."""
    rng = random.Random(num_turns)
    for file in store.rglob("*.safetensors"):
        file.unlink()  # pruned, so that nothing is merged again
    others = [file for file in objects(store) if not re.search("contract|/global/0", str(file))]
    assert len(others) > 35
    for file in others * num_turns:
        data = file.read_bytes()
        spoiled, bit = bytearray(data), rng.randrange(8 * len(data))
        spoiled[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(spoiled))
        name = str(file.relative_to(store))
        names = {found.name for found in findings(store)}
        assert names & {name, "amendments/"}, f"bit {bit} of {name}"
        file.write_bytes(data)
    assert findings(store) == []


MOVED = {
    "silos/alpha/beats/000004": "silos/alpha/beats/000003",
    "silos/beta/membership/000001.json": "silos/alpha/membership/000000.json",
    "silos/beta/resumable/000001": "silos/alpha/resumable/000001",
    "silos/alpha/000004/refused-0.json": "rolled-back/000001/silos/beta/000002/refused-0.json",
    "waiting/000004.json": "waiting/000003.json",
    "damaged/000003/beta": "damaged/000002/beta",
    "aggregator/000003.json": "aggregator/000002.json",
    "aggregator/000001.beat-000008": "aggregator/000002.ended",
    "aggregator/000007.ended": "aggregator/000002.ended",
    "rollbacks/000002.done": "rollbacks/000001.done",
    "rollbacks/000002.json": "rollbacks/000001.json",
    "rolled-back/000001/global/000003/commit.json": "global/000003/commit.json",
    "rolled-back/000001/silos/beta/000003/manifest.json": "rolled-back/000001/silos/alpha/000002/manifest.json",
    "silos/beta/000005/manifest.json": "silos/alpha/000004/manifest.json",
    "snapshots/000003.json": "snapshots/000002.json",
    "snapshots/000009.json": "snapshots/000002.json",
    "revocations/beta-000001-000003/beta.json": "revocations/beta-000001-000003/alpha.json",
    "revocations/alpha-000001-000003/alpha.json": "revocations/beta-000001-000003/alpha.json",
    "amendments/000002.json": "amendments/000001.json",
    "amendments/000001/aggregator.json": "amendments/000001/beta.json",
    "silos/gamma/membership/000000.json": "silos/alpha/membership/000000.json",
    "signatures/gamma.json": "signatures/alpha.json",
    "keys/alpha.json": "signatures/alpha.json",
    "silos/alpha/000003/notes.txt": "contract.json",
    "global/000003/commit.json.bak": "global/000003/commit.json",
    "silos/alpha/000003.d/hidden": "contract.json",
    "elsewhere/commit": "global/000003/commit.json",
}


def test_what_is_put_where_it_does_not_belong_is_named_in_the_table_and_the_json(store: Path) -> None:
    for name, source in MOVED.items():
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(store / source, store / name)
    (store / "silos/beta/empty").mkdir()  # of no object
    found = {finding.name: finding for finding in findings(store)}
    assert found.keys() == {*MOVED} - {"silos/alpha/000003.d/hidden"} | {"silos/alpha/000003.d"}
    assert not any(finding.of_chain for finding in found.values())
    said = CliRunner().invoke(cli.app, ["verify", str(store)])
    assert said.exit_code == 1
    assert "WRONG       silos/gamma/membership/000000.json: gamma is no silo of this run\n" in said.stdout
    assert "WRONG       elsewhere/commit: no object of a run has this name\n" in said.stdout
    said = CliRunner().invoke(cli.app, ["verify", str(store), "--json"])
    assert {one["name"] for one in json.loads(said.stdout)["findings"]} == found.keys()


def test_what_is_not_signed_or_by_another_is_named(store: Path, whole: RunConfig) -> None:
    names = ("aggregator/000002.ended", "silos/alpha/beats/000003", "silos/alpha/identity.json")
    for name in (names[0], names[2]):
        word = json.loads((store / name).read_bytes())
        del word["signature"]
        (store / name).write_text(json.dumps(word) + "\n")
    (store / names[1]).write_bytes(as_member(whole, "beta").signed(names[1], Beat(lease_seconds=30.0)))
    found = findings(store)
    assert [finding.name for finding in found] == [*names]
    assert found[0].what.startswith("the word is not signed; it needs a signature by the key")
    assert found[1].what.startswith("signature of the word: not of these bytes by the key")


def test_an_evaluation_of_other_parameters_than_a_versions_is_found(whole: RunConfig, store: Path) -> None:
    member = as_member(dataclasses.replace(whole, exchange=dataclasses.replace(whole.exchange, url=str(store))), "beta")
    name = member.tell_evaluation("beta", evaluation(3, "0" * 64))
    assert [(found.name, found.what) for found in findings(store)] == [
        (name, "it is of other parameters than those of version 3")
    ]
