"""What came of a comparison: `results.json`, `table.md` and two plots, from the runs' `metrics.jsonl` alone."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.compare import CompareConfig, Planned, plan_runs
from launch.report import Evaluation, Run, evaluations, summary_of
from pretrain.config import load_config

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom; then the normal distribution's.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
NORMAL_QUANTILE = 1.960


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
        quantile = T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else NORMAL_QUANTILE
        half = quantile * statistics.stdev(values) / len(values) ** 0.5
        return cls(mean=statistics.fmean(values), half=half)

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.half is None else f" ± {self.half:.4f}")

    @property
    def percent(self) -> str:
        """The same of a ratio minus 1."""
        return f"{100 * self.mean:+.1f} %" + ("" if self.half is None else f" ± {100 * self.half:.1f}")


@dataclass(kw_only=True)
class Result:
    """What one model came to with one seed."""

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


Results = dict[str, dict[int, Result]]


def read_results(spec: CompareConfig) -> Results:
    """Model to seed to what it came to, of those of which every run is finished."""
    own = {name: list(silo.valid) for name, silo in load_config(spec.run, spec.settings).silos.items()}
    runs: dict[tuple[str, int], list[Planned]] = defaultdict(list)
    for planned in plan_runs(spec):
        runs[planned.model, planned.seed].append(planned)
    results: Results = {name: {} for name in spec.models}
    for (model, seed), found in runs.items():
        if all(planned.is_finished for planned in found):
            results[model][seed] = _result(found, own, spec.choice)
    return {model: seeds for model, seeds in results.items() if seeds}


def _result(runs: Sequence[Planned], own: Mapping[str, list[str]], choice: str) -> Result:
    corpora, own_text, curves, tokens, sent = {}, {}, [], 0, 0.0
    for planned in runs:
        run = Run.read(planned.directory)
        matter = own[planned.silo] if planned.silo else sorted({corpus for found in own.values() for corpus in found})
        found = evaluations(run)
        chosen = min(found, key=lambda one: mean_of(one, matter)) if choice == "best" else found[-1]
        corpora[planned.silo] = chosen.val_loss
        for silo in [planned.silo] if planned.silo else own:
            own_text[silo] = mean_of(chosen, own[silo])
        curves.append([(one.tokens, mean_of(one, matter)) for one in found])
        summary = summary_of(run)
        tokens += summary["tokens"]
        sent += summary["bytes_sent"] / len(planned.config.silos)
    points = [list(zip(*same, strict=True)) for same in zip(*curves, strict=False)]
    return Result(
        all_text=statistics.fmean(statistics.fmean(losses.values()) for losses in corpora.values()),
        own_text=own_text,
        corpora=corpora,
        curve=[(sum(at), statistics.fmean(losses)) for at, losses in points],
        tokens=tokens,
        sent_bytes=sent / len(runs),
    )


def mean_of(evaluation: Evaluation, corpora: Iterable[str]) -> float:
    """Mean loss over some corpora, in nats."""
    return statistics.fmean(evaluation.val_loss[corpus] for corpus in corpora)


# ---- tables


def table(spec: CompareConfig, results: Results) -> str:
    """Both tables in Markdown: all silos' text, and each silo's own against what it reaches alone."""
    return f"{_all_text(spec, results)}\n{_own_text(spec, results)}"


def _all_text(spec: CompareConfig, results: Results) -> str:
    reference = results.get(spec.reference, {})
    lines = [
        f"Held-out loss in nats, mean over all corpora ({spec.choice} evaluation), ± 95 % over seeds; differences are "
        "paired by seed.\n",
        f"| model | loss | against {spec.reference} | seeds | tokens | MB sent by each silo |",
        "|---|---|---|---|---|---|",
    ]
    for model, seeds in results.items():
        ratios = [one.all_text / reference[seed].all_text - 1 for seed, one in seeds.items() if seed in reference]
        against = Interval.of(ratios).percent if ratios and model != spec.reference else ""
        some = next(iter(seeds.values()))
        lines.append(
            f"| {model} | {Interval.of([one.all_text for one in seeds.values()])} | {against} | {len(seeds)} | "
            f"{some.tokens:,} | {some.sent_bytes / 1e6:,.1f} |"
        )
    return "\n".join(lines) + "\n"


def _own_text(spec: CompareConfig, results: Results) -> str:
    """Below each silo, its loss, and the difference to the model that it trained alone."""
    silos = sorted({silo for seeds in results.values() for one in seeds.values() for silo in one.own_text})
    alone = next((name for name in results if spec.models[name].kind == "isolated"), None)
    lines = [
        "Each silo's own held-out text" + (f", and the difference to {alone}" if alone else "") + ".\n",
        f"| model | {' | '.join(silos)} | mean | silos worse off than alone |",
        "|---" * (len(silos) + 3) + "|",
    ]
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
        left = "" if not alone or model == alone else ", ".join(worse) or "none"
        lines.append(f"| {model} | {' | '.join(cells)} | {mean} | {left} |")
    return "\n".join(lines) + "\n"


# ---- plots


def write_results(spec: CompareConfig) -> str:
    """Write results.json, table.md, loss.svg and own.svg; returns the table."""
    from launch import figures

    results, directory = read_results(spec), Path(spec.directory)
    text = table(spec, results)
    files = {"results.json": json.dumps(_plain(results), indent=1) + "\n", "table.md": text}
    if results:
        curves = {
            model: [one.curve for one in seeds.values() if one.curve]
            for model, seeds in results.items()
            if spec.models[model].kind in ("central", "federated")
        }
        own = {
            model: {
                silo: [one.own_text[silo] for one in seeds.values()] for silo in next(iter(seeds.values())).own_text
            }
            for model, seeds in results.items()
        }
        files |= {"loss.svg": figures.compared_losses(curves), "own.svg": figures.compared_silos(own)}
    for name, content in files.items():
        temporary = directory / f"{name}.tmp"
        temporary.write_text(content)
        temporary.replace(directory / name)
    return text


def _plain(results: Results) -> dict[str, Any]:
    return {model: {str(seed): vars(one) for seed, one in seeds.items()} for model, seeds in results.items()}
