"""What a private silo may do and has spent: noise from a budget, releases counted, one line for mistakes."""

import sys
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from scipy import stats

from pretrain.config.keys import RunConfig
from pretrain.federation.preflight import check_silo
from pretrain.silo.account import Account, Plan, plan
from pretrain.silo.shards import read_manifest
from tests.conftest import TinyConfig
from tests.support import TinyText, one_line_error, zero

PLAN = Plan(noise_multiplier=2.0, delta=1e-6, batch_sequences=4, epoch_sequences=12, most_epochs=2)
WITHHELD = {"trust": {"metrics": {"loss": "member", "held_out": "member"}}}


def private(directory: Path, tiny_config: TinyConfig, changes: dict[str, Any], **given: Any) -> RunConfig:
    alpha = {"private": {"epsilon": 2.0, "delta": 1e-6} | given}
    return tiny_config(directory, **WITHHELD | {"silos": {"alpha": alpha | changes.pop("alpha", {})}} | changes)


def planned(config: RunConfig) -> Plan:
    return plan(config, "alpha", [read_manifest(Path(config.silos["alpha"].data[0]), key="data")])


def test_the_noise_of_a_budget_is_the_least_with_which_all_epochs_are_within_it(
    tmp_path: Path, tiny_config: TinyConfig
) -> None:
    found = planned(private(tmp_path, tiny_config, {"inner": {"num_steps": 1200}}))
    num_epochs = -(-1200 * 4 // found.epoch_sequences)
    assert num_epochs == 3
    # One epoch of epsilon 2, delta 1e-6 takes 2.2305 by the analytic Gaussian mechanism; E of them sqrt(E) as much.
    assert found.noise_multiplier == pytest.approx(2.23048 * 3**0.5, rel=1e-5)
    assert found.most_epochs == num_epochs
    assert found.epsilon(num_epochs) == pytest.approx(2.0, rel=1e-6)
    assert found.epsilon(num_epochs) <= 2.0
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(found.noise_multiplier), 2)
    assert found.epsilon(2) == pytest.approx(accountant.get_epsilon(1e-6), rel=1e-4)
    assert found.epsilon(0) == 0.0


def test_a_release_counts_once_a_batch_once_an_epoch_and_no_more_than_the_budget_has(tmp_path: Path) -> None:
    account = Account(tmp_path / "account.txt", PLAN, {})
    a, b, c, d = (f"{number:032x}" for number in range(4))
    assert account.is_new
    assert [account.release(position, digest) for position, digest in ((0, a), (4, b), (8, c))] == [1, 1, 1]
    assert account.release(12, a) == 2  # the next epoch
    assert account.release(16, d) == 2
    before = (tmp_path / "account.txt").read_bytes()
    again = Account(tmp_path / "account.txt", PLAN, {})  # as after a kill
    assert (again.is_new, again.num_epochs) == (False, 2)
    assert [again.release(position, digest) for position, digest in ((8, c), (12, a))] == [1, 2]  # as they were first
    assert again.release(4, d) is None  # other gradients of a batch that was released
    assert again.release(24, a) is None
    assert (tmp_path / "account.txt").read_bytes() == before
    with (tmp_path / "account.txt").open("a") as file:
        file.write(f"20 {a[:7]}")  # what a kill leaves of a line
    third = Account(tmp_path / "account.txt", PLAN, {})
    assert third.release(20, b) == 2
    assert (tmp_path / "account.txt").read_bytes() == before + f"20 {b}\n".encode()


def test_an_account_of_something_else_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "account.txt"
    Account(file, PLAN, {"data": "one"}).release(0, "0" * 32)
    assert "begun with text" in one_line_error(Account, file, PLAN, {"data": "other"})
    other = Plan(noise_multiplier=3.0, delta=1e-6, batch_sequences=4, epoch_sequences=12, most_epochs=2)
    message = one_line_error(Account, file, other, {"data": "one"})
    assert "begun with noise_multiplier 2.0, and this is 3.0" in message
    file.write_text(file.read_text() + "nonsense\n")
    assert "'nonsense' is no release" in one_line_error(Account, file, PLAN, {"data": "one"})


def test_noise_is_normal_follows_from_its_key_and_is_another_with_another() -> None:
    import torch

    from pretrain.silo.noise import add_noise, derived

    values = {}
    for name, key in (("first", b"a"), ("again", b"a"), ("other", b"b")):
        values[name] = torch.full((600_001,), 5.0)  # an odd number, and more than are made at once
        add_noise(values[name], derived(bytes(32), key), 2.0)
    assert torch.equal(values["first"], values["again"])
    first, other = ((values[name].double().numpy() - 5) / 2 for name in ("first", "other"))
    assert stats.kstest(first, "norm").pvalue > 1e-3
    assert abs(stats.pearsonr(first, other).statistic) < 4 / len(first) ** 0.5
    assert abs(stats.pearsonr(first[:-1], first[1:]).statistic) < 4 / len(first) ** 0.5


def test_without_the_accountant_it_is_one_line(
    tmp_path: Path, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    message = one_line_error(planned, private(tmp_path, tiny_config, {}))
    assert "dp-accounting is not installed: pip install 'atoll[privacy]'" in message


QUORUM = {"membership": {"quorum": 1}}
REFUSED = [
    ({"alpha": zero(3)}, "silos.alpha.deepspeed.zero_optimization.stage: 3 given; allowed: 0, 1, 2 with"),
    ({"alpha": {"data_weights": [1.0]}}, "silos.alpha.data_weights: [1.0] given; allowed: none with"),
    ({"alpha": {"accept_other_data": True}}, "silos.alpha.accept_other_data: True given; allowed: false with"),
    ({"membership": {"quorum": 1, "max_loss_rise": 1.0}}, "membership.max_loss_rise: 1.0 given; allowed: null with"),
    ({"membership": {"steps": "speed"}}, "membership.steps: 'speed' given; allowed: equal with"),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED)
def test_what_would_tell_of_the_text_beside_is_one_line(
    tmp_path: Path, tiny_config: TinyConfig, changes: dict[str, Any], expected: str
) -> None:
    assert expected in one_line_error(private, tmp_path, tiny_config, dict(changes))


def test_losses_that_would_leave_are_one_line(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> None:
    told = private(tmp_path, tiny_config, {"trust": {}})
    assert "its manifests would tell its training loss" in one_line_error(check_silo, told, "alpha")
    told = private(tmp_path, tiny_config, {"trust": {"metrics": {"loss": "member"}}})
    assert "its evaluations would tell its held-out loss" in one_line_error(check_silo, told, "alpha")
    shown = private(tmp_path, tiny_config, {"trust": {}, "exchange": {"kind": "none"}, "wandb": {"mode": "online"}})
    assert "Weights & Biases (wandb.mode=online) would tell" in one_line_error(check_silo, shown, "alpha")
    policy = tmp_path / "policy.yaml"
    policy.write_text("metrics: [tokens, pseudo_gradient_norm, epsilon, delta]\n")
    check_silo(private(tmp_path, tiny_config, {"trust": {"policy": str(policy)}}), "alpha")
    check_silo(private(tmp_path, tiny_config, {}), "alpha")


def test_a_budget_that_the_steps_exceed_is_one_line_unless_others_go_on(
    tmp_path: Path, tiny_config: TinyConfig
) -> None:
    steps: dict[str, Any] = {"inner": {"num_steps": 1200}}
    found = planned(private(tmp_path, tiny_config, steps | QUORUM, noise_multiplier=3.3))
    epoch_steps = found.epoch_sequences // 4
    assert (found.most_epochs, found.most_steps) == (2, 2 * epoch_steps)
    message = one_line_error(planned, private(tmp_path, tiny_config, steps, noise_multiplier=3.3))
    assert "noise_multiplier: 3.3 given" in message
    assert f"allows {2 * epoch_steps:,} of 1,200 steps (an epoch has {epoch_steps})" in message
    assert "allowed: 3.8633 or more, null" in message  # 2.23048 * sqrt(3)
    message = one_line_error(planned, private(tmp_path, tiny_config, {}, delta=1e-3))
    assert "delta: 0.001 given; allowed: below" in message
