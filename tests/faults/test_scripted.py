"""The points at which faults strike are in the code, and called as they expect."""

import importlib
import inspect
from operator import attrgetter

import pytest

from tests.faults.scripted import POINTS


@pytest.mark.parametrize("point", POINTS)
def test_a_point_is_there(point: str) -> None:
    module, path, _, number_of = POINTS[point]
    parameters = inspect.signature(attrgetter(path)(importlib.import_module(module))).parameters.values()
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    optional = {p.name: p for p in by_place if p.default is not p.empty}
    needed = [p for p in by_place if p.default is p.empty]
    expected = inspect.signature(number_of)
    by_name = {name: p for name, p in by_name.items() if name in expected.parameters}  # as scripted.py calls it
    try:
        expected.bind(*by_place, **by_name)
    except TypeError:
        expected.bind(*needed, **optional, **by_name)
