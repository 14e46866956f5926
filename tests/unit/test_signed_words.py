"""The small words of a signed store: what their author has not said counts as not said, and what it says stands."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from launch.show.status import print_status
from launch.show.status_reader import StoreStatus, store_status
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.config.load import save_config
from pretrain.exchange.beats import Beats
from pretrain.exchange.history import History
from pretrain.exchange.lease import Lease
from pretrain.exchange.options import operators_key
from pretrain.exchange.rollback import finish_rollbacks, is_rolling_back, roll_back_store
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.words import Beat, Damaged, Holder, Identity, Membership, Refusal, Resumable, TermSign, Waiting
from pretrain.federation.relay import Relay
from pretrain.trust.keys import new_key
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.test_aggregate import one_version, start
from tests.unit.test_signed import as_member, begin, deliver
from tests.waiting import wait_for

SECONDS = 0.3
HOLDER = Holder(holder="beta", machine="", pid=0, lease_seconds=1e9, nonce="0")
Said = Callable[[], str]


@pytest.fixture
def config(signed_config: RunConfig) -> RunConfig:
    return signed_config


@pytest.fixture
def store(config: RunConfig) -> Path:
    begin(config)
    return Path(config.store_url)


@contextmanager
def held(config: RunConfig) -> Iterator[Lease]:
    lease = Lease(as_member(config, OPERATOR), seconds=SECONDS)
    yield lease
    lease.release()


# ---- the lease


@pytest.mark.parametrize("term", [2, 3, 999_999])
def test_a_term_that_the_operator_has_not_signed_is_nobodys(
    term: int,
    store: Path,
    config: RunConfig,
    said: Said,
) -> None:
    """Beta writes one: who holds the lease goes on, and who comes next takes a term that is free, at once."""
    name = f"aggregator/{term:06d}.json"
    with held(config) as lease:
        beta = as_member(config, "beta")
        beta.objects.write(name, beta.signed(name, HOLDER))
        lease.check()
        assert f"{name} is passed over: signature of the word: not of these bytes" in said()
    with held(config) as lease:
        lease.check()
        assert (store / "aggregator" / f"{3 if term == 2 else 2:06d}.json").is_file()


def test_an_end_that_the_holder_has_not_said_and_a_sign_that_it_has_not_left(store: Path, config: RunConfig) -> None:
    """Who starts goes by the holder's own signs: a forged end does not let it in, forged life does not keep it out."""
    folder, beta = store / "aggregator", as_member(config, "beta")
    with held(config):
        (folder / "000001.ended").write_bytes(b"{}\n")
        record = json.loads((folder / "000001.json").read_bytes())
        other = as_member(config, OPERATOR)
        elsewhere = Holder(**record | {"machine": "another", "signature": None})
        (folder / "000001.json").write_bytes(other.signed("aggregator/000001.json", elsewhere))
        assert "works on this store; stop it first" in one_line_error(lambda: Lease(other, seconds=3 * SECONDS))
        wait_for(lambda: any(folder.glob("000001.beat-*")))
        old = {path.name: path.read_bytes() for path in folder.glob("000001.beat-*")}
        wait_for(lambda: not [name for name in old if (folder / name).exists()])
    (folder / "000001.ended").unlink()  # as if it had been killed
    newest = max(folder.glob("000001.beat-*"))
    newest.with_name("000001.beat-999999").write_bytes(beta.signed("x", TermSign(nonce=record["nonce"])))

    class Copies(StoreExchange):
        """Somebody puts copies of old signs there while one waits, and new ones of its own."""

        def heard(self, *arguments: object) -> object:  # type: ignore[override]
            for name, data in old.items():
                (folder / name).write_bytes(data)
            (folder / "000001.beat-9999999").write_bytes(b"{}")
            return super().heard(*arguments)  # type: ignore[arg-type]

    copies = Copies(config.store_url)
    copies.members.signer = other.members.signer
    copies.read_contract()
    lease = Lease(copies, seconds=SECONDS)
    assert (folder / "000002.json").is_file()
    lease.release()


def test_signs_of_life_go_on_above_their_authors_own(store: Path, config: RunConfig) -> None:
    folder, alpha = store / "silos" / "alpha" / "beats", as_member(config, "alpha")
    alpha.say("silos/alpha/beats/000007", Beat(lease_seconds=9), "alpha")
    for name in ("000008", "999999999"):
        alpha.objects.write(f"silos/alpha/beats/{name}", b"{}\n")
    beats = Beats(alpha, "silos/alpha/beats/", Beat(lease_seconds=9), "alpha", lease_seconds=SECONDS)
    wait_for(lambda: [path.name for path in folder.iterdir()] > ["000009"])
    beats.stop()
    (left,) = folder.iterdir()
    assert left.name < "000100"


# ---- silos' words


def test_forged_words_of_a_silo_count_as_not_said(store: Path, config: RunConfig, said: Said) -> None:
    """Each in turn: unsigned and signed by beta. Alpha's own word then takes its place."""
    alpha, beta, operator = (as_member(config, name) for name in ("alpha", "beta", OPERATOR))
    folder = "silos/alpha"
    forged = {
        f"{folder}/identity.json": Identity(identity="beta's"),
        f"{folder}/resumable/000009": Resumable(num_rollbacks=0),
        f"{folder}/membership/000000.json": Membership(left=True, version=0),
        f"{folder}/membership/999999999.json": Membership(left=True, version=0),
        "damaged/000000/alpha": Damaged(reason="no", nonce="1"),
        "waiting/000001.json": Waiting(silos=[], deadline_seconds=None),
    }
    for sign in (False, True):
        for name, word in forged.items():
            beta.objects.delete(name)
            beta.objects.write(name, beta.signed(name, word) if sign else word.to_bytes())
        assert operator.resumable("alpha") is None
        assert operator.membership("alpha") is None
        assert operator.hear_damaged(["alpha"], 0) == []
        assert not alpha.has_name("alpha", "alpha's")
    alpha.claim_name("alpha", "alpha's")
    assert (alpha.has_name("alpha", "alpha's"), alpha.holder("alpha")) == (True, "alpha's")
    assert "another run directory takes part" in one_line_error(alpha.claim_name, "alpha", "another")
    alpha.mark_resumable("alpha", 9)
    assert operator.resumable("alpha") == 9
    alpha.announce("alpha", left=False, version=3)
    assert as_member(config, OPERATOR).membership("alpha") == Membership(left=False, version=3)
    beta.objects.write("damaged/000000/alpha", b"{}")
    alpha.say_damaged("alpha", 0, "it is torn")
    assert operator.hear_damaged(["alpha"], 0) == ["alpha"]
    operator.say_waiting(1, ["beta"], deadline_seconds=None)
    assert operator.heard(Waiting, "waiting/000001.json", OPERATOR) == Waiting(silos=["beta"], deadline_seconds=None)
    lines = said().splitlines()
    for name in set(forged) - {"waiting/000001.json"}:
        assert [line for line in lines if f": {name} is passed over: " in line], name


def test_a_copy_of_an_old_word_changes_nothing(store: Path, config: RunConfig) -> None:
    alpha, operator = as_member(config, "alpha"), as_member(config, OPERATOR)
    alpha.say_damaged("alpha", 0, "it is torn")
    word = alpha.objects.read("damaged/000000/alpha")
    assert operator.hear_damaged(["alpha"], 0) == ["alpha"]
    alpha.objects.write("damaged/000000/alpha", word)
    assert operator.hear_damaged(["alpha"], 0) == []
    alpha.say_damaged("alpha", 0, "it is torn")  # the same, anew
    assert operator.hear_damaged(["alpha"], 0) == ["alpha"]
    # A mark of an earlier checkpoint, and one of before a rollback.
    alpha.mark_resumable("alpha", 2)
    old = alpha.objects.read("silos/alpha/resumable/000002")
    alpha.mark_resumable("alpha", 3)
    alpha.objects.write("silos/alpha/resumable/000002", old)
    assert operator.resumable("alpha") == 3
    operator.num_rollbacks = 1
    assert operator.resumable("alpha") is None
    operator.num_rollbacks = 0
    alpha.objects.write("silos/alpha/resumable/000004", old)  # under another name
    assert operator.resumable("alpha") == 3


def test_a_forged_mark_prunes_nothing_and_a_forged_snapshot_is_none(store: Path, config: RunConfig) -> None:
    """Beta says that alpha's checkpoint is far on, and that there is a snapshot of a version to come."""
    beta = as_member(config, "beta")
    name = "silos/alpha/resumable/000009"
    beta.objects.write(name, beta.signed(name, Resumable(num_rollbacks=0)))
    beta.mark_resumable("beta", 9)
    beta.objects.write("snapshots/000001.json", b"{}")
    aggregator, state = start(config)
    for _ in range(3):
        for silo in config.full_roster:
            deliver(config, state, silo)
        one_version(aggregator, state)
    aggregator.snapshots.finish()
    assert beta.tensors("global/000000")
    assert History(beta, 1).snapshots() == [1, 2, 3]
    shutil.copy(store / "snapshots/000003.json", store / "snapshots/000004.json")
    (store / "snapshots/000005.json").write_bytes(b"{}")
    assert start(config)[1].version == 3


# ---- rollbacks


def test_a_rollback_is_complete_when_the_operator_says_so(store: Path, config: RunConfig) -> None:
    aggregator, state = start(config)
    for _ in range(2):
        for silo in config.full_roster:
            deliver(config, state, silo)
        one_version(aggregator, state)
    aggregator.snapshots.finish()
    roll_back_store(StoreExchange(config.store_url), to=1, key=config.key_file(OPERATOR))
    done = store / "rollbacks" / "000001.done"
    done.write_bytes(b"{}\n")
    operator = as_member(config, OPERATOR)
    assert is_rolling_back(operator)
    assert len(finish_rollbacks(operator)) == 1
    assert not is_rolling_back(as_member(config, "alpha"))


def test_the_operators_key_is_where_the_run_directory_says(tmp_path: Path, config: RunConfig) -> None:
    folder = Path(config.directory)
    assert operators_key(str(folder)) == config.key_file(OPERATOR)
    assert operators_key(config.store_url) is None
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    new_key(elsewhere / f"{OPERATOR}.key", OPERATOR)
    trust = dataclasses.replace(config.trust, directory=str(elsewhere))
    save_config(dataclasses.replace(config, trust=trust), folder / "config.yaml")
    assert operators_key(str(folder)) == elsewhere / f"{OPERATOR}.key"


# ---- status


def test_status_shows_what_is_signed_alone(store: Path, config: RunConfig) -> None:
    """Beta says for others whatever there is; all of it is named, and the rest is as if nothing had been said."""
    alpha, beta, operator = (as_member(config, name) for name in ("alpha", "beta", OPERATOR))
    alpha.claim_name("alpha", "ab")
    alpha.say("silos/alpha/beats/000001", Beat(lease_seconds=9), "alpha")
    with held(config):
        wait_for(lambda: any((store / "aggregator").glob("000001.beat-*")))
    before = untimed(config)
    assert (before.version, before.unsigned, before.aggregator.words.split(" (")[0]) == (0, [], "ended")
    forged = {
        "aggregator/000007.json": HOLDER.to_bytes(),
        "aggregator/000001.beat-999999": TermSign(nonce="0").to_bytes(),
        "global/000001/commit.json": beta.objects.read("global/000000/commit.json"),
        "silos/alpha/000001/manifest.json": MANIFEST,
        "silos/alpha/000001/refused-0.json": Refusal(reason="no", final=True).to_bytes(),
        "silos/alpha/beats/000099": Beat(lease_seconds=1e9).to_bytes(),
        "silos/beta/beats/000099": alpha.signed("silos/beta/beats/000099", Beat(lease_seconds=1e9)),
        "silos/beta/identity.json": Identity(identity="no").to_bytes(),
        "silos/alpha/membership/000005.json": Membership(left=True, version=0).to_bytes(),
        "waiting/000001.json": Waiting(silos=[], deadline_seconds=1.0).to_bytes(),
    }
    for name, data in forged.items():
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(data)
    after = untimed(config)
    assert set(after.unsigned) == set(forged)
    after.unsigned.clear()
    assert after == before
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    print_status(config.store_url, console=console)
    assert "not said, as who should have said it has not signed it: " in console.export_text()
    operator.say("waiting/000001.json", Waiting(silos=["beta"], deadline_seconds=None), OPERATOR)
    assert store_status(config.store_url).waiting_for == "delivery for version 1 from beta"


MANIFEST = json.dumps(
    {
        "format": 3,
        "signature": None,
        "contract_sha256": "0" * 64,
        "cosigned": "",
        "silo": "alpha",
        "version": 1,
        "base_version": 0,
        "base_digest": "",
        "codec": "fp32",
        "payloads": [],
        "tokens": 1,
        "steps": 1,
        "tokens_total": 10**9,
        "metrics": {},
    }
).encode()


def untimed(config: RunConfig) -> StoreStatus:
    """All but the clock, which goes on."""
    status = store_status(config.store_url)
    status.now_unix_seconds = status.waited_seconds = None
    return status


# ---- the relay


def test_a_relay_hands_on_what_is_signed_and_takes_the_place_of_what_is_not(
    store: Path, config: RunConfig, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    """Alpha's site has a relay; somebody at the store, and somebody here, has taken the names of alpha's words."""
    trust = {"keys": config.trust.keys, "directory": str(Path(config.directory) / "keys")}
    only = {"silos": {"beta": None}, "roster": ["alpha", "beta"], "trust": trust}
    site = tiny_config(tmp_path / "site", exchange={"url": str(tmp_path / "here"), "snapshot_versions": 1}, **only)
    relay = Relay(site, config.store_url)
    relay.start()
    here, there = as_member(site, "alpha"), as_member(config, "beta")
    for name in ("identity.json", "resumable/000000", "beats/000001"):
        there.objects.write(f"silos/alpha/{name}", b"{}")
    for name in ("resumable/000009", "beats/000099"):
        here.objects.write(f"silos/alpha/{name}", b"{}")
    relay.copy()
    assert not there.has_name("alpha", "ab")
    here.claim_name("alpha", "ab")
    here.mark_resumable("alpha", 0)
    here.say("silos/alpha/beats/000001", Beat(lease_seconds=9), "alpha")
    for _ in range(2):
        relay.copy()
        relay.copy_beats()
    assert there.has_name("alpha", "ab")
    assert there.resumable("alpha") == 0
    assert there.heard(Beat, "silos/alpha/beats/000001", "alpha")
    # A rollback's end that nobody has said, and a refusal.
    there.objects.write("rollbacks/000001.done", b"{}")
    there.objects.write("silos/alpha/000001/refused-0.json", Refusal(reason="no", final=True).to_bytes())
    relay.copy()
    assert here.objects.names("rollbacks") == []
    assert here.objects.names("silos/alpha/000001") == []
    for name in here.objects.names("silos/alpha/beats"):
        if name != "000099":
            here.objects.delete(f"silos/alpha/beats/{name}")
    relay.copy_beats()
    assert there.objects.names("silos/alpha/beats") == []
