"""What tools declare, checked as far as a call relies on it: names, and arguments as JSON Schema has them.

Words of JSON Schema that are not looked at ($ref, format, pattern and so on) are left as they are.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_tools.pieces import one_line
from pretrain.config.errors import named as named_of

TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
SEVERAL = ("anyOf", "oneOf", "allOf")
MOST_DEEP = 32


def wrong_with_tool(function: Mapping[str, Any], others: Iterable[str], where: str) -> str | None:
    """What is wrong with a function that has a name, beside `others`, in a few words; None: nothing."""
    name = function["name"]
    if not name.strip():
        return f"{where}.name: {name!r} given; allowed: a name"
    if name in others:
        return f"{where}: a second tool named {quoted(name)} given; allowed: each name once"
    parameters = function.get("parameters")
    if parameters is None:
        return None
    where = f"{where}.parameters"
    if not isinstance(parameters, dict):
        return f"{where}: {kind_of(parameters)} given; allowed: an object, as JSON Schema has it"
    if parameters and parameters.get("type", "object") != "object":
        return f"{where}.type: {quoted(parameters['type'])} given; allowed: 'object', as arguments have names"
    return _wrong_with_schema(parameters, where, 0)


def _wrong_with_schema(schema: Any, where: str, depth: int) -> str | None:
    if not isinstance(schema, dict):  # true and false are schemas, too: any value, or none
        return None if isinstance(schema, bool) else f"{where}: {kind_of(schema)} given; allowed: a schema, an object"
    if depth > MOST_DEEP:
        return f"{where}: more than {MOST_DEEP} schemas within each other given; allowed: fewer"
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in TYPES:
            return f"{where}.type: {quoted(kind)} given; allowed: {', '.join(TYPES)}"
    if "enum" in schema and not (isinstance(schema["enum"], list) and schema["enum"]):
        return f"{where}.enum: {quoted(schema['enum'])} given; allowed: a list of values"
    return _wrong_with_required(schema, where) or _wrong_within(schema, where, depth)


def _wrong_with_required(schema: Mapping[str, Any], where: str) -> str | None:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict):
        return f"{where}.properties: {kind_of(properties)} given; allowed: an object, name to schema"
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return f"{where}.required: {quoted(required)} given; allowed: a list of names"
    for name in required:
        if name not in properties:
            return f"{where}.required: {quoted(name)} given; allowed: {named([*properties]) or 'nothing'} (properties)"
    return None


def _wrong_within(schema: Mapping[str, Any], where: str, depth: int) -> str | None:
    properties = schema.get("properties", {}).items()
    inner = [(one, f"{where}.properties.{one_line(name)[:40]}") for name, one in properties]
    if "items" in schema:
        items = schema["items"]
        inner += [(one, f"{where}.items") for one in (items if isinstance(items, list) else [items])]
    for word in SEVERAL:
        listed = schema.get(word, [])
        if not isinstance(listed, list):
            return f"{where}.{word}: {kind_of(listed)} given; allowed: a list of schemas"
        inner += [(one, f"{where}.{word}") for one in listed]
    found = (_wrong_with_schema(one, place, depth + 1) for one, place in inner)
    return next(filter(None, found), None)


def named(names: Sequence[str]) -> str:
    """Names of others, in a line."""
    return named_of([one_line(name)[:40] for name in names])


def quoted(given: Any) -> str:
    """What was given, on a line."""
    return one_line(repr(given))[:80]


def kind_of(given: Any) -> str:
    """What it is, in JSON's words."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(given), "a number")
