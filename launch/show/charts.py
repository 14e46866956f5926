"""The charts of a federation's page: small SVG elements, so that two stand side by side and one fits a phone."""

from collections.abc import Callable, Sequence
from itertools import accumulate, cycle
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from data_tools.report import COLORS
from launch.show.display import shortened
from launch.show.figures import MAIN_COLOR, ROLLBACK_COLOR, STYLE, mark_rollbacks, short, svg, thin
from launch.show.history import History, Version
from pretrain.config.keys import OPERATOR

SIZE_INCHES = (4.7, 2.9)
MOST_ROWS, MOST_NAMED = 64, 8  # silos with a row of their own; with a name in a legend, ...
MOST_CHARACTERS = 16  # ... which is no longer
PART_COLORS = {"in": "#56b4e9", "late": "#e69f00", "no weight": "#8a8a8a"}
ABSENT_COLOR = "#eef1f4"
MARKS = {"joined": (">", "#009e73"), "came back": ("D", "#0072b2"), "left": ("X", "#1f2933"), "lease": ("^", "#1f2933")}
BESIDE: Any = [{"color": "#616e7c", "linestyle": dashes} for dashes in ("--", ":", "-.")]
UNITS = ((86_400.0, "days"), (3_600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def draw_charts(history: History) -> dict[str, str]:
    """Every chart there is data for, by name, as SVG."""
    draw: dict[str, Callable[[History], Figure | None]] = {
        "loss": loss,
        "loss_in_time": loss_in_time,
        "held_out": held_out,
        "commits": commits,
        "tokens": tokens,
        "waiting": waiting,
        "bytes": num_bytes,
        "norms": norms,
        "cosine": cosine,
    }
    small: Any = STYLE | {"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8, "lines.linewidth": 1.4}
    with matplotlib.rc_context(small):
        figures = {name: make(history) for name, make in draw.items()}
        return {name: svg(figure) for name, figure in figures.items() if figure is not None}


def loss(history: History) -> Figure | None:
    """What each silo's manifests tell, and the mean of those in a commit, by version."""
    return _by_silo(history, "loss", "training loss of each silo, nats per token", mean=history.losses)


def loss_in_time(history: History) -> Figure | None:
    """The same over wall time, by the store's clock."""
    timed = [one for one in history.versions if one.unix_seconds is not None]
    if len(timed) < 2 or not history.losses:
        return None
    began = min(one.unix_seconds or 0.0 for one in timed)
    last = max(one.unix_seconds or 0.0 for one in timed) - began
    size, unit = next((pair for pair in UNITS if last >= 2 * pair[0]), UNITS[-1])

    def place(version: Version) -> float | None:
        return None if version.unix_seconds is None else (version.unix_seconds - began) / size

    means = [(at, one.loss) for one in timed if one.loss is not None and (at := place(one)) is not None]
    figure = _by_silo(history, "loss", "training loss over time, nats per token", mean=means, key="time", place=place)
    if figure:
        back = [event.unix_seconds for event in history.events if event.what == "rolled back"]
        mark_rollbacks(figure.axes[0], [(at - began) / size for at in back if at is not None])
        figure.axes[0].set_xlabel(f"{unit} since version 0, by the store's clock")
    return figure


def held_out(history: History) -> Figure | None:
    """What silos have found versions to be worth on their held-out text; and models beside the run, across."""
    found = history.held_out
    figure, axes = _panel("held-out loss, nats per token")
    for silo, color in _colors(history).items():
        _line(axes, found.curve(silo), silo, color, f"held-out-{silo}")
    _line(axes, found.means, "mean", MAIN_COLOR, "held-out-mean", linewidth=2.4)
    for (label, loss), style in zip(list(found.beside_means.items())[:MOST_NAMED], cycle(BESIDE), strict=False):
        axes.axhline(loss, label=shortened(label, MOST_CHARACTERS), gid=f"held-out-beside-{label}", **style)
    return _finished(figure, axes, history)


def commits(history: History) -> Figure | None:
    """Who was in which commit: a row a silo, and one for what happened to all."""
    if not any(one.parts for one in history.versions):
        return None
    rows = history.silos[:MOST_ROWS]
    height = max(SIZE_INCHES[1], 1.1 + 0.2 * (len(rows) + 1))
    figure = Figure(figsize=(SIZE_INCHES[0], height), layout="constrained")
    axes = figure.subplots()
    last = history.versions[-1].number
    for row, silo in enumerate(rows):
        axes.broken_barh([(0.5, last)], (row - 0.32, 0.64), color=ABSENT_COLOR)
        states: dict[str, list[int]] = {}
        for one in history.versions:
            if part := one.parts.get(silo):
                states.setdefault(part.state, []).append(one.number)
        for state, numbers in states.items():
            color, gid = PART_COLORS[state], f"commits-{silo}-{state.replace(' ', '-')}"
            axes.broken_barh(_runs(numbers), (row - 0.32, 0.64), color=color, gid=gid)
    for source, to in history.taken_back:
        axes.broken_barh([(to + 0.5, source - to)], (len(rows) - 0.12, 0.24), color=ROLLBACK_COLOR, gid="taken-back")
    places = {name: row for row, name in enumerate([*rows, OPERATOR])}
    for event in history.events:
        mark, color = MARKS.get(event.what, MARKS["lease"])
        if event.who in places and event.what != "rolled back":
            style: dict[str, Any] = {"marker": mark, "color": color, "markersize": 7, "markeredgecolor": "white"}
            axes.plot([event.version + 0.5], [places[event.who]], **style, gid=f"event-{event.what.replace(' ', '-')}")
    mark_rollbacks(axes, [to + 0.5 for _, to in history.taken_back])
    axes.set_yticks(range(len(rows) + 1), [*(shortened(name, MOST_CHARACTERS) for name in rows), "all"])
    axes.set_ylim(len(rows) + 0.6, -0.6)
    axes.set_xlim(0, last + 1)
    axes.grid(axis="y", visible=False)
    some = f", of the first {MOST_ROWS} silos" if len(history.silos) > MOST_ROWS else ""
    axes.set_title(f"who is in which commit{some}")
    _version_axis(axes, history)
    return figure


def tokens(history: History) -> Figure | None:
    """Tokens behind each silo's contributions so far."""
    figure, axes = _panel("tokens contributed so far")
    for silo, color in _colors(history).items():
        given = [(one.number, count) for one, count in history.of_silo(silo, "tokens")]
        total = list(accumulate(count for _, count in given))
        _line(axes, [(x, y) for (x, _), y in zip(given, total, strict=True)], silo, color, f"tokens-{silo}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: short(count)))
    return _finished(figure, axes, history)


def waiting(history: History) -> Figure | None:
    """How long a delivery lay there until the commit."""
    return _by_silo(history, "waited_seconds", "from delivery to commit, seconds", key="waiting", from_zero=True)


def num_bytes(history: History) -> Figure | None:
    """What all silos sent for a version, and what each received of it."""
    figure, axes = _panel("MB of a version")
    sent = [(v.number, sum(p.num_bytes or 0 for p in v.parts.values()) / 1e6) for v in history.versions if v.parts]
    _line(axes, sent, "sent by all silos together", COLORS[0], "bytes-sent")
    received = [(v.number, v.num_bytes / 1e6) for v in history.versions if v.number]
    _line(axes, received, "received by each", COLORS[5], "bytes-received")
    axes.set_ylim(bottom=0)
    return _finished(figure, axes, history)


def norms(history: History) -> Figure | None:
    """Of each silo's pseudo-gradient, and of the outer step."""
    updates = [(one.number, one.update_norm) for one in history.versions if one.update_norm is not None]
    title = "norms: pseudo-gradients, outer step (update)"
    return _by_silo(history, "norm", title, mean=updates, label="update", from_zero=True)


def cosine(history: History) -> Figure | None:
    """How far the silos move in one direction."""
    figure, axes = _panel("cosine between pseudo-gradients, mean")
    axes.axhline(0, color="#9aa5b1", linewidth=1)
    found = [(one.number, one.cosine_mean) for one in history.versions if one.cosine_mean is not None and one.number]
    _line(axes, found, "", MAIN_COLOR, "cosine")
    axes.set_ylim(min(-0.3, axes.get_ylim()[0]), 1)
    return _finished(figure, axes, history) if found else None


def _by_silo(
    history: History,
    what: str,
    title: str,
    *,
    mean: Sequence[tuple[float, float]] = (),
    label: str = "mean",
    key: str = "",
    place: Callable[[Version], float | None] | None = None,
    from_zero: bool = False,
) -> Figure | None:
    """A line a silo of one of its numbers, and one of all, by version, or where `place` puts one."""
    figure, axes = _panel(title)
    at_place = place or _number
    for silo, color in _colors(history).items():
        found = [(at, number) for one, number in history.of_silo(silo, what) if (at := at_place(one)) is not None]
        _line(axes, found, silo, color, f"{key or what}-{silo}")
    _line(axes, mean, label, MAIN_COLOR, f"{key or what}-{label}", linewidth=2.4)
    if from_zero:
        axes.set_ylim(bottom=0)
    return _finished(figure, axes, history, by_version=place is None)


def _number(version: Version) -> float | None:
    return version.number


def _panel(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def _line(axes: Axes, points: Sequence[tuple[float, float]], label: str, color: str, gid: str, **style: Any) -> None:
    if points:
        fewer = thin(points)
        marker = "o" if len(points) <= 30 else ""
        x, y = [x for x, _ in fewer], [y for _, y in fewer]
        axes.plot(x, y, label=label, color=color, marker=marker, markersize=2.8, gid=gid, **style)


def _finished(figure: Figure, axes: Axes, history: History, *, by_version: bool = True) -> Figure | None:
    """With its legend and axis; None if nothing was drawn."""
    handles, labels = axes.get_legend_handles_labels()
    if not any(line.get_gid() for line in axes.lines):
        return None
    if len(history.silos) > MOST_NAMED:  # colors come again: what has a name is what is of all
        named = [(handle, label) for handle, label in zip(handles, labels, strict=True) if label not in history.silos]
        handles, labels = [handle for handle, _ in named], [label for _, label in named]
    if labels:
        columns = min(3, len(labels))
        cut = [shortened(label, MOST_CHARACTERS) if label in history.silos else label for label in labels]
        figure.legend(handles, cut, loc="outside lower center", ncols=columns, handlelength=1.4, columnspacing=1.2)
    if by_version:
        mark_rollbacks(axes, [float(to) for _, to in history.taken_back])
        _version_axis(axes, history)
    return figure


def _version_axis(axes: Axes, history: History) -> None:
    each = f", {history.num_fragments} a round" if history.num_fragments > 1 else ", one a round"
    axes.set_xlabel(f"version{each}")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _colors(history: History) -> dict[str, str]:
    return {silo: COLORS[number % len(COLORS)] for number, silo in enumerate(history.silos)}


def _runs(numbers: Sequence[int]) -> list[tuple[float, float]]:
    """Rising numbers as bars of begin and width, one for those that follow each other."""
    found: list[tuple[float, float]] = []
    for number in numbers:
        begin, width = found[-1] if found else (0.0, 0.0)
        if found and begin + width == number - 0.5:
            found[-1] = (begin, width + 1)
        else:
            found.append((number - 0.5, 1.0))
    return found
