"""What a member publishes of an evaluation by hand: signed, of the parameters it says, and on the federation's page."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.evaluate import evaluate
from launch.show.page import Federation
from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config
from pretrain.exchange.store import StoreExchange
from pretrain.federation.evaluation import open_subject
from pretrain.federation.export import export_global_model
from pretrain.federation.verify import StoreVerifier
from pretrain.trust.egress import egress_file, read_lines
from tests.support import TinyText, one_line_error
from tests.unit.test_aggregate import one_version
from tests.unit.test_signed import begin, deliver

Said = Callable[[], str]


@pytest.fixture
def run(signed_config: RunConfig) -> RunConfig:
    """A run of version 1, in its run directory."""
    aggregator, state = begin(signed_config)
    for silo in signed_config.full_roster:
        deliver(signed_config, state, silo)
    one_version(aggregator, state)
    aggregator.stop()
    save_config(signed_config, Path(signed_config.directory) / "config.yaml")
    return signed_config


def test_what_a_member_publishes_is_on_the_page(run: RunConfig, tmp_path: Path, said: Said) -> None:
    (corpus, split), *_ = run.silos["alpha"].valid.items()
    evaluate(run.directory, publish=True, silo="alpha")
    evaluate(run.directory, publish=True, silo="beta", version=0, data=[f"both={split}"], num_sequences=3)
    provenance = export_global_model(run, tmp_path / "model")
    (tmp_path / "alpha.yaml").write_bytes((Path(run.directory) / "config.yaml").read_bytes())
    as_alpha = {"publish": True, "silo": "alpha", "config": [tmp_path / "alpha.yaml"]}
    evaluate(str(tmp_path / "model"), data=[split], **as_alpha)
    evaluate(str(tmp_path / "model"), label="central", **as_alpha)
    names = (
        "alpha/evaluations/000000",
        "beta/evaluations/000000",
        "alpha/evaluations/000001",
        "alpha/evaluations/000002",
    )
    assert [line for line in said().splitlines() if "published" in line] == [
        f"published: silos/{name}.json" for name in names
    ]
    found = open_subject(str(tmp_path / "model")).losses({corpus: Path(split)})[corpus]
    held_out = Federation(run.store_url).history.held_out
    assert held_out.versions == {0: {"both": pytest.approx(held_out.curve("beta")[0][1])}, 1: {corpus: found.loss}}
    assert held_out.of_silos["alpha"][1].sequences == {corpus: found.num_sequences}
    assert held_out.of_silos["beta"][0].sequences == {"both": 3}
    central = held_out.beside["central"]["alpha"]
    assert central.losses == {corpus: found.loss}
    assert (central.parameters_digest, central.tokens) == (
        provenance["parameters_digest"],
        sum(provenance["tokens"].values()),
    )
    (tmp_path / "scratch").mkdir()
    assert (
        StoreVerifier(StoreExchange(run.store_url), tmp_path / "scratch", tell=lambda _: None).verify().findings == []
    )
    lines = [line for line, _ in read_lines(egress_file(run.directory, "alpha")) if line and line.kind == "evaluation"]
    assert [(line.name, line.of.get("version")) for line in lines] == [
        ("silos/alpha/evaluations/000000.json", 1),
        ("silos/alpha/evaluations/000001.json", 1),
        ("silos/alpha/evaluations/000002.json", None),
    ]

    # Of another silo, another version or another history it counts for nothing.
    store = Path(run.store_url)
    (store / "silos/beta/evaluations/000007.json").write_bytes((store / f"silos/{names[0]}.json").read_bytes())
    federation = Federation(run.store_url)
    assert federation.history.held_out == held_out
    assert federation.status.unsigned == ["silos/beta/evaluations/000007.json"]


def test_what_cannot_be_published_is_one_line_before_anything_is_evaluated(
    run: RunConfig, tmp_path: Path, tiny_text: TinyText
) -> None:
    def refused(where: str = run.directory, **options: object) -> str:
        return one_line_error(evaluate, where, publish=True, **options)

    assert refused() == "--silo: none given; allowed with --publish: alpha, beta"
    assert refused(silo="gamma") == "--silo: gamma given; allowed with --publish: alpha, beta"
    assert refused(silo="alpha", label="A B").startswith("--label: 'A B' given; allowed: [a-z]")
    assert refused(run.store_url, silo="alpha").startswith("--config: none given, and ")
    prose = str(tiny_text.packed["gamma"] / "valid")
    assert refused(silo="alpha", data=[prose]) == f"--data: {prose!r} given; allowed: CORPUS=SPLIT, each corpus once"
    assert (
        one_line_error(evaluate, run.directory, label="central") == "--label: given without --publish; allowed: with it"
    )
    export_global_model(run, tmp_path / "model")
    changed = Path(shutil.copytree(tmp_path / "model", tmp_path / "changed"))
    told = (changed / "atoll.json").read_text()
    (changed / "atoll.json").write_text(told.replace('"version": 1', '"version": 0'))
    config = [Path(run.directory) / "config.yaml"]
    said = refused(str(changed), silo="alpha", config=config)
    assert said.startswith("--label: none given; this model is none of the versions 0 to 1 of tiny; allowed: a label")
    policy = tmp_path / "policy.yaml"
    policy.write_text("metrics: [loss]")
    kept = dataclasses.replace(run, trust=dataclasses.replace(run.trust, policy=str(policy)))
    save_config(kept, Path(run.directory) / "config.yaml")
    assert refused(silo="alpha") == f"--publish: given; {policy} keeps held_out with its silo; allowed: without"
    assert StoreExchange(run.store_url).objects.names("silos/alpha/evaluations") == []
