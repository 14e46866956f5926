"""The plots of the report, each one an SVG element to be put into the page as it is."""

import io
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import FuncFormatter, MaxNLocator

from data_tools.report import COLORS, LOOK, WIDTH_INCHES
from launch.show.run import Evaluation, Run

MAIN_COLOR = "#0b3c5d"  # the darkest goes to the reported run
COMPARISON_COLORS = ("#d55e00", "#8a8a8a", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
ROLLBACK_COLOR = "#c1121f"
COMPARISON_DASHES = ("-", "--", "-.", ":")
# Every color before the first dash or marker comes again.
LINES = cycler(linestyle=COMPARISON_DASHES) * cycler(color=COLORS)
DOTS = cycler(marker=("o", "s", "^", "D")) * cycler(color=COLORS)
MAX_POINTS = 400
PANELS_PER_ROW, MOST_PANELS = 3, 24

STYLE: Any = LOOK | {
    "text.parse_math": False,  # names of silos and corpora may have $ in them
    "svg.fonttype": "none",  # text stays text: small, selectable, in the reader's font
    "svg.hashsalt": "atoll",  # the same run gives the same file
    "font.family": "sans-serif",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def draw_all(run: Run, evaluated: Mapping[str, list[Evaluation]]) -> dict[str, str]:
    """Every plot there is data for, by name, as SVG; the first run of `evaluated` is `run`, the others comparisons."""
    draw: dict[str, Callable[[], Figure | None]] = {
        "held_out": lambda: held_out(evaluated, run.rollbacks_at("tokens")),
        "training": lambda: training(run),
        "sync": lambda: sync(run),
        "time": lambda: time_by_silo(run),
        "gradients": lambda: pseudo_gradients(run),
    }
    with matplotlib.rc_context(STYLE):
        figures = {name: make() for name, make in draw.items()}
        return {name: svg(figure) for name, figure in figures.items() if figure is not None}


def draw_held_out(evaluated: Mapping[str, list[Evaluation]]) -> str:
    """The plot of `held_out` alone, as SVG; each run has evaluations."""
    with matplotlib.rc_context(STYLE):
        figure = held_out(evaluated)
        assert figure
        return svg(figure)


def held_out(evaluated: Mapping[str, list[Evaluation]], rollbacks: Sequence[float] = ()) -> Figure | None:
    """Held-out loss against tokens: the mean first, then one panel per corpus, every run in each.

    `rollbacks` are the tokens to which the first run was taken back.
    """
    main_name, main = next(iter(evaluated.items()))
    if not main:
        return None
    corpora = sorted({corpus for one in main for corpus in one.val_loss})[:MOST_PANELS]
    panels: list[str | None] = [None, *corpora] if len(corpora) > 1 else list(corpora)
    columns = min(PANELS_PER_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(WIDTH_INCHES, 3.1 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for number, corpus in enumerate(panels):
        axes: Axes = grid[number // columns][number % columns]
        for order, (name, found) in enumerate(evaluated.items()):
            points = [(one.tokens, one.mean if corpus is None else one.val_loss.get(corpus, math.nan)) for one in found]
            style = (
                {"color": MAIN_COLOR, "linewidth": 2.4, "zorder": 3.0} if name == main_name else _other_style(order - 1)
            )
            marker = "o" if len(points) <= 30 else ""
            axes.plot(*_split(points), label=name, marker=marker, markersize=3.5, **style)  # type: ignore[arg-type]
        mark_rollbacks(axes, rollbacks)
        axes.set_title("mean over corpora" if corpus is None else corpus)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: short(tokens)))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(labelbottom=True)
        if number % columns == 0:
            axes.set_ylabel("loss, nats per token")
        if number + columns >= len(panels):
            axes.set_xlabel("training tokens, all silos together")
    for number in range(len(panels), rows * columns):
        grid[number // columns][number % columns].set_axis_off()
    if len(evaluated) > 1:
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(6, len(labels)))
    return figure


def training(run: Run) -> Figure | None:
    """Training loss and learning rate by inner step."""
    if not run.records["step"]:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 3.4), layout="constrained")
    loss, rate = figure.subplots(1, 2, width_ratios=(2, 1))
    for silo, color in _silo_colors(run.silos).items():
        steps = run.of_silo("step", silo)
        points = thin([(step["step"], step["loss"]) for step in steps if step.get("loss") is not None])
        loss.plot(*_split(points), label=silo, color=color, linewidth=1.3)
        rate.plot(*_split(thin([(step["step"], step["lr"]) for step in steps if "lr" in step])), color=color)
    loss.set_title("training loss of each silo on its own corpus")
    loss.set_ylabel("loss, nats per token")
    loss.legend(ncols=2)
    rate.set_title("learning rate")
    for axes in (loss, rate):
        mark_rollbacks(axes, run.rollbacks_at("step"))
        axes.set_xlabel("inner step")
        axes.margins(x=0.02)
    rate.set_ylim(bottom=0)
    return figure


def sync(run: Run) -> Figure | None:
    """Bytes and waiting by round."""
    syncs = run.records["sync"]
    if not syncs:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 3.1), layout="constrained")
    volume, wait = figure.subplots(1, 2)
    rounds = sorted({int(record["round"]) for record in syncs})
    for offset, (key, label, color) in enumerate(
        (("bytes_sent", "sent", COLORS[0]), ("bytes_received", "received", COLORS[5]))
    ):
        by_round = dict.fromkeys(rounds, 0.0)
        for record in syncs:
            by_round[int(record["round"])] += (record.get(key) or 0) / 1e6
        if len(rounds) <= 60:
            at = [number + (offset - 0.5) * 0.38 for number in rounds]
            volume.bar(at, list(by_round.values()), width=0.38, label=label, color=color)
        else:
            volume.plot(*_split(thin(list(by_round.items()))), label=label, color=color)
    volume.set_title("bytes per round, all silos together")
    volume.set_ylabel("MB")
    volume.set_ylim(top=volume.get_ylim()[1] * 1.22)
    volume.legend(ncols=2, loc="upper left")
    for silo, color in _silo_colors(run.silos).items():
        waits: dict[int, float] = defaultdict(float)
        for record in run.of_silo("sync", silo):
            waits[int(record["round"])] += record.get("wait_seconds") or 0.0
        wait.plot(*_split(thin(list(waits.items()))), label=silo, color=color, marker=_marker(waits), markersize=3.5)
    wait.set_title("waiting for the sync")
    wait.set_ylabel("seconds")
    wait.set_ylim(bottom=0, top=wait.get_ylim()[1] * 1.3)
    wait.legend(ncols=3, loc="upper left")
    for axes in (volume, wait):
        mark_rollbacks(axes, run.rollbacks_at("round"))
        _round_axis(axes)
    return figure


def time_by_silo(run: Run) -> Figure | None:
    """Where each silo's time went, as stacked bars."""
    ends = {record["silo"]: record for record in run.records["summary"]}
    silos = [silo for silo in run.silos if silo in ends]
    if not silos:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 1.1 + 0.34 * len(silos)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(silos)
    kinds = (("training", MAIN_COLOR), ("evaluating", COLORS[5]), ("waiting", COLORS[4]))
    for kind, color in kinds:
        seconds = [float(ends[silo].get(f"seconds_{kind}") or 0.0) for silo in silos]
        axes.barh(silos, seconds, left=left, height=0.6, label=kind, color=color)
        left = [before + more for before, more in zip(left, seconds, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def pseudo_gradients(run: Run) -> Figure | None:
    """Norm of each silo's pseudo-gradient, and how far the silos' agree, by round."""
    if not run.records["sync"]:
        return None
    cosines: dict[int, list[float]] = defaultdict(list)
    for commit in run.records["commit"]:
        if commit.get("cosine_mean") is not None:
            cosines[int(commit.get("round") or commit["version"])].append(float(commit["cosine_mean"]))
    figure = Figure(figsize=(WIDTH_INCHES, 3.1), layout="constrained")
    panels = figure.subplots(1, 2 if cosines else 1, squeeze=False)[0]
    for silo, color in _silo_colors(run.silos).items():
        squares: dict[int, float] = defaultdict(float)
        for record in run.of_silo("sync", silo):
            squares[int(record["round"])] += (record.get("pseudo_gradient_norm") or 0.0) ** 2
        norms = thin([(number, math.sqrt(square)) for number, square in squares.items()])
        panels[0].plot(*_split(norms), label=silo, color=color, marker=_marker(squares), markersize=3.5)
    panels[0].set_title("pseudo-gradient norm")
    panels[0].set_ylim(bottom=0)
    panels[0].legend(ncols=2)
    if cosines:
        means = thin([(number, sum(found) / len(found)) for number, found in cosines.items()])
        panels[1].axhline(0, color="#9aa5b1", linewidth=1)
        panels[1].plot(*_split(means), color=MAIN_COLOR, marker=_marker(cosines), markersize=3.5)
        panels[1].set_title("cosine between silos' pseudo-gradients, mean")
        panels[1].set_ylim(min(-0.3, panels[1].get_ylim()[0]), 1)
    for axes in panels:
        mark_rollbacks(axes, run.rollbacks_at("round"))
        _round_axis(axes)
    return figure


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, each the mean of its neighbours: a page must open fast, however long the run was."""
    size = math.ceil(len(points) / MAX_POINTS) or 1
    if size == 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _split(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _silo_colors(silos: Sequence[str]) -> dict[str, str]:
    return {silo: COLORS[number % len(COLORS)] for number, silo in enumerate(silos)}


def _other_style(order: int) -> dict[str, object]:
    dashes = COMPARISON_DASHES[order % len(COMPARISON_DASHES)]
    return {"color": COMPARISON_COLORS[order % len(COMPARISON_COLORS)], "linestyle": dashes, "linewidth": 1.6}


def _marker(points: Mapping[int, object]) -> str:
    return "o" if len(points) <= 60 else ""


def _round_axis(axes: Axes) -> None:
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)


def mark_rollbacks(axes: Axes, rollbacks: Sequence[float]) -> None:
    """A line where the run was taken back to, and went on from."""
    for at in rollbacks:
        axes.axvline(at, color=ROLLBACK_COLOR, linestyle=":", linewidth=1.4, gid="rollback")


def short(number: float) -> str:
    """12.5 M: a count on an axis."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:g} {unit}"
    return f"{number:g}"


def svg(figure: Figure) -> str:
    """The SVG element, to be put into a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    # Only the element: an XML declaration and a document type have no place inside a page.
    return text[text.index("<svg") :]


def compared_losses(curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]]) -> str:
    """Held-out loss against tokens: of every model one curve, the mean over seeds, and where they lie."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES * 0.7, 4.0), layout="constrained")
        axes = figure.subplots()
        axes.set_prop_cycle(LINES)
        for model, seeds in curves.items():
            # Without the untrained model, unless that is all.
            points = list(zip(*(seed[1:] or seed for seed in seeds), strict=False))
            tokens = [same[0][0] for same in points]
            losses = [[loss for _, loss in same] for same in points]
            (line,) = axes.plot(
                tokens,
                [sum(found) / len(found) for found in losses],
                label=model,
                marker="o" if len(points) == 1 else "",
            )
            low, high = [min(found) for found in losses], [max(found) for found in losses]
            axes.fill_between(tokens, low, high, color=line.get_color(), alpha=0.2, lw=0)
        axes.set_title("held-out loss, nats")
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left")
        return svg(figure)


def compared_silos(own: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Each silo's loss on its own held-out text: a row a silo, a dot a model and seed."""
    silos = sorted({silo for losses in own.values() for silo in losses})
    with matplotlib.rc_context(STYLE):
        height = max(0.6 * len(silos), 0.22 * len(own)) + 1.4  # of the rows, or of the legend
        figure = Figure(figsize=(WIDTH_INCHES * 0.7, height), layout="constrained")
        axes = figure.subplots()
        axes.set_prop_cycle(DOTS)
        for number, (model, losses) in enumerate(own.items()):
            points = [(loss, row) for row, silo in enumerate(silos) for loss in losses.get(silo, ())]
            above = 0.6 * (number / max(1, len(own) - 1) - 0.5)
            axes.plot([x for x, _ in points], [y + above for _, y in points], linestyle="", label=model, ms=4)
        axes.set_yticks(range(len(silos)), silos)
        axes.invert_yaxis()
        axes.set_title("held-out loss of each silo's own text, nats")
        axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left")
        return svg(figure)
