"""JSON and text that came from another party: read within bounds, and shown without what a terminal obeys. No torch."""

import json
import math
from typing import Any, NoReturn

from pretrain.config.errors import printable

LIMIT_BYTES = 64 << 20
LIMIT_DEPTH = 32  # of lists and objects in each other; ours have 5
SHOWN_CHARACTERS = 200


def loads(data: bytes | str, *, limit_bytes: int = LIMIT_BYTES) -> Any:
    """What JSON of another party says; raises ValueError, in one line, for all that is none.

    Refused, too, are what is larger than `limit_bytes`, deeper than `LIMIT_DEPTH`, NaN, infinite (1e999 reads as that)
    or a whole number beyond 64 bits.
    """
    if len(data) > limit_bytes:
        raise ValueError(f"{len(data)} bytes of JSON given; allowed: {limit_bytes}")
    try:
        found = json.loads(data, parse_constant=_refuse, parse_float=_finite, parse_int=_whole)
    except RecursionError:
        raise ValueError(f"JSON nested too deeply given; allowed: {LIMIT_DEPTH} levels") from None
    level: list[Any] = [found]
    for _ in range(LIMIT_DEPTH):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return found
    raise ValueError(f"JSON nested too deeply given; allowed: {LIMIT_DEPTH} levels")


def shown(text: object, *, limit: int = SHOWN_CHARACTERS) -> str:
    """Text of another party as it may reach a terminal, a log or a page: one line, cut, odd characters spelled out."""
    words = str(text)
    return printable(words[:limit]) + ("..." if len(words) > limit else "")


def shown_lines(text: str) -> str:
    """The same of a text that keeps its lines and tabs, whatever its length: what a model writes may be anything."""
    return "".join(c if c in "\n\t" else printable(c) for c in text)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} given; allowed: finite numbers")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:20]} given; allowed: finite numbers")
    return value


def _whole(digits: str) -> int:
    if len(digits) > 20 or abs(value := int(digits)) >= 1 << 64:
        raise ValueError(f"{digits[:20]}... given; allowed: whole numbers below 2^64")
    return value
