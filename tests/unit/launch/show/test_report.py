"""Summary and report, from metrics with hand-computed totals."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from launch.show.figures import MAX_POINTS, thin
from launch.show.report import data_parallel_bytes, format_count, summarize, write_report
from launch.show.run import Run, evaluations
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig, SiloConfig
from pretrain.config.load import save_config

SILOS = ("law", "prose <b>")
NUM_ROUNDS, INTERVAL = 3, 4


def silo_records(silo: str, *, kind: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for step in range(NUM_ROUNDS * INTERVAL + 1):
        number, over = divmod(step, INTERVAL)
        if step:
            speeds = {"tokens": 10 * step, "tokens_per_second": 5.0}
            records.append(
                {"kind": "step", "step": step, "round": number + 1, "loss": 9 - step / 4, "lr": 0.1, **speeds}
            )
        if over:
            continue
        for fragment in range(2 if number and kind == "store" else 0):
            sizes = {"version": number, "bytes_sent": 100, "bytes_received": 200, "wait_seconds": 0.5 * fragment}
            records.append({"kind": "sync", "step": step, "round": number, "fragment": fragment, **sizes})
            records[-1]["pseudo_gradient_norm"] = 3.0 + fragment
        losses = {"law": 8.0 - number, "prose": 7.0 - number}
        records.append({"kind": "eval", "step": step, "round": number, "val_loss": losses})
    seconds = {"seconds_training": 6.0, "seconds_waiting": 1.5, "seconds_evaluating": 0.5}
    records.append({"kind": "summary", "parameters": 1000, "peak_memory_bytes": 5_000_000, **seconds})
    return [{**record, "silo": silo, "time": 0.0} for record in records]


def make_run(directory: Path, *, silos: tuple[str, ...] = SILOS, kind: str = "store") -> RunConfig:
    config = RunConfig(name="trial-run", directory=str(directory))
    config.model.config = {"model_type": "llama", "hidden_size": 64}
    config.inner.num_steps, config.outer.sync_interval_steps = NUM_ROUNDS * INTERVAL, INTERVAL
    config.silos = {name: SiloConfig() for name in silos}
    config.exchange.kind = kind
    records = [record for silo in silos for record in silo_records(silo, kind=kind)]
    for version in range(1, NUM_ROUNDS + 1) if kind == "store" else ():
        commit = {"version": version, "silos": list(silos), "weights": [10, 30], "divisor": 40, "update_norm": 0.5}
        for fragment in range(2):
            records.append({"kind": "commit", "fragment": fragment, **commit, "cosine_mean": 0.25, "digest": "ab" * 32})
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return config


def test_summary(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run")
    summary = summarize(config)
    assert summary == json.loads((tmp_path / "run/summary.json").read_text())
    expected = {
        "silos": 2,
        "rounds": 3,
        "sync_interval": 4,
        "parameters": 1000,
        "tokens": 2 * 120,
        "bytes_sent": 2 * 3 * 2 * 100,
        "bytes_received": 2 * 3 * 2 * 200,
        "bytes_data_parallel": 2 * 1 * 2 * 1000 * 12,  # silos, 2 (K - 1) / K, bytes of bf16, parameters, steps
        "seconds_training": 12.0,
        "seconds_waiting": 3.0,
        "seconds_evaluating": 1.0,
        "val_loss": {"law": 5.0, "prose": 4.0},
        "val_loss_round": 3,
        "peak_memory_bytes": dict.fromkeys(SILOS, 5_000_000),
    }
    assert {key: summary[key] for key in expected} == expected
    assert summary["val_loss_by_round"][0] == {"round": 0, "val_loss": {"law": 8.0, "prose": 7.0}}
    assert len(summary["val_loss_by_round"]) == 4


def test_a_resumed_run_counts_nothing_twice(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run")
    before = summarize(config)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        for record in silo_records("law", kind="store")[10:]:
            file.write(json.dumps(record) + "\n")
    assert summarize(config) == before


def append(config: RunConfig, *records: dict[str, Any]) -> None:
    with Path(config.directory, "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps({"time": 0.0, **record}) + "\n" for record in records))


def test_the_share_of_the_cards_peak_is_shown_where_it_is_known(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run")
    assert "MFU" not in write_report(config).read_text()
    of_step = {"kind": "step", "silo": "law", "loss": 5.0, "tokens_per_second": 5.0}
    append(config, *({**of_step, "step": step, "tokens": 10 * step, "mfu": step / 100} for step in (41, 42, 43)))
    html = write_report(config).read_text()
    assert html.count("(MFU)") == 1
    assert '<td class="n">42.0%</td>' in html


def rollback(number: int, *, from_version: int, to_version: int) -> dict[str, Any]:
    place = {"step": to_version * INTERVAL, "round": to_version, "reason": "bad <text>"}
    return {"kind": "rollback", "number": number, "from_version": from_version, "to_version": to_version, **place}


def start(silo: str, *, version: int, tokens: int) -> dict[str, Any]:
    step = version * INTERVAL
    return {"kind": "start", "silo": silo, "step": step, "round": version, "version": version, "tokens": tokens}


def test_what_was_rolled_back_counts_nothing_and_is_marked(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run")
    back = rollback(1, from_version=3, to_version=1)
    append(config, back, *(start(silo, version=1, tokens=40) for silo in SILOS))
    summary = summarize(config)
    assert (summary["rounds"], summary["steps"], summary["tokens"]) == (1, 4, 2 * 40)
    assert (summary["bytes_sent"], summary["seconds_training"]) == (2 * 2 * 100, 0)
    assert [one["round"] for one in summary["val_loss_by_round"]] == [0, 1]
    assert summary["rollbacks"] == [{"from_version": 3, "to_version": 1, "reason": "bad <text>"}]

    # The run goes on; whoever starts later says again what was rolled back, and takes nothing back by it.
    eval_2 = {"kind": "eval", "step": 8, "round": 2, "version": 2, "tokens": 90, "val_loss": {"law": 3.0, "prose": 3.0}}
    append(config, {"kind": "commit", "version": 2, "fragment": 0, "silos": [], "weights": []}, back)
    append(config, *({**eval_2, "silo": silo, "sequences": {"law": [64, 406]}} for silo in SILOS))
    assert summarize(config)["rounds"] == 2
    found = evaluations(Run.read(config))
    assert [(one.round, one.tokens, one.mean) for one in found] == [(0, 0, 7.5), (1, 80, 6.5), (2, 180, 3.0)]
    assert found[-1].sequences == summarize(config)["val_sequences"] == {"law": "64 of 406"}
    html = write_report(config).read_text()
    assert "Rolled back from version 3 to 1" in html
    assert "bad &lt;text&gt;" in html
    assert "Of law 64 of 406 sequences" in html
    assert html.count('id="rollback"') == 3 + 2 + 2 + 2  # in each panel of four figures


def test_a_silo_that_was_killed_counts_what_it_had_saved(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run")
    append(config, start("law", version=2, tokens=80))
    summary = summarize(config)
    assert summary["tokens"] == 80 + 120
    assert summary["rounds"] == 3


def test_tokens_of_a_silo_that_has_come_late(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run", silos=("law",))
    append(config, start("late", version=2, tokens=0), {"kind": "step", "silo": "late", "step": 10, "tokens": 30})
    run = Run.read(config)
    assert [run.tokens_at("late", step) for step in (0, 4, 8, 9, 10, 12)] == [0, 0, 0, 15, 30, 30]
    assert [run.tokens_at("law", step) for step in (0, 4, 5, 12)] == [0, 40, 50, 120]


def test_a_run_that_was_stopped_has_a_summary(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run")
    path = tmp_path / "run/metrics.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"summary"' not in line))
    summary = summarize(config)
    assert summary["parameters"] is None
    assert summary["bytes_data_parallel"] is None
    assert summary["seconds_waiting"] == 2 * 3 * 0.5
    assert write_report(config).is_file()


@pytest.mark.parametrize(("num_silos", "expected"), [(1, 0), (2, 2 * 2 * 1000 * 7), (4, 4 * 1.5 * 2 * 1000 * 7)])
def test_data_parallel_bytes(num_silos: int, expected: float) -> None:
    steps = {str(silo): 7 for silo in range(num_silos)}
    assert data_parallel_bytes(num_silos=num_silos, num_parameters=1000, steps_by_silo=steps) == expected


def test_evaluations_know_their_tokens(tmp_path: Path) -> None:
    found = evaluations(Run.read(make_run(tmp_path / "run")))
    assert [one.tokens for one in found] == [0, 80, 160, 240]
    assert [one.mean for one in found] == [7.5, 6.5, 5.5, 4.5]


def test_a_run_that_holds_out_nothing_has_a_report(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run")
    path = tmp_path / "run/metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records = [one | ({"val_loss": {}} if one["kind"] == "eval" else {}) for one in records]
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    assert evaluations(Run.read(config)) == []
    assert summarize(config)["val_loss_by_round"] == []
    assert write_report(config).is_file()


def test_report_with_comparisons(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    for name in ("central", "law"):
        config = make_run(tmp_path / name, silos=(name,), kind="none")
        save_config(config, tmp_path / name / "config.yaml")
    comparisons = {"central": tmp_path / "central", "alone: law": tmp_path / "law"}
    config = make_run(tmp_path / "other")
    html = write_report(config, comparisons).read_text()
    for text in (
        "federated",
        "central",
        "alone: law",
        "trial-run",
        "prose &lt;b&gt; 30",
        "abababababab",
        "4.5000",
    ):
        assert text in html
    assert "prose <b>" not in html
    assert "<script" not in html
    # Names of XML dialects and the licence of a drawing are no links that a page would load.
    assert not re.search(r"""(?:src|href)=["'](?!#)""", html.replace("xlink:href", "href"))
    figures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(figures) == 5
    for figure in figures:
        ElementTree.fromstring(figure)


def test_a_dollar_in_a_name_is_a_dollar(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run", silos=("$\\law$",))
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"prose"', '"price_$x_$"'))
    alone = make_run(tmp_path / "alone", silos=("law",), kind="none")
    save_config(alone, tmp_path / "alone/config.yaml")
    html = write_report(config, {"a_$^$": tmp_path / "alone"}).read_text()
    for name in ("price_$x_$", "$\\law$", "a_$^$"):
        assert f">{name}<" in html


def test_report_of_a_silo_alone(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run", silos=("law",), kind="none")
    html = write_report(config).read_text()
    assert summarize(config)["bytes_data_parallel"] == 0
    assert summarize(config)["rounds"] == 3
    assert "Commits" not in html
    assert "fewer bytes" not in html


def test_nothing_recorded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it has no metrics\.jsonl"):
        summarize(tmp_path)


def test_long_runs_are_thinned() -> None:
    points = [(float(x), 2.0 * x) for x in range(10_001)]
    thinned = thin(points)
    assert len(thinned) <= MAX_POINTS
    assert all(y == pytest.approx(2 * x) for x, y in thinned)
    assert thin(points[:MAX_POINTS]) == points[:MAX_POINTS]


def test_format_count() -> None:
    assert [format_count(n) for n in (950, 475_000, 1_234_567, 12_345_678, 7e9)] == [
        "950",
        "475,000",
        "1.23 M",
        "12.3 M",
        "7.00 G",
    ]
