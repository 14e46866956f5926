"""What each party to a federation has, from real stores; and text and options of benchmarks/leaks.py."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.leak_audit import design
from benchmarks.leak_passages import Passages, attack_run, chance
from benchmarks.leak_runs import Column, Text, corpora_in, parse_column
from benchmarks.leak_texts import CODES, HELD_OUT, deal, make_canaries, write_texts
from benchmarks.leak_views import SEALED, Attacked, Opened, check_readable, readable
from benchmarks.leaks import (
    AUDIT_HEAD,
    TEXTS_HEAD,
    TOKENS_HEAD,
    attack_designed,
    attack_tokens,
    audit_cells,
    token_cells,
)
from launch.start.local import write_resolved
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.trust.ledger import RefusedError
from tests.conftest import TinyConfig
from tests.distributed.federation import federate
from tests.support import CORPORA, TinyText, one_line_error, tiny_silo, write_corpus
from tests.unit.test_aggregate import one_version, plus_noise
from tests.unit.test_sealed import make, outgoing
from tests.unit.test_signed import begin

NESTEROV = {"codec": "fp32", "downlink_codec": "fp32", "optimizer": "nesterov", "lr": 0.5, "momentum": 0.5}


# ---- what a party has


def three_versions(config: RunConfig) -> list[dict[str, dict[str, torch.Tensor]]]:
    """A sealed run by the real aggregator; returns what each silo's parameters were, version by version."""
    write_resolved(config)
    aggregator, state = begin(config)
    sent = []
    while state.version < 3:
        sent.append({silo: plus_noise(state, ord(silo[0])) for silo in config.full_roster})
        for silo in config.full_roster:
            through, delivery = outgoing(config, state, silo)
            through.deliver(delivery)
            through.close("")
        one_version(aggregator, state)
    return sent


def test_of_two_silos_one_has_what_the_other_sealed_by_subtracting_its_own(
    tmp_path: Path, tiny_config: TinyConfig
) -> None:
    config = make(tiny_config, tmp_path, outer=NESTEROV, exchange={"keep_versions": 100})
    sent, run = three_versions(config), Path(config.directory)
    operator, beta = Opened(run, OPERATOR), Opened(run, "beta")
    delivered = operator.delivery("alpha", 3)
    subtracted = beta.subtracted(3, operator.delivery("beta", 3))
    for name, value in sent[2]["alpha"].items():
        assert torch.equal(delivered.local[name], value)
        torch.testing.assert_close(subtracted.local[name], value, rtol=0, atol=1e-6)
    assert [readable(run, party, "alpha", 3) for party in (OPERATOR, "alpha", "beta", "")] == [True, True, False, False]


def test_of_three_silos_one_has_the_mean_of_the_others(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    gamma = {"data": [str(tiny_text.packed["gamma"] / "train")], "valid": {}}
    config = make(tiny_config, tmp_path, outer=NESTEROV, exchange={"keep_versions": 100}, silos={"gamma": gamma})
    sent, run = three_versions(config), Path(config.directory)
    beta = Opened(run, "beta")
    subtracted = beta.subtracted(3, Opened(run, OPERATOR).delivery("beta", 3))
    for name, value in sent[2]["alpha"].items():
        others = (value + sent[2]["gamma"][name]) / 2
        torch.testing.assert_close(subtracted.local[name], others, rtol=0, atol=1e-6)
        assert not torch.allclose(subtracted.local[name], value, rtol=0, atol=1e-3)


# ---- a real run


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> Attacked:
    """Plain SGD without weight decay moves an input's row, and no row of what was no input."""
    inner = {"optimizer": "sgd", "weight_decay": 0.0, "lr": 0.5}
    directory = tmp_path_factory.mktemp("leaks")
    config = tiny_config(directory, inner=inner, exchange={"keep_versions": 100, "poll_seconds": 0.05})
    federate(config)
    return Attacked(config, "alpha", "beta")


@pytest.mark.soak
def test_the_rows_that_moved_are_the_tokens_of_the_round(attacked: Attacked) -> None:
    for version in (1, 2, 3):
        view = attacked.views(version)["aggregator, member"]
        moved = (view.pseudo_gradient["model.embed_tokens.weight"] != 0).any(1).numpy()
        inputs, *_ = attacked.mixture("alpha").batch(attacked.positions("alpha", version))
        there = np.isin(np.arange(len(moved)), inputs.numpy())
        assert moved.tolist() == there.tolist()
        assert 0.1 < there.mean() < 0.9
        assert (attacked.counts("alpha", version)[there] > 0).all()
    found = attack_tokens(attacked)["aggregator, member"]["rows"]
    assert found.auc > 0.95
    assert found.recall > 0.9


@pytest.mark.soak
def test_of_a_secure_sum_the_aggregator_has_the_mean_of_all(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    """Whose values each silo can take the masks off of its own."""
    outer = {"secure_sum": True, "max_share": 1.0, "max_batch_sequences": 16, "lr": 0.5, "momentum": 0.5}
    silos = {name: tiny_silo(tiny_text, name) for name in CORPORA}
    metrics = {"metrics": {"pseudo_gradient_norm": "member"}}
    outer |= {"second_moments": "shared"}
    config = tiny_config(tmp_path, silos=silos, outer=outer, trust=metrics, exchange={"keep_versions": 100})
    federate(config)
    found = Attacked(config, "alpha", "beta")
    views = found.views(2)
    assert views.keys() == {"aggregator", "member"}
    own = {silo: Opened(found.run, silo).delivery(silo, 2) for silo in silos}
    shares = found.operator.versions[2].shares
    for name, value in views["aggregator"].pseudo_gradient.items():
        mean = sum(shares[silo] * own[silo].pseudo_gradient[name] for silo in silos)
        torch.testing.assert_close(value, mean, rtol=1e-3, atol=1e-6)
    rows = views["aggregator"].moments["model.embed_tokens.weight"]["rows"]
    told = {silo: own[silo].moments["model.embed_tokens.weight"]["rows"] for silo in silos}
    torch.testing.assert_close(rows, sum(shares[silo] * told[silo] for silo in silos), rtol=1e-5, atol=0.0)
    assert "model.embed_tokens.weight" in views["member"].moments
    with pytest.raises(RefusedError, match="the delivery of alpha for version 2 is masked"):
        found.operator.delivery("alpha", 2)


@pytest.mark.soak
def test_tables_of_a_real_run(attacked: Attacked, tiny_text: TinyText) -> None:
    packed = tiny_text.packed | {f"alpha-{HELD_OUT}": tiny_text.packed["gamma"]}
    canaries = {"alpha": make_canaries(1)}
    text = Text(
        packed=packed, tokenizer=tiny_text.tokenizer, corpora=["alpha", "beta"], canaries=canaries, directory=Path()
    )
    never_trained = attacked.model(attacked.operator.versions[0].parameters)
    passages = Passages(attacked, text)
    found = attack_run(attacked, passages, never_trained)
    assert [*found] == ["aggregator, member", SEALED, "model's user"]
    assert {2 + len(one.cells) for one in found.values()} == {TEXTS_HEAD.count("|") - 1}
    # alpha's text is of other words than gamma's, which the model has never seen.
    assert found["aggregator, member"].auc > 0.7
    assert "tells" in chance(passages, never_trained)
    words = attack_tokens(attacked)
    assert [*words] == ["aggregator, member", SEALED]
    assert 2 + len(token_cells(words[SEALED])) == TOKENS_HEAD.count("|") - 1


@pytest.mark.soak
def test_canaries_that_no_run_was_trained_on_prove_nothing(attacked: Attacked) -> None:
    (own,) = attacked.mixture("alpha").corpora
    found = attack_designed(attacked, design(own, own, 20, seed=0), attacked.model(attacked.own(1).base))
    assert [*found] == ["aggregator, member", SEALED, "model's user"]
    for score in found.values():
        cells = audit_cells([score], attacked.config)
        assert 2 + len(cells) == AUDIT_HEAD.count("|") - 1
        assert cells[3].values == [0]


# ---- text


def test_documents_are_dealt_out_in_turn(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    texts = [f"document {number}" for number in range(12)]
    (corpus / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert deal(corpus, 15) == [["document 0", "docum"], ["document 1", "docum"], ["document 2", "docum"]]
    assert one_line_error(deal, corpus, 50) == ("--characters: 50 given; corpus has not 3 times as many; allowed: less")


def test_canaries_stand_in_one_silos_text_as_often_as_they_say(tmp_path: Path) -> None:
    for name in ("alpha", "beta"):
        write_corpus(tmp_path / "corpora" / name, name, num_characters=9_000)
    canaries = {"alpha": make_canaries(2, seed=1), "beta": make_canaries(2, seed=2)}
    write_texts(tmp_path / "corpora", tmp_path / "out", num_characters=2_000, canaries=canaries)
    said = {path.name: (path / "train.jsonl").read_text() for path in (tmp_path / "out").iterdir()}
    assert len(said) == 6
    for canary in canaries["alpha"]:
        counts = {name: text.count(canary.text()) for name, text in said.items()}
        assert counts == dict.fromkeys(said, 0) | {"alpha": canary.num_repeats}
        assert 0 <= canary.code < CODES
    assert sorted(canary.num_repeats for canary in canaries["alpha"]) == [1, 1, 4, 4, 16, 16]
    held_out = (tmp_path / "out" / "alpha-held-out" / "train.jsonl").read_text()
    assert (tmp_path / "out" / "alpha" / "valid.jsonl").read_text() == held_out
    assert not {*said["alpha"].splitlines()} & {*held_out.splitlines()}


# ---- what a user can say


def test_a_run_with_changes() -> None:
    base = ("inner.lr=0.1",)
    column = parse_column("more:silos=4,inner.betas=[0.9,0.95],trust.seal=true", 2, base)
    assert column == Column(name="more", num_silos=4, overrides=(*base, "inner.betas=[0.9,0.95]", "trust.seal=true"))
    assert parse_column("as it is:silos=2", 3, base) == Column(name="as it is", num_silos=2, overrides=base)
    assert one_line_error(parse_column, "sealed", 2, ()) == "--with: 'sealed' given; allowed: NAME:key=value,key=value"
    assert one_line_error(parse_column, "few:silos=1", 2, ()) == "--with: 'silos=1' given; allowed: silos=2 or more"


def of_two(tiny_text: TinyText, directory: Path) -> Text:
    """The text of two silos, without canaries."""
    return Text(
        packed=tiny_text.packed,
        tokenizer=tiny_text.tokenizer,
        corpora=["alpha", "beta"],
        canaries={},
        directory=directory,
    )


def test_what_the_attacks_cannot_read_is_refused(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> None:
    check_readable(tiny_config(tmp_path))
    fragments = tiny_config(tmp_path, outer={"num_fragments": 2})
    assert one_line_error(check_readable, fragments) == (
        "outer.num_fragments: 2 given; allowed where leaks are measured: 1"
    )
    text = of_two(tiny_text, tmp_path)
    three = Column(name="three", num_silos=3)
    assert one_line_error(text.config, three) == "silos: 3 given; allowed: up to 2, one a corpus"
    assert one_line_error(corpora_in, tmp_path / "none", tmp_path, []) == (
        f"--corpora: '{tmp_path / 'none'}' given; allowed: a folder of two folders or more with train.jsonl"
    )
    for name in ("alpha", "beta"):
        (tmp_path / "corpora" / name).mkdir(parents=True)
    refused = one_line_error(corpora_in, tmp_path / "corpora", tmp_path, ["alpha", "delta"])
    assert refused == "--silo: 'delta' given; allowed: alpha, beta"
    assert corpora_in(tmp_path / "corpora", tmp_path, []) == (tmp_path / "corpora", ["alpha"])


def test_other_settings_have_another_directory(tmp_path: Path, tiny_text: TinyText) -> None:
    text = of_two(tiny_text, tmp_path)
    columns = [Column(name="one run", num_silos=2, overrides=(f"inner.lr={lr}",)) for lr in (0.1, 0.2, 0.2)]
    first, second, third = (text.config(column).directory for column in columns)
    assert first != second == third
    assert Path(first).name.startswith("one-run-")
    # Who is attacked changes no run of all silos; another seed does.
    assert text.attacked("beta").config(columns[0]).directory == first
    seeded = replace(text, seed=1).config(columns[0])
    assert (seeded.model.seed, seeded.silos["alpha"].data_seed, seeded.silos["beta"].data_seed) == (1, 1, 1)
