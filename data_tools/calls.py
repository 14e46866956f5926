"""What a model says read as calls, and compared by meaning with those that are right.

Read are the forms that chat templates write calls in: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as
often as there are calls (our own template, Qwen, Hermes); or the whole answer as one such object or a list of them,
with "parameters" for "arguments", and after `[TOOL_CALLS]` or `<|python_tag|>` (Llama 3, Mistral). Reasoning in <think>
before is passed over. All else is an answer without a call, or one that cannot be read; nothing is guessed.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MARKED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
MARK = "<tool_call>"
BEGINNINGS = ("[TOOL_CALLS]", "<|python_tag|>")
REASONING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
LEFT_OUT = ""  # among the leaderboard's values: that the argument need not be given

RIGHT = "right"
# What can be wrong with an answer, the first that holds.
ERRORS = (
    *("prompt too long", "cut off", "unreadable call", "no call", "call not wanted"),
    *("undeclared tool", "other tool", "other number of calls"),
    *("argument missing", "argument not wanted", "other value"),
)


class UnreadableError(Exception):
    """What begins like a call and is none."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A function and what it is called with."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A call that is right."""

    name: str
    allowed: Mapping[str, Sequence[Any]]
    """Of each argument the values that are right."""
    optional: frozenset[str] = frozenset()
    """Arguments that may be left out."""
    is_nested: bool = False
    """Whether within an object every value is a list of those that are right, too, as the leaderboard has it."""
    defaults: Mapping[str, Any]
    """What arguments are that are left out, as the tool's schema says: to give that is to leave it out."""


def calls_in(text: str) -> list[Call]:
    """The calls of an answer, in its order; none if it is text. Raises UnreadableError."""
    text = REASONING.sub("", text).strip()
    if MARK in text:
        written = MARKED.findall(text)
        if len(written) != text.count(MARK):
            raise UnreadableError(f"{MARK} without its end")
        return [_call(_read(one)) for one in written]
    begin = next((one for one in BEGINNINGS if text.startswith(one)), "")
    try:
        found = _read(text.removeprefix(begin))
    except UnreadableError:
        if begin:
            raise
        return []
    listed = found if isinstance(found, list) else [found]
    if not begin and not all(isinstance(one, dict) and "name" in one for one in listed):
        return []
    return [_call(one) for one in listed]


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableError("no JSON") from error


def _call(given: Any) -> Call:
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise UnreadableError("no name")
    arguments = given.get("arguments", given.get("parameters"))
    if isinstance(arguments, str):
        arguments = _read(arguments)
    if not isinstance(arguments, dict):
        raise UnreadableError("no arguments")
    return Call(name=given["name"], arguments=arguments)


# --- what is right ----------------------------------------------------------------------------------------------------


def verdict(text: str, expected: Sequence[Expected], declared: Sequence[str], *, is_cut: bool) -> str:
    """RIGHT, or which of ERRORS it is. Several calls are compared as a set, whatever their order."""
    if is_cut:
        return "cut off"
    try:
        calls = calls_in(text)
    except UnreadableError:
        return "unreadable call"
    if not calls or not expected:
        return RIGHT if not calls and not expected else ("call not wanted" if calls else "no call")
    names, right = Counter(call.name for call in calls), Counter(one.name for one in expected)
    if names != right:
        if not {*declared}.issuperset(names):
            return "undeclared tool"
        return "other tool" if names.keys() != right.keys() else "other number of calls"
    return _compared(calls, expected)


def names_are_right(text: str, expected: Sequence[Expected]) -> bool:
    """Whether an answer calls the right functions, each as often as it is to be, whatever with."""
    try:
        return Counter(call.name for call in calls_in(text)) == Counter(one.name for one in expected)
    except UnreadableError:
        return False


def _compared(calls: Sequence[Call], expected: Sequence[Expected]) -> str:
    """RIGHT if each call can be given one of the expected of its own; or what is wrong with the first that cannot."""
    taken: dict[int, int] = {}  # expected to call

    def find(number: int, tried: set[int]) -> bool:
        for place, one in enumerate(expected):
            if place not in tried and not difference(calls[number], one):
                tried.add(place)
                if place not in taken or find(taken[place], tried):
                    taken[place] = number
                    return True
        return False

    for number, call in enumerate(calls):
        if not find(number, set()):
            others = (one for place, one in enumerate(expected) if one.name == call.name and place not in taken)
            return next(filter(None, (difference(call, one) for one in others)), "other value")
    return RIGHT


def difference(call: Call, expected: Expected) -> str:
    """Which of ERRORS a call is beside one that is right; empty if it means the same."""
    if call.name != expected.name:
        return "other tool"
    for name in expected.allowed.keys() - call.arguments.keys():
        if name not in expected.optional:
            return "argument missing"
    for name, value in call.arguments.items():
        is_default = name in expected.defaults and same(value, expected.defaults[name])
        if name not in expected.allowed:
            if not is_default:
                return "argument not wanted"
        elif not (is_default and name in expected.optional) and not _is_one_of(
            value, expected.allowed[name], is_nested=expected.is_nested
        ):
            return "other value"
    return ""


def _is_one_of(value: Any, allowed: Sequence[Any], *, is_nested: bool) -> bool:
    return any(_fits(value, one) if is_nested else same(value, one) for one in allowed)


def _fits(value: Any, allowed: Any) -> bool:
    """Whether a value is as one of the leaderboard's says: the values of objects in it are lists of what is right."""
    if isinstance(allowed, dict):
        if not isinstance(value, dict) or not value.keys() <= allowed.keys():
            return False
        given = all(_is_one_of(one, allowed[name], is_nested=True) for name, one in value.items())
        return given and all(LEFT_OUT in allowed[name] for name in allowed.keys() - value.keys())
    if isinstance(allowed, list):
        is_list = isinstance(value, list) and len(value) == len(allowed)
        return is_list and all(_fits(one, other) for one, other in zip(value, allowed, strict=True))
    return same(value, allowed)


def same(value: Any, other: Any) -> bool:
    """Whether two values of JSON mean the same: 1 and 1.0 do, so do texts that differ in white space; 1 and true do
    not, nor 1 and "1"."""
    if isinstance(value, str) and isinstance(other, str):
        return value.split() == other.split()
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(same(value[name], other[name]) for name in value)
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(same, value, other))
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    return bool(value == other)
