"""Tools whose schema is none, and calls of what no tool declares: one line with file, line and what is wrong."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from data_tools.conversations import NoConversationError, normalised
from data_tools.tokenizer import train_tokenizer
from launch import cli
from tests.conversations import CALL, TOOL, TURNS, assistant, user


def tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "parameters": parameters}}


def properties(**schemas: Any) -> dict[str, Any]:
    return {"type": "object", "properties": schemas}


DEEP: dict[str, Any] = {}
for _ in range(40):
    DEEP = {"items": DEEP}

WRONG = {
    "tools[0].parameters: text given; allowed: an object, as JSON Schema has it": "city",
    "tools[0].parameters.type: 'dict' given; allowed: 'object', as arguments have names": {"type": "dict"},
    "tools[0].parameters.properties: a list given; allowed: an object, name to schema": {"properties": ["city"]},
    "tools[0].parameters.properties.city: text given; allowed: a schema, an object": properties(city="string"),
    "tools[0].parameters.properties.city.type: 'str' given; allowed: "
    "string, number, integer, boolean, object, array, null": properties(city={"type": "str"}),
    "tools[0].parameters.properties.city.enum: [] given; allowed: a list of values": properties(city={"enum": []}),
    "tools[0].parameters.properties.city.items.type: 7 given; allowed: "
    "string, number, integer, boolean, object, array, null": properties(
        city={"type": ["array", "null"], "items": {"type": 7}}
    ),
    "tools[0].parameters.properties.city.anyOf: an object given; allowed: a list of schemas": properties(
        city={"anyOf": {}}
    ),
    "tools[0].parameters.required: ['city', 1] given; allowed: a list of names": {"required": ["city", 1]},
    "tools[0].parameters.required: 'town' given; allowed: city (properties)": properties(city={})
    | {"required": ["town"]},
}


@pytest.mark.parametrize("expected", WRONG)
def test_a_schema_that_is_none_is_said(expected: str) -> None:
    with pytest.raises(NoConversationError) as refused:
        normalised({"messages": TURNS, "tools": [tool(WRONG[expected])]})
    assert (refused.value.reason, refused.value.what) == ("tools", expected)


def test_endless_and_repeated_schemas_are_refused_and_what_schemas_allow_is_not() -> None:
    with pytest.raises(NoConversationError, match="more than 32 schemas within each other"):
        normalised({"messages": TURNS, "tools": [tool(properties(city=DEEP))]})
    with pytest.raises(NoConversationError, match=r"tools\[1\]: a second tool named 'weather'"):
        normalised({"messages": TURNS, "tools": [TOOL, TOOL]})
    allowed: list[Any] = [None, {}, properties(city=True), properties(city={"$ref": "#/x", "type": ["string", "null"]})]
    for parameters in allowed:
        assert normalised({"messages": TURNS, "tools": [tool(parameters)]}).tools


def test_a_call_of_what_is_not_declared_stops_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = {"messages": [user("Is it cold?"), assistant("", tool_calls=[CALL])]}
    assert normalised(called).tools is None  # what could be called is told elsewhere, as in a system text
    other = {"type": "function", "function": {"name": "stock"}}
    for tools, allowed in (([other], "stock"), ([], "no call, as it has no tools")):
        with pytest.raises(NoConversationError) as refused:
            normalised(called | {"tools": tools})
        assert refused.value.reason == "undeclared tool"
        assert refused.value.what == f"message 2 calls 'weather'; allowed: {allowed} (its tools)"

    lines = [{"messages": TURNS}, called | {"tools": [other]}, {"messages": TURNS, "tools": [tool({"type": "dict"})]}]
    for bad, expected in (
        (lines[1], "message 2 calls 'weather'; allowed: stock (its tools)"),
        (lines[2], "tools[0].parameters.type: 'dict' given; allowed: 'object', as arguments have names"),
    ):
        file = tmp_path / "chats.jsonl"
        file.write_text(json.dumps(lines[0]) + "\n" + json.dumps(bad) + "\n")
        tokenizer, output = train_tokenizer(["a"], vocab_size=259, output=tmp_path, chat=True), tmp_path / "packed"
        command = f"atoll data prepare {file} --chat --sequence-tokens 4096 --tokenizer {tokenizer} --output {output}"
        monkeypatch.setattr(sys, "argv", [*command.split(), "--workers", "0"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        *_, told = capsys.readouterr().err.splitlines()
        assert told == f"atoll: {file}, line 2: {expected}: mend or drop it, or give --on-bad skip"
        assert not output.exists()
