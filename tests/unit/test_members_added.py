"""A silo that comes by an amendment while the run goes on, and how many amendments a member may leave open."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import cli
from launch.show.status_reader import store_status
from pretrain.aggregate import Aggregator, OuterState
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.config.load import load_config
from pretrain.exchange.agreement import accept_amendments, propose_amendment, sign_amendment
from pretrain.exchange.amended import MOST_OPEN, amendment_path
from pretrain.federation.contract import Agreed, describe, rotate
from pretrain.federation.exit import write_bundle
from pretrain.federation.revoke import Revoker
from pretrain.sync.through_store import ThroughStore
from pretrain.trust.amendment import Amendment
from pretrain.trust.keys import load_signer, new_key
from pretrain.trust.ledger import Commit, Manifest, RefusedError
from tests.support import TinyText, one_line_error, tiny_silo
from tests.unit.federation.test_join import Site
from tests.unit.test_aggregate import GOOD, start, times
from tests.unit.test_aggregate_restart import assert_same_state
from tests.unit.test_contract_amended import LR, QUORUM, deliver, make_version, propose, sign, verified
from tests.unit.test_signed import as_member, begin, manifest_file
from tests.waiting import PATIENCE_SECONDS

Run = tuple[RunConfig, Aggregator, OuterState]
RULES = QUORUM | {"quorum": 1, "deadline_ceiling_seconds": 0.2}


@pytest.fixture
def run(make: Callable[..., RunConfig]) -> Run:
    """Alpha and beta at version 0; one of them is enough for a version."""
    config = make(membership=RULES, outer={"lr": 0.5, "max_share": 1.0})
    aggregator, state = begin(config)
    for silo in config.full_roster:
        as_member(config, silo).announce(silo, left=False, version=0)
    return config, aggregator, state


def with_gamma(config: RunConfig) -> RunConfig:
    """Gamma's configuration, as atoll launch join writes it, with a key of its own; here the others' keys are, too."""
    file = config.key_file("gamma")
    text = load_signer(file).public.text if file.exists() else new_key(file, "gamma").text
    silos, trust = {"gamma": config.silos["alpha"]}, dataclasses.replace(config.trust, added={"gamma": text})
    return dataclasses.replace(config, silos=silos, roster=config.agreed_roster, trust=trust)


def add_gamma(config: RunConfig, from_version: int) -> RunConfig:
    """All agree that gamma takes part from a version on; its configuration."""
    own = with_gamma(config)
    number = propose(config, "alpha", from_version, f"trust.keys.gamma={own.trust.added['gamma']}").amendment.number
    assert sign(config, "beta", number) == ["gamma"]
    assert sign(own, "gamma", number) == []
    return own


def contributors(commit: Commit) -> list[str]:
    return [one.silo for one in commit.contributors]


def forge(config: RunConfig, state: OuterState, sha256: str) -> None:
    """What gamma delivers, signed with its key, whatever holds."""
    GOOD.deliver(config, "gamma", state, times(state, 100))
    file = manifest_file(config, "gamma", state.version + 1)
    manifest = dataclasses.replace(Manifest.from_bytes(file.read_bytes()), contract_sha256=sha256, signature=None)
    signature = load_signer(config.key_file("gamma")).sign("manifest", manifest.to_bytes())
    file.write_bytes(dataclasses.replace(manifest, signature=signature).to_bytes())


# ---- a new silo


def test_a_silo_that_all_agree_to_takes_part_from_its_version_on(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, nothing that it signs counts; whoever reads later knows it from there on, after restarts, too."""
    config, aggregator, state = run
    own = with_gamma(config)
    proposal = propose(config, "alpha", 3, f"trust.keys.gamma={own.trust.added['gamma']}")
    assert proposal.missing == ["beta", "gamma"]
    assert sign(own, "gamma") == ["beta"]
    assert sign(config, "beta") == []
    make_version(config, aggregator, state)
    gamma = as_member(own, "gamma")
    gamma.announce("gamma", left=False, version=1)
    for sha256 in (gamma.contract_sha256, proposal.sha256):
        forge(own, state, sha256)
        assert as_member(config, OPERATOR).delivered("gamma", 2) is None
    assert one_line_error(gamma.members.sign, gamma.read_commit(1)).endswith(
        "which counts only from version 3 on, as the contract is amended; allowed: a member with a key"
    )
    assert [*store_status(config.store_url).silos] == ["alpha", "beta"]
    assert contributors(make_version(config, aggregator, state)) == ["alpha", "beta"]
    assert [*store_status(config.store_url).silos] == ["alpha", "beta", "gamma"]
    commit = make_version(own, aggregator, state, ["alpha", "beta", "gamma"])
    assert (contributors(commit), commit.contract_sha256) == (["alpha", "beta", "gamma"], proposal.sha256)
    aggregator, again = start(config)
    assert_same_state(again, state)
    for silo in config.full_roster:
        as_member(config, silo).announce(silo, left=True, version=3)
    assert contributors(make_version(own, aggregator, again, ["gamma"])) == ["gamma"]
    found = verified(config, tmp_path)
    assert [(one.name, one.of_chain) for one in found.findings] == [("silos/gamma/000002/manifest.json", False)]
    assert (found.num_amendments, found.merged) == (1, [1, 2, 3, 4])
    said = dict(describe(Agreed.at(config.store_url)))
    assert said["gamma"].endswith("  was added, from version 3 on")
    assert said["amendment 1"].startswith("from version 3 on: gamma is added, with the key ")


def test_a_silo_that_was_added_leaves_with_proof_and_is_taken_out(run: Run, tmp_path: Path) -> None:
    """As any other: its bundle is whole, a copy of it knows it from its version on, and so does who merges again."""
    config, aggregator, state = run
    own = add_gamma(config, 2)
    make_version(config, aggregator, state)
    as_member(own, "gamma").announce("gamma", left=False, version=1)
    for _ in range(2):
        make_version(own, aggregator, state, ["alpha", "beta", "gamma"])
    for silo, whose in (("gamma", own), ("alpha", config)):
        write_bundle(whose, silo, tmp_path / silo, tell=lambda line: None)
        assert CliRunner().invoke(cli.app, ["verify", str(tmp_path / silo)]).exit_code == 0
        assert own.trust.added["gamma"] in (tmp_path / silo / "keys.txt").read_text()
    exchange = as_member(config, "alpha")
    (tmp_path / "scratch").mkdir()
    found = Revoker(config, exchange, tmp_path / "scratch", tell=lambda line: None).revoke("gamma", 2)
    assert [one.version for one in found.versions] == [2, 3]


def test_a_kill_while_it_is_accepted_changes_nothing(make: Callable[..., RunConfig], run: Run, tmp_path: Path) -> None:
    """Accepted and not committed, as when the aggregator dies in between: the next start goes on, to the same bits."""
    config, aggregator, state = run
    own = add_gamma(config, 2)
    for silo in config.full_roster:
        deliver(config, state, silo)
    deliveries = aggregator.collect(state)
    aggregator.merge(state, deliveries)
    accept_amendments(as_member(config, OPERATOR), config, before=1)
    aggregator, state = start(config)
    assert state.version == 0
    make_version(config, aggregator, state)
    as_member(own, "gamma").announce("gamma", left=False, version=1)
    assert contributors(make_version(own, aggregator, state, ["alpha", "beta", "gamma"]))[-1] == "gamma"
    assert_same_state(start(config)[1], state)
    assert not verified(config, tmp_path).findings


def test_a_silo_that_was_added_is_taken_away_and_added_again(run: Run, tmp_path: Path) -> None:
    """The others sign, as for any key; it cannot bring itself back."""
    config, aggregator, state = run
    own = add_gamma(config, 2)
    make_version(config, aggregator, state)
    assert propose(config, "alpha", 3, "trust.keys.gamma=").missing == ["beta"]
    assert sign(config, "beta", 2) == []
    text = new_key(config.key_file("gamma").with_name("gamma.key.1"), "gamma").text
    assert propose(own, "gamma", 3, f"trust.keys.gamma={text}").missing == []  # so far it is a member
    make_version(config, aggregator, state)
    members = as_member(config, "alpha").members
    assert [terms.number for terms in members.later] == [1, 2]
    assert ["gamma" in members.keys_at(version) for version in range(1, 5)] == [False, True, False, False]
    assert propose(config, "alpha", 4, f"trust.keys.gamma={text}").missing == ["beta", "gamma"]
    assert sign(config, "beta", 3) == ["gamma"]
    assert sign(own, "gamma", 3) == []
    make_version(config, aggregator, state)
    as_member(own, "gamma").announce("gamma", left=False, version=3)
    assert contributors(make_version(own, aggregator, state, ["alpha", "gamma"])) == ["alpha", "gamma"]
    assert not verified(config, tmp_path).findings


def test_the_quorum_may_count_who_was_added(run: Run) -> None:
    config, aggregator, state = run
    line = "membership.quorum: 3 given; allowed: null, or 1 to the 2 silos of the roster"
    assert one_line_error(propose, config, "alpha", 3, "membership.quorum=3") == line
    own = add_gamma(config, 2)
    make_version(config, aggregator, state)
    assert propose(config, "alpha", 3, "membership.quorum=3").missing == ["beta", "gamma"]
    assert store_status(config.store_url).quorum == 1
    assert sign(config, "beta", 2) == ["gamma"]
    assert sign(own, "gamma", 2) == []
    make_version(config, aggregator, state)
    assert store_status(config.store_url).quorum == 3


def test_a_silo_that_was_added_is_drawn_as_all_others(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Of a sample: by aggregator, silos and status alike, from its version on, and after restarts."""
    config = make(membership=RULES | {"sample": 1}, inner={"num_steps": 32}, outer={"lr": 0.5, "max_share": 1.0})
    aggregator, state = begin(config)
    own = add_gamma(config, 4)
    drawn = [["beta"], ["beta"], ["alpha"], ["gamma"], ["beta"], ["beta"], ["gamma"], ["beta"]]
    silos: dict[str, ThroughStore] = {}
    for version, expected in enumerate(drawn, start=1):
        for silo in ("alpha", "beta", *(["gamma"] if version == 4 else ())):
            if silo not in silos:  # each knows what its own configuration says, and reads the rest
                silos[silo] = ThroughStore(own if silo == "gamma" else config, silo)
                own.silo_directory(silo).mkdir(parents=True, exist_ok=True)
                silos[silo].join()
                silos[silo].announce(version - 1)
        trains = [name for name, silo in silos.items() if silo.is_drawn(version)]
        said = [name for name, silo in store_status(config.store_url).silos.items() if silo.part == "yes"]
        assert (trains, said) == (expected, expected)
        assert contributors(make_version(own, aggregator, state, [*silos])) == expected
        for silo in silos.values():
            silo._store.read_commit(version)  # as it does when it adopts it; the deliveries here are not its own
        if version == 5:
            aggregator, again = start(config)
            assert_same_state(again, state)
            state = again
    for silo in silos.values():
        silo.close("")
    assert aggregator._collector.past.drawn(4) == ["gamma"]
    assert not verified(config, tmp_path).findings


@pytest.mark.parametrize(
    ("changes", "what", "line"),
    [
        ({"membership": {}}, "gamma", "trust.keys.gamma: a new silo given; allowed: in a run with a membership.quorum"),
        ({}, "Gamma/../x", "trust.keys.Gamma/../x: given; allowed: a-z, 0-9, _ and - in the name of a new silo"),
        ({}, "beta", "trust.keys.beta: a key that is in use given; allowed: one that no member has"),
    ],
)
def test_who_cannot_come_is_one_line(
    changes: dict[str, object], what: str, line: str, make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make(**{"membership": RULES, **changes})
    begin(config)
    key = config.trust.keys["beta"] if what == "beta" else new_key(tmp_path / "new.key", "gamma").text
    assert one_line_error(propose, config, "alpha", 3, f"trust.keys.{what}={key}").startswith(line)


# ---- how much there is to read


def test_a_member_may_leave_so_many_amendments_open(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More are passed over, and said; another member's go on from there, and once one holds it may propose again."""
    config, aggregator, state = run
    for _ in range(MOST_OPEN):
        propose(config, "alpha", 4, LR)
    line = f"alpha has proposed {MOST_OPEN} amendments since the last that holds; allowed: another once one of these"
    assert one_line_error(propose, config, "alpha", 4, LR).startswith(line)
    alpha = as_member(config, "alpha")
    last = alpha.amendments.read(alpha.objects)[-1]
    more = dataclasses.replace(last.amendment, number=MOST_OPEN + 1, previous=last.sha256)
    alpha.objects.write(amendment_path(more.number), alpha.members.sign(more, version=3).to_bytes())
    make_version(config, aggregator, state)
    assert capsys.readouterr().out.count(f"{amendment_path(more.number)} is passed over: {line}") == 1
    number = propose(config, "beta", 3, LR).amendment.number
    assert number == more.number
    assert sign(config, "alpha", number) == []
    make_version(config, aggregator, state)
    assert propose(config, "alpha", 4, LR).amendment.number == number + 1
    assert not verified(config, tmp_path).findings


def test_nobody_keeps_the_others_from_amending_by_a_key_of_its_own(make: Callable[..., RunConfig]) -> None:
    """Its successor far ahead is not accepted, as nothing after it could hold before."""
    config = make(membership=RULES, inner={"num_steps": 200})
    aggregator, state = begin(config)
    agreed, keys = Agreed.at(config.store_url), Path(config.directory) / "keys"
    assert (
        one_line_error(rotate, agreed, "beta", keys, 40)
        == "--from: 40 given; allowed: up to 17 for a key of one's own, by version 0"
    )
    assert rotate(agreed, "beta", keys, 17)[0].missing == []
    exchange = as_member(config, "beta")
    exchange.objects.delete(amendment_path(1))
    change = f"trust.keys.beta={load_signer(keys / 'beta.key.1').public.text}"
    far = Amendment(number=1, previous=exchange.contract_sha256, from_version=50, changes=[change], author="beta")
    exchange.objects.write(amendment_path(1), exchange.members.sign(far, version=49).to_bytes())
    sign_amendment(exchange, exchange.amendments.read(exchange.objects)[0], "beta")
    assert exchange.amendments.read(exchange.objects)[0].missing == []
    make_version(config, aggregator, state)
    assert as_member(config, "alpha").members.later == []


def test_who_has_a_stolen_key_does_not_outlive_its_replacement(run: Run) -> None:
    """The others give beta another key from version 3 on; whoever has the old one cannot say what holds there."""
    config, aggregator, state = run
    change = f"trust.keys.beta={new_key(config.key_file('beta').with_name('beta.key.1'), 'beta').text}"
    stolen = as_member(config, "beta")
    assert propose(config, "alpha", 3, change).missing == [OPERATOR, "beta"]
    assert [sign(config, name) for name in (OPERATOR, "beta")] == [["beta"], []]
    make_version(config, aggregator, state)
    mine = f"trust.keys.beta={new_key(config.key_file('beta').with_name('beta.key.2'), 'beta').text}"
    stolen.follow_amendments()
    line = "beta replaces a key that an amendment before has replaced or taken away"
    assert one_line_error(propose_amendment, stolen, config, "beta", from_version=3, changes=[mine]) == line
    with pytest.raises(RefusedError, match="not of these bytes"):
        stolen.check("beta", stolen.members.sign(stolen.read_commit(1), version=1), version=3)


# ---- what its institution is told


def test_launch_join_says_whose_signature_is_missing(run: Run, tmp_path: Path, tiny_text: TinyText) -> None:
    """And what a silo is that nobody has added; its configuration has the key, and makes the store's contract."""
    config, aggregator, state = run
    site = Site(directory=tmp_path / "here", url=config.store_url, text=tiny_text)
    trust = {"directory": str(config.key_file("gamma").parent)}
    silo = {"silos": {"beta": None, "gamma": tiny_silo(tiny_text, "gamma")}, "trust": trust}
    assert site.refusal(**silo).startswith("silos: 'gamma' given; allowed: names of the roster: alpha, beta; a member ")
    text = new_key(config.key_file("gamma"), "gamma").text
    propose(config, "alpha", 3, f"trust.keys.gamma={text}")
    assert "the signature of beta, gamma under amendment 1, which adds gamma; allowed: once gamma" in site.refusal(
        **silo
    )
    assert sign(with_gamma(config), "gamma") == ["beta"]
    waits = "until gamma is a member its start waits for the signature of beta under amendment 1, which adds gamma"
    assert waits in site.join(**silo)["warning"]
    assert sign(config, "beta") == []
    make_version(config, aggregator, state)
    said = site.join(**silo)
    assert said["enters"] == ["gamma takes over version 2, or the newest by then, and trains for the next"]
    own = load_config([tmp_path / "here" / "run" / "config.yaml"])
    assert (own.trust.added, own.full_roster) == ({"gamma": text}, ["alpha", "beta", "gamma"])
    own.silo_directory("gamma").mkdir(parents=True)
    gamma = ThroughStore(own, "gamma")
    gamma.join()
    with ThreadPoolExecutor(1) as pool:
        initial = pool.submit(gamma.initial)
        make_version(config, aggregator, state)
        assert initial.result(PATIENCE_SECONDS).commit.version == 2
    gamma.close("")


def test_a_silo_whose_amendment_is_void_ends_in_one_line(run: Run) -> None:
    """And does not wait for ever; nor does one that nobody adds."""
    config, aggregator, state = run
    own = with_gamma(config)
    own.silo_directory("gamma").mkdir(parents=True)
    gamma = ThroughStore(own, "gamma")
    allowed = "neither the contract nor an amendment has this silo; allowed: alpha, beta, or one that a member adds by"
    assert allowed in one_line_error(gamma.join)
    propose(config, "alpha", 2, f"trust.keys.gamma={own.trust.added['gamma']}")
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(one_line_error, gamma.join)
        make_version(config, aggregator, state)
        assert joining.result(PATIENCE_SECONDS) == (
            "silos: 'gamma' given; amendment 1, which adds it, is void, as it was not complete in time; allowed: once "
            "a member has proposed it anew"
        )
    gamma.close("")
