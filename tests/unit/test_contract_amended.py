"""Amendments of a signed run's contract: the real aggregator in this process, deliveries that are written by hand."""

import dataclasses
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pretrain.aggregate import Aggregator, OuterState
from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.agreement import propose_amendment, sign_amendment, sign_contract
from pretrain.exchange.amended import Proposal
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.words import Membership
from pretrain.federation import contract
from pretrain.federation.contract import Agreed, rotate
from pretrain.federation.relay import Relay
from pretrain.federation.verify import StoreVerifier, Verified
from pretrain.trust.amendment import Acceptance
from pretrain.trust.keys import load_signer, new_key
from pretrain.trust.ledger import Commit, Manifest, RefusedError, sha256_bytes
from pretrain.trust.members import own_signer, with_keys
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.test_aggregate import GOOD, one_version, start, times
from tests.unit.test_aggregate_restart import assert_same_state
from tests.unit.test_signed import as_member, begin, manifest_file
from tests.waiting import PATIENCE_SECONDS, wait_for

QUORUM = {"quorum": 2, "deadline_floor_seconds": 0.0, "deadline_ceiling_seconds": 0.5}
LR = "outer.lr=0.25"


def deliver(config: RunConfig, state: OuterState, silo: str, factor: float = 2, *, tokens: int = 100) -> None:
    """As the silo would: by the terms of the version, signed with the key that holds there."""
    GOOD.deliver(config, silo, state, times(state, factor), tokens=tokens)
    member, file = as_member(config, silo), manifest_file(config, silo, state.version + 1)
    manifest = Manifest.from_bytes(file.read_bytes())
    manifest = dataclasses.replace(manifest, contract_sha256=member.terms_sha256(manifest.version))
    file.write_bytes(member.members.sign(manifest).to_bytes())


def make_version(config: RunConfig, aggregator: Aggregator, state: OuterState, silos: Sequence[str] = ()) -> Commit:
    for place, silo in enumerate(silos or config.full_roster):
        deliver(config, state, silo, 2 + place, tokens=100 * (1 + place))
    one_version(aggregator, state)
    return as_member(config, OPERATOR).read_commit(state.version)


def propose(config: RunConfig, member: str, from_version: int, *changes: str) -> Proposal:
    return propose_amendment(as_member(config, member), config, member, from_version=from_version, changes=changes)


def sign(config: RunConfig, member: str, number: int = 1) -> list[str]:
    """Whose signatures are missing then."""
    agreed = Agreed.at(config.store_url)
    agreed.exchange.members.signer = own_signer(config, member)
    return contract.sign(agreed, member, number)


def verified(config: RunConfig, tmp_path: Path) -> Verified:
    return StoreVerifier(StoreExchange(config.store_url), tmp_path / "scratch", tell=lambda line: None).verify()


@pytest.fixture(scope="module")
def ready(tiny_config: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, RunConfig]]:
    """A run at version 0, and alpha's view of it; nobody may change it."""
    settings = {"inner": {"num_steps": 16}, "trust": {"directory": ""}}
    config = with_keys(tiny_config(tmp_path_factory.mktemp("ready"), **settings), make=True)
    begin(config)
    return lambda: (as_member(config, "alpha"), config)


# ---- settings


def test_a_complete_amendment_holds_from_its_version_on(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Whatever was restarted, and in between: the learning rate is another one in versions 3 and 4, and only there."""
    config = make()
    aggregator, state = begin(config)
    proposal = propose(config, "alpha", 3, LR)
    assert proposal.missing == ["beta"]
    make_version(config, aggregator, state)
    assert sign(config, "beta") == []
    make_version(config, aggregator, state)
    before = {name: value.double() for name, value in state.parameters.items()}
    velocity = {name: value.double().clone() for name, value in state.kept["velocity"].items()}
    aggregator, state = start(config)  # from version 0's outer state, with what was delivered since
    commit = make_version(config, aggregator, state)
    assert commit.contract_sha256 == proposal.sha256
    momentum = config.outer.momentum
    for name, value in before.items():  # locals 2p and 3p of 100 and 200 tokens are a pseudo-gradient of -5/3 p
        gradient = -5 / 3 * value
        moved = momentum * velocity[name] + gradient
        expected = value - 0.25 * (gradient + momentum * moved)
        assert (state.parameters[name].double() - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert_same_state(start(config)[1], state)
    make_version(config, *(aggregator, state))
    found = verified(config, tmp_path)
    assert (found.findings, found.num_amendments, found.merged) == ([], 1, [1, 2, 3, 4])
    first = sha256_bytes((Path(config.store_url) / "contract.json").read_bytes())
    shas = [as_member(config, "beta").read_commit(version).contract_sha256 for version in range(5)]
    assert shas == [first] * 3 + [proposal.sha256] * 2


def test_an_amendment_without_its_signatures_does_nothing(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Nor what beta signs when it is too late; an operator who takes it for complete is found out by all."""
    config = make()
    aggregator, state = begin(config)
    proposal = propose(config, "alpha", 3, LR)
    for _ in range(2):
        make_version(config, aggregator, state)
    assert one_line_error(sign, config, "beta").startswith("--from: 3 given; allowed: 4 to 4, as silos may be at work")
    late = as_member(config, "beta")
    sign_amendment(late, late.amendments.read(late.objects)[0], "beta")
    sha256 = as_member(config, "beta").contract_sha256
    assert [make_version(config, aggregator, state).contract_sha256 for _ in range(2)] == [sha256] * 2
    assert not list(Path(config.store_url).glob("amendments/*.accepted"))
    assert not verified(config, tmp_path).findings
    forged = as_member(config, OPERATOR)
    name = "global/000003/commit.json"
    commit = dataclasses.replace(forged.read_commit(3), contract_sha256=proposal.sha256)
    forged.objects.delete(name)
    forged.objects.write(name, forged.members.sign(commit).to_bytes())
    with pytest.raises(RefusedError, match=r"^commit 3 belongs to contract "):
        as_member(config, "beta").read_commit(3)


def test_who_goes_by_the_old_terms_is_refused(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A delivery that is signed for the contract as it was, and the operator's commit, by silos and atoll verify."""
    config = make()
    aggregator, state = begin(config)
    propose(config, "alpha", 3, LR)
    sign(config, "beta")
    for _ in range(2):
        make_version(config, aggregator, state)
    operator, beta = as_member(config, OPERATOR), as_member(config, "beta")
    GOOD.deliver(config, "beta", state, times(state, 2))
    file = manifest_file(config, "beta", 3)
    manifest = dataclasses.replace(Manifest.from_bytes(file.read_bytes()), contract_sha256=beta.contract_sha256)
    data = beta.members.sign(manifest).to_bytes()
    with pytest.raises(RefusedError, match=r"^its contract_sha256 is "):
        aggregator._merger.verify("beta", data, state, 3)
    make_version(config, aggregator, state)
    name, sha256 = "global/000003/commit.json", operator.contract_sha256
    old = operator.members.sign(dataclasses.replace(operator.read_commit(3), contract_sha256=sha256))
    operator.objects.delete(name)
    operator.objects.write(name, old.to_bytes())
    line = "commit 3 goes by the contract as it was written; allowed: amendment 1, which holds there"
    with pytest.raises(RefusedError, match=f"^{line}$"):
        as_member(config, "beta").read_commit(3)
    assert line in [finding.what for finding in verified(config, tmp_path).findings]


def test_an_acceptance_of_what_nobody_has_signed_is_refused_by_name(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The operator cannot make the rules: whoever reads such a word stops."""
    config = make()
    begin(config)
    proposal = propose(config, "alpha", 3, LR)
    operator = as_member(config, OPERATOR)
    for by in ("beta", OPERATOR):
        exchange = as_member(config, by)
        accepted = exchange.members.sign(Acceptance(amendment_sha256=proposal.sha256, version=1))
        operator.objects.delete("amendments/000001.accepted")
        operator.objects.write("amendments/000001.accepted", accepted.to_bytes())
        if by == "beta":
            assert as_member(config, "alpha").members.later == []
    assert one_line_error(as_member, config, "alpha") == (
        f"exchange.url: {config.store_url} given; amendments/000001.json, which the operator has accepted: the "
        "signature of beta is missing"
    )
    what = "amendments/000001.json, which the operator has accepted: the signature of beta is missing"
    assert [finding.what for finding in verified(config, tmp_path).findings] == [what]


def test_k_of_n_silos_are_enough_where_the_contract_says_so(make: Callable[..., RunConfig]) -> None:
    """The operator is none of them. With two fragments silos work on a version more ahead."""
    config = make(trust={"amend": "1"}, outer={"lr": 0.5, "num_fragments": 2})
    begin(config)
    assert one_line_error(propose, config, "alpha", 2, LR).startswith(
        "--from: 2 given; allowed: 3 to 9, as silos may be"
    )
    assert propose(config, OPERATOR, 3, LR).missing == ["alpha", "beta"]
    assert one_line_error(sign, config, OPERATOR).startswith("--silo: 'aggregator' given; allowed: alpha, beta, whose")
    assert sign(config, "beta") == []
    assert propose(config, "alpha", 4, LR).missing == []
    assert one_line_error(make, trust={"amend": "3"}).startswith(
        "trust.amend: '3' given; allowed: all, or 1 to the 2 silos"
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            ["inner.lr=0.1"],
            "inner.lr: cannot be amended: it would be another run; allowed: trust.keys.NAME, membership",
        ),
        (["outer.codec=int4"], "outer.codec: cannot be amended: it would be another run; allowed: "),
        (["outer.lr"], "change 'outer.lr' given; allowed: key=value"),
        (["outer.lr=fast"], "outer.lr: 'fast' given; allowed: a number, or null"),
        (["outer.lr=-1"], "outer.lr: -1.0 given; allowed: above 0"),
        (["outer.lr=null"], "outer.lr: null given; allowed: above 0"),
        (["outer.lr=1", "outer.lr=2"], "outer.lr: given twice; allowed: once"),
        ([], "0 changes given; allowed: 1 to 32"),
        (["membership.quorum=1"], "membership.quorum: 1 given; allowed: another one where there is one already"),
        (["trust.keys.alpha="], "trust.keys.alpha: '' given; allowed: with a membership.quorum of 1 or less, as no"),
        (["trust.keys.gamma="], "trust.keys.gamma: given; allowed: aggregator, alpha, beta"),
        (["trust.keys.aggregator="], "trust.keys.aggregator: taken away; allowed: another key, as nobody could commit"),
        (["trust.keys.alpha=x"], "trust.keys.alpha: 'x' given; allowed: atoll-key-1: and 86 characters of base64url"),
        (["trust.keys.alpha=", "outer.lr=1"], "trust.keys.alpha: given with other changes; allowed: alone, as others"),
    ],
)
def test_what_cannot_be_amended_is_one_line(
    changes: list[str], line: str, ready: Callable[..., tuple[StoreExchange, RunConfig]]
) -> None:
    exchange, config = ready()
    with pytest.raises(ConfigError) as raised:
        propose_amendment(exchange, config, "alpha", from_version=3, changes=changes)
    assert str(raised.value).startswith(line)
    assert not exchange.objects.names("amendments")


@pytest.mark.parametrize("from_version", [-1, 0, 1, 5])
def test_an_amendment_holds_at_versions_that_nobody_works_on(
    from_version: int, ready: Callable[..., tuple[StoreExchange, RunConfig]]
) -> None:
    exchange, config = ready()
    with pytest.raises(ConfigError) as raised:
        propose_amendment(exchange, config, "alpha", from_version=from_version, changes=[LR])
    allowed = "allowed: 2 to 4, as silos may be at work on the versions before"
    assert str(raised.value) == f"--from: {from_version} given; {allowed}"


# ---- keys


def test_a_rotated_key_signs_from_its_version_on(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Of a silo and of the operator; the old key is refused from then on, the new one before; restarts find both."""
    config = make()
    aggregator, state = begin(config)
    agreed, keys = Agreed.at(config.store_url), Path(config.directory) / "keys"
    for number, member in enumerate(("beta", OPERATOR), start=1):
        proposal, file = rotate(agreed, member, keys, 3)
        assert (proposal.missing, proposal.amendment.number, file) == ([], number, keys / f"{member}.key.1")
    assert load_signer(keys / "beta.key").public.text == config.trust.keys["beta"]
    for version in range(1, 5):
        sha256 = as_member(config, "beta").terms_sha256(version)
        GOOD.deliver(config, "beta", state, times(state, 2))
        file = manifest_file(config, "beta", version)
        manifest = dataclasses.replace(Manifest.from_bytes(file.read_bytes()), contract_sha256=sha256)
        for key, counts in (("beta.key", version < 3), ("beta.key.1", version >= 3)):
            signer = load_signer(keys / key)
            signed = dataclasses.replace(
                manifest, signature=signer.sign("manifest", dataclasses.replace(manifest, signature=None).to_bytes())
            )
            file.write_bytes(signed.to_bytes())
            assert as_member(config, OPERATOR).is_delivered("beta", version) == counts
        make_version(config, aggregator, state)
        aggregator, state = start(config)
    found = verified(config, tmp_path)
    assert (found.findings, found.num_amendments, found.merged) == ([], 2, [1, 2, 3, 4])
    exchange = as_member(config, "alpha")
    signers = [exchange.members.keys_at(version)[OPERATOR] for version in (2, 3)]
    assert signers == [load_signer(keys / key).public for key in ("aggregator.key", "aggregator.key.1")]
    with pytest.raises(RefusedError, match="not of these bytes by the key"):
        exchange.members.check(OPERATOR, exchange.read_commit(4), version=2)
    # A word of the old key counts on: beta replaced it itself.
    word = Membership(left=False, version=0)
    name = "silos/beta/membership/000000.json"
    old = load_signer(keys / "beta.key").sign("word", word.to_sign(exchange.contract_sha256, name))
    exchange.objects.write(name, dataclasses.replace(word, signature=old).to_bytes())
    assert exchange.membership("beta") == word


SIGNING = """
import base64, json, os, pathlib, sys
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

for path in pathlib.Path(sys.argv[1]).iterdir():
    key = json.loads(path.read_text())
    if key["public"] == os.environ["ATOLL_KEY"]:
        secret = Ed25519PrivateKey.from_private_bytes(base64.urlsafe_b64decode(key["signing"] + "="))
        sys.stdout.buffer.write(secret.sign(sys.stdin.buffer.read()))
"""


def test_a_key_behind_a_command_is_rotated(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Beta's machine has public lines alone; the command is told which of its keys is to sign."""
    config = make(inner={"num_steps": 12})
    keys, token, program = Path(config.directory) / "keys", tmp_path / "token", tmp_path / "sign.py"
    token.mkdir()
    program.write_text(SIGNING)
    aggregator, state = begin(config)
    shutil.move(keys / "beta.key", token)
    (keys / "beta.key").write_text(config.trust.keys["beta"] + "\n")
    successor, command = new_key(token / "beta.key.1", "beta"), [sys.executable, str(program), str(token)]
    agreed = Agreed.at(config.store_url)
    assert "; allowed: the private one of atoll keys new, or a key_command" in one_line_error(
        rotate, agreed, "beta", keys, 2
    )
    assert one_line_error(rotate, agreed, "beta", keys, 2, command).startswith(
        f"{keys / 'beta.key.1'}: not there; allowed: the public line of the key that the key_command is to sign with"
    )
    (keys / "beta.key.1").write_text(successor.text + "\n")
    proposal, file = rotate(agreed, "beta", keys, 2, command)
    assert (proposal.missing, file) == ([], keys / "beta.key.1")
    beta = dataclasses.replace(config, trust=dataclasses.replace(config.trust, key_command=command))
    for version in (1, 2):
        deliver(config, state, "alpha")
        deliver(beta, state, "beta")
        one_version(aggregator, state)
        assert state.version == version
    found = verified(config, tmp_path)
    assert (found.findings, found.num_amendments, found.merged) == ([], 1, [1, 2])


def test_who_changes_its_key_signs_again_what_holds_later(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Both are complete before either is accepted; then the second is not: beta has another key by then."""
    config = make()
    aggregator, state = begin(config)
    rotate(Agreed.at(config.store_url), "beta", Path(config.directory) / "keys", 3)
    propose(config, "alpha", 4, LR)
    assert sign(config, "beta", 2) == []
    make_version(config, aggregator, state)
    assert [terms.number for terms in as_member(config, "beta").members.later] == [1]
    assert sign(config, "beta", 2) == []
    for _ in range(3):
        make_version(config, aggregator, state)
    assert [terms.number for terms in as_member(config, "beta").members.later] == [1, 2]
    assert not verified(config, tmp_path).findings


def test_nobody_replaces_anothers_key(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Alone; nor one's own with a key that is not here."""
    config = make(outer={"lr": 0.5}, membership=QUORUM | {"quorum": 1})
    begin(config)
    stolen = new_key(tmp_path / "alpha.key.9", "alpha")
    proposal = propose(config, "beta", 3, f"trust.keys.alpha={stolen.text}")
    assert proposal.missing == [OPERATOR, "alpha"], "as there is no third silo; and alpha proves that it has the key"
    change = f"trust.keys.beta={new_key(tmp_path / 'beta.key.9', 'beta').text}"
    assert " none of " in one_line_error(propose, config, "beta", 3, change)
    assert as_member(config, "beta").objects.names("amendments") == ["000001", "000001.json"]


def test_the_run_goes_on_without_a_revoked_member(
    make: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others sign, not it; from its version on what its key signs counts as not there, and is named."""
    config = make(silos={"gamma": {}}, outer={"lr": 0.5, "max_share": 1.0}, membership=QUORUM, trust={"amend": "all"})
    aggregator, state = begin(config)
    for silo in config.full_roster:
        as_member(config, silo).announce(silo, left=False, version=0)
    proposal = propose(config, "alpha", 2, "trust.keys.beta=")
    assert proposal.missing == ["gamma"]
    assert one_line_error(sign, config, "beta") == "--silo: 'beta' given; allowed: alpha, gamma, whose signatures count"
    assert sign(config, "gamma") == []
    commit = make_version(config, aggregator, state)
    assert [one.silo for one in commit.contributors] == ["alpha", "beta", "gamma"]
    beta = as_member(config, "beta")
    GOOD.deliver(config, "beta", state, times(state, 1000))
    file = manifest_file(config, "beta", 2)
    manifest = dataclasses.replace(Manifest.from_bytes(file.read_bytes()), contract_sha256=beta.terms_sha256(2))
    file.write_bytes(dataclasses.replace(manifest, signature=_by(config, "beta", manifest)).to_bytes())
    commit = make_version(config, aggregator, state, ["alpha", "gamma"])
    assert [one.silo for one in commit.contributors] == ["alpha", "gamma"]
    said = "silos/beta/000002/manifest.json is passed over: the key of beta counts no more from version 2 on"
    assert said in capsys.readouterr().out
    line = one_line_error(beta.members.sign, manifest)
    assert line.endswith(
        "which counts no more from version 2 on, as the contract is amended; allowed: a member with a key"
    )
    assert_same_state(start(config)[1], state)
    found = verified(config, tmp_path)
    assert [one.name for one in found.findings if not one.of_chain] == ["silos/beta/000002/manifest.json"]
    assert (len(found.findings), found.num_words, found.num_past_words) == (1, 3, 1)  # beta's, of joining
    assert one_line_error(propose, config, "alpha", 4, "trust.keys.gamma=").startswith(
        "trust.keys.gamma: '' given; allowed: with a membership.quorum of 1 or less"
    )


def test_who_lost_its_key_is_given_another_by_the_others(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """And what the lost one has said, or says, counts no more, words too."""
    config = make(silos={"gamma": {}}, membership=QUORUM)
    aggregator, state = begin(config)
    as_member(config, "beta").announce("beta", left=False, version=0)
    lost, file = load_signer(config.key_file("beta")), config.key_file("beta")
    file.unlink()
    change = f"trust.keys.beta={new_key(file.with_name('beta.key.1'), 'beta').text}"
    assert propose(config, "alpha", 2, change).missing == ["gamma", "beta"]
    assert sign(config, "gamma") == ["beta"]
    assert sign(config, "beta") == []
    make_version(config, aggregator, state, ["alpha", "gamma"])
    operator = as_member(config, OPERATOR)
    assert operator.membership("beta") is None
    commit = make_version(config, aggregator, state)
    assert [one.silo for one in commit.contributors] == ["alpha", "beta", "gamma"]
    _, data = operator.contributed(commit.contributors[1])
    manifest = dataclasses.replace(Manifest.from_bytes(data), signature=None)
    manifest = dataclasses.replace(manifest, signature=lost.sign("manifest", manifest.to_bytes()))
    with pytest.raises(RefusedError, match="not of these bytes by the key"):
        operator.check("beta", manifest)
    as_member(config, "beta").announce("beta", left=False, version=2)
    assert operator.membership("beta") == Membership(left=False, version=2)


def _by(config: RunConfig, silo: str, manifest: Manifest) -> str:
    """A signature by a silo's first key, whatever holds."""
    unsigned = dataclasses.replace(manifest, signature=None)
    return load_signer(config.key_file(silo)).sign("manifest", unsigned.to_bytes())


def test_signatures_pass_a_relay(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Alpha is behind it: its signatures go out, amendments and what was accepted of them come in."""
    config = make()
    here = dataclasses.replace(
        config,
        directory=str(tmp_path / "site"),
        roster=config.full_roster,
        silos={"alpha": config.silos["alpha"]},
        exchange=dataclasses.replace(config.exchange, url=str(tmp_path / "site" / "store")),
        trust=dataclasses.replace(config.trust, directory=f"{config.directory}/keys"),
    )
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(start, config)
        wait_for((Path(config.store_url) / "signatures" / f"{OPERATOR}.json").exists)
        relay = Relay(here, config.store_url)
        relay.start()
        sign_contract(as_member(here, "alpha"), "alpha")
        sign_contract(as_member(config, "beta"), "beta")
        relay.copy()
        aggregator, state = starting.result(PATIENCE_SECONDS)
    assert propose(config, "beta", 3, LR).missing == ["alpha"]
    relay.copy()
    assert sign(here, "alpha") == []
    relay.copy()
    make_version(config, aggregator, state)
    relay.copy()
    assert [terms.from_version for terms in as_member(here, "alpha").members.later] == [3]
