"""What a model says read as calls, and compared by meaning: order and spaces do not count, all else does."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.asked import question, read_questions
from data_tools.calls import RIGHT, Call, UnreadableError, calls_in, same, verdict
from data_tools.conversations import NoConversationError
from tests.conversations import CALL, RESULT, TOOL, assistant, user
from tests.support import one_line_error

WEATHER = {"name": "weather", "arguments": {"city": "Bonn"}}
STOCK = {"name": "stock", "arguments": {"code": "XY", "days": 2}}
READ = [Call(name="weather", arguments={"city": "Bonn"}), Call(name="stock", arguments={"code": "XY", "days": 2})]


def marked(*calls: Any) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


@pytest.mark.parametrize(
    "text",
    [
        marked(WEATHER, STOCK),
        "<think>\nWhich? <tool_call>\n</think>\n\nLooking.\n" + marked(WEATHER, STOCK),
        marked(WEATHER | {"arguments": json.dumps(WEATHER["arguments"])}, STOCK),
        json.dumps([WEATHER, STOCK], indent=2),
        json.dumps([{"name": "weather", "parameters": {"city": "Bonn"}}, STOCK]),
        "[TOOL_CALLS] " + json.dumps([WEATHER, STOCK]),
    ],
)
def test_calls_are_read_as_templates_write_them(text: str) -> None:
    assert calls_in(text) == READ


@pytest.mark.parametrize("text", ["", "It is cold.", "[1, 2]", '{"city": "Bonn"}', "7", "{", '["name"]'])
def test_text_is_no_call(text: str) -> None:
    assert calls_in(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n{}\n</tool_call>",
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": "Bonn"}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"city": "Bonn}}</tool_call>',
        marked(WEATHER) + "<tool_call>",
        "[TOOL_CALLS] soon",
        '{"name": "weather"}',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ],
)
def test_what_begins_like_a_call_and_is_none_is_told(text: str) -> None:
    with pytest.raises(UnreadableError):
        calls_in(text)


def test_values_are_the_same_by_what_they_mean() -> None:
    for one, other in (
        (1, 1.0),
        ("San  Francisco\n", "San Francisco"),
        ({"a": [1], "b": None}, {"b": None, "a": [1.0]}),
    ):
        assert same(one, other)
    for one, other in (
        (1, True),
        (1, "1"),
        ("bonn", "Bonn"),
        ([1, 2], [2, 1]),
        ({"a": 1}, {"a": 1, "b": 2}),
        (0, None),
    ):
        assert not same(one, other)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"name": name, "parameters": {"type": "object", "properties": properties}}


TOOLS = [tool("weather", city={}, unit={"type": "string", "default": "C"}), tool("stock", code={}, days={})]


def asked(**changes: Any) -> str:
    return json.dumps({"messages": [user("Is it cold?")], "tools": TOOLS} | changes)


def judged(text: str, *, is_cut: bool = False, **expected: Any) -> str:
    found = question(1, asked(**expected))
    return verdict(text, found.expected, found.declared, is_cut=is_cut)


def test_every_kind_of_error_is_told_apart() -> None:
    def of(*calls: Any, expected: list[Any] | None = None) -> str:
        return judged(marked(*calls), expected=[WEATHER] if expected is None else expected)

    city = WEATHER["arguments"]
    assert of(WEATHER) == RIGHT
    assert of(WEATHER, expected=[]) == "call not wanted"
    assert judged("Cold.", expected=[]) == RIGHT
    assert judged("Cold.", expected=[WEATHER]) == "no call"
    assert judged(marked(WEATHER), is_cut=True, expected=[WEATHER]) == "cut off"
    assert judged("<tool_call>", expected=[WEATHER]) == "unreadable call"
    assert of({"name": "wether", "arguments": city}) == "undeclared tool"
    assert of(STOCK) == "other tool"
    assert of(WEATHER, WEATHER) == "other number of calls"
    assert of({"name": "weather", "arguments": {}}) == "argument missing"
    assert of({"name": "weather", "arguments": city | {"days": 2}}) == "argument not wanted"
    assert of({"name": "weather", "arguments": {"city": "Köln"}}) == "other value"


def test_what_is_left_out_is_what_the_schema_says() -> None:
    with_unit = {"name": "weather", "arguments": {"unit": "C", "city": "Bonn"}}
    other_unit = {"name": "weather", "arguments": {"unit": "F", "city": "Bonn"}}
    assert judged(marked(with_unit), expected=[WEATHER]) == RIGHT
    assert judged(marked(WEATHER), expected=[with_unit]) == RIGHT
    assert judged(marked(other_unit), expected=[WEATHER]) == "argument not wanted"
    assert judged(marked(WEATHER), expected=[other_unit]) == "argument missing"


def test_several_calls_are_a_set_in_which_each_counts_once() -> None:
    there, here = ({"name": "weather", "arguments": {"city": city}} for city in ("Bonn", "Köln"))
    assert judged(marked(here, STOCK, there), expected=[there, here, STOCK]) == RIGHT
    assert judged(marked(here, here), expected=[there, here]) == "other value"
    # The first could take either of two, of which the second can take but one.
    possible = [{"weather": {"city": ["Bonn", "Köln"]}}, {"weather": {"city": ["Bonn"]}}]
    assert judged(marked(there, here), possible_answer=possible) == RIGHT
    assert judged(marked(here, there), possible_answer=possible) == RIGHT
    assert judged(marked(here, here), possible_answer=possible) == "other value"


def test_the_leaderboards_answers_are_read_as_they_are() -> None:
    possible = [{"stock": {"code": ["XY", "xy"], "days": [{"from": [1], "to": [2, ""]}], "more": ["", [["a"]]]}}]

    def of(**arguments: Any) -> str:
        return judged(marked({"name": "stock", "arguments": arguments}), possible_answer=possible)

    assert of(code="xy", days={"from": 1}) == RIGHT
    assert of(code="XY", days={"to": 2, "from": 1}, more=[["a"]]) == RIGHT
    assert of(code="Xy", days={"from": 1}) == "other value"
    assert of(code="XY", days={"to": 2}) == "other value"
    assert of(code="XY", days={"from": 1, "till": 2}) == "other value"
    assert of(code="XY", days={"from": 1}, more=[["b"]]) == "other value"
    assert of(days={"from": 1}) == "argument missing"


def test_a_question_goes_up_to_where_the_model_is_asked(tmp_path: Path) -> None:
    later = question(1, asked(messages=[user("Is it cold?"), assistant("", tool_calls=[CALL]), RESULT], expected=[]))
    assert [message["role"] for message in later.begun.messages] == ["user", "assistant", "tool"]
    file = tmp_path / "asked.jsonl"
    for changes, expected in (
        ({}, "expected, possible_answer: neither given; allowed: one of them"),
        ({"expected": [], "possible_answer": []}, "expected, possible_answer: both given; allowed: one of them"),
        ({"expected": {}}, "expected: an object given; allowed: a list of calls"),
        ({"expected": [["weather"]]}, 'expected[0]: a list given; allowed: {"name": "...", "arguments": {...}}'),
        (
            {"expected": [{"name": "wether", "arguments": {}}]},
            "expected[0] calls 'wether'; allowed: weather, stock (its tools)",
        ),
        ({"expected": [{"name": [], "arguments": {}}]}, "expected[0] calls []; allowed: weather, stock (its tools)"),
        (
            {"possible_answer": [{"weather": {"city": "Bonn"}}]},
            "possible_answer[0]: an object given; allowed: {NAME: {ARGUMENT: [a right value, ...]}}",
        ),
        (
            {"messages": [*[user("a"), assistant("b")]]},
            "assistant given last; allowed: a user's words, or a tool's result",
        ),
        ({"messages": []}, "no message given; allowed: a user's words, or a tool's result"),
        ({"tools": []}, "tools: none given; allowed: what the model may call"),
        ({"tools": [TOOL | {"name": "a", "function": {"name": 1}}]}, "tools[0]: an object given; allowed: "),
        ({"tools": [tool("weather", city=1)]}, "tools[0].parameters.properties.city: a number given; allowed: "),
    ):
        file.write_text(asked(expected=[WEATHER]) + "\n" + asked(**changes) + "\n")
        refused = one_line_error(lambda: [*read_questions(file)])
        assert refused.startswith(f"{file}, line 2: {expected}"), refused
        assert refused.endswith(": mend or drop it")
    file.write_text("\n")
    assert one_line_error(lambda: [*read_questions(file)]).endswith("there is no question in it")
    with pytest.raises(NoConversationError, match="not JSON"):
        question(1, "{")
