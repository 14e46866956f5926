"""What came of a comparison: `results.json`, tables and plots, from the runs' `metrics.jsonl` alone."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import rich.table
from rich.console import Console
from rich.text import Text

from launch.compare.compare import CompareConfig, Planned, named_by, plan_runs
from launch.show.report import summary_of
from launch.show.run import Evaluation, Run, evaluations
from pretrain.config.load import load_config

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
NORMAL_QUANTILE = 1.960
GAP = 2  # between columns in a terminal
TOGETHER = ("central", "federated")  # kinds whose one model is for all silos


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds, and half of its 95 % confidence interval; None with one seed."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Student's interval of independent values. Raises statistics.StatisticsError without any."""
        freedom = len(values) - 1
        if not freedom:
            return cls(mean=values[0], half=None)
        half = t_quantile(freedom) * statistics.stdev(values) / len(values) ** 0.5
        return cls(mean=statistics.fmean(values), half=half)

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.half is None else f" ± {self.half:.4f}")

    @property
    def percent(self) -> str:
        """The same of a ratio minus 1."""
        return f"{100 * self.mean:+.1f} %" + ("" if self.half is None else f" ± {100 * self.half:.1f}")


def t_quantile(freedom: int) -> float:
    """Student's t, two-sided 95 %; beyond the table by the expansion in 1 / freedom, exact to 0.003."""
    if freedom <= len(T_QUANTILES):
        return T_QUANTILES[freedom - 1]
    # Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    z = NORMAL_QUANTILE
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


@dataclass(kw_only=True)
class Result:
    """What one model came to with one seed; tokens, bytes and seconds with those of the model that it goes on from."""

    all_text: float
    """Mean held-out loss over all corpora, in nats; of models that each silo has for itself, the mean over these."""
    own_text: dict[str, float]
    """Silo to the mean held-out loss over its own corpora."""
    corpora: dict[str, dict[str, float]]
    """Silo ("" for a model that all have) to the loss of every corpus."""
    curve: list[tuple[float, float]]
    """Tokens that the silos have trained on, and the mean loss: over all corpora, or of silos alone over their own."""
    tokens: int
    sent_bytes: float
    """By each silo, on average."""
    sent_bytes_by_silo: dict[str, int]
    received_bytes_by_silo: dict[str, int]
    seconds: dict[str, float]
    """training, waiting and evaluating, all silos together."""


Results = dict[str, dict[int, Result]]


def read_results(spec: CompareConfig) -> Results:
    """Model to seed to what it came to, of those of which every run is finished. Raises ConfigError."""
    held_out = {name: silo.valid for name, silo in load_config(spec.run, spec.settings).silos.items()}
    own = {name: named_by("report_on", spec.report_on, corpora, name) for name, corpora in held_out.items()}
    judges = {name: named_by("choose_on", spec.choose_on, corpora, name) for name, corpora in held_out.items()}
    runs: dict[tuple[str, int], list[Planned]] = defaultdict(list)
    for planned in plan_runs(spec):
        runs[planned.model, planned.seed].append(planned)
    results: Results = {name: {} for name in spec.models}
    for (model, seed), found in runs.items():  # a personalised model after the one that it goes on from
        if all(planned.is_finished for planned in found):
            origin = results.get(spec.models[model].of, {}).get(seed)
            results[model][seed] = _result(found, own, judges if spec.choice == "best" else None, origin)
    return {model: seeds for model, seeds in results.items() if seeds}


def _result(
    runs: Sequence[Planned],
    own: Mapping[str, list[str]],
    judges: Mapping[str, list[str]] | None,
    origin: Result | None,
) -> Result:
    """Of corpora in `own`, by silo; the evaluation is the best on those in `judges`, or the last one."""
    corpora, own_text, curves = {}, {}, []
    tokens = origin.tokens if origin else 0
    sent = defaultdict[str, int](int, origin.sent_bytes_by_silo if origin else {})
    received = defaultdict[str, int](int, origin.received_bytes_by_silo if origin else {})
    seconds = dict(origin.seconds) if origin else dict.fromkeys(("training", "waiting", "evaluating"), 0.0)
    for planned in runs:
        run = Run.read(planned.directory)
        matter, found = _of(own, planned.silo), evaluations(run)
        judged = partial(mean_of, corpora=_of(judges, planned.silo)) if judges else None
        chosen = min(found, key=judged) if judged else found[-1]
        corpora[planned.silo] = {corpus: chosen.val_loss[corpus] for corpus in _of(own)}
        for silo in [planned.silo] if planned.silo else own:
            own_text[silo] = mean_of(chosen, own[silo])
        curves.append([(one.tokens, mean_of(one, matter)) for one in found])
        summary = summary_of(run)
        tokens += summary["tokens"]
        for silo in run.silos:
            sent[silo] += sum(sync.get("bytes_sent") or 0 for sync in run.of_silo("sync", silo))
            received[silo] += sum(sync.get("bytes_received") or 0 for sync in run.of_silo("sync", silo))
        for what in seconds:
            seconds[what] += summary[f"seconds_{what}"]
    points = [list(zip(*same, strict=True)) for same in zip(*curves, strict=False)]
    return Result(
        all_text=statistics.fmean(statistics.fmean(losses.values()) for losses in corpora.values()),
        own_text=own_text,
        corpora=corpora,
        curve=[(sum(at), statistics.fmean(losses)) for at, losses in points],
        tokens=tokens,
        sent_bytes=statistics.fmean(sent.values()),
        sent_bytes_by_silo=sent,
        received_bytes_by_silo=received,
        seconds=seconds,
    )


def _of(corpora: Mapping[str, list[str]], silo: str = "") -> list[str]:
    """A silo's, or everybody's."""
    return corpora[silo] if silo else sorted({corpus for found in corpora.values() for corpus in found})


def mean_of(evaluation: Evaluation, corpora: Iterable[str]) -> float:
    """Mean loss over some corpora, in nats."""
    return statistics.fmean(evaluation.val_loss[corpus] for corpus in corpora)


# ---- tables


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table, before it is Markdown or HTML."""

    caption: str
    header: list[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return f"{self.caption}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)

    def show(self, console: Console) -> None:
        """Print it for reading; what does not fit beside the first column goes below, with that again."""
        console.print(Text(self.caption), "")
        widths = [
            max([*map(len, self.header[column].split()), *(len(cells[column]) for cells in self.rows)], default=0) + GAP
            for column in range(len(self.header))
        ]
        left = list(range(1, len(self.header)))
        while left:
            taken = [left.pop(0)]
            while left and sum(widths[column] for column in (0, *taken, left[0])) <= console.width:
                taken.append(left.pop(0))
            table = rich.table.Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold dim")
            table.add_column(Text(self.header[0]), overflow="fold")
            for column in taken:
                table.add_column(Text(self.header[column]), justify="right", overflow="fold")
            for cells in self.rows:
                table.add_row(*(Text(cells[column]) for column in (0, *taken)))
            console.print(table, "")


def all_text(spec: CompareConfig, results: Results) -> Table:
    """Every model's loss over all corpora, and against the reference."""
    caption = (
        f"Held-out loss in nats, mean over all corpora ({spec.choice} evaluation), ± 95 % over seeds; differences are "
        "paired by seed."
    )
    kinds = {model.kind for model in spec.models.values()}
    if {"isolated", "personalised"} <= kinds:
        caption += " Isolated models have trained on as many of their own tokens as the personalised ones in all."
    header = ["model", "loss", f"against {spec.reference}", "seeds", "tokens", "MB sent by each silo"]
    reference, rows = results.get(spec.reference, {}), []
    for model, seeds in results.items():
        ratios = [one.all_text / reference[seed].all_text - 1 for seed, one in seeds.items() if seed in reference]
        against = Interval.of(ratios).percent if ratios and model != spec.reference else ""
        some = next(iter(seeds.values()))
        loss = Interval.of([one.all_text for one in seeds.values()])
        sent = f"{some.sent_bytes / 1e6:,.1f}"
        rows.append([model, str(loss), against, str(len(seeds)), f"{some.tokens:,}", sent])
    return Table(caption=caption, header=header, rows=rows)


def own_text(spec: CompareConfig, results: Results) -> Table:
    """Below each silo, its loss, and the difference to the model that it trained alone."""
    silos = sorted({silo for seeds in results.values() for one in seeds.values() for silo in one.own_text})
    alone = next((name for name in results if spec.models[name].kind == "isolated"), None)
    caption = "Each silo's own held-out text" + (f", and the difference to {alone}" if alone else "") + "."
    rows = []
    for model, seeds in results.items():
        cells, worse = [], []
        for silo in silos:
            cell = str(Interval.of([one.own_text[silo] for one in seeds.values()]))
            if alone and model != alone:
                ratios = [
                    one.own_text[silo] / results[alone][seed].own_text[silo] - 1
                    for seed, one in seeds.items()
                    if seed in results[alone]
                ]
                if ratios:
                    cell += f" ({Interval.of(ratios).percent})"
                    worse += [silo] if statistics.fmean(ratios) >= 0 else []
            cells.append(cell)
        mean = Interval.of([statistics.fmean(one.own_text.values()) for one in seeds.values()])
        paired = alone and model != alone and any(seed in results[alone] for seed in seeds)
        rows.append([model, *cells, str(mean), ", ".join(worse) or "none" if paired else ""])
    return Table(caption=caption, header=["model", *silos, "mean", "silos worse off than alone"], rows=rows)


# ---- plots


def write_results(spec: CompareConfig) -> list[Table]:
    """Write results.json, table.md, loss.svg, own.svg and compare.html; returns the tables."""
    results, directory = read_results(spec), Path(spec.directory)
    tables = [all_text(spec, results), own_text(spec, results)]
    text = "\n".join(map(str, tables))
    written = {"results.json": json.dumps(_plain(results), indent=1) + "\n", "table.md": text}
    if results:
        plots = draw(spec, results)
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
        template = environment.from_string((files("launch.compare") / "compare.html.j2").read_text())
        page = template.render(name=directory.name, tables=tables, plots=plots.values())
        written |= {**plots, "compare.html": page}
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in written.items():
        temporary = directory / f"{name}.tmp"
        temporary.write_text(content)
        temporary.replace(directory / name)
    return tables


def draw(spec: CompareConfig, results: Results) -> dict[str, str]:
    """File name to SVG: loss against tokens of models for all, and each silo's loss on its own text of every model."""
    # matplotlib takes a second to import; those who only want to run should not wait for it.
    from launch.show import figures

    curves = {
        model: [one.curve for one in seeds.values()]
        for model, seeds in results.items()
        if spec.models[model].kind in TOGETHER
    }
    own = {
        model: {silo: [one.own_text[silo] for one in seeds.values()] for silo in next(iter(seeds.values())).own_text}
        for model, seeds in results.items()
    }
    return {"loss.svg": figures.compared_losses(curves), "own.svg": figures.compared_silos(own)}


def _plain(results: Results) -> dict[str, Any]:
    return {model: {str(seed): vars(one) for seed, one in seeds.items()} for model, seeds in results.items()}
