"""`atoll watch`: a federation in a terminal, from its store alone; once, or as it goes on."""

import io
import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.show.display import commit_words, format_seconds, shortened
from launch.show.history import History, Version
from launch.show.page import Federation
from launch.show.status import show_status, waiting_words
from launch.show.status_reader import StoreStatus
from pretrain.config.errors import ConfigError

POLL_SECONDS = 5.0
MOST_BUSY = 4  # a look that takes long is followed by a pause of so many times that
NARROW = 14  # of a name in the table of the newest versions, ...
WIDEST = 4  # ... of which each has so many columns at most
MORE = {"held-out": 4, "epochs": 2}  # columns that are there if anybody tells them, and their decimals
SIGNS = {"in": ("▆", "#"), "late": ("▃", "+"), "no weight": ("_", "-"), "absent": ("·", ".")}
STYLES = {"in": "cyan", "late": "yellow", "no weight": "red", "absent": "dim"}
HEIGHTS = ("▁▂▃▄▅▆▇█", "_.-=+*#")


def watch(federation: Federation, console: Console, *, follow: bool) -> None:
    """Print where a run stands; with `follow` go on until it is finished: a picture in a terminal, else lines."""
    if not follow:
        console.print(draw(federation, console))
    elif console.is_terminal:
        _watch_live(federation, console)
    else:
        _tell(federation, console)


def draw(federation: Federation, console: Console, trouble: str = "") -> RenderableType:
    """One picture, as wide as the console."""
    status, history = federation.status, federation.history
    parts: list[RenderableType] = [_said(status, console)]
    if history.versions[1:]:
        parts += [Text(), _newest(history, console), Text(), _progress(status)]
    return Group(*parts, *([Text(trouble, style="bold red")] if trouble else []))


def _said(status: StoreStatus, console: Console) -> Text:
    """What `atoll status` prints."""
    size = console.size
    paper = Console(
        file=io.StringIO(),
        width=size.width,
        force_terminal=console.is_terminal,
        color_system=console.color_system,  # type: ignore[arg-type]
    )
    show_status(status, paper)
    return Text.from_ansi(paper.file.getvalue().rstrip())  # type: ignore[attr-defined]


def _newest(history: History, console: Console) -> Table:
    """Who was in the newest commits, and what their losses were."""
    plain = console.options.ascii_only
    more = [name for name in MORE if any(_newest_of(history, silo, name) for silo in history.silos)]
    room = max(10, console.width - NARROW - 12 - sum(len(name) + 1 for name in more))
    newest = [one for one in history.versions if one.number][-room:]
    times = min(WIDEST, room // len(newest))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold dim")
    table.add_column("silo", no_wrap=True)
    table.add_column(f"versions {newest[0].number} to {newest[-1].number}", no_wrap=True)
    for name in ("loss", *more):
        table.add_column(name, justify="right", no_wrap=True)
    for silo in history.silos:
        line = Text()
        for state in (part.state if (part := one.parts.get(silo)) else "absent" for one in newest):
            line.append(SIGNS[state][plain] * times, style=STYLES[state])
        told = (_newest_of(history, silo, name) or "-" for name in ("loss", *more))
        table.add_row(Text(shortened(silo, NARROW)), line, *told)
    if means := [one.loss for one in newest if one.loss is not None]:
        last = [f"{means[-1]:.4f}", *(f"{mean:.4f}" for _, mean in history.held_out.means[-1:])]
        table.add_row(Text("mean loss", style="bold"), _curve(newest, times, plain=plain), *last)
    back = {to + 1 for _, to in history.taken_back}  # the first that was made again
    if back & {one.number for one in newest}:
        marks = "".join(("^" if one.number in back else " ").ljust(times) for one in newest)
        table.add_row(Text("made again", style="red"), Text(marks.rstrip(), style="red"), "")
    return table


def _newest_of(history: History, silo: str, name: str) -> str:
    """A silo's last number of a kind; empty if there is none."""
    curve = history.held_out.curve(silo) if name == "held-out" else history.of_silo(silo, name)
    return f"{curve[-1][1]:.{MORE.get(name, 4)}f}" if curve else ""


def _curve(versions: list[Version], times: int, *, plain: bool) -> str:
    told = [one.loss for one in versions if one.loss is not None]
    low, high, heights = min(told), max(told), HEIGHTS[plain]
    steps = (len(heights) - 1) / ((high - low) or 1.0)
    signs = (" " if one.loss is None else heights[round((one.loss - low) * steps)] for one in versions)
    return "".join(sign * times for sign in signs)


def _progress(status: StoreStatus) -> RenderableType:
    done, total = status.version or 0, status.num_versions
    text = f"{done / total:4.0%}   "
    if status.version_seconds is not None and not status.is_finished:
        text += f"about {format_seconds(status.version_seconds * (total - done))} left"
    grid = Table.grid(padding=(0, 2))
    grid.add_row(ProgressBar(total=total, completed=done, width=36), text)
    return grid


def _watch_live(federation: Federation, console: Console) -> None:
    with Live(draw(federation, console), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        live.refresh()
        while not federation.status.is_over:
            trouble = _pause_and_look(federation)
            live.update(draw(federation, console, trouble), refresh=True)


def _tell(federation: Federation, console: Console) -> None:
    """A line for each commit, each decision of the gate, and for what is waited for when that is another."""
    version, waiting, trouble, decided = federation.status.version, "", "", _decisions(federation)
    console.print(draw(federation, console))
    while not federation.status.is_over:
        if (new := _pause_and_look(federation)) != trouble:
            trouble = new
            _say(console, trouble or "the store can be read again")
        status, history = federation.status, federation.history
        if version is not None and status.version is not None and status.version < version:
            _say(console, f"rolled back to version {status.version}")
            version = status.version
        for one in history.versions:
            if version is None or one.number > version:
                version = one.number
                who = len(one.parts), len(history.silos)
                text = commit_words(one.number, status.num_versions, who, one.update_norm, one.cosine_mean)
                _say(console, text if one.loss is None else f"{text}  loss {one.loss:.4f}")
        for words in _decisions(federation):
            if words not in decided:
                decided.append(words)
                _say(console, words)
        if (now := status.waiting_for or "finished") != waiting:
            waiting = now
            _say(console, waiting_words(status))


def _decisions(federation: Federation) -> list[str]:
    return federation.status.gate.decisions if federation.status.gate else []


def _say(console: Console, words: str) -> None:
    console.print(Text(f"{time.strftime('%H:%M:%S')}  {words}"), soft_wrap=True)


def _pause_and_look(federation: Federation) -> str:
    """Why the store cannot be read, if so."""
    time.sleep(max(POLL_SECONDS, MOST_BUSY * federation.look_seconds))
    try:
        federation.look()
    except ConfigError as error:
        return str(error)
    return ""
