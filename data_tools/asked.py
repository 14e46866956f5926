"""Questions whose right calls are known: JSON lines that `atoll eval --tools` reads.

    messages           a conversation up to where the model is asked: it ends with the user, or with a tool's result
    tools              what it may call
    expected           the right calls: [{"name": ..., "arguments": {...}}, ...], in any order; []: to call nothing
    possible_answer    in place of it, as the Berkeley Function Calling Leaderboard has it:
                       [{NAME: {ARGUMENT: [a right value, ...]}}, ...], "" among them where it may be left out

All other keys are left alone.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.calls import LEFT_OUT, Expected, same
from data_tools.conversations import Conversation, NoConversationError, begun
from data_tools.formats import WHOLE, Bad
from data_tools.pieces import one_line
from data_tools.schemas import kind_of, named, quoted
from data_tools.sources import Source, find_text, parse_block, read_blocks
from pretrain.config.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Question:
    """One line of a file."""

    line: int
    begun: Conversation
    """Up to where the model is asked."""
    expected: tuple[Expected, ...]

    @property
    def declared(self) -> list[str]:
        """Names of what may be called."""
        return [tool["function"]["name"] for tool in self.begun.tools or ()]


def read_questions(file: Path) -> Iterator[Question]:
    """All questions of a file. Raises ConfigError, with file and line, for what is none."""
    found = 0
    for part in find_text(Source(path=str(file), text=WHOLE)).parts:
        for block in read_blocks(part):
            for number, record in parse_block(block):
                if isinstance(record, Bad):
                    raise ConfigError(record.message)
                try:
                    yield question(number, record)
                except NoConversationError as no:
                    raise ConfigError(f"{part.path}, {part.unit} {number}: {no.what}: mend or drop it") from None
                found += 1
    if not found:
        raise ConfigError(f"--tools: {str(file)!r} given; there is no question in it")


def question(line: int, text: str) -> Question:
    """A question from the JSON of a line. Raises NoConversationError."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NoConversationError("not JSON", f"not JSON ({one_line(error)})") from None
    conversation = begun(record)
    if not conversation.tools:
        raise NoConversationError("tools", "tools: none given; allowed: what the model may call")
    return Question(line=line, begun=conversation, expected=_expected(record, conversation.tools))


def _expected(record: Mapping[str, Any], tools: list[dict[str, Any]]) -> tuple[Expected, ...]:
    given = [key for key in ("expected", "possible_answer") if record.get(key) is not None]
    if len(given) != 1:
        what = "both given" if given else "neither given"
        raise NoConversationError("expected", f"expected, possible_answer: {what}; allowed: one of them")
    [key] = given
    if not isinstance(record[key], list):
        raise NoConversationError("expected", f"{key}: {kind_of(record[key])} given; allowed: a list of calls")
    read = _exact if key == "expected" else _possible
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    return tuple(read(one, f"{key}[{place}]", schemas) for place, one in enumerate(record[key]))


def _exact(given: Any, where: str, schemas: Mapping[str, Any]) -> Expected:
    call = given.get("function", given) if isinstance(given, dict) else None
    if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
        raise NoConversationError(
            "expected", f'{where}: {kind_of(given)} given; allowed: {{"name": "...", "arguments": {{...}}}}'
        )
    defaults = _defaults(call.get("name"), where, schemas)
    arguments = call["arguments"]
    return Expected(
        name=call["name"],
        allowed={one: [value] for one, value in arguments.items()},
        optional=frozenset(one for one, value in arguments.items() if one in defaults and same(defaults[one], value)),
        defaults=defaults,
    )


def _possible(given: Any, where: str, schemas: Mapping[str, Any]) -> Expected:
    call = next(iter(given.items())) if isinstance(given, dict) and len(given) == 1 else ("", None)
    name, arguments = call
    if not isinstance(arguments, dict) or not all(isinstance(one, list) for one in arguments.values()):
        raise NoConversationError(
            "expected", f"{where}: {kind_of(given)} given; allowed: {{NAME: {{ARGUMENT: [a right value, ...]}}}}"
        )
    return Expected(
        name=name,
        allowed=arguments,
        optional=frozenset(one for one, values in arguments.items() if LEFT_OUT in values),
        is_nested=True,
        defaults=_defaults(name, where, schemas),
    )


def _defaults(name: Any, where: str, schemas: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(name, str) or name not in schemas:
        raise NoConversationError(
            "undeclared tool", f"{where} calls {quoted(name)}; allowed: {named([*schemas])} (its tools)"
        )
    properties = schemas[name].get("properties", {})
    return {one: schema["default"] for one, schema in properties.items() if "default" in schema}
