"""Conversations of every form come to one form, and what is none is refused with what is wrong."""

import json
from typing import Any

import pytest

from data_tools.conversations import NoConversationError, normalised, parse_conversation

CALL = {"name": "weather", "arguments": {"city": "Köln", "days": 2}}
TOOL = {"name": "weather", "description": "Tells it.", "parameters": {"type": "object", "properties": {}}}
ASKED = {"role": "user", "content": "How is it in Köln?"}
RESULT = {"role": "tool", "content": "12 C"}
SAID = {"role": "assistant", "content": "Cold."}
AS_OBJECT = [
    ASKED,
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    RESULT,
    SAID,
]
TOOLS = [{"type": "function", "function": TOOL}]


def call(**changed: Any) -> list[dict[str, Any]]:
    return [
        ASKED,
        {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL | changed}]},
        RESULT,
        SAID,
    ]


SAME: dict[str, dict[str, Any]] = {
    "OpenAI": {"messages": AS_OBJECT, "tools": TOOLS},
    "arguments as JSON": {"messages": call(arguments=json.dumps(CALL["arguments"])), "tools": TOOLS},
    "tools as JSON": {"messages": call(), "tools": json.dumps(TOOLS)},
    "bare tools and calls": {
        "messages": [ASKED, {"role": "assistant", "tool_calls": [CALL]}, RESULT, SAID],
        "tools": [TOOL],
    },
    "nulls of a table": {
        "messages": [one | {"name": None, "tool_calls": one.get("tool_calls")} for one in AS_OBJECT],
        "tools": TOOLS,
        "prompt": None,
    },
    "one call as it once was": {
        "messages": [
            ASKED,
            {"role": "assistant", "content": None, "function_call": CALL},
            RESULT | {"role": "function"},
            SAID,
        ],
        "functions": [TOOL],
    },
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": ASKED["content"]},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "12 C"},
            {"from": "gpt", "value": "Cold."},
        ],
        "tools": json.dumps([TOOL]),
    },
}


@pytest.mark.parametrize("record", SAME.values(), ids=SAME)
def test_all_forms_are_one(record: dict[str, Any]) -> None:
    found, expected = normalised(record), normalised(SAME["OpenAI"])
    assert found.messages == AS_OBJECT
    assert found.tools == TOOLS
    assert found == expected
    assert found.canonical() == expected.canonical()


def test_a_system_text_beside_a_conversation_comes_first() -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "weight": 0}]
    turns += [{"from": "human", "value": "So?"}, {"from": "gpt", "value": "Yes"}]
    found = normalised({"system": "Be brief.", "conversations": turns})
    assert [one["role"] for one in found.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert found.untrained == {2}


def test_of_a_prompt_nothing_is_learned() -> None:
    assert normalised({"prompt": "Hi", "completion": "Hello"}) == normalised(
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    )
    prompt = [{"role": "user", "content": "Hi"}, SAID, {"role": "user", "content": "Sure?"}]
    found = normalised({"prompt": prompt, "completion": [SAID | {"reasoning": "Hm."}]})
    assert found.untrained == {1}
    assert found.messages[3] == SAID | {"reasoning_content": "Hm."}
    assert found.canonical() != normalised({"messages": found.messages}).canonical()


USER = {"role": "user", "content": "Hi"}
BAD: dict[str, tuple[Any, str, str]] = {
    "a list": ([1], "no conversation", "a list given; allowed: an object with messages"),
    "other keys": ({"text": "Hi"}, "no conversation", "text given; allowed: messages (OpenAI), conversations"),
    "half": ({"prompt": "Hi"}, "no conversation", "prompt given"),
    "pairs": ({"prompt": "Hi", "chosen": "A", "rejected": "B"}, "preference pair", "allowed with --pairs (atoll data"),
    "role": ({"messages": [USER, {"role": "bot", "content": "A"}]}, "unknown role", "messages[1].role: 'bot' given"),
    "from": ({"conversations": [{"from": "me", "value": "A"}]}, "unknown role", "allowed: system, human"),
    "no role": ({"messages": [{"content": "A"}]}, "unknown role", "messages[0].role: None given"),
    "empty": ({"messages": [USER, {"role": "assistant", "content": " "}]}, "empty assistant turn", "message 2"),
    "no answer": ({"messages": [USER]}, "no assistant turn", "not one token would be trained"),
    "nothing": ({"messages": []}, "no assistant turn", ""),
    "not learned": ({"messages": [USER, SAID | {"weight": 0}]}, "no assistant turn", ""),
    "weight": ({"messages": [USER, SAID | {"weight": 2}]}, "weight", "allowed: 0 (not to be learned) or 1"),
    "twice": (
        {"messages": [USER, USER, SAID]},
        "mixed-up order",
        "user given after user (message 1); allowed there: a",
    ),
    "begins": ({"messages": [SAID]}, "mixed-up order", "assistant given first; allowed there: system or user"),
    "late": ({"messages": [USER, SAID, {"role": "system", "content": "A"}]}, "mixed-up order", "system given after a"),
    "result": ({"messages": [USER, SAID, RESULT, SAID]}, "mixed-up order", "a tool's result given (message 3), and no"),
    "user calls": ({"messages": [USER | {"tool_calls": [CALL]}, SAID]}, "mixed-up order", "calls given of user"),
    "content": ({"messages": [USER | {"content": ["A"]}, SAID]}, "content is no text", "messages[0].content: a list"),
    "null": ({"messages": [USER | {"content": None}, SAID]}, "content is no text", "null given; allowed: text"),
    "value": ({"conversations": [{"from": "human", "value": 3}]}, "content is no text", "a number given"),
    "arguments": (
        {"messages": call(arguments="{city:")},
        "no arguments",
        "arguments: '{city:' given, which is not JSON",
    ),
    "encoded twice": ({"messages": call(arguments='"{}"')}, "no arguments", "text in JSON (encoded twice?) given"),
    "no name": ({"messages": call(name="")}, "no arguments", 'allowed: {"name": "...", "arguments": {...}}'),
    "function call": ({"conversations": [{"from": "function_call", "value": "weather()"}]}, "no arguments", "not JSON"),
    "tools": ({"messages": [USER, SAID], "tools": "weather"}, "tools", "tools: 'weather' given, which is not JSON"),
    "a tool": ({"messages": [USER, SAID], "tools": [{"type": "function"}]}, "tools", "tools[0]: an object given"),
    "message": ({"messages": ["Hi"]}, "no conversation", "messages[0]: text given; allowed: an object"),
    "messages": ({"messages": "Hi"}, "no conversation", "messages: text given; allowed: a list"),
}


@pytest.mark.parametrize(("record", "reason", "what"), BAD.values(), ids=BAD)
def test_what_is_no_conversation_is_refused(record: Any, reason: str, what: str) -> None:
    with pytest.raises(NoConversationError) as refused:
        parse_conversation(json.dumps(record))
    assert refused.value.reason == reason
    assert what in refused.value.what
    assert "\n" not in refused.value.what


def test_what_is_not_json_is_refused() -> None:
    for text in ("{", "[" * 100_000):
        with pytest.raises(NoConversationError, match="not JSON"):
            parse_conversation(text)
