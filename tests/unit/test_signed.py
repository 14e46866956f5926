"""A store in which everything is signed: the real aggregator in this process, and somebody else who can write there."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from pretrain.aggregate import Aggregator, OuterState
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.agreement import agree, not_signed, sign_contract
from pretrain.exchange.history import History
from pretrain.exchange.rollback import is_rolling_back, roll_back_store, rollback_records
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.words import Membership, Refusal
from pretrain.federation.leave import say_left
from pretrain.federation.verify import StoreVerifier
from pretrain.sync.through_store import ThroughStore
from pretrain.trust.keys import PublicKey, load_signer, new_key
from pretrain.trust.ledger import RECORD_BYTES, Commit, Manifest, RefusedError, sha256_bytes
from pretrain.trust.members import Members, own_signer, public_keys, with_keys
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.test_aggregate import GOOD, one_version, start, times
from tests.unit.test_aggregate_restart import assert_same_state
from tests.waiting import PATIENCE_SECONDS, wait_for


@pytest.fixture
def config(signed_config: RunConfig) -> RunConfig:
    return signed_config


def as_member(config: RunConfig, name: str) -> StoreExchange:
    exchange = StoreExchange(config.store_url)
    exchange.members.signer = own_signer(config, name)
    assert exchange.read_contract()
    return exchange


def begin(config: RunConfig) -> tuple[Aggregator, OuterState]:
    """All members sign while the aggregator starts."""
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(start, config)
        wait_for((Path(config.store_url) / "signatures" / f"{OPERATOR}.json").exists)
        for silo in config.full_roster:
            sign_contract(as_member(config, silo), silo)
        return starting.result(PATIENCE_SECONDS)


def manifest_file(config: RunConfig, silo: str, version: int) -> Path:
    return Path(config.store_url) / "silos" / silo / f"{version:06d}" / "manifest.json"


def sign_delivery(config: RunConfig, silo: str, version: int, signer: str) -> None:
    """Sign what was written by hand."""
    file = manifest_file(config, silo, version)
    file.write_bytes(as_member(config, signer).members.sign(Manifest.from_bytes(file.read_bytes())).to_bytes())


def deliver(config: RunConfig, state: OuterState, silo: str, *, signer: str = "", factor: float = 2) -> None:
    GOOD.deliver(config, silo, state, times(state, factor))
    sign_delivery(config, silo, state.version + 1, signer or silo)


# ---- what is signed


def test_all_records_are_signed_by_their_authors(config: RunConfig) -> None:
    aggregator, state = begin(config)
    for silo in config.full_roster:
        deliver(config, state, silo)
    one_version(aggregator, state)
    exchange = StoreExchange(config.store_url)
    exchange.read_contract()
    assert {name: key.text for name, key in exchange.members.keys.items()} == config.trust.keys
    assert (exchange.newest_version(), exchange.read_commit(1).version) == (1, 1)
    assert History(exchange, 1).read_snapshot(1).version == 1
    assert not not_signed(exchange)
    assert_same_state(start(config)[1], state)  # a restart asks nobody again
    other = Members(keys=dict.fromkeys(exchange.members.keys, exchange.members.keys["beta"]))
    with pytest.raises(RefusedError, match="signature of the commit: not of these bytes by the key"):
        other.check(OPERATOR, exchange.read_commit(1))


def test_nothing_begins_before_all_have_signed(config: RunConfig, said: Callable[[], str]) -> None:
    store = Path(config.store_url)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(start, config)
        wait_for((store / "signatures" / f"{OPERATOR}.json").exists)
        alpha = as_member(config, "alpha")
        sign_contract(alpha, "alpha")
        assert not_signed(alpha) == ["beta"]
        # Alpha's signature is none of beta's, and one under another contract is none under this one.
        shutil.copy(store / "signatures" / "alpha.json", store / "signatures" / "beta.json")
        assert not_signed(alpha) == ["beta"]
        wait_for(lambda: "waiting for the signature of beta under the contract\n" in said())
        assert not (store / "global").exists()
        sign_contract(as_member(config, "beta"), "beta")
        state = starting.result(PATIENCE_SECONDS)[1]
    assert state.version == 0
    assert f"{store}: signatures/beta.json is passed over: " in said()


def test_a_silo_that_is_shown_another_history_tells_the_others(config: RunConfig, tmp_path: Path) -> None:
    """The operator shows beta a commit 1 of its own, with the same parameters: beta's next manifest says so."""
    aggregator, state = begin(config)
    alpha = ThroughStore(config, "alpha")
    alpha._store.read_contract()
    alpha._delivered.begin(3)  # its own were sent by an earlier start
    for version in (1, 2):
        for silo in config.full_roster:
            deliver(config, state, silo)
        if version == 2:
            operator = as_member(config, OPERATOR)
            shown = dataclasses.replace(operator.read_commit(1), metrics={})
            cosigned = sha256_bytes(operator.members.sign(shown).to_bytes())
            file = manifest_file(config, "beta", 2)
            file.write_bytes(dataclasses.replace(Manifest.from_bytes(file.read_bytes()), cosigned=cosigned).to_bytes())
            sign_delivery(config, "beta", 2, "beta")
            aggregator._collector.past.check_cosigned = lambda manifest: None  # type: ignore[method-assign]  # the operator's
        one_version(aggregator, state)
        alpha.receive(version, None, state.parameters)
    line = one_line_error(alpha.receive, 3, None, state.parameters)
    found = f"silo beta had adopted commit {cosigned[:12]} when it delivered for version 2, which is none of this chain"
    assert line.startswith(f"silo alpha: version 2 in the store cannot be used: {found}: it was shown another history")
    (tmp_path / "scratch").mkdir()
    findings = StoreVerifier(StoreExchange(config.store_url), tmp_path / "scratch").verify().findings
    assert [(finding.version, finding.name) for finding in findings] == [(2, "silos/beta/000002/manifest.json")]
    assert findings[0].what.startswith(found)


@pytest.mark.parametrize("is_shown", [True, False])
def test_a_silo_that_signs_two_histories_is_refused_and_the_others_go_on(
    is_shown: bool, config: RunConfig, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the operator shows what beta signed for the one that was merged; it could have made that up."""
    aggregator, state = begin(config)
    alpha = ThroughStore(config, "alpha")
    alpha._store.read_contract()
    alpha._delivered.begin(4)
    for version in (1, 2):
        for silo in config.full_roster:
            deliver(config, state, silo)
        one_version(aggregator, state)
        alpha.receive(version, None, state.parameters)
    file = manifest_file(config, "beta", 2)
    merged, cosigned = file.read_bytes(), "e" * 64
    file.write_bytes(dataclasses.replace(Manifest.from_bytes(merged), cosigned=cosigned).to_bytes())
    sign_delivery(config, "beta", 2, "beta")
    if not is_shown:
        monkeypatch.setattr("pretrain.sync.through_store.POLLS_FOR_REPAIR", 10)
        line = one_line_error(alpha.receive, 3, None, state.parameters)
        found = f"silo beta had adopted commit {cosigned[:12]} when it delivered for version 2, which is none of this"
        assert line.startswith(f"silo alpha: version 2 in the store cannot be used: {found}")
        return
    with ThreadPoolExecutor(2) as pool:
        receiving = pool.submit(alpha.receive, 3, None, state.parameters)
        making = pool.submit(one_version, aggregator, state)
        wait_for(lambda: file.exists() and file.read_bytes() == merged)
        wait_for(lambda: "version 2: silo beta has signed two histories; this one goes on\n" in said())
        for silo in config.full_roster:
            deliver(config, state, silo)
        making.result(PATIENCE_SECONDS)
        assert receiving.result(PATIENCE_SECONDS).commit.version == 3
    why = "it has signed another one for this version, which was merged"
    assert [(one.reason, one.final) for one in as_member(config, "beta").refusals("beta", 2)] == [(why, False)]
    assert f"version 2: refused the delivery of silo beta: {why}\n" in said()


@pytest.mark.parametrize("what", ["gone", "somebody's", "too long", "another of its own", "no file"])
def test_a_silo_without_the_others_manifests_goes_on(what: str, config: RunConfig, said: Callable[[], str]) -> None:
    """Behind a relay there are none but its own; and who can write to the store can replace what was merged."""
    aggregator, state = begin(config)
    alpha = ThroughStore(config, "alpha")
    alpha._store.read_contract()
    alpha._delivered.begin(4)
    for version in (1, 2, 3):
        for silo in config.full_roster:
            deliver(config, state, silo)
        one_version(aggregator, state)
        file = manifest_file(config, "beta", version)
        data = file.read_bytes()
        file.unlink()
        if what == "no file":
            file.mkdir()
        elif what != "gone":
            other = data.replace(b'"tokens": ', b'"tokens": 1')
            file.write_bytes(bytes(RECORD_BYTES + 1) if what == "too long" else other)
        if what == "another of its own":
            sign_delivery(config, "beta", version, "beta")
        assert alpha.receive(version, None, state.parameters).commit.version == version
    assert ("silos/beta/000002/manifest.json is passed over: " in said()) == (what not in ("gone", "no file"))


@pytest.mark.parametrize("what", ["other terms", "no JSON", "too long"])
def test_whoever_replaces_the_newest_commit_stops_nobody(what: str, config: RunConfig, said: Callable[[], str]) -> None:
    """While all run, and just before the next one is made: the operator's own takes its place again."""
    aggregator, state = begin(config)
    alpha = ThroughStore(config, "alpha")
    alpha._store.read_contract()
    alpha._delivered.begin(4)
    for silo in config.full_roster:
        deliver(config, state, silo)
    one_version(aggregator, state)
    alpha.receive(1, None, state.parameters)
    file = Path(config.store_url) / "global" / "000001" / "commit.json"
    true = file.read_bytes()
    other = {
        "other terms": true.replace(b'"divisor": 2', b'"divisor": 3'),
        "no JSON": b"{",
        "too long": b" " * (5 << 20),
    }
    assert other[what] != true
    file.write_bytes(other[what])
    with ThreadPoolExecutor(2) as pool:
        receiving = pool.submit(alpha.receive, 2, None, state.parameters)
        alpha._next_look = 0
        collecting = pool.submit(aggregator.collect, state)
        wait_for(lambda: file.exists() and file.read_bytes() == true)
        for silo in config.full_roster:
            deliver(config, state, silo)
        deliveries = collecting.result(PATIENCE_SECONDS)
        file.write_bytes(other[what])
        aggregator.commit(state, deliveries, aggregator.merge(state, deliveries))
        assert receiving.result(PATIENCE_SECONDS).commit.version == 2
    assert file.read_bytes() == true
    assert said().count("version 1: somebody has replaced its commit; it was written again\n") == 2


def test_a_silo_stops_at_a_delivery_that_was_merged_unsigned(config: RunConfig) -> None:
    """The operator invents what beta has sent."""
    aggregator, state = begin(config)
    alpha = ThroughStore(config, "alpha")
    alpha._store.read_contract()
    alpha._delivered.begin(4)
    for version in (1, 2):
        deliver(config, state, "alpha")
        deliver(config, state, "beta", signer="beta" if version == 1 else "alpha")
        if version == 2:
            aggregator._exchange._is_by = lambda *_: True  # type: ignore[method-assign]  # the operator's own
            aggregator._exchange.check = lambda *_, **__: None  # type: ignore[method-assign]
        one_version(aggregator, state)
        alpha.receive(version, None, state.parameters)
    line = one_line_error(alpha.receive, 3, None, state.parameters)
    assert line.startswith("silo alpha: version 2 in the store cannot be used: signature of the manifest: not of these")


def test_a_signature_that_was_replaced_or_taken_away_comes_again(config: RunConfig) -> None:
    begin(config)
    file, beta = (Path(config.store_url) / "signatures" / f"{name}.json" for name in ("alpha", "beta"))
    stands, kept, found = file.read_bytes(), beta.read_bytes(), list[bool]()
    beta.unlink()

    def pause() -> None:
        found.append(file.read_bytes() == stands)
        if len(found) == 1:
            file.write_bytes(b"{}")
        elif len(found) == 2:
            file.unlink()
        else:
            beta.write_bytes(kept)

    agree(as_member(config, "alpha"), config, "alpha", pause)
    assert found == [True] * 3
    assert file.read_bytes() == stands
    file.unlink()
    file.mkdir()
    said = one_line_error(sign_contract, as_member(config, "alpha"), "alpha")
    assert said.endswith("signatures/alpha.json cannot be written: something else has the name; take it away")


# ---- what somebody else writes


@pytest.mark.parametrize("signer", ["", "beta", OPERATOR, "stranger"])
def test_a_delivery_in_anothers_name_counts_as_none(
    signer: str, config: RunConfig, tmp_path: Path, said: Callable[[], str]
) -> None:
    """It was there first; alpha delivers in its place, nothing is refused, and no try of alpha's is used up."""
    aggregator, state = begin(config)
    deliver(config, state, "beta")
    GOOD.deliver(config, "alpha", state, times(state, 1000), tokens=10**6)
    if signer == "stranger":
        new_key(tmp_path / "stranger.key", "stranger")
        members = dataclasses.replace(as_member(config, "beta").members, signer=load_signer(tmp_path / "stranger.key"))
        file = manifest_file(config, "alpha", 1)
        file.write_bytes(members.sign(Manifest.from_bytes(file.read_bytes())).to_bytes())
    elif signer:
        sign_delivery(config, "alpha", 1, signer)
    alpha = as_member(config, "alpha")
    assert not alpha.is_delivered("alpha", 1)
    with ThreadPoolExecutor(1) as pool:
        collecting = pool.submit(aggregator.collect, state)
        wait_for(lambda: "silos/alpha/000001/manifest.json is passed over" in said())
        folder = tmp_path / "outbox"
        shutil.copytree(manifest_file(config, "alpha", 1).parent, folder)
        manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes())
        manifest = alpha.members.sign(dataclasses.replace(manifest, tokens=100))
        alpha.deliver(manifest, [(payload, folder / payload.file) for payload in manifest.payloads])
        deliveries = collecting.result(PATIENCE_SECONDS)
    assert [delivery.manifest.tokens for delivery in deliveries] == [100, 100]
    assert alpha.refusals("alpha", 1) == []


def test_a_version_that_the_aggregator_has_not_signed_is_none(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """A silo that can write to the store makes version 1 itself: nobody takes it, and the true one takes its place."""
    aggregator, state = begin(config)
    beta = as_member(config, "beta")
    forged = dataclasses.replace(
        beta.read_commit(0), version=1, previous="0" * 64, parameters_digest="f" * 64, signature=None
    )
    forged = beta.members.sign(forged)
    beta.objects.write("global/000001/commit.json", forged.to_bytes())
    alpha = as_member(config, "alpha")
    assert (alpha.newest_version(), alpha.newest_version(0)) == (0, 0)
    with pytest.raises(RefusedError):
        alpha.read_commit(1)
    for silo in config.full_roster:
        deliver(config, state, silo)
    one_version(aggregator, state)
    assert alpha.newest_version(0) == 1
    assert alpha.read_commit(1).parameters_digest == state.parameters_digest
    assert "global/000001/commit.json is passed over: signature of the commit: " in capsys.readouterr().out


def rewritten(change: Callable[[Commit], Commit]) -> Callable[[bytes], bytes]:
    return lambda data: change(Commit.from_bytes(data)).to_bytes()


@pytest.mark.parametrize(
    "change",
    [
        rewritten(lambda commit: dataclasses.replace(commit, divisor=7)),
        rewritten(lambda commit: dataclasses.replace(commit, signature=None)),
        rewritten(lambda commit: dataclasses.replace(commit, contributors=commit.contributors[:1])),
    ],
)
def test_a_commit_that_was_changed_later_is_refused(change: Callable[[bytes], bytes], config: RunConfig) -> None:
    aggregator, state = begin(config)
    for silo in config.full_roster:
        deliver(config, state, silo)
    one_version(aggregator, state)
    file = Path(config.store_url) / "global" / "000001" / "commit.json"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(RefusedError, match=r"^(signature of the commit|the commit is not signed)"):
        as_member(config, "alpha").read_commit(1)


def test_a_rollback_that_the_aggregators_operator_has_not_signed_is_none(
    config: RunConfig, said: Callable[[], str]
) -> None:
    """Nothing is deleted, nobody waits for its end, and the operator's own takes its name."""
    aggregator, state = begin(config)
    for silo in config.full_roster:
        deliver(config, state, silo)
    one_version(aggregator, state)
    aggregator.snapshots.finish()
    beta = as_member(config, "beta")
    record = {
        "format": 2,
        "previous": None,
        "from_version": 1,
        "to_version": 0,
        "commit_sha256": "0" * 64,
        "discarded": [],
        "reason": "",
        "signature": None,
    }
    beta.objects.write("rollbacks/000001.json", json.dumps(record).encode())
    assert rollback_records(beta, config) == []
    assert not is_rolling_back(beta)
    assert "rollbacks/000001.json is passed over: the rollback is not signed" in said()
    assert_same_state(start(config)[1], state)
    assert beta.newest_version() == 1
    assert roll_back_store(StoreExchange(config.store_url), to=0, key=config.key_file(OPERATOR)).to_version == 0
    assert [record["to_version"] for record in rollback_records(beta, config)] == [0]
    assert start(config)[1].version == 0


def test_words_that_nobody_has_signed_are_not_said(
    tmp_path: Path, tiny_config: TinyConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """That beta has left, and that its delivery was refused for good; by alpha, who can write to the store."""
    config = with_keys(tiny_config(tmp_path, trust={"directory": ""}, membership={"quorum": 1}), make=True)
    begin(config)
    alpha, beta, operator = (as_member(config, name) for name in ("alpha", "beta", OPERATOR))
    beta.announce("beta", left=False, version=0)
    for by in (None, alpha):
        name = "silos/beta/membership/000001.json"
        word = Membership(left=True, version=0)
        alpha.objects.write(name, word.to_bytes() if by is None else alpha.signed(name, word))
        assert operator.membership("beta") == Membership(left=False, version=0)
        alpha.objects.delete(name)
    # Beta's own word, in another place, is none there.
    alpha.objects.write("silos/beta/membership/000001.json", alpha.objects.read("silos/beta/membership/000000.json"))
    assert operator.membership("beta") == Membership(left=False, version=0)
    alpha.objects.write("silos/beta/000001/refused-0.json", Refusal(reason="no", final=True).to_bytes())
    assert beta.refusals("beta", 1) == []
    operator.refuse("beta", 1, b"", "it is too long", final=True)
    assert beta.refusals("beta", 1) == [Refusal(reason="it is too long", final=True)]
    said = capsys.readouterr().out
    assert "silos/beta/membership/000001.json is passed over: the word is not signed" in said
    assert "silos/beta/000001/refused-0.json is passed over: the word is not signed" in said
    say_left(config, "beta")
    assert operator.membership("beta") == Membership(left=True, version=0)


def test_a_contract_without_keys_or_with_others_is_another_contract(config: RunConfig, tmp_path: Path) -> None:
    """Whoever takes the keys out of the contract, or puts others in, has one that no member goes on with."""
    begin(config)
    file = Path(config.store_url) / "contract.json"
    terms = json.loads(file.read_bytes())
    for keys in ({}, terms["trust"]["keys"] | {"beta": new_key(tmp_path / "other.key", "beta").text}):
        file.write_text(json.dumps(terms | {"trust": {"keys": keys}}))
        assert "trust.keys" in one_line_error(start, config)


# ---- mistakes


def test_keys_that_do_not_fit(config: RunConfig, tmp_path: Path) -> None:
    other = new_key(tmp_path / "other.key", "alpha")
    shutil.copy(tmp_path / "other.key", config.key_file("alpha"))
    assert one_line_error(own_signer, config, "alpha").startswith(
        f"trust.keys.alpha: {config.trust.keys['alpha']} given ("
    )
    assert f"is the key of {other.text} ({other.fingerprint}); allowed: the same" in one_line_error(
        own_signer, config, "alpha"
    )
    config.key_file("alpha").unlink()
    assert one_line_error(own_signer, config, "alpha") == (
        f"trust.directory: '' given; there is no {config.key_file('alpha')}, the private half of trust.keys.alpha; "
        "allowed: where atoll keys new alpha made it"
    )
    config.trust.keys["beta"] = config.trust.keys["alpha"]
    assert one_line_error(public_keys, config).startswith("trust.keys.beta: the key of alpha given; allowed: one that")
    config.trust.keys["beta"] = "atoll-key-1:none"
    assert one_line_error(public_keys, config).startswith("trust.keys.beta: 'atoll-key-1:none' given; allowed: ")


def test_only_the_operator_can_roll_back(config: RunConfig) -> None:
    aggregator, state = begin(config)
    for silo in config.full_roster:
        deliver(config, state, silo)
    one_version(aggregator, state)
    allowed = f"allowed: the private key of the aggregator's operator, {aggregator_key(config).fingerprint}, as this"
    for key, given in ((None, "none"), (config.key_file("beta"), f"{config.key_file('beta')}, the key ")):
        line = one_line_error(partial(roll_back_store, key=key, to=0), StoreExchange(config.store_url))
        assert line.startswith(f"--key: {given}")
        assert allowed in line
    assert roll_back_store(StoreExchange(config.store_url), to=0, key=config.key_file(OPERATOR)).to_version == 0
    assert start(config)[1].version == 0


def aggregator_key(config: RunConfig) -> PublicKey:
    return public_keys(config)[OPERATOR]
