"""What silos of a collective sign of every version: it is in each one's ledger, and nothing else is taken."""

import json
import shutil
from pathlib import Path

import pytest

from pretrain.config.keys import RunConfig
from pretrain.exchange.lane import PeerLostError
from pretrain.exchange.store import StoreExchange, version_path
from pretrain.federation.verify import StoreVerifier
from pretrain.merge.outcome import Outcome, check_commit, manifest_path, outcome_path, record_paths
from pretrain.sync.own_ledger import OwnLedger, whole_versions
from pretrain.trust.contract import build_contract
from pretrain.trust.keys import load_signer, new_key
from pretrain.trust.ledger import Manifest, RefusedError
from pretrain.trust.members import Members, public_keys
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.sync.together import among_silos, run, start

OUTER = {"optimizer": "nesterov", "codec": "int4", "downlink_codec": "int4", "num_fragments": 2}
NUM_VERSIONS = 3


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody dies here: who broke a connection need not be found out."""
    monkeypatch.setattr("pretrain.sync.among_silos.SETTLE_SECONDS", 0.1)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> RunConfig:
    """Two silos that have merged three versions."""
    config = among_silos(tiny_config, tmp_path_factory.mktemp("done"), outer=OUTER)
    run(config, NUM_VERSIONS)
    return config


@pytest.fixture
def config(done: RunConfig, tmp_path: Path, tiny_config: TinyConfig) -> RunConfig:
    """The same, to spoil."""
    shutil.copytree(done.directory, tmp_path / "run")
    return among_silos(tiny_config, tmp_path, outer=OUTER)


def ledger(config: RunConfig, silo: str) -> Path:
    return Path(config.ledger_url(silo))


def records(config: RunConfig, silo: str, version: int) -> dict[str, bytes]:
    found = {name: ledger(config, silo) / name for name in record_paths(config.full_roster, version)}
    return {name: file.read_bytes() for name, file in found.items()}


def test_every_ledger_has_what_all_have_signed_of_every_version(done: RunConfig) -> None:
    members = Members(keys=public_keys(done))
    for version in range(1, NUM_VERSIONS + 1):
        ours, theirs = (records(done, silo, version) for silo in ("alpha", "beta"))
        assert ours == theirs
        for silo in ("alpha", "beta"):
            members.check(silo, Manifest.from_bytes(ours[manifest_path(silo, version)]))
            members.check(silo, Outcome.from_bytes(ours[outcome_path(silo, version)]))
        commit = StoreExchange(str(ledger(done, "alpha"))).peek_commits([version])[0]
        assert len(check_commit(commit, ours, done, members)) == 2
    for silo in ("alpha", "beta"):
        assert sorted(file.name for file in (ledger(done, silo) / "signatures").iterdir()) == [
            "alpha.json",
            "beta.json",
        ]


def test_what_is_not_what_all_have_signed_is_named(done: RunConfig) -> None:
    members, of_two = Members(keys=public_keys(done)), records(done, "alpha", 2)
    commit = StoreExchange(str(ledger(done, "alpha"))).peek_commits([2])[0]
    manifest, outcome = manifest_path("beta", 2), outcome_path("beta", 2)

    def refused(name: str, old: bytes, new: bytes) -> str:
        assert old in of_two[name]
        with pytest.raises(RefusedError) as caught:
            check_commit(commit, of_two | {name: of_two[name].replace(old, new)}, done, members)
        return str(caught.value)

    assert refused(manifest, b'"tokens": 512', b'"tokens": 513').startswith(f"{manifest}: ")
    assert refused(outcome, b'"version": 2', b'"version": 1') == f"{outcome}: its version is 1, not 2"
    number = json.loads(of_two[outcome])["update_squared"]
    assert "signature" in refused(outcome, f"{number}".encode(), b"0.5")
    with pytest.raises(RefusedError, match="its gram is not 2 rows of 2 numbers"):
        check_commit(commit, of_two | {outcome: of_two[outcome].replace(b'"gram": [', b'"gram": [[],')}, done, members)
    del of_two[outcome]
    with pytest.raises(RefusedError, match=rf"^{outcome}: it is missing$"):
        check_commit(commit, of_two, done, members)


@pytest.mark.parametrize("what", ["manifest", "outcome"])
def test_who_does_not_sign_it_itself_is_named(
    tmp_path: Path, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    config = among_silos(tiny_config, tmp_path, outer=OUTER)
    new_key(tmp_path / "other.key", "other")
    other, sign = load_signer(tmp_path / "other.key"), Members.sign

    def forged(members: Members, record: object, **more: object) -> object:
        if type(record).__name__.lower() == what and getattr(record, "silo", "") == "beta":
            members.signer = other
        return sign(members, record, **more)  # type: ignore[arg-type, type-var]

    monkeypatch.setattr(Members, "sign", forged)
    found = start(dict.fromkeys(config.full_roster, config), 1)
    of = {"manifest": "its part of version 1", "outcome": "what came out of version 1 there"}[what]
    with pytest.raises(PeerLostError, match=rf"^silo beta: {of}: .*signature"):
        found["alpha"].result()
    assert not (ledger(config, "alpha") / version_path(1)).exists()


def test_who_is_behind_is_given_what_all_have_signed(config: RunConfig) -> None:
    expected = records(config, "alpha", NUM_VERSIONS)
    for name in (*expected, f"{version_path(NUM_VERSIONS)}/commit.json"):
        (ledger(config, "beta") / name).unlink()
    (ledger(config, "beta") / manifest_path("alpha", NUM_VERSIONS)).write_text("of one who was killed before")
    run(config, NUM_VERSIONS)
    assert records(config, "beta", NUM_VERSIONS) == expected


def test_who_gives_what_was_not_signed_is_named(config: RunConfig) -> None:
    for name in (*record_paths(config.full_roster, NUM_VERSIONS), f"{version_path(NUM_VERSIONS)}/commit.json"):
        (ledger(config, "beta") / name).unlink()
    file = ledger(config, "alpha") / outcome_path("beta", NUM_VERSIONS)
    file.write_bytes(file.read_bytes().replace(b'"kept_digest": "', b'"kept_digest": "0'))
    found = start(dict.fromkeys(config.full_roster, config), NUM_VERSIONS)
    with pytest.raises(PeerLostError, match=r"^silo alpha: its version 3: silos/beta/000003/outcome.json: .*signature"):
        found["beta"].result()


@pytest.mark.parametrize("codec", [pytest.param("int4", marks=pytest.mark.soak), "topk"])
def test_a_ledger_has_changes_and_now_and_then_all(tmp_path: Path, tiny_config: TinyConfig, codec: str) -> None:
    outer, every = OUTER | {"downlink_codec": codec}, whole_versions(codec)
    num_versions = 2 * every + 2  # the parameters of both fragments are written whole two versions before
    more = {"exchange": {"keep_versions": 1}, "inner": {"num_steps": 100}}
    config = among_silos(tiny_config, tmp_path, outer=outer, **more)
    run(config, num_versions - 2)
    (ledger(config, "beta") / "snapshots" / f"{2 * every:06d}.json").unlink()  # as one who was killed before it
    run(config, num_versions)  # from the ledgers alone
    place = ledger(config, "alpha")
    found = StoreVerifier(StoreExchange(str(place)), tmp_path, tell=lambda line: None).verify()
    assert (found.findings, found.compared[-1]) == ([], num_versions)
    assert sorted(file.stem for file in (place / "snapshots").glob("*")) == [f"{2 * every - 1:06d}", f"{2 * every:06d}"]
    assert not [*(place / "global" / "000000").glob("*.safetensors")]
    sizes = [file.stat().st_size for file in (place / version_path(num_versions)).glob("*.safetensors")]
    own = OwnLedger(config, "alpha")
    own.open(build_contract(config))
    whole = sum(value.nbytes for value in own.initial().values.values())
    assert sum(sizes) < whole / 8  # a half of the model, in at most an eighth of its bytes
    again = StoreVerifier(StoreExchange(str(ledger(config, "beta"))), tmp_path, tell=lambda line: None).verify()
    assert (again.findings, again.compared[-1]) == ([], num_versions)


def test_a_ledger_without_what_was_signed_is_one_line(config: RunConfig) -> None:
    file = ledger(config, "alpha") / outcome_path("beta", NUM_VERSIONS)
    file.unlink()
    message = one_line_error(OwnLedger(config, "alpha").open, build_contract(config))
    assert message == (
        f"run directory: {file} is missing, which a silo has signed of version {NUM_VERSIONS}; restore it; a run that "
        "was begun by an atoll that kept none goes on with that one"
    )
