"""`atoll compare`: what it runs, what it makes of what came out, and what it refuses."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from launch.cli import app
from launch.compare.compare import CompareConfig, Planned, load_comparison, plan_runs
from launch.compare.pace import Followed, Pace
from launch.compare.run import compare
from launch.compare.table import Interval, Table, read_results, t_quantile, write_results
from launch.show import figures
from launch.show.display import format_seconds
from pretrain.config.load import save_config
from pretrain.trust.members import with_keys
from tests.support import ROOT, TinyText, one_line_error, tiny_settings, tiny_silo

MODELS: dict[str, dict[str, Any]] = {
    "central": {"kind": "central"},
    "averaged": {"kind": "federated", "settings": ["outer.optimizer=sgd", "outer.lr=1.0"]},
    "isolated": {"kind": "isolated"},
    "personal": {"kind": "personalised", "of": "averaged", "steps": 6, "settings": ["inner.lr=0.0001"]},
}


@pytest.fixture
def comparison(tmp_path: Path, tiny_text: TinyText) -> Path:
    """A comparison's YAML file."""
    return make_comparison(tmp_path, tiny_text)


def make_comparison(tmp_path: Path, tiny_text: TinyText) -> Path:
    """Two silos, of which the second has three times the batch."""
    run = tiny_settings(tmp_path, tiny_text)
    larger = tiny_silo(tiny_text, "beta") | {"global_batch_sequences": 12, "micro_batch_sequences": 12}
    run["silos"] = {"alpha": tiny_silo(tiny_text, "alpha"), "beta": larger}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    file = tmp_path / "compare.yaml"
    spec = {"directory": str(tmp_path / "all"), "run": [str(tmp_path / "run.yaml")], "seeds": [3, 4], "models": MODELS}
    file.write_text(yaml.safe_dump(spec, sort_keys=False))
    return file


def by_model(spec: CompareConfig, seed: int) -> dict[str, list[Planned]]:
    found: dict[str, list[Planned]] = {}
    for planned in plan_runs(spec):
        if planned.seed == seed:
            found.setdefault(planned.model, []).append(planned)
    return found


def test_all_models_see_as_many_tokens(comparison: Path) -> None:
    spec = load_comparison([comparison])
    runs = by_model(spec, 3)
    # 12 steps of 16 tokens: 4 sequences of alpha and 12 of beta
    assert [planned.tokens for planned in runs["central"]] == [12 * 16 * 16]
    assert [planned.tokens for planned in runs["averaged"]] == [12 * 16 * 16]
    # alone, each has as many of its own as in the federation and afterwards
    assert [planned.tokens for planned in runs["isolated"]] == [(12 + 6) * 16 * 4, (12 + 6) * 16 * 12]
    assert [planned.tokens for planned in runs["personal"]] == [6 * 16 * 4, 6 * 16 * 12]


def test_the_central_model_mixes_as_the_federation_does(comparison: Path) -> None:
    (central,) = by_model(load_comparison([comparison]), 3)["central"]
    (silo,) = central.config.silos.values()
    assert silo.data_weights == [4.0, 12.0]
    assert silo.global_batch_sequences == silo.micro_batch_sequences * silo.accumulation_steps == 16
    assert sorted(silo.valid) == ["alpha", "beta"]


def test_a_seed_is_the_same_for_all_models_and_another_for_each_silo(comparison: Path) -> None:
    spec = load_comparison([comparison])
    runs, others = by_model(spec, 3), by_model(spec, 4)
    seeds = {name: silo.data_seed for name, silo in runs["averaged"][0].config.silos.items()}
    assert len({*seeds.values(), *(silo.data_seed for silo in others["averaged"][0].config.silos.values())}) == 4
    assert {p.silo: p.config.silos[p.silo].data_seed for p in runs["isolated"]} == seeds
    assert {p.config.model.seed for found in runs.values() for p in found} == {3}


def test_a_personalised_model_goes_on_from_the_federated_one(comparison: Path) -> None:
    runs = by_model(load_comparison([comparison]), 3)
    (federated,), personal = runs["averaged"], runs["personal"]
    assert {p.config.model.checkpoint for p in personal} == {str(federated.directory / "model")}
    assert {p.config.inner.lr for p in personal} == {0.0001}
    assert {p.config.exchange.kind for p in personal} == {"none"}
    assert list(federated.config.silos["alpha"].valid) == ["alpha", "beta"]
    assert not federated.config.silos["beta"].valid  # all have the same model: one evaluates it


def finish(planned: Planned, losses: dict[str, float], worst: float) -> None:
    """What a run leaves that evaluates three times: first the worst, then the best, then half a nat above."""
    steps, (name, *others) = planned.config.inner.num_steps, planned.config.silos
    tokens = planned.tokens // len(planned.config.silos)
    lines: list[dict[str, Any]] = [
        {
            "kind": "eval",
            "silo": name,
            "round": round,
            "step": round,
            "val_loss": {c: v + more for c, v in losses.items()},
        }
        for round, more in ((0, worst), (1, 0.0), (2, 0.5))
    ]
    for silo in (name, *others):
        lines.append({"kind": "step", "silo": silo, "round": 2, "step": steps, "tokens": tokens})
        sync = {"kind": "sync", "silo": silo, "round": 1, "version": 1, "fragment": 0, "bytes_sent": 5_000_000}
        lines.append(sync | {"bytes_received": 3_000_000})
        lines.append({"kind": "summary", "silo": silo, "seconds_training": 30.0, "seconds_waiting": 2.0})
        planned.config.silo_directory(silo).mkdir(parents=True)
        (planned.config.silo_directory(silo) / "status.json").write_text('{"phase": "finished"}')
    (planned.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (planned.directory / "summary.json").write_text(json.dumps({"steps": steps}))
    save_config(with_keys(planned.config, make=True), planned.directory / "config.yaml")  # as a launch does


def write_all(spec: CompareConfig) -> None:
    """Of two seeds: central 4.0 and 4.2, federated 1 % and 3 % above, alone half as good on the other's text."""
    for planned in plan_runs(spec):
        central = 4.0 if planned.seed == 3 else 4.2
        base = {
            "central": central,
            "averaged": central * (1.01 if planned.seed == 3 else 1.03),
            "isolated": central + 0.1,
            "personal": central + (-0.1 if planned.silo == "alpha" else 0.3),
        }[planned.model]
        finish(planned, {c: base * (2 if planned.silo not in ("", c) else 1) for c in ("alpha", "beta")}, worst=2.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_text: TinyText) -> CompareConfig:
    """One whose runs are all there: nothing but its results may be written into it."""
    spec = load_comparison([make_comparison(tmp_path_factory.mktemp("finished"), tiny_text)])
    write_all(spec)
    return spec


@pytest.fixture(scope="module")
def tables(finished: CompareConfig) -> list[Table]:
    """Its results, of the last evaluations; they are written, too."""
    return write_results(finished)


def test_the_table(finished: CompareConfig) -> None:
    spec = dataclasses.replace(finished, choice="best")
    table = "\n".join(map(str, write_results(spec)))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line]
    rows = {name: cells for name, *cells in lines}
    assert "| averaged | 4.1830 ± 1.8170 | +2.0 % ± 12.7 | 2 | 3,072 | 5.0 |" in table
    assert "| central | 4.1000 ± 1.2706 |  | 2 | 3,072 | 5.0 |" in table
    # own text: personalised is 0.2 better than alone for alpha and 0.2 worse for beta
    assert rows["personal"][0].startswith("4.0000")
    assert rows["personal"][-1] == "beta"
    assert rows["averaged"][-1] == "none"
    assert "Isolated models have trained on as many of their own tokens as the personalised ones in all." in table
    for name in ("results.json", "table.md", "loss.svg", "own.svg", "compare.html"):
        assert (Path(spec.directory) / name).stat().st_size > 100
    assert (Path(spec.directory) / "table.md").read_text() == table
    page = (Path(spec.directory) / "compare.html").read_text()
    assert page.count("<svg") == 2
    assert "<td>4.1830 ± 1.8170</td><td>+2.0 % ± 12.7</td>" in page


@pytest.mark.parametrize("width", [80, 200])
def test_tables_fit_the_terminal_and_lose_nothing(tables: list[Table], width: int) -> None:
    console = Console(record=True, width=width, file=open(os.devnull, "w"))  # noqa: SIM115
    for table in tables:
        table.show(console)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    for cell in {cell for table in tables for row in table.rows for cell in row}:
        assert any(cell in line for line in lines), cell
    assert sum(line.startswith("personal ") for line in lines) == (2 if width == 200 else 3)


@pytest.mark.parametrize("curve", [[(0.0, 7.0)], [(0.0, 7.0), (5.0, 6.0)]])
def test_one_evaluation_of_a_model_is_seen_in_the_plot(curve: list[tuple[float, float]]) -> None:
    """A line through one point is invisible: there is a mark, in the plot and in its legend."""
    plot = ElementTree.fromstring(figures.compared_losses({"price_$x_$": [curve, curve]}))
    shapes = {f"#{path.get('id')}" for path in plot.iterfind(".//{*}defs/{*}path") if "C" in path.get("d", "")}
    marks = [use for use in plot.iterfind(".//{*}use") if use.get("{http://www.w3.org/1999/xlink}href") in shapes]
    assert len(marks) == 2
    assert "price_$x_$" in "".join(plot.itertext())


def test_progress_and_time_left(comparison: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_comparison([comparison])
    runs = plan_runs(spec)
    first = runs[0]
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    followed = [Followed(name=planned.name, config=planned.config) for planned in runs]
    pace = Pace(followed)
    assert pace.due() is None
    now = 131.0
    followed[0].state = "running"
    steps = first.config.inner.num_steps
    assert pace.due() == f"0% of all tokens, measuring the time left; running: {first.name} at step 0 of {steps}"
    assert pace.due() is None
    first.directory.mkdir(parents=True)
    step = {"kind": "step", "silo": next(iter(first.config.silos)), "step": steps // 2}
    (first.directory / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    now = 191.0
    share = first.tokens / 2 / sum(planned.tokens for planned in runs)
    left = format_seconds(91 / share - 91)
    assert pace.due() == (
        f"{share:.0%} of all tokens, about {left} left; running: {first.name} at step {steps // 2} of {steps}"
    )


def test_no_two_models_look_alike_in_the_plots() -> None:
    names = [f"model {number}" for number in range(12)]
    lines = ElementTree.fromstring(figures.compared_losses({name: [[(0, 7.0), (1, 6.0), (2, 5.0)]] for name in names}))
    dots = ElementTree.fromstring(figures.compared_silos({name: {"alpha": [5.0]} for name in names}))
    shapes = {f"#{path.get('id')}": path.get("d") for path in dots.iterfind(".//{*}path")}
    href = "{http://www.w3.org/1999/xlink}href"
    styles = [line.get("style") for line in lines.iterfind(".//*[@id='legend_1']//{*}path")]
    looks = [(dot.get("style"), shapes[dot.get(href, "")]) for dot in dots.iterfind(".//*[@id='legend_1']//{*}use")]
    assert len(set(styles)) == len(set(looks)) == len(names)


def test_results_have_bytes_and_seconds_of_every_silo(finished: CompareConfig) -> None:
    write_results(finished)
    results = json.loads((Path(finished.directory) / "results.json").read_text())
    for model in ("averaged", "isolated"):  # of one run, and of one run a silo
        assert results[model]["3"]["sent_bytes_by_silo"] == {"alpha": 5_000_000, "beta": 5_000_000}
        assert results[model]["3"]["received_bytes_by_silo"] == {"alpha": 3_000_000, "beta": 3_000_000}
        assert results[model]["3"]["seconds"] == {"training": 60.0, "waiting": 4.0, "evaluating": 0.0}
    assert results["isolated"]["3"]["corpora"]["alpha"] == {"alpha": 4.6, "beta": 8.7}
    # with what the averaged model took, which it goes on from: so as many tokens as alone
    assert results["personal"]["3"]["tokens"] == results["isolated"]["3"]["tokens"] == (12 + 6) * 16 * 16
    assert results["personal"]["3"]["sent_bytes_by_silo"]["alpha"] == 2 * 5_000_000
    assert results["personal"]["3"]["seconds"]["training"] == 2 * 60.0


def test_the_last_evaluation_counts_unless_the_best_is_asked_for(finished: CompareConfig) -> None:
    last, best = read_results(finished), read_results(dataclasses.replace(finished, choice="best"))
    assert last["central"][3].all_text - best["central"][3].all_text == pytest.approx(0.5)
    assert last["central"][3].curve[0][1] - last["central"][3].curve[1][1] == pytest.approx(2.0)


def with_tests(comparison: Path) -> Path:
    """The same, whose silos hold out a second text each, with `-test` to its name."""
    file = comparison.with_name("run.yaml")
    run = yaml.safe_load(file.read_text())
    for name, silo in run["silos"].items():
        silo["valid"][f"{name}-test"] = silo["valid"][name]
    file.write_text(yaml.safe_dump(run))
    return comparison


def test_what_is_reported_had_no_part_in_the_choice(comparison: Path) -> None:
    file = with_tests(comparison)
    apart = ["choice=best", "choose_on=[alpha,beta]", "report_on=['*-test']"]
    spec = load_comparison([file], apart)
    for planned in plan_runs(spec):  # the second evaluation is the best on valid, the third on test
        finish(planned, {"alpha": 4.0, "beta": 4.0, "alpha-test": 5.0, "beta-test": 6.0}, worst=1.0)
        metrics = planned.directory / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        for line in (line for line in lines if line["kind"] == "eval" and line["round"] == 2):
            line["val_loss"] |= {"alpha-test": 1.0, "beta-test": 1.0}
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = read_results(spec)
    assert results["central"][3].corpora == {"": {"alpha-test": 5.0, "beta-test": 6.0}}
    assert results["isolated"][3].own_text == {"alpha": 5.0, "beta": 6.0}
    assert results["averaged"][3].all_text == 5.5
    assert "| averaged | 5.5000 ± 0.0000 |" in str(write_results(spec)[0])
    # chosen by what is reported, it would be 1.0
    same = dataclasses.replace(spec, choose_on=["*-test"])
    assert read_results(same)["averaged"][3].all_text == 1.0


def test_checkpoints_of_finished_runs_go_unless_they_are_to_stay(comparison: Path) -> None:
    spec = load_comparison([comparison])
    write_all(spec)
    folders = [p.config.silo_directory(silo) for p in plan_runs(spec) for silo in p.config.silos]
    for folder in folders:
        (folder / "checkpoints" / "000012").mkdir(parents=True)
        (folder / "final.safetensors").write_text("the model")
    assert compare(dataclasses.replace(spec, keep_checkpoints=True)) == 0
    assert all((folder / "checkpoints" / "000012").is_dir() for folder in folders)
    assert compare(spec) == 0
    assert not any((folder / "checkpoints").exists() for folder in folders)
    assert all((folder / "final.safetensors").is_file() for folder in folders)


def test_a_model_counts_when_all_its_runs_are_finished(comparison: Path) -> None:
    spec = load_comparison([comparison])
    for planned in plan_runs(spec)[:3]:
        finish(planned, {"alpha": 4.0, "beta": 4.0}, worst=1.0)
    assert {model: list(seeds) for model, seeds in read_results(spec).items()} == {"central": [3], "averaged": [3]}


def test_a_run_is_finished_when_all_its_silos_are(comparison: Path) -> None:
    spec = load_comparison([comparison])
    (federated,) = by_model(spec, 3)["averaged"]
    assert federated.state == "to do"
    finish(federated, {"alpha": 4.0, "beta": 4.0}, worst=1.0)
    assert federated.state == "finished"
    # the other silo has made its last step, but neither merged nor evaluated
    (federated.config.silo_directory("beta") / "status.json").write_text('{"phase": "stopped"}')
    assert federated.state == "to resume"
    assert not read_results(spec)


def test_a_model_may_have_fewer_seeds(comparison: Path) -> None:
    spec = load_comparison([comparison], ["models.averaged.seeds=[4]", "models.personal.seeds=[4]"])
    assert set(by_model(spec, 3)) == {"central", "isolated"}
    assert set(by_model(spec, 4)) == set(MODELS)
    write_all(spec)
    lines = [line.split(" | ") for table in write_results(spec) for line in str(table).splitlines()]
    (averaged, _) = [cells for cells in lines if cells[0] == "| averaged"]
    assert averaged[1:4] == ["4.8260", "+2.7 %", "1"]  # 4.2 * 1.03 + 0.5 against 4.2 + 0.5


def test_the_dry_run(comparison: Path) -> None:
    spec = load_comparison([comparison])
    first, second = plan_runs(spec)[:2]
    finish(first, {"alpha": 4.0, "beta": 4.0}, worst=1.0)
    save_config(second.config, second.directory / "config.yaml")
    shown = CliRunner().invoke(app, ["compare", "--config", str(comparison), "--dry-run"])
    lines = shown.stdout.splitlines()
    assert lines[0] == f"{first.directory}  finished  3,072 tokens (central 3,072)"
    assert lines[1] == f"{second.directory}  to resume  3,072 tokens (alpha 768, beta 2,304)"
    assert lines[2].endswith("isolated/alpha/seed-3  to do  1,152 tokens (alpha 1,152)")
    assert lines[-1] == "12 runs, 24,576 tokens; left: 11 runs, 21,504 tokens"


def test_a_run_that_fails_ends_the_comparison(comparison: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = load_comparison([comparison], ["settings=[tokenizer=nowhere]"])
    assert compare(spec, jobs=2) == 2
    said = capfd.readouterr().out
    started = [planned.directory for planned in plan_runs(spec)[:2]]  # either may be the first to fail
    (failed,) = [place for place in started if f"exit status 2 in {place}; see {place}.console" in said]
    assert "tokenizer" in Path(f"{failed}.console").read_text()
    assert not (Path(spec.directory) / "runs" / "personal").exists()


def test_the_documented_comparison(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "learning.md").read_text()
    (documented,) = [block.split("```")[0] for block in text.split("```yaml")[1:]]
    (file := tmp_path / "compare.yaml").write_text(documented)
    assert len(load_comparison([file]).models) == 5


def test_nothing_is_left_to_do(finished: CompareConfig) -> None:
    assert compare(finished) == 0  # starts nothing: it would fail without the metrics of real runs


def test_intervals() -> None:
    assert str(Interval.of([4.0])) == "4.0000"
    # mean 2, standard deviation 1: 4.303 / sqrt(3)
    assert str(Interval.of([1.0, 2.0, 3.0])) == "2.0000 ± 2.4843"
    assert Interval.of([0.01, 0.03]).percent == "+2.0 % ± 12.7"
    # beyond the table: 2.228 and 2.042 in any printed one
    assert t_quantile(10) == pytest.approx(2.228, abs=0.003)
    assert t_quantile(30) == pytest.approx(2.042, abs=0.001)


REFUSED = {
    "no run": (["run=[]"], "run: [] given; allowed: the YAML files of the federated run"),
    "no seed": (["seeds=[]"], "seeds: [] given; allowed: one or more, each once"),
    "twice": (["seeds=[1,1]"], "seeds: [1, 1] given; allowed: one or more, each once"),
    "choice": (["choice=first"], "choice: 'first' given; allowed: last, best"),
    "choose on": (["choose_on=[alpha]"], "choose_on: ['alpha'] given; allowed: [] with choice: last, which chooses"),
    "report on": (
        ["report_on=[alpha]"],
        "report_on: ['alpha'] given; allowed: names of beta, one of silo beta's",
    ),
    "reference": (["reference=centre"], "reference: 'centre' given; allowed: central, averaged, isolated, personal"),
    "kind": (
        ["models.central.kind=pooled"],
        "models.central.kind: 'pooled' given; allowed: central, isolated, federated, ",
    ),
    "of": (["models.personal.of=central"], "models.personal.of: 'central' given; allowed: averaged"),
    "steps": (["models.personal.steps=0"], "models.personal.steps: 0 given; allowed: 1 or more"),
    "of without": (
        ["models.central.of=averaged"],
        "models.central.of, models.central.steps: given; allowed: with kind",
    ),
    "key": (
        ["models.central.seed=1"],
        "models.central.seed: unknown key given; allowed: kind, settings, of, steps, seeds",
    ),
    "seeds": (["models.central.seeds=[5]"], "models.central.seeds: [5] given; allowed: 3, 4"),
    "seeds of": (["models.averaged.seeds=[4]"], "models.personal.seeds: [3, 4] given; allowed: 4"),
    "no text": (
        ["settings=['silos.gamma.data=[elsewhere]']"],
        "silos.gamma.valid: {} given; allowed: held-out text of its own in a comparison",
    ),
    "two texts": (
        ["settings=[silos.beta.valid.alpha=elsewhere]"],
        "silos.beta.valid.alpha: 'elsewhere' given; another silo's alpha is ",
    ),
    "setting": (["settings=[outer.lr=-1]"], "outer.lr: -1.0 given; allowed: above 0"),
    "nodes": (
        ["settings=[silo.num_nodes=2,silo.micro_batch_sequences=2,silos.beta.micro_batch_sequences=6]"],
        "silos.alpha.num_nodes: 2 given; allowed: 1 in a comparison",
    ),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_mistakes(comparison: Path, overrides: list[str], message: str) -> None:
    assert message in one_line_error(lambda: plan_runs(load_comparison([comparison], overrides)))


def test_no_model_goes_on_from_a_prompt(comparison: Path) -> None:
    file = comparison.with_name("run.yaml")
    model = {"checkpoint": "base", "adapter": {"kind": "prompt", "tokens": 3, "text": "a"}}
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"model": model}))
    said = one_line_error(lambda: plan_runs(load_comparison([comparison])))
    assert said == (
        "models.personal: model.adapter.kind: 'prompt' given; allowed: none, lora with kind personalised, which goes "
        "on from a whole model"
    )


def test_a_name_that_is_no_folder(comparison: Path) -> None:
    spec = yaml.safe_load(comparison.read_text())
    comparison.write_text(yaml.safe_dump(spec | {"models": {"a/b": {"kind": "central"}}, "reference": "a/b"}))
    assert one_line_error(load_comparison, [comparison]) == "models: 'a/b' given; allowed: the name of a folder"


USES: dict[str, Callable[[CompareConfig], object]] = {"run": compare, "show": plan_runs, "table": write_results}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_runs_with_other_settings_stay_what_they_are(
    finished: CompareConfig, use: Callable[[CompareConfig], object]
) -> None:
    before = {path: path.read_bytes() for path in Path(finished.directory).rglob("*") if path.is_file()}
    message = one_line_error(use, dataclasses.replace(finished, settings=["inner.lr=0.1"]))
    assert message.endswith("holds a run with another inner.lr; delete it, or name another directory")
    assert {path: path.read_bytes() for path in Path(finished.directory).rglob("*") if path.is_file()} == before


def test_what_a_run_has_no_more_is_another_setting_too(comparison: Path) -> None:
    spec = load_comparison([comparison], ["reference=averaged"])
    spec = dataclasses.replace(spec, models={"averaged": spec.models["averaged"]})
    for planned in plan_runs(spec):
        finish(planned, {"alpha": 4.0, "beta": 4.0}, worst=1.0)
    file = Path(spec.run[0])
    run = yaml.safe_load(file.read_text())
    model = {key: value for key, value in run["model"]["config"].items() if key != "num_key_value_heads"}
    file.write_text(yaml.safe_dump(run | {"model": {"config": model}}))
    assert "with another model.config.num_key_value_heads; delete it" in one_line_error(plan_runs, spec)
    file.write_text(yaml.safe_dump(run | {"silos": {"alpha": run["silos"]["alpha"]}}))
    message = one_line_error(plan_runs, spec)
    assert "with another silos.alpha.valid.beta, silos.beta." in message
    assert "more; delete it" in message


def test_a_personalised_model_does_not_outlive_the_one_that_it_went_on_from(comparison: Path) -> None:
    spec = load_comparison([comparison])
    write_all(spec)
    origin = Path(spec.directory) / "runs" / "averaged" / "seed-3"
    shutil.rmtree(origin)
    message = one_line_error(plan_runs, spec)
    assert "personal/alpha/seed-3' holds a run that went on from " in message
    assert message.endswith(f"{str(origin)!r}, which is not finished; delete it, too, or name another directory")
