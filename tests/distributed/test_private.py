"""Differential privacy in a silo of two ranks: clipped sums are brute force's, noise is normal and never twice."""

import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

from launch.show.report import summarize
from launch.show.status_reader import store_status
from pretrain.config.budgets import PrivateConfig
from pretrain.silo.model import build_initial
from pretrain.silo.optim import is_muon_matrix
from pretrain.silo.private import SECRET, open_private
from pretrain.trust.ledger import Manifest
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_same_bits, federate
from tests.distributed.private_worker import (
    CLIP_NORM,
    LR,
    MODEL,
    NUM_SEQUENCES,
    NUM_STEPS,
    TRAINED,
    VOCAB_SIZE,
    brute_force,
)
from tests.distributed.test_collective import collective
from tests.faults.scripted import federate_with
from tests.support import TWO_RANKS, TinyText, one_line_error, torchrun

WORKER = Path(__file__).parent / "private_worker.py"
Found = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What one torchrun of two ranks leaves, by the name of the case."""
    directory = tmp_path_factory.mktemp("private")
    torchrun(WORKER, directory, num_ranks=2, timeout=200)
    assert (directory / "noisy" / "noise.key").stat().st_mode & 0o777 == 0o600
    assert "no account is here of the 8 sequences that it has read in this run" in (directory / "lost.txt").read_text()
    return {file.stem: load_file(file) for file in directory.glob("*.safetensors")}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_clipped_sum_is_that_of_brute_force(found: Found, stage: int, precision: str) -> None:
    expected, norms = brute_force()
    assert min(norms) > 1.1 * CLIP_NORM or any(norm < CLIP_NORM for norm in norms)
    assert max(norms) > 3 * CLIP_NORM
    whole, made = flat(expected), flat(found[f"clean-{stage}-{precision}"])
    # Of bf16's 8 bits those of each gradient, and of the noised mean.
    tolerance = 1e-4 if precision == "fp32" else 0.02
    assert ((made - whole).norm() / whole.norm()).item() < tolerance


def plain_steps(made: dict[str, Tensor], optimizer: str) -> dict[str, Tensor]:
    """What plain optimizers come to along the gradients that a silo's were given, and clipped as it does."""
    model = build_initial(MODEL, VOCAB_SIZE)
    named = dict(model.named_parameters())
    for_muon = [name for name, p in named.items() if optimizer == "muon" and is_muon_matrix(name, p.shape)]
    matrices = [p for name, p in named.items() if p.ndim >= 2 and name not in for_muon]
    groups = [{"params": matrices}, {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0}]
    steps: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), weight_decay=TRAINED.weight_decay)
    ]
    if for_muon:
        lr = LR * TRAINED.muon_lr / TRAINED.lr
        steps.append(torch.optim.Muon([named[name] for name in for_muon], lr=lr, weight_decay=TRAINED.weight_decay))
    for number in range(NUM_STEPS):
        for name, parameter in named.items():
            parameter.grad = made[f"gradient {number}/{name}"].clone()
        torch.nn.utils.clip_grad_norm_(named.values(), TRAINED.clip_norm)
        for one in steps:
            one.step()
    return {name: parameter.detach() for name, parameter in named.items()}


def part(made: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}/"): t for name, t in made.items() if name.startswith(f"{kind}/")}


def check_trained(found: Found, way: str) -> None:
    """Whatever the optimizer and the stage: the same clipped sum with the same noise, at the same price."""
    runs = {name: made for name, made in found.items() if name.endswith(f"-{way}") and "clean" not in name}
    assert {name.split("-")[0] for name in runs} == {"adamw", "muon"}
    first = flat(part(next(iter(runs.values())), "gradient 0"))
    noise = (first * NUM_SEQUENCES - flat(brute_force()[0])) / CLIP_NORM
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-6
    epsilon, initial = composed(1.0, 1, delta=1e-6), build_initial(MODEL, VOCAB_SIZE)
    for name, made in runs.items():
        assert torch.equal(flat(part(made, "gradient 0")), first), name
        assert made["epsilon"].item() == pytest.approx(epsilon, rel=1e-4)
        optimizer = name.split("-")[0]
        wanted = plain_steps(made, optimizer)
        for parameter, start in initial.named_parameters():
            came, to_come = made[f"parameter/{parameter}"] - start.detach(), wanted[parameter] - start.detach()
            # Muon computes in bf16, in which the last bit of a norm to clip by shows.
            tolerance = 0.03 if optimizer == "muon" and is_muon_matrix(parameter, start.shape) else 1e-3
            assert ((came - to_come).norm() / to_come.norm()).item() < tolerance, (name, parameter)
    of_muon = [flat(part(made, "gradient 1")) for name, made in runs.items() if name.startswith("muon")]
    of_adamw = [flat(part(made, "gradient 1")) for name, made in runs.items() if name.startswith("adamw")]
    assert not torch.allclose(of_muon[0], of_adamw[0])


@pytest.mark.parametrize("way", ["plain", "layers", "selective"])
def test_muon_gets_the_noised_sum_that_adamw_gets_at_the_same_price(found: Found, way: str) -> None:
    check_trained(found, way)


@pytest.mark.soak
@pytest.mark.parametrize("way", ["offload", "compiled"])
def test_a_private_step_offloaded_or_compiled(way: str, tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path, way, num_ranks=2, timeout=900)
    check_trained({file.stem: load_file(file) for file in tmp_path.glob("*.safetensors")}, way)


@cache
def composed(noise_multiplier: float, num_epochs: int, *, delta: float) -> float:
    """Epsilon by another accountant than the silo's: privacy loss distributions, one epoch after another."""
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(noise_multiplier), num_epochs)
    return accountant.get_epsilon(delta)


def noise(found: Found, name: str) -> Tensor:
    return (flat(found[name]) - flat(found["clean-1-fp32"])) / CLIP_NORM


@pytest.mark.parametrize("name", ["noisy", "elsewhere", "other secret"])
def test_noise_is_normal(found: Found, name: str) -> None:
    values = noise(found, name)
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-6
    assert values.std().item() == pytest.approx(1, abs=6 / (2 * len(values)) ** 0.5)


def test_noise_is_another_in_every_part_step_and_silo_and_the_same_only_where_all_is(found: Found) -> None:
    first, elsewhere, other = (noise(found, name) for name in ("noisy", "elsewhere", "other secret"))
    half = len(first) // 2
    in_order = torch.cat([t.flatten() for t in found["noisy"].values()])
    pairs = [(first, elsewhere), (first, other), (first[:half], first[half : 2 * half])]
    for one, two in pairs:
        assert abs(stats.pearsonr(one.numpy(), two.numpy()).statistic) < 6 / len(one) ** 0.5
    assert torch.equal(in_order, torch.cat([t.flatten() for t in found["again"].values()]))
    assert not torch.equal(first, elsewhere)


def test_what_is_spent_is_what_the_accountant_says(found: Found) -> None:
    spent = found["spent"]
    # Two batches of an epoch are one mechanism; the same step again is none; with other gradients it is another.
    assert spent["noisy"].item() == spent["again"].item() == spent["elsewhere"].item()
    assert spent["elsewhere"].item() == pytest.approx(composed(1.0, 1, delta=1e-6), rel=1e-4)
    assert spent["rolled back"].item() == pytest.approx(composed(1.0, 2, delta=1e-6), rel=1e-4)


@pytest.mark.soak
def test_silos_among_themselves_come_to_the_same_and_say_the_same(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """A private silo beside one that is not, through a store and in a collective, with the same secret."""

    def run(name: str, exchange: dict[str, Any]) -> Outcome:
        alpha = {"private": {"epsilon": 8.0, "delta": 1e-5}, **TWO_RANKS}
        trust = {"metrics": {"loss": "member", "held_out": "member"}}
        outer = {"codec": "int4", "second_moments": "shared", "merge": "importance", "control_variates": 0.5}
        inner = {"optimizer": "muon"}
        silos = {"alpha": alpha}
        config = tiny_config(tmp_path / name, trust=trust, outer=outer, inner=inner, silos=silos, exchange=exchange)
        if name == "among":
            own = config.silo_directory("alpha") / "private"
            own.mkdir(parents=True)
            shutil.copy(tmp_path / "stored/run/silos/alpha/private" / SECRET, own)
        return federate(config)

    stored, among = run("stored", {}), run("among", collective())
    last = among.config.schedule.num_versions
    assert_same_bits(among.parameters(last), stored.parameters(last))
    assert among.by_step("alpha", "epsilon") == stored.by_step("alpha", "epsilon")
    assert summarize(among.config)["epsilon"] == summarize(stored.config)["epsilon"]
    told = {}
    for one in (stored, among):
        data = next(Path(one.ledger).glob(f"silos/alpha/{last:06d}/manifest.json")).read_bytes()
        told[one.config.exchange.kind] = Manifest.from_bytes(data).metrics
    assert told["store"] == told["collective"]
    assert told["store"].keys() == {"pseudo_gradient_norm", "epochs", "epsilon", "delta"}


def test_a_killed_silo_accounts_on_stops_at_its_budget_to_the_step_and_leaves(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    batch, rules = 32, {"quorum": 1, "deadline_floor_seconds": 0.5, "deadline_ceiling_seconds": 20.0}
    alpha = {
        "data": [str(tiny_text.packed["alpha"] / "valid")],  # four batches, and a rest that is not used
        "private": {"epsilon": 4.0, "delta": 1e-5, "noise_multiplier": 1.2},  # enough for one epoch, not for two
        "global_batch_sequences": batch,
        "micro_batch_sequences": batch // 2,
    }
    config = tiny_config(
        tmp_path,
        sequence_tokens=32,
        outer={"sync_interval_steps": 3},
        membership=rules,
        trust={"metrics": {"loss": "member", "held_out": "member"}},
        silos={"alpha": alpha},
    )
    run = federate_with({"alpha": [("step", 1, 0, "kill", 0)]}, config, tmp_path / "fired", max_restarts=1)
    begun, *releases = (config.silo_directory("alpha") / "private" / "account.txt").read_text().splitlines()
    assert json.loads(begun)["epoch_sequences"] == 4 * batch
    assert [int(line.split()[0]) for line in releases] == [0, batch, 2 * batch, 3 * batch]  # the first was made twice
    epsilon = run.by_step("alpha", "epsilon")
    assert sorted(epsilon) == [1, 2, 3, 4]
    assert epsilon[4] == pytest.approx(composed(1.2, 1, delta=1e-5), rel=1e-4)
    assert sorted(run.by_step("beta", "loss")) == list(range(1, 13))
    (delivered,) = (Path(config.store_url) / "silos" / "alpha").glob("*/manifest.json")
    manifest = Manifest.from_bytes(delivered.read_bytes())
    assert manifest.metrics.keys() == {"pseudo_gradient_norm", "epochs", "epsilon", "delta"}
    assert (manifest.metrics["epsilon"], manifest.metrics["delta"]) == (epsilon[3], 1e-5)
    status = store_status(config.store_url).silos["alpha"]
    assert (status.part, status.spent) == ("left", {"epsilon": epsilon[3], "delta": 1e-5})
    assert summarize(config)["epsilon"] == {"alpha": epsilon[4]}
    assert "private: epsilon 3.5" in (Path(config.directory) / "report.html").read_text()
    said = (Path(config.directory) / "logs" / "attempt-001" / "alpha.log").read_text()
    assert "its budget of epsilon 4, delta 1e-05 is spent after step 4; a larger one" in said
    assert "goes on with noise_multiplier=1.2; it has left, and the others go on" in said
    plain = dataclasses.replace(config.silos["alpha"], private=PrivateConfig())
    message = one_line_error(open_private, dataclasses.replace(config, silos={"alpha": plain}), "alpha", None, None)
    assert "silos.alpha.private.epsilon: null given" in message
    assert "has the account of a run that was private until now" in message
