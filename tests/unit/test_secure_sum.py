"""A secure sum through a store: the real aggregator in this process, and the silos' real exchanges."""

import copy
import dataclasses
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.payload import Tensors
from pretrain.exchange.rollback import roll_back_store
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.sums import answer_path, shares_path
from pretrain.federation.bundle import BundleVerifier
from pretrain.federation.contract import Agreed, rotate
from pretrain.federation.exit import write_bundle
from pretrain.federation.relay import Relay
from pretrain.federation.revoke import Revoker
from pretrain.trust.amendment import amended
from pretrain.trust.ledger import Commit, Manifest, RefusedError, sha256_bytes
from pretrain.trust.policy import Policy
from pretrain.trust.sums import Answer, Shares, Survivors
from tests.conftest import TinyConfig
from tests.support import TinyText, one_line_error
from tests.unit.federation.test_verify import verified
from tests.unit.summing import (
    ADAMW,
    MUON,
    TIERS,
    Asked,
    Silo,
    advance,
    commit_bytes,
    four,
    make,
    plain_moments,
    plain_step,
    published,
    streaming,
    summed,
)
from tests.unit.test_aggregate import fragment_names, start
from tests.unit.test_aggregate_restart import assert_same_state
from tests.unit.test_signed import as_member, begin, manifest_file
from tests.waiting import PATIENCE_SECONDS, wait_for


@pytest.fixture
def config(tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path) -> RunConfig:
    return make(tiny_config, tiny_text, tmp_path)


@pytest.mark.parametrize(
    ("seal", "told"),
    [(False, {}), (True, {}), (False, ADAMW), (True, MUON)],
    ids=["plain", "sealed", "AdamW's moments", "Muon's gradients, sealed"],
)
def test_a_version_is_the_plain_sum_to_the_last_bit_and_goes_on_after_a_restart(
    seal: bool, told: dict[str, Any], tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    config = make(tiny_config, tiny_text, tmp_path, trust={"seal": seal}, **copy.deepcopy(told))
    aggregator, state = begin(config)
    before = dataclasses.replace(state, parameters={name: value.clone() for name, value in state.parameters.items()})
    wanted = plain_step(config, before, ["alpha", "beta", "gamma"])
    commit = advance(config, aggregator, state)
    assert all(torch.equal(state.parameters[name], value) for name, value in wanted.items())
    moments = published(config, 1)
    assert moments.keys() == (wanted.keys() if told else set())
    for name, parts in plain_moments(config, before, ["alpha", "beta", "gamma"]).items():
        assert all(torch.equal(moments[name][part], value) for part, value in parts.items()), name
    assert [(c.silo, c.weight) for c in commit.contributors] == [("alpha", 100), ("beta", 300), ("gamma", 200)]
    assert commit.divisor == 600
    assert commit.metrics.keys() == {"update_norm"}
    advance(config, aggregator, state)
    aggregator.stop()
    again = start(config)[1]  # from version 0 and what was delivered and answered since
    assert_same_state(again, state)


# ---- what is refused before anything starts

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a collective": (
        {"exchange": {"kind": "collective", "url": "tcp://127.0.0.1:29500"}},
        "exchange.kind: 'collective' given; allowed: store with outer.secure_sum: silos of a collective merge each",
    ),
    "another merge": (
        {"outer": {"merge": "median"}},
        "outer.merge: 'median' given; allowed: mean with outer.secure_sum: all other ways look at each delivery",
    ),
    "a codec": (
        {"outer": {"codec": "int4"}},
        "outer.codec: 'int4' given; allowed: fp32 with outer.secure_sum: a sum takes one scale for all",
    ),
    "a largest share": (
        {"outer": {"max_share": 0.8}},
        "outer.max_share: 0.8 given; allowed: 1.0 with outer.secure_sum: a silo weighs its delivery before it knows",
    ),
    "a floor": (
        {"outer": {"quality_floor": 1.5}},
        "outer.quality_floor: 1.5 given; allowed: null with outer.secure_sum: no delivery can be left out",
    ),
    "moments without a bound": (
        {"outer": {"second_moments": "shared"}, "inner": {"clip_norm": 0.0}},
        "inner.clip_norm: 0.0 given; allowed: above 0 with outer.secure_sum and shared moments: it bounds what is told",
    ),
    "mean gradients without one": (
        {"outer": {"control_variates": 0.5}, "inner": {"optimizer": "muon", "clip_norm": 0.0}},
        "inner.clip_norm: 0.0 given; allowed: above 0 with outer.secure_sum and shared moments",
    ),
    "moments in the merge": (
        {"outer": {"second_moments": "shared", "merge": "importance"}},
        "outer.merge: 'importance' given; allowed: mean with outer.secure_sum",
    ),
    "late ones": (
        {"membership": {"quorum": 3, "stale_weight": 0.5}},
        "membership.stale_weight: 0.5 given; allowed: 0.0 with outer.secure_sum: masks are of one version",
    ),
    "a sample": ({"membership": {"sample": 3}}, "membership.sample: 3 given; allowed: null with outer.secure_sum"),
    "speed": ({"membership": {"steps": "speed"}}, "membership.steps: 'speed' given; allowed: equal with"),
    "norms": (
        {"membership": {"max_norm_ratio": 4.0}, "trust": {"metrics": TIERS | {"pseudo_gradient_norm": "public"}}},
        "membership.max_norm_ratio: 4.0 given; allowed: null with outer.secure_sum: nobody knows how long a delivery",
    ),
    "a norm that is told": (
        {"trust": {"metrics": TIERS | {"pseudo_gradient_norm": "public"}}},
        "trust.metrics.pseudo_gradient_norm: 'public' given; allowed: member with outer.secure_sum: it tells of a",
    ),
    "no largest batch": (
        {"outer": {"max_batch_sequences": None}},
        "outer.max_batch_sequences: None given; allowed: a number with outer.secure_sum: weights are shares of the",
    ),
    "two silos": ({"silos": {"gamma": None}}, "roster: 'alpha, beta' given; allowed: 3 to 100 silos with"),
    "a small quorum": (
        {"membership": {"quorum": 2}},
        "membership.quorum: 2 given; allowed: null, or 3 or more of 3 with outer.secure_sum, so that no two sets of",
    ),
    "a few who amend": (
        {"trust": {"amend": "2"}},
        "trust.amend: '2' given; allowed: all, or 3 or more with outer.secure_sum: fewer could put keys of their own",
    ),
    "no keys": (
        {"trust": {"keys": {}}, "roster": ["alpha", "beta", "gamma", "far"]},
        "outer.secure_sum: True given; allowed: false without trust.keys: it is the members' keys that masks follow",
    ),
    "no range": ({"outer": {"sum_range": 0}}, "outer.sum_range: 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_with_the_reason(
    what: str, tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    changes, message = REFUSED[what]
    assert message in one_line_error(make, tiny_config, tiny_text, tmp_path, **copy.deepcopy(changes))
    assert not (tmp_path / "run").exists()


def test_what_has_no_meaning_for_a_sum_is_refused(config: RunConfig, tmp_path: Path) -> None:
    aggregator, state = begin(config)
    advance(config, aggregator, state)
    aggregator.stop()
    store = StoreExchange(config.store_url)
    store.read_contract()
    assert "no silo answers twice for a version" in one_line_error(roll_back_store, store, to=0)
    assert "nobody has one silo's part of a sum" in one_line_error(Revoker, config, store, tmp_path)
    assert "a relay does not carry" in one_line_error(Relay, config, str(tmp_path / "there"))
    settings: dict[str, float | None] = {"outer.weight_power": 0.5}
    assert "silos compute with it" in one_line_error(amended, config, settings, {})


def test_a_site_can_demand_a_sum(config: RunConfig, tiny_config: TinyConfig, tmp_path: Path) -> None:
    Policy(codecs=["sum32"], least_silos=3).check_config(config)
    message = one_line_error(Policy(codecs=["sum32"], file="here").check_config, tiny_config(tmp_path / "plain"))
    assert "its codecs is sum32, and the contract's outer.codec is fp32" in message


def test_what_would_leave_the_range_stops_the_silo_before_it_wraps(config: RunConfig) -> None:
    aggregator, state = begin(config)
    silo = Silo(config, "alpha")
    name = fragment_names(config, state, 1)[0]
    local = {name: state.parameters[name] + 1.5}
    message = one_line_error(silo.through.masked, 1, state.parameters, local, {}, 100)
    assert message.startswith(f"outer.sum_range: 1 given; silo alpha: version 1: {name} has a change of 1.5")
    assert not list(config.silo_directory("alpha").rglob("*.safetensors"))
    aggregator.stop()


# ---- who is missing, and who lies


@pytest.mark.parametrize("told", [{}, MUON], ids=["plain", "streaming, moments told"])
def test_a_silo_may_be_missing_at_any_phase(
    told: dict[str, Any], tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    config = four(tiny_config, tiny_text, tmp_path, **streaming(told))
    aggregator, state = begin(config)
    for silo in config.full_roster:
        as_member(config, silo).announce(silo, left=False, version=0)
    before = dataclasses.replace(state, parameters={name: value.clone() for name, value in state.parameters.items()})
    wanted = plain_step(config, before, ["alpha", "beta", "delta"])
    silos = {name: Silo(config, name) for name in config.full_roster}
    sent = {name: silos[name].deliver(state) for name in ("alpha", "beta", "delta")}  # gamma never does
    with ThreadPoolExecutor(1) as pool:
        collecting = pool.submit(summed, aggregator, state)
        wait_for((Path(config.store_url) / "sums/000001.json").exists)
        late = silos["gamma"].deliver(before)  # it shares masks with all of them, and comes too late
        for name in ("gamma", "alpha", "delta"):  # and beta has died since
            silos[name].sum.answer(1)
        collecting.result(PATIENCE_SECONDS)
    assert late.manifest.silo == "gamma"
    assert sent.keys() == {c.silo for c in Commit.from_bytes(commit_bytes(config, 1)).contributors}
    assert all(torch.equal(state.parameters[name], value) for name, value in wanted.items())
    moments, plain = published(config, 1), plain_moments(config, before, ["alpha", "beta", "delta"])
    assert moments.keys() == plain.keys() == (wanted.keys() if told else set())
    assert all(torch.equal(moments[name][part], value) for name, of in plain.items() for part, value in of.items())
    for silo in silos.values():
        silo.through.close("")
    for _ in range(3):
        advance(config, aggregator, state, without=("beta",))
    aggregator.stop()
    assert_same_state(start(config)[1], state)
    found = verified(config, tmp_path / "scratch")
    assert (found.findings, found.merged) == ([], [1, 2, 3, 4])


@pytest.fixture
def asked(config: RunConfig) -> Iterator[Asked]:
    found = Asked(config)
    yield found
    found.close()


def test_below_the_threshold_there_is_no_sum(asked: Asked) -> None:
    for silo in ("alpha", "beta"):
        asked.answer(silo)
    with pytest.raises(RefusedError, match="version 1: 2 silos have answered; it takes 3 of them"):
        asked.aggregator.merge(asked.state, asked.deliveries)
    asked.answer("gamma")
    assert asked.aggregator.merge(asked.state, asked.deliveries).weights == [100, 300, 200]


def test_a_silo_answers_for_one_set_alone(asked: Asked) -> None:
    asked.answer("alpha")
    first = asked.noted("alpha")[0].read_text()
    asked.answer("alpha")  # the same again: killed before it was heard
    file = manifest_file(asked.config, "gamma", 1)
    other = dataclasses.replace(Manifest.from_bytes(file.read_bytes()), metrics={"loss": 2.0})
    file.write_bytes(as_member(asked.config, "gamma").members.sign(other).to_bytes())
    manifests = [sha256_bytes(manifest_file(asked.config, name, 1).read_bytes()) for name in asked.silos]
    asked.ask(manifests=manifests)
    message = one_line_error(asked.answer, "alpha")
    assert "silo alpha has answered for version 1, and is asked for another set of deliveries" in message
    assert asked.noted("alpha")[0].read_text() == first
    asked.answer("beta")  # which had not answered


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "two silos": ({"silos": ["alpha", "beta"], "manifests": ["0" * 64] * 2}, "has 2 silos; allowed: 3 or more"),
    "a silo twice": (
        {"silos": ["alpha", "beta", "beta"], "manifests": ["0" * 64] * 3},
        "does not name silos of this run, each once",
    ),
    "a stranger": (
        {"silos": ["alpha", "beta", "sybil"], "manifests": ["0" * 64] * 3},
        "does not name silos of this run, each once",
    ),
    "what nobody delivered": ({"manifests": ["0" * 64] * 3}, "is not the one that is asked about"),
}


def test_an_aggregator_that_asks_for_what_is_no_sum_of_all_is_refused(asked: Asked, tmp_path: Path) -> None:
    honest = Survivors.from_bytes((Path(asked.config.store_url) / "sums/000001.json").read_bytes())
    for lie, (changes, message) in LIES.items():
        asked.ask(**{"silos": honest.silos, "manifests": honest.manifests} | changes)
        said = one_line_error(asked.answer, "alpha")
        assert said.startswith("silo alpha: version 1 was not answered: "), lie
        assert message in said, lie
        assert not asked.noted("alpha"), lie
    asked.ask(silos=honest.silos, manifests=honest.manifests)
    (tmp_path / "policy.yaml").write_text("least_silos: 4\n")
    asked.config.trust.policy = str(tmp_path / "policy.yaml")
    assert "a sum of 3 silos was asked for; allowed: 4 or more" in one_line_error(asked.answer, "alpha")


def test_a_share_that_is_not_what_was_dealt_is_found(asked: Asked) -> None:
    for silo in asked.silos:
        asked.answer(silo)
    file = Path(asked.config.store_url) / answer_path("beta", 1)
    answer = Answer.from_bytes(file.read_bytes())
    lie = dataclasses.replace(answer, shares=[answer.shares[1], *answer.shares[1:]])
    file.write_bytes(as_member(asked.config, "beta").members.sign(lie).to_bytes())
    with pytest.raises(RefusedError, match="the shares of silo alpha's mask that alpha, beta, gamma have laid open"):
        asked.aggregator.merge(asked.state, asked.deliveries)


def test_a_delivery_without_its_shares_is_refused_and_comes_again(asked: Asked) -> None:
    verify = functools.partial(asked.aggregator._merger.verify, state=asked.state, version=1)
    data = manifest_file(asked.config, "beta", 1).read_bytes()
    file = Path(asked.config.store_url) / shares_path("beta", 1)
    there = file.read_bytes()
    file.unlink()
    with pytest.raises(RefusedError, match=r"silos/beta/000001/shares.json is missing"):
        verify("beta", data)
    shares = Shares.from_bytes(there)
    for changed, reason in (
        (dataclasses.replace(shares, blake3="0" * 64), "its blake3 is 000000"),
        (dataclasses.replace(shares, sealed=shares.sealed[:2]), "has not just one row for each silo"),
    ):
        file.write_bytes(as_member(asked.config, "beta").members.sign(changed).to_bytes())
        with pytest.raises(RefusedError, match=reason):
            verify("beta", data)
    manifest_file(asked.config, "beta", 1).unlink()  # as the aggregator does when it refuses
    asked.silos["beta"].through.deliver(asked.sent["beta"])
    assert file.read_bytes() == there
    assert verify("beta", data).manifest.silo == "beta"


def test_killed_and_coded_again_it_is_the_same_and_with_other_values_another_mask(asked: Asked) -> None:
    silo, file = asked.silos["alpha"], asked.sent["alpha"].file
    payload, shares = file.read_bytes(), file.with_suffix(".shares").read_bytes()
    assert silo.coded(asked.state).manifest == asked.sent["alpha"].manifest
    assert (file.read_bytes(), file.with_suffix(".shares").read_bytes()) == (payload, shares)
    name = fragment_names(asked.config, asked.state, 1)[0]
    first = Tensors(file).parts(name)["values"].clone()
    local = silo.local(asked.state)
    local[name].view(-1)[0] += 1e-3
    masked = silo.through.masked(1, asked.state.parameters, local, {}, 100)
    assert masked
    assert (masked[0][name]["values"].view(-1)[1:] == first.view(-1)[1:]).float().mean() < 1e-3


def test_masks_follow_the_keys_of_their_version(config: RunConfig, tmp_path: Path) -> None:
    aggregator, state = begin(config)
    keys = Path(config.directory) / "keys"
    for member in ("alpha", OPERATOR):
        rotate(Agreed.at(config.store_url), member, keys, 2)
    for _ in range(3):
        advance(config, aggregator, state)
    aggregator.stop()
    found = verified(config, tmp_path / "scratch")
    assert (found.findings, found.merged, found.num_amendments) == ([], [1, 2, 3], 2)


def test_a_member_takes_along_what_its_versions_are_made_of(config: RunConfig, tmp_path: Path) -> None:
    aggregator, state = begin(config)
    advance(config, aggregator, state)
    aggregator.stop()
    write_bundle(config, "alpha", tmp_path / "bundle", tell=lambda line: None)
    (tmp_path / "scratch").mkdir()
    found = BundleVerifier(tmp_path / "bundle", tmp_path / "scratch", tell=lambda line: None).verify()
    assert found.store
    assert (found.findings, found.store.findings, found.store.merged) == ([], [], [1])


def test_verify_finds_what_was_changed_afterwards(config: RunConfig, tmp_path: Path) -> None:
    aggregator, state = begin(config)
    advance(config, aggregator, state)
    aggregator.stop()
    store = Path(config.store_url)
    found = verified(config, tmp_path / "scratch")
    assert (found.findings, found.merged) == ([], [1])
    file = store / "sums/000001.json"
    there = file.read_bytes()
    file.unlink()
    said = {(one.version, one.name): one.what for one in verified(config, tmp_path / "scratch").findings}
    assert said[1, "sums/000001.json"] == "its silos were not asked about just those deliveries that its commit names"
    file.write_bytes(there)
    (store / answer_path("beta", 1)).write_bytes((store / answer_path("alpha", 1)).read_bytes())
    (store / "sums/000009.json").write_bytes(there)
    names = {one.name for one in verified(config, tmp_path / "scratch").findings}
    assert {answer_path("beta", 1), "sums/000009.json"} <= names
