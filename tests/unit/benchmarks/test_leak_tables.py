"""A row of several measurements is their mean, and from where to where they go."""

import math

from benchmarks.leak_tables import Cell, Table, shown


def test_cells_of_several_measurements() -> None:
    assert shown([Cell(values=[0.5]), Cell(values=[0.7])]) == "0.600 (0.500 to 0.700)"
    assert shown([Cell(values=[0.5])]) == "0.500"
    assert shown([Cell(values=[1, 2], form="d", between=" / ")]) == "1 / 2"
    assert shown([Cell(values=[math.nan]), Cell(values=[1.0])]) == "1.000"
    assert shown([Cell(values=[math.nan])]) == shown([Cell(values=[])]) == "-"


def test_a_table_has_a_row_for_each_run_and_attacker() -> None:
    table = Table(head="| run | who | AUC |")
    assert table.lines() == []
    for run, who, value in (("plain", "member", 0.5), ("plain", "user", 0.4), ("plain", "member", 0.7)):
        table.add(run, who, [Cell(values=[value], form=".1f")])
    assert table.lines() == [
        "",
        "| run | who | AUC |",
        "|---|---|---|",
        "| plain | member | 0.6 (0.5 to 0.7) |",
        "| plain | user | 0.4 |",
    ]
