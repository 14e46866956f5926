"""The tables of benchmarks/leaks.py: a row for each run and attacker, of one measurement or of several."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Numbers that are shown together; none are a dash."""

    values: Sequence[float]
    form: str = ".3f"
    between: str = ", "


def spread(values: Sequence[float], form: str) -> str:
    """The mean of several measurements, and the least and the greatest; NaN is none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    middle, *ends = (format(value, form) for value in (mean(known), min(known), max(known)))
    return middle if ends[0] == ends[1] else f"{middle} ({ends[0]} to {ends[1]})"


def shown(several: Sequence[Cell]) -> str:
    """One cell of several measurements."""
    first = several[0]
    columns = zip(*(cell.values for cell in several), strict=True)
    return first.between.join(spread(of, first.form) for of in columns) or "-"


@dataclass(kw_only=True)
class Table:
    """Rows by run and attacker, in the order in which they first came."""

    head: str
    rows: dict[tuple[str, str], list[list[Cell]]] = field(default_factory=dict)

    def add(self, run: str, who: str, cells: list[Cell]) -> None:
        """One measurement more."""
        self.rows.setdefault((run, who), []).append(cells)

    def lines(self) -> list[str]:
        """All of it, in Markdown; nothing without rows."""
        if not self.rows:
            return []
        found = ["", self.head, "|" + "---|" * (self.head.count("|") - 1)]
        for names, measured in self.rows.items():
            cells = [*names, *(shown(several) for several in zip(*measured, strict=True))]
            found.append(f"| {' | '.join(cells)} |")
        return found
