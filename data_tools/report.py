"""What `atoll data prepare` read, kept and dropped, as `report.json`, `report.png` and a table.

A report is what JSON holds, so that it is the same before and after it was written:

    format, recipe, seconds, bytes_per_second, tokens_per_second
    sources: name -> documents, bytes     all that was read, before cleaning; bytes of UTF-8 text
                     kept                 split -> documents, bytes, tokens
                     dropped              reason -> documents, bytes
                     personal             kind of personal data -> found, documents; of all that came to this step
                     bad, bad_examples    reason -> records that could not be used, and the first of them
                     lengths_kept         documents by floor(log2(bytes of text)), 32 of them
                     lengths_dropped      the same of what was dropped
                     split                of conversations that were split, if any were; see encode.py
    left_out: name -> reason -> files     what was there and was not read
    rows: split -> rows, row_tokens,      of conversations alone: how well rows are filled, and what of them is trained
                   trained_tokens, padding_tokens

How data tools draw and tabulate is here, too. No picture has a time or a version in it: equal data give equal files.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_tools.quality import quantile
from pretrain.silo.shards import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPORT_FILE = "report.json"
PICTURE_FILE = "report.png"
# In the order in which a document meets them; a report may hold others.
REASONS = (
    *("blank", "filter", "personal data", "short", "long", "language"),
    *("duplicate", "near duplicate", "overlap", "too long"),
)
ALL_SOURCES = "all"
# What a terminal shows of each source; report.json has more.
SHOWN_BAD_EXAMPLES = 5

# Okabe and Ito's colours: distinguishable with every kind of colour vision.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c6d31")
KEPT_COLORS = {"train": "#0b3c5d", "valid": "#56b4e9"}
_DROPPED = (
    "#8a8a8a",
    "#cc79a7",
    "#5b3a8c",
    "#e69f00",
    "#8c6d31",
    "#56b4a0",
    "#d55e00",
    "#f3b391",
    "#009e73",
    "#3e4c59",
)
DROPPED_COLORS = dict(zip(REASONS, _DROPPED, strict=True))
DARK, LIGHT = "#1f2933", "#ffffff"
WIDTH_INCHES = 10.5
LOOK: Any = {  # of a run's plots too
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": "#3e4c59",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "xtick.color": "#616e7c",
    "ytick.color": "#616e7c",
    "text.color": DARK,
    "legend.frameon": False,
}
STYLE: Any = LOOK | {
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same on every machine
    "text.parse_math": False,  # a dollar in a name is a dollar
    "savefig.dpi": 120,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.07,
}
# A label and this many columns of at most this width fit into 100 characters.
MAX_TABLE_COLUMNS, MAX_COLUMN_WIDTH = 4, 18

Source = Mapping[str, Any]
_NONE = {"documents": 0, "tokens": 0}


def write_report(report: Mapping[str, Any], directory: Path) -> None:
    """Write `report.json` and `report.png` into `directory`, each atomically."""
    sources = _with_total(report)
    with atomic_path(directory / REPORT_FILE) as temporary:
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with new_picture(directory / PICTURE_FILE) as figure:
        _draw(figure, sources)


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print a table, sources as columns and, where there are several, their sum; then the first bad records."""
    sources = _with_total(report)
    columns = list(sources.values())
    rows = [("documents read", [format_count(source["documents"]) for source in columns])]
    rows.append(("text read", [format_bytes(source["bytes"]) for source in columns]))
    for group in ("kept", "dropped"):
        counts = [{name: entry["documents"] for name, entry in source[group].items()} for source in columns]
        rows.append((group, [_with_share(_num_documents(source, group), source) for source in columns]))
        for name in _names(counts):
            found = zip(counts, columns, strict=True)
            rows.append((f"  {name}", [_with_share(one.get(name, 0), source) for one, source in found]))
    for split in _names([source["kept"] for source in columns]):
        kept = [source["kept"].get(split, {"bytes": 0, "tokens": 0}) for source in columns]
        rows.append((f"tokens, {split}", [format_count(one["tokens"]) for one in kept]))
        rows.append(("  bytes per token", [format_ratio(one["bytes"], one["tokens"]) for one in kept]))
    personal = [source.get("personal", {}) for source in columns]
    for kind in _names(personal):
        numbers = [one.get(kind, {"found": 0, "documents": 0}) for one in personal]
        rows.append((f"{kind} found", [format_count(one["found"]) for one in numbers]))
        rows.append(("  in documents", [format_count(one["documents"]) for one in numbers]))
    rows += _language_rows(columns)
    rows += _quality_rows(columns)
    rows += _bad_rows(columns)
    print_side_by_side(console, list(sources), rows)
    console.print(
        f"{report['seconds']:,.1f} s, {report['bytes_per_second'] / 1e6:,.1f} MB/s, "
        f"{report['tokens_per_second']:,.0f} tokens/s",
        highlight=False,
    )
    for split, filled in report.get("rows", {}).items():
        num_tokens = filled["rows"] * filled["row_tokens"]
        shares = [_percent(filled[f"{what}_tokens"], num_tokens) for what in ("trained", "padding")]
        line = f"{split}: {filled['rows']:,} rows of {filled['row_tokens']:,} tokens, {shares[0]:.1f} % trained"
        console.print(Text(f"{line}, {shares[1]:.2f} % padding"), soft_wrap=True)
    for name, source in report["sources"].items():
        if split := source.get("split"):
            console.print(Text(f"{name}: {_split_line(split)}"), soft_wrap=True)
    for name, left_out in report.get("left_out", {}).items():
        if left_out:
            listed = "; ".join(f"{number:,} {why}" for why, number in left_out.items())
            console.print(Text(f"left out of {name}: {listed}"), soft_wrap=True)
    _print_bad_examples(report["sources"], console)


def _split_line(split: Mapping[str, int]) -> str:
    """What became of conversations that were too long for a row."""
    cut = split["trained_tokens"] - split["piece_trained_tokens"]
    share = _percent(cut, split["trained_tokens"])
    return (
        f"{split['conversations']:,} conversations too long for a row split into {split['pieces']:,} pieces, each with "
        f"system text and tools again ({split['tokens']:,} tokens became {split['piece_tokens']:,}); "
        f"{split['turns_cut']:,} turns too long even so cut, {share:.2f} % of what was to be learned"
    )


def _language_rows(columns: Sequence[Source]) -> list[tuple[str, list[str]]]:
    """Documents of each language and their share of the tokens, the most frequent first."""
    found = [source.get("languages", {}) for source in columns]
    totals = [sum(language["tokens"] for language in one.values()) for one in found]
    most_first = sorted(_names(found), key=lambda name: (-sum(one.get(name, _NONE)["tokens"] for one in found), name))
    rows = [("languages: documents, % of tokens", [""] * len(columns))] if most_first else []
    for name in most_first:
        counts = [one.get(name, _NONE) for one in found]
        cells = zip(counts, totals, strict=True)
        rows.append((f"  {name}", [_count_and_share(one["documents"], one["tokens"], total) for one, total in cells]))
    return rows


def _quality_rows(columns: Sequence[Source]) -> list[tuple[str, list[str]]]:
    """What 5 %, half and 95 % of the documents do not exceed; then the documents that published rules would drop."""
    found = [source.get("quality", {}) for source in columns]
    measures, rules = ([one.get(what, {}) for one in found] for what in ("measures", "would_drop"))
    rows = [("quality: 5 %, median, 95 %", [""] * len(columns))] if any(measures) else []
    for name in _names(measures):
        rows.append((f"  {name}", [_spread(one.get(name, {})) for one in measures]))
    numbers = {name: [one.get(name, 0) for one in rules] for name in _names(rules)}
    dropping = {name: of for name, of in numbers.items() if any(of)}
    rows += [("would be dropped by", [""] * len(columns))] if dropping else []
    kept = [_num_documents(source, "kept") for source in columns]
    for name, of in dropping.items():
        cells = zip(of, kept, strict=True)
        rows.append((f"  {name}", [_count_and_share(number, number, total) for number, total in cells]))
    return rows


def _spread(distribution: Mapping[str, int]) -> str:
    return "  ".join(f"{quantile(distribution, share):,.10g}" for share in (0.05, 0.5, 0.95) if distribution)


def print_described(report: Mapping[str, Any], console: Console) -> None:
    """Print what a report says of languages and quality, if it does."""
    sources = _with_total(report)
    rows = [*_language_rows(list(sources.values())), *_quality_rows(list(sources.values()))]
    if rows:
        print_side_by_side(console, list(sources), rows)


def _bad_rows(columns: Sequence[Source]) -> list[tuple[str, list[str]]]:
    rows = [("bad records", [format_count(sum(source["bad"].values())) for source in columns])]
    for reason in _names([source["bad"] for source in columns]):
        rows.append((f"  {reason}", [format_count(source["bad"].get(reason, 0)) for source in columns]))
    return rows


def print_bad(sources: Mapping[str, Source], console: Console) -> None:
    """Print what was skipped of each source, and the first examples: what `count_bad` counted."""
    print_side_by_side(console, list(sources), _bad_rows(list(sources.values())))
    _print_bad_examples(sources, console)


def _print_bad_examples(sources: Mapping[str, Source], console: Console) -> None:
    for name, source in sources.items():
        num_bad = sum(source["bad"].values())
        examples = source["bad_examples"][:SHOWN_BAD_EXAMPLES]
        if examples:
            first = f"the first {len(examples)} of {num_bad:,}" if num_bad > len(examples) else "all"
            console.print(Text(f"bad records of {name}, {first}:"), soft_wrap=True)
        for example in examples:
            console.print(Text(f"  {printable(example)}"), soft_wrap=True)


def _num_documents(source: Source, group: str) -> int:
    return sum(entry["documents"] for entry in source[group].values())


def _with_total(report: Mapping[str, Any]) -> dict[str, Source]:
    """The sources by name; where there are several, their sum, too."""
    sources: dict[str, Source] = dict(report["sources"])
    for name, source in sources.items():
        num_kept, num_dropped = _num_documents(source, "kept"), _num_documents(source, "dropped")
        read = source["documents"]
        assert read == num_kept + num_dropped, f"{name}: read {read}, kept {num_kept}, dropped {num_dropped}"
    if len(sources) > 1:
        counted = [{key: value for key, value in one.items() if key != "bad_examples"} for one in sources.values()]
        total = functools.reduce(_sum, counted)
        # A source may have the name; then the sum takes the next.
        sources[ALL_SOURCES if ALL_SOURCES not in sources else f"{ALL_SOURCES} sources"] = total
    return sources


def _sum(one: Any, other: Any) -> Any:
    """Two counts, lists of counts, or dictionaries of these, added up; what only one has is taken as it is."""
    if isinstance(one, Mapping):
        return {**one, **other} | {key: _sum(one[key], other[key]) for key in one if key in other}
    if isinstance(one, list):
        return [_sum(left, right) for left, right in zip(one, other, strict=True)]
    return one + other


def _names(counts: Sequence[Mapping[str, object]]) -> list[str]:
    """All keys: train, valid and the known reasons first, in their order."""
    found = {name: None for count in counts for name in count}
    known = [name for name in (*KEPT_COLORS, *REASONS) if name in found]
    return [*known, *(name for name in found if name not in known)]


def _with_share(num_documents: int, source: Source) -> str:
    return _count_and_share(num_documents, num_documents, source["documents"])


def _count_and_share(count: int, part: int, whole: int) -> str:
    return f"{format_count(count)} {_percent(part, whole):5.1f} %"


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


# --- the picture ------------------------------------------------------------------------------------------------------


def _draw(figure: "Figure", sources: Mapping[str, Source]) -> None:
    """Shares kept and dropped; what was dropped on a scale of its own; lengths of both."""
    has_dropped = any(_num_documents(source, "dropped") for source in sources.values())
    bars_inches = 1.8 + 0.5 * len(sources)
    figure.set_size_inches(WIDTH_INCHES, bars_inches + 3.2)
    bars, lengths = figure.subfigures(2, 1, squeeze=False, height_ratios=(bars_inches, 3.2))[:, 0]
    panels = bars.subplots(1, 2 if has_dropped else 1, sharey=True, squeeze=False)[0]
    _draw_shares(panels[0], sources, ("kept", "dropped"))
    panels[0].set_title("kept and dropped")
    panels[0].set_yticks(
        range(len(sources)), [f"{name}\n{format_count(source['documents'])} read" for name, source in sources.items()]
    )
    panels[0].invert_yaxis()
    if has_dropped:
        _draw_shares(panels[1], sources, ("dropped",))
        panels[1].set_title("dropped alone")
    handles, labels = panels[0].get_legend_handles_labels()
    bars.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    _draw_lengths(lengths.subplots(), list(sources.values())[-1])


def _draw_shares(axes: "Axes", sources: Mapping[str, Source], groups: Sequence[str]) -> None:
    """One stacked bar a source: percent of the documents read, by split and by reason."""
    left = np.zeros(len(sources))
    segments: list[tuple[str, str, Any, list[int]]] = []
    for group in groups:
        for number, name in enumerate(_names([source[group] for source in sources.values()])):
            counts = [source[group].get(name, {"documents": 0})["documents"] for source in sources.values()]
            color = (KEPT_COLORS | DROPPED_COLORS).get(name, COLORS[number % len(COLORS)])
            shares = [_percent(count, one["documents"]) for count, one in zip(counts, sources.values(), strict=True)]
            # The last source is the sum of all, or the only one.
            label = f"{'kept, ' * (group == 'kept')}{name}: {shares[-1]:.1f} %, {format_count(counts[-1])}"
            bars = axes.barh(range(len(sources)), shares, left=left, height=0.62, label=label, color=color)
            segments.append((name, color, bars, counts))
            left = left + shares
    # Room for the total at the right end of a bar.
    full = 100.0 if "kept" in groups else 1.2 * left.max()
    axes.set_xlim(0, full)
    for _, color, bars, counts in segments:
        texts = [f"{bar.get_width():.1f} %\n{format_count(count)}" for bar, count in zip(bars, counts, strict=True)]
        fitting = [text if bar.get_width() > 0.13 * full else "" for text, bar in zip(texts, bars, strict=True)]
        axes.bar_label(bars, fitting, label_type="center", color=_ink_on(color), fontsize=8)
    if "kept" not in groups:
        for row, (share, source) in enumerate(zip(left, sources.values(), strict=True)):
            text = f" {share:.1f} %\n {format_count(_num_documents(source, 'dropped'))}"
            axes.text(share, row, text, va="center", fontsize=8)
    axes.set_xlabel("% of the documents read")
    axes.grid(axis="y", visible=False)


def _draw_lengths(axes: "Axes", source: Source) -> None:
    """How long kept and dropped documents are, each in percent of its own number."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    found = {group: np.array(source[f"lengths_{group}"]) for group in ("kept", "dropped")}
    used = np.flatnonzero(sum(found.values()))
    first, last = (used[0], used[-1] + 1) if len(used) else (0, 1)
    edges = 2.0 ** np.arange(first, last + 1)
    for group, color in (("kept", COLORS[0]), ("dropped", COLORS[1])):
        num_documents = int(found[group].sum())
        shares = 100 * found[group][first:last] / max(1, num_documents)
        label = f"{group}: {format_count(num_documents)} documents"
        axes.stairs(shares, edges, color=color, linewidth=2.2, label=label)
        axes.stairs(shares, edges, color=color, alpha=0.15, fill=True)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=16))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda num_bytes, _: format_bytes(num_bytes, base=1024)))
    axes.set_title("length of the text, kept against dropped")
    axes.set_xlabel("bytes of text, each step a doubling")
    axes.set_ylabel("% of documents")
    axes.set_ylim(bottom=0)
    axes.legend()


def _ink_on(color: str) -> str:
    """Dark or light, whichever reads better on a colour #rrggbb."""
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return LIGHT if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else DARK


# --- what other data tools share --------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_picture(path: Path) -> "Iterator[Figure]":
    """Yield a figure to draw on; at the end it is written to `path` as PNG, atomically."""
    import matplotlib.style
    from matplotlib.figure import Figure

    # From matplotlib's defaults, not from the user's file. A bare Figure draws with Agg: no display, no global state.
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(layout="constrained")
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})


def print_side_by_side(
    console: Console, names: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], *, label: str = ""
) -> None:
    """Print facts as rows and `names` as columns, in as many tables as the columns need; nothing is read as markup."""
    for first in range(0, len(names), MAX_TABLE_COLUMNS):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold dim")
        table.add_column(label, no_wrap=True)
        for name in names[first : first + MAX_TABLE_COLUMNS]:
            table.add_column(Text(name), justify="right", max_width=MAX_COLUMN_WIDTH, overflow="fold")
        for fact, values in rows:
            table.add_row(Text(fact), *(Text(value) for value in values[first : first + MAX_TABLE_COLUMNS]))
        console.print(table, Text(), sep="")


def format_count(count: int) -> str:
    """In full below a hundred million, then with a unit: ten characters at most, up to 10^15."""
    if count < 1e8:
        return f"{count:,}"
    size, unit = next((size, unit) for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if count >= size)
    return f"{count / size:,.2f} {unit}"


def format_bytes(num_bytes: float, *, base: int = 1000) -> str:
    """4.13 MB or, with base 1024, 4 MiB."""
    units = ("B", "kB", "MB", "GB", "TB", "PB") if base == 1000 else ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = 0
    while num_bytes >= base and power < len(units) - 1:
        num_bytes, power = num_bytes / base, power + 1
    return f"{num_bytes:,.{2 if power and base == 1000 else 0}f} {units[power]}"


def format_ratio(numerator: float, denominator: float) -> str:
    """Two decimals, or a dash where there is nothing to divide by."""
    return f"{numerator / denominator:.2f}" if denominator else "-"


def printable(text: str) -> str:
    """The text with every character that a terminal would obey, line ends and tabs apart, written as its code."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)
