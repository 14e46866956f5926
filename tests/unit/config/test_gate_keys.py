"""A gate's rule that nobody could keep, or decide, is one line before anything starts."""

from pathlib import Path

import pytest

from pretrain.config.load import load_config
from pretrain.trust.contract import agreed_settings
from tests.support import one_line_error

SHA = "a" * 64
MINIMAL = f"""
model: {{config: {{model_type: llama}}}}
inner: {{num_steps: 12}}
outer: {{sync_interval_steps: 4}}
silos: {{alpha: {{}}, beta: {{}}}}
gate: {{every_versions: 1, data: {{alpha/news: {SHA}, beta/law: {SHA}}}, max_worst: 3.0}}
"""

MISTAKES = {
    "gate.every_versions=0": f"gate.data: {{'alpha/news': '{SHA}', 'beta/law': '{SHA}'}} given; allowed: {{}} without",
    "gate.every_versions=4": "gate.every_versions: 4 given; allowed: 0 to 3, the versions of the run: else none is a",
    "exchange={kind: collective, url: 'tcp://a:1'}": "gate.every_versions: 1 given; allowed: 0 with exchange.kind=coll",
    "gate.data={gamma/news: a}": "gate.data: 'gamma/news' given; allowed: SILO/CORPUS, of a silo of the roster: alph",
    "gate.data={alpha: a}": "gate.data: 'alpha' given; allowed: SILO/CORPUS",
    "gate.data={alpha/news: a}": "gate.data.alpha/news: 'a' given; allowed: a sha256, as atoll contract gate says it",
    "gate.public={shared: b}": "gate.public.shared: 'b' given; allowed: a sha256",
    "gate.places={shared: /tmp}": "gate.places: 'shared' given; allowed: names of gate.public: none",
    "gate.max_worst=0": "gate.max_worst: 0.0 given; allowed: null, or above 0",
    "gate.max_worst=null": "gate: [] given; allowed: one or more of max_mean, max_worst, max_mean_rise, max_silo_ris",
    "gate.max_public=3": "gate.max_public: 3.0 given; allowed: null without gate.public: there is no result to decid",
    "gate.max_silo_rise=-3": "gate.max_silo_rise: -3.0 given; allowed: above -3 with gate.max_worst=3.0: no loss is ",
    "gate.quorum=3": "gate.quorum: 3 given; allowed: null, or 1 to the 2 silos of gate.data",
    "gate.quorum=1": "gate.quorum: 1 given; allowed: null without gate.deadline_seconds, until which all are waited ",
    "membership.quorum=1": "gate.deadline_seconds: None given; allowed: a number with membership.quorum, as a silo m",
    "membership.sample=1": "gate.deadline_seconds: None given; allowed: a number with membership.sample",
    "gate.otherwise=stop": "gate.otherwise: 'stop' given; allowed: go_on, go_back",
    "trust.metrics.held_out=member": "trust.metrics.held_out: 'member' given; allowed: public, consortium with gate.",
}
TOGETHER = {
    (
        "gate.otherwise=go_back",
        "outer.num_fragments=2",
    ): "gate.otherwise: 'go_back' given; allowed: go_on with outer.num_f",
    (
        "gate.data={}",
        "gate.max_worst=1",
    ): "gate.max_worst: 1.0 given; allowed: null without gate.data: there is no result",
}


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    return tmp_path / "run.yaml"


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line(minimal: Path, override: str) -> None:
    assert one_line_error(load_config, [minimal], [override]).startswith(MISTAKES[override])


@pytest.mark.parametrize("overrides", TOGETHER)
def test_what_does_not_fit_together_is_one_line(minimal: Path, overrides: tuple[str, ...]) -> None:
    if overrides[0] == "gate.data={}":  # a mapping on the command line is put over the one in the file
        minimal.write_text(MINIMAL.replace(f"data: {{alpha/news: {SHA}, beta/law: {SHA}}}, ", ""))
    assert one_line_error(load_config, [minimal], [*overrides]).startswith(TOGETHER[overrides])


def test_the_rule_is_part_of_the_contract_and_places_are_not(minimal: Path) -> None:
    with_gate = load_config([minimal], [f"gate.public={{shared: {SHA}}}", "gate.places={shared: /tmp/x}"])
    told = agreed_settings(with_gate)["gate"]
    assert told["max_worst"] == 3.0
    assert told["public"] == {"shared": SHA}
    assert "places" not in told
    minimal.write_text(MINIMAL[: MINIMAL.index("gate:")])
    assert "gate" not in agreed_settings(load_config([minimal]))
