"""The design's exactness rules with real processes: aggregator, torchrun, DeepSpeed, the store on disk."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.config.keys import RunConfig
from pretrain.exchange.payload import Tensors
from pretrain.outer.moments import MeanGradient
from pretrain.silo.data import Order, PackedTokens
from pretrain.silo.model import build_initial, token_losses
from pretrain.silo.named_state import SavedState
from pretrain.silo.optim import is_muon_matrix, learning_rate
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_evaluated_last, assert_same_bits, federate
from tests.support import TWO_RANKS, VOCAB_SIZE, TinyText, zero

KEEP_ALL = {"keep_versions": 100}
PLAIN_AVERAGING = {"optimizer": "sgd", "lr": 1.0}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> Outcome:
    """Silo alpha alone, never syncing."""
    return federate(one_silo(tiny_config, tmp_path_factory.mktemp("plain"), exchange={"kind": "none"}))


def one_silo(tiny_config: TinyConfig, directory: Path, **changes: object) -> RunConfig:
    """Silo alpha only; its data order is stated, so that twins of it see the same."""
    return tiny_config(directory, silos={"beta": None, "alpha": {"data_seed": 7}}, **changes)


@pytest.mark.parametrize(
    ("sync_interval_steps", "num_fragments"), [(1, 1), pytest.param(6, 1, marks=pytest.mark.soak), (6, 3)]
)
def test_one_silo_with_outer_sgd_is_plain_training(
    plain: Outcome, tmp_path: Path, tiny_config: TinyConfig, sync_interval_steps: int, num_fragments: int
) -> None:
    outer = PLAIN_AVERAGING | {"sync_interval_steps": sync_interval_steps, "num_fragments": num_fragments}
    run = federate(one_silo(tiny_config, tmp_path, outer=outer, exchange=KEEP_ALL))
    assert_same_bits(run.parameters(run.config.schedule.num_versions), plain.alone("alpha"))
    assert run.by_step("alpha", "loss") == plain.by_step("alpha", "loss")
    assert run.by_step("alpha", "lr") == plain.by_step("alpha", "lr")  # never depends on H or syncs


@pytest.mark.soak
def test_one_silo_is_plain_training_at_zero_3_in_bf16_too(tmp_path: Path, tiny_config: TinyConfig) -> None:
    layout = TWO_RANKS | {"precision": "bf16"} | zero(3)
    outer = PLAIN_AVERAGING | {"sync_interval_steps": 3}
    alone = federate(one_silo(tiny_config, tmp_path / "alone", silo=layout, exchange={"kind": "none"}))
    run = federate(one_silo(tiny_config, tmp_path / "federated", silo=layout, outer=outer))
    assert_same_bits(run.parameters(4), alone.alone("alpha"))
    assert run.by_step("alpha", "loss") == alone.by_step("alpha", "loss")


@pytest.mark.soak
def test_a_silo_alone_is_not_corrected_by_control_variates(tmp_path: Path, tiny_config: TinyConfig) -> None:
    outer, inner = PLAIN_AVERAGING | {"num_fragments": 3, "overlap_steps": 1}, {"optimizer": "muon"}
    free = federate(one_silo(tiny_config, tmp_path / "free", inner=inner, outer=outer))
    run = federate(one_silo(tiny_config, tmp_path / "run", inner=inner, outer=outer | {"control_variates": 1.0}))
    newest = run.config.schedule.num_versions
    assert_same_bits(run.parameters(newest), free.parameters(newest))  # what is told in int4 is taken back in int4
    assert run.by_step("alpha", "loss") == free.by_step("alpha", "loss")


def test_control_variates_are_a_share_of_what_the_mean_gradients_sent_are_off_their_mean(
    tmp_path: Path, tiny_config: TinyConfig
) -> None:
    outer = PLAIN_AVERAGING | {"control_variates": 0.5}
    run = federate(tiny_config(tmp_path, inner={"optimizer": "muon"}, outer=outer, exchange=KEEP_ALL))
    newest, store = f"{run.config.schedule.num_versions:06d}", Path(run.config.store_url)
    merged = Tensors(store / "global" / newest / "parameter-000.safetensors").moments
    for silo in ("alpha", "beta"):
        (sent,) = (store / "silos" / silo / newest).glob("*.safetensors")
        told = Tensors(sent).moments
        last = run.config.silo_directory(silo) / "checkpoints" / f"step-{run.config.inner.num_steps:08d}"
        saved, values = SavedState(last / "engine"), load_file(last / "global.safetensors")
        shapes = {name: value.shape for name, value in values.items() if is_muon_matrix(name, value.shape)}
        assert set(shapes) == set(told) == set(merged)
        for name, shape in shapes.items():
            moment = MeanGradient(shape)
            off = moment.decode(merged[name]) - moment.decode(told[name])
            assert off.any()
            assert torch.equal(saved.read("correction", name, 0, shape.numel()), 0.5 * off.flatten())


def test_identical_silos_are_one_silo(plain: Outcome, tmp_path: Path, tiny_config: TinyConfig) -> None:
    twin = {"data": [str(Path(d)) for d in plain.config.silos["alpha"].data], "data_seed": 7}
    silos = {"alpha": {"data_seed": 7}, "beta": twin | {"valid": plain.config.silos["alpha"].valid}}
    run = federate(tiny_config(tmp_path, silos=silos, outer=PLAIN_AVERAGING))
    assert_same_bits(run.parameters(3), plain.alone("alpha"))
    assert run.by_step("beta", "loss") == run.by_step("alpha", "loss") == plain.by_step("alpha", "loss")


def test_h_1_with_inner_sgd_is_data_parallel_training(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    inner = {"optimizer": "sgd", "lr": 0.5, "clip_norm": 0, "weight_decay": 0, "num_steps": 6}
    outer = PLAIN_AVERAGING | {"sync_interval_steps": 1}
    run = federate(tiny_config(tmp_path, inner=inner, outer=outer))

    config, model = run.config, build_initial(run.config.model, VOCAB_SIZE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(6):
        optimizer.zero_grad()
        for name in ("alpha", "beta"):  # the mean gradient over both silos' batches
            tokens = PackedTokens([tiny_text.packed[name] / "train"], sequence_tokens=16)
            order = Order(seed=0, silo=name, num_sequences=tokens.num_sequences)
            input_ids, targets, *_ = tokens.batch([order.index(4 * step + i) for i in range(4)])
            (token_losses(model, input_ids, targets).mean() / 2).backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, config.inner)
        optimizer.step()
    merged = run.parameters(6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(merged[name], parameter.detach(), rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> Outcome:
    """Three silos that differ in ranks, ZeRO stage, precision and tokens per step; Nesterov outside."""
    silos = {
        "alpha": TWO_RANKS | {"micro_batch_sequences": 1, "accumulation_steps": 2} | zero(2),
        "beta": {"precision": "bf16"} | zero(3),
        "gamma": {"global_batch_sequences": 2, "micro_batch_sequences": 2, "activation_checkpointing": "layers"},
    }
    directory = tmp_path_factory.mktemp("mixed")
    text = tiny_config(directory).silos["alpha"].data[0].rsplit("/", 2)[0]
    silos["gamma"] |= {"data": [f"{text}/gamma/train"], "valid": {"gamma": f"{text}/gamma/valid"}}
    outer = {"optimizer": "nesterov", "lr": 0.7, "momentum": 0.9}
    return federate(tiny_config(directory, silos=silos, outer=outer, exchange=KEEP_ALL))


def test_the_divisor_is_the_tokens_of_those_in_the_commit(mixed: Outcome) -> None:
    tokens = {"alpha": 4 * 4 * 16, "beta": 4 * 4 * 16, "gamma": 4 * 2 * 16}
    for version in (1, 2, 3):
        commit = mixed.commit(version)
        assert {c.silo: c.weight for c in commit.contributors} == tokens
        assert commit.divisor == sum(tokens.values())
        assert {c.silo: c.tokens_total for c in commit.contributors} == {s: version * t for s, t in tokens.items()}


def test_the_first_nesterov_step_is_lr_times_one_plus_momentum(mixed: Outcome) -> None:
    before, after, divisor = mixed.parameters(0), mixed.parameters(1), mixed.commit(1).divisor
    weights = {c.silo: c.weight for c in mixed.commit(1).contributors}
    delivered = {silo: mixed.delivered(silo, 1) for silo in weights}
    for name, value in before.items():
        merged = sum(w * (value.double() - delivered[s][name].double()) for s, w in weights.items()) / divisor
        expected = (value.double() - 0.7 * (1 + 0.9) * merged).float()
        torch.testing.assert_close(after[name], expected, rtol=2e-7, atol=1e-9)  # sums may round differently


def test_every_silo_evaluates_the_model_of_the_commit(mixed: Outcome) -> None:
    # Each silo's held-out loss after the last sync is that of a plain transformers model with the merged parameters.
    assert_evaluated_last(mixed)


def test_every_line_of_the_file_contract_is_there(mixed: Outcome) -> None:
    seconds = {"seconds_training", "seconds_waiting", "seconds_evaluating"}
    kinds = {
        "step": {"time", "silo", "step", "round", "loss", "lr", "tokens", "tokens_per_second", "grad_norm"},
        "sync": {"time", "silo", "step", "round", "fragment", "bytes_sent", "bytes_received", "wait_seconds"}
        | {"version", "pseudo_gradient_norm", *seconds},
        "eval": {"time", "silo", "step", "round", "version", "tokens", "val_loss", "sequences"},
        "start": {"time", "silo", "step", "round", "version", "tokens", *seconds},
        "commit": {
            "time",
            "version",
            "round",
            "fragment",
            "silos",
            "weights",
            "divisor",
            "update_norm",
            "cosine_mean",
            "digest",
        },
    }
    for kind, names in kinds.items():
        rows = [record for record in mixed.records if record["kind"] == kind]
        assert rows
        assert all(row.keys() == names | {"kind"} for row in rows)
