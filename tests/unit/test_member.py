"""A budget for all that a silo delivers: clipped, noised in a secure sum, accounted, refused where it cannot hold."""

import copy
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from rich.console import Console
from scipy import stats
from torch import Tensor

from launch.show.status import print_status
from pretrain.aggregate import OuterState
from pretrain.config.keys import RunConfig
from pretrain.federation.preflight import check_silo
from pretrain.sync.noised import Noised
from pretrain.trust.ledger import Commit
from pretrain.trust.member import MemberBudget, check_budget, member_budget
from tests.conftest import TinyConfig
from tests.support import TinyText, one_line_error, tiny_silo
from tests.unit.federation.test_verify import verified
from tests.unit.summing import TIERS, Silo, advance, make
from tests.unit.test_aggregate import fragment_names, plus_noise, start
from tests.unit.test_aggregate_restart import assert_same_state
from tests.unit.test_signed import as_member, begin

CLIP_NORM, DELTA = 0.5, 1e-6
KEPT = TIERS | {"loss": "member", "held_out": "member", "epochs": "member"}
OUTER: dict[str, Any] = {
    "weight_power": 0.0,
    "sum_range": 16.0,
    "member_privacy": {"epsilon": 8.0, "delta": DELTA, "clip_norm": CLIP_NORM},
}


def noised(tiny_config: TinyConfig, text: TinyText, directory: Path, outer: Any = (), **changes: Any) -> RunConfig:
    given = copy.deepcopy(OUTER)
    given["member_privacy"] |= dict(outer).pop("member_privacy", {})
    given |= {key: value for key, value in dict(outer).items() if key != "member_privacy"}
    changes.setdefault("trust", {"metrics": KEPT})
    return make(tiny_config, text, directory, outer=given, **changes)


def four(tiny_config: TinyConfig, text: TinyText, directory: Path, **outer: Any) -> RunConfig:
    """Four silos, of which three are enough."""
    rules = {"quorum": 3, "deadline_floor_seconds": 0.0, "deadline_ceiling_seconds": 0.3}
    return noised(tiny_config, text, directory, outer, silos={"delta": tiny_silo(text, "alpha")}, membership=rules)


def budget_of(config: RunConfig) -> MemberBudget:
    found = member_budget(config)
    assert found
    return found


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def brute_force(config: RunConfig, before: OuterState, silos: list[str]) -> Tensor:
    """The sum of clipped pseudo-gradients of a version."""
    total = torch.zeros(())
    for silo in silos:
        local = plus_noise(before, ord(silo[0]))
        names = fragment_names(config, before, before.version + 1)
        change = flat({name: before.parameters[name].double() - local[name].double() for name in names})
        assert change.norm() > 1.5 * CLIP_NORM
        total = total + change * (CLIP_NORM / change.norm())
    return total


def merged_sum(config: RunConfig, before: OuterState, after: OuterState, num_silos: int) -> Tensor:
    """What the first outer step of Nesterov was of, times the silos in it."""
    names = fragment_names(config, before, after.version)
    step = config.outer.lr * (1 + config.outer.momentum)
    change = {name: before.parameters[name].double() - after.parameters[name].double() for name in names}
    return flat(change) * (num_silos / step)


def copied(state: OuterState) -> OuterState:
    return dataclasses.replace(state, parameters={name: value.clone() for name, value in state.parameters.items()})


def check_normal(noise: Tensor, deviation: float) -> None:
    assert noise.std().item() == pytest.approx(deviation, rel=5 / (2 * len(noise)) ** 0.5)
    assert stats.kstest((noise / deviation).numpy(), "norm").pvalue > 1e-4


def test_a_version_is_the_clipped_sum_with_the_noise_of_the_budget_whoever_is_missing(
    tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    config = four(tiny_config, tiny_text, tmp_path, num_fragments=2, overlap_steps=1)
    budget, version = budget_of(config), 1
    aggregator, state = begin(config)
    for silo in config.full_roster:
        as_member(config, silo).announce(silo, left=False, version=0)
    before, here = copied(state), ["alpha", "beta", "delta"]
    advance(config, aggregator, state, without=("gamma",))
    noise = merged_sum(config, before, state, 3) - brute_force(config, before, here)
    promised = budget.noise_multiplier * CLIP_NORM
    check_normal(noise, promised * (3 / 2) ** 0.5)  # three shares, two of which are enough
    # What is left when one of them takes its own share off is what was promised, to the last silo that is not needed.
    names, local = sorted(fragment_names(config, before, version)), plus_noise(before, ord("b"))
    of_beta = Noised(config, budget, config.silo_directory("beta") / "private")
    pairs = [(before.parameters[name], local[name]) for name in names]
    terms = Commit.from_bytes((Path(config.store_url) / "global/000001/commit.json").read_bytes()).contract_sha256
    sent = flat({name: pair[0] for name, pair in zip(names, of_beta.pairs(pairs, 1, terms, 3), strict=True)})
    check_normal(noise - (sent - brute_force(config, before, ["beta"])), promised)
    for number in range(2, 4):
        commit = advance(config, aggregator, state)
        assert commit.metrics["delta"] == DELTA
        assert commit.metrics["epsilon"] == pytest.approx(composed(budget.noise_multiplier, number), rel=1e-4)
    aggregator.stop()
    assert_same_state(start(config)[1], state)
    assert verified(config, tmp_path / "scratch").findings == []
    console = Console(record=True, width=120)
    print_status(config.store_url, console=console)
    said = f"spent: epsilon {budget.epsilon(3):.4g}, delta 1e-06"
    assert f"differential privacy for all that a silo delivers; {said}" in console.export_text()


def composed(noise_multiplier: float, num_versions: int) -> float:
    """Epsilon by another accountant than ours: privacy loss distributions, one version after another."""
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(noise_multiplier), num_versions)
    return accountant.get_epsilon(DELTA)


def test_the_noise_of_a_budget_is_the_least_with_which_all_versions_are_within_it(
    tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    config = noised(tiny_config, tiny_text, tmp_path)
    budget, num_versions = budget_of(config), config.schedule.num_versions
    assert num_versions == 10
    assert budget.epsilon(num_versions) == pytest.approx(8.0, rel=1e-6)
    assert budget.epsilon(num_versions) <= 8.0 < budget.epsilon(num_versions + 1)
    assert budget.epsilon(0) == 0.0
    few = {"member_privacy": {"noise_multiplier": 0.9 * budget.noise_multiplier}}
    message = one_line_error(check_silo, noised(tiny_config, tiny_text, tmp_path / "few", few), "alpha")
    assert f"outer.member_privacy.noise_multiplier: {0.9 * budget.noise_multiplier:g} given" in message
    assert "allows 8 of 10 versions; allowed: " in message
    more = {"member_privacy": {"noise_multiplier": 2 * budget.noise_multiplier}}
    assert budget_of(noised(tiny_config, tiny_text, tmp_path / "more", more)).epsilon(10) < 4.0
    # The smaller the range, the more of it is noise; the larger, the coarser are the numbers that are added.
    for wanted, said in ((1.0, "outer.sum_range: 1.0 given; allowed: 6."), (1e10, "has to be 4 steps of the sum")):
        other = noised(tiny_config, tiny_text, tmp_path / said[:3], {"sum_range": wanted})
        assert said in one_line_error(check_budget, other)
    narrow = noised(tiny_config, tiny_text, tmp_path / "narrow", {"sum_range": 1.0})
    assert "outer.sum_range: 1.0 given" in one_line_error(start, narrow)
    assert not (tmp_path / "narrow" / "run" / "store").exists()


def test_coded_again_it_has_the_same_noise_and_with_other_values_places_and_secrets_another(
    tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    config = noised(tiny_config, tiny_text, tmp_path)
    base, value = torch.zeros(70, 100), torch.full((70, 100), 1e-3)
    other = value.clone()
    other[0, 0] += 1e-9

    def made(
        value: Tensor = value, *, silo: str = "a", version: int = 1, terms: str = "t", threshold: int = 3
    ) -> list[Tensor]:
        secret = Noised(config, budget_of(config), tmp_path / silo)
        found = secret.pairs([(base, value), (base, value)], version, terms, threshold)
        return [noised + value.double() for noised, nothing in found if not nothing.any()]

    first = made()
    assert (tmp_path / "a" / "member.key").stat().st_mode & 0o777 == 0o600
    assert all(map(torch.equal, first, made()))
    for again in (made(other), made(silo="b"), made(version=2), made(terms="u"), [first[1], first[0]]):
        correlated = stats.pearsonr(first[0].flatten().numpy(), again[0].flatten().numpy()).statistic
        assert abs(correlated) < 5 / first[0].numel() ** 0.5
    assert made(threshold=2)[0].std().item() == pytest.approx(first[0].std().item() * 2**0.5, rel=0.05)


def test_a_delivery_counts_as_nothing_where_it_is_not_finite_and_is_as_it_is_where_it_is_short(
    tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    given = {"member_privacy": {"epsilon": 1e7, "noise_multiplier": 1e-3}}
    config = noised(tiny_config, tiny_text, tmp_path, given)
    secret, base = Noised(config, budget_of(config), tmp_path), torch.zeros(1000)

    def length(value: Tensor) -> float:
        [(found, _)] = secret.pairs([(base, value)], 1, "", 3)
        return found.norm().item()

    most = 1e-3 * CLIP_NORM * 40
    assert length(torch.full((1000,), torch.nan)) < most
    assert length(torch.full((1000,), -torch.inf)) < most
    assert length(torch.full((1000,), 3e38)) == pytest.approx(CLIP_NORM, abs=most)
    assert length(torch.full((1000,), 0.01)) == pytest.approx(0.01 * 1000**0.5, abs=most)


@pytest.mark.parametrize("deviation", [0.7, 1.0, 1.5])
def test_rounded_shares_have_the_probabilities_of_noise_that_is_added_once(deviation: float) -> None:
    """To within the factor that member.py says, for values that are no whole numbers."""
    values, points = (19 / 64, -77 / 64, 157 / 64), np.arange(-12, 14)

    def of_one(at: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return stats.norm.cdf((at + 0.5) / deviation) - stats.norm.cdf((at - 0.5) / deviation)

    whole = np.arange(-40, 41)
    rounded = functools.reduce(np.convolve, [of_one(whole - value) for value in values])[points + 120]
    step = 1 / 128
    fine = np.arange(-30 * 128, 30 * 128 + 1) * step
    density = stats.norm.pdf(fine, scale=deviation * 3**0.5)
    box = [stats.uniform.cdf(fine + step / 2, -0.5), stats.uniform.cdf(fine - step / 2, -0.5)]
    for _ in values:
        density = np.convolve(density, box[0] - box[1], mode="same")
    wanted = np.interp(points - sum(values), fine, density)
    most = (1 + 3 * math.exp(-((math.pi * deviation) ** 2))) ** 3
    near = wanted > 1e-6
    ratio = rounded[near] / wanted[near]
    assert ratio.max() < most * 1.001
    assert ratio.min() > 1 / most / 1.001
    if deviation < 1:
        assert abs(ratio - 1).max() > 1e-3  # where the noise is short, it does differ


# ---- what is refused before anything starts

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no sum": (
        {"outer": {"secure_sum": False}},
        "outer.member_privacy.epsilon: 8.0 given; allowed: null without outer.secure_sum: a delivery by itself has but",
    ),
    "weights": (
        {"outer": {"weight_power": 1.0}},
        "outer.weight_power: 1.0 given; allowed: 0.0 with outer.member_privacy.epsilon=8: all silos are as much of",
    ),
    "a loss": (
        {"trust": {"metrics": KEPT | {"loss": "public"}}},
        "trust.metrics.loss: 'public' given; allowed: member with outer.member_privacy.epsilon=8: it has no noise",
    ),
    "a held-out loss": (
        {"trust": {"metrics": KEPT | {"held_out": "consortium"}}},
        "trust.metrics.held_out: 'consortium' given; allowed: member with",
    ),
    "how much text": ({"trust": {"metrics": KEPT | {"epochs": "public"}}}, "trust.metrics.epochs: 'public' given"),
    "going back": (
        {"membership": {"quorum": 3, "max_loss_rise": 1.0}},
        "membership.max_loss_rise: 1.0 given; allowed: null with outer.member_privacy.epsilon=8: a loss has no noise",
    ),
    "a large delta": (
        {"outer": {"member_privacy": {"delta": 0.5}}},
        "outer.member_privacy.delta: 0.5 given; allowed: below 0.333, 1 / the 3 silos",
    ),
    "liars alone": (
        {"outer": {"member_privacy": {"num_colluding": 3}}},
        "outer.member_privacy.num_colluding: 3 given; allowed: 0 to 2, so that one of the 3 silos of a sum is left",
    ),
    "no epsilon": (
        {"outer": {"member_privacy": {"epsilon": 0.0}}},
        "outer.member_privacy.epsilon: 0.0 given; allowed: null, or above 0",
    ),
    "the other clip_norm": (
        {"silo": {"private": {"clip_norm": 0.1}}},
        "silos.alpha.private.clip_norm: 0.1 given; allowed: outer.member_privacy.clip_norm, of a silo's whole delivery"
        "; this one is of a sequence, with silos.alpha.private.epsilon",
    ),
    "the one of a delivery": (
        {"silo": {"private": {"epsilon": 8.0}}, "outer": {"member_privacy": {"epsilon": None}}},
        "outer.member_privacy.clip_norm: 0.5 given; allowed: silos.alpha.private.clip_norm, of one sequence's gradient"
        "; this one is of a delivery, with outer.member_privacy.epsilon",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_tell_more_is_refused_in_one_line_with_the_reason(
    what: str, tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    changes, message = REFUSED[what]
    assert message in one_line_error(noised, tiny_config, tiny_text, tmp_path, **copy.deepcopy(changes))


def test_silo_and_sum_can_both_have_a_budget(tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path) -> None:
    config = noised(tiny_config, tiny_text, tmp_path, silo={"private": {"epsilon": 8.0, "clip_norm": 0.1}})
    check_silo(config, "alpha")


def test_a_silo_codes_what_the_contract_has_noised(
    tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    config = noised(tiny_config, tiny_text, tmp_path)
    aggregator, state = begin(config)
    silo = Silo(config, "alpha")
    assert silo.coded(state).manifest == silo.coded(state).manifest
    aggregator.stop()
