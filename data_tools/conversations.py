"""Conversations as others write them, brought to one form: OpenAI messages, with tools.

    messages, tools          OpenAI: role and content, tool_calls with arguments as JSON or as an object
    conversations, tools     ShareGPT: from (human, gpt, system, function_call, observation) and value
    prompt, completion       text or messages; of these the completion's turns alone are trained
    prompt, chosen, rejected a preference pair: two conversations that begin alike, of which one answers better

The one form: `content` is text in every message, `arguments` is an object, tools are {"type": "function", "function":
{...}}, and what is null is left out. Nothing is guessed: what is not clear is refused with what is wrong.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_tools.pieces import one_line
from data_tools.schemas import kind_of, named, quoted, wrong_with_tool

Message = dict[str, Any]

# Columns of a table that hold a conversation.
COLUMNS = ("messages", "conversations", "prompt", "completion", "tools", "functions", "system", "chosen", "rejected")
ALLOWED = "messages (OpenAI), conversations (ShareGPT), or prompt and completion"
PAIR = ("chosen", "rejected")
BEFORE_PAIR = ("prompt", "messages", "conversations")  # what both sides of a pair begin with, if they do not say it
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
OLD_ROLES = {"function": "tool"}
SHAREGPT_ROLES = {
    **{"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"function_call": "assistant", "observation": "tool", "tool": "tool"},
}
# Names that reasoning travels under; the first is what chat templates read.
REASONING = ("reasoning_content", "reasoning", "thinking")
KEPT_KEYS = ("name", "tool_call_id")
# What may come after what; "" is the beginning.
FOLLOWERS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


class NoConversationError(Exception):
    """A record that is no conversation we can train on. Has the reason, the name of a count, and what is wrong."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(reason, what)
        self.reason, self.what = reason, what


@dataclass(kw_only=True, frozen=True)
class Conversation:
    """One conversation in the form that chat templates read."""

    messages: list[Message]
    """Role and content, and where there are any tool_calls, reasoning_content, name, tool_call_id."""
    tools: list[dict[str, Any]] | None = None
    """What could be called, as JSON schemas; None: nothing."""
    untrained: frozenset[int] = field(default_factory=frozenset)
    """The assistant's messages, by their place, that are not to be learned."""

    @property
    def kind(self) -> str:
        """What the assistant does in it: calls functions, or else reasons, or else answers more than once, or once."""
        said = [message for message in self.messages if message["role"] == "assistant"]
        if any(message.get("tool_calls") for message in said):
            return "with calls"
        if any(message.get(REASONING[0]) for message in said):
            return "with reasoning"
        return "several turns" if len(said) > 1 else "one turn"

    def canonical(self) -> str:
        """It as JSON in ASCII, the same of equal conversations."""
        said = [self.messages, self.tools, sorted(self.untrained)]
        return json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @staticmethod
    def digest(canonical: str) -> bytes:
        """16 bytes of the sha256: what makes it a duplicate, and what decides whether it is held out."""
        return hashlib.sha256(canonical.encode()).digest()[:16]

    def with_texts(self, changed: Callable[[str], str]) -> "Conversation":
        """The same with all text in it changed."""

        def through(value: Any) -> Any:
            if isinstance(value, dict):
                return {changed(key): through(inner) for key, inner in value.items()}
            if isinstance(value, list):
                return [through(inner) for inner in value]
            return changed(value) if isinstance(value, str) else value

        return Conversation(messages=through(self.messages), tools=through(self.tools), untrained=self.untrained)


def parse_conversation(text: str) -> Conversation:
    """A conversation from the JSON of one record. Raises NoConversationError."""
    return normalised(_parsed(text))


def parse_pair(text: str) -> tuple[Conversation, Conversation]:
    """The chosen and the rejected conversation of the JSON of one record. Raises NoConversationError.

    What they begin with alike is not learned: it is as likely in both.
    """
    record = _present(_parsed(text))
    for side in PAIR:
        if side not in record:
            raise NoConversationError("half a pair", f"{side}: nothing given; allowed: {' and '.join(PAIR)}, both")
    given = record.get("tools", record.get("functions"))
    tools = parse_tools(given) if given else None
    key = next((key for key in BEFORE_PAIR if key in record), None)
    before = _half(record[key], key, "user", set()) if key else []
    if record.get("system"):
        before = [{"role": "system", "content": _string(record["system"], "system")}, *before]
    untrained: tuple[set[int], set[int]] = (set(), set())
    sides = [_side(record[side], side, before, places) for side, places in zip(PAIR, untrained, strict=True)]
    if sides[0] == sides[1]:
        raise NoConversationError("equal sides", "chosen and rejected are the same; allowed: two that differ")
    num_shared = next(
        place for place in range(max(map(len, sides))) if sides[0][place : place + 1] != sides[1][place : place + 1]
    )
    found = []
    for messages, places in zip(sides, untrained, strict=True):
        places |= {place for place, one in enumerate(messages[:num_shared]) if one["role"] == "assistant"}
        _check(messages, places)
        found.append(Conversation(messages=messages, tools=tools, untrained=frozenset(places)))
    return found[0], found[1]


def _side(given: Any, key: str, before: list[Message], untrained: set[int]) -> list[Message]:
    """One side of a pair, whole; it may be one message, or say again what was before."""
    after = _half([given] if isinstance(given, dict) else given, key, "assistant", untrained)
    if before and after[: len(before)] == before:
        return after
    moved = {place + len(before) for place in untrained}
    untrained.clear()
    untrained |= moved
    return before + after


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NoConversationError("not JSON", f"not JSON ({one_line(error)})") from None


def _present(record: Any) -> dict[str, Any]:
    """A record without what is null. Raises NoConversationError."""
    if not isinstance(record, dict):
        raise NoConversationError("no conversation", f"{kind_of(record)} given; allowed: an object with {ALLOWED}")
    return {key: value for key, value in record.items() if value is not None}


def normalised(record: Any) -> Conversation:
    """A conversation from one record. Raises NoConversationError."""
    record = _present(record)
    if "chosen" in record or "rejected" in record:
        raise NoConversationError(
            "preference pair", "chosen and rejected given; allowed with --pairs (atoll data prepare), of which all are"
        )
    given = record.get("tools", record.get("functions"))
    tools = parse_tools(given) if given else None
    untrained: set[int] = set()
    if "messages" in record:
        messages = _messages(record["messages"], "messages", untrained)
    elif "conversations" in record:
        messages = _messages(record["conversations"], "conversations", untrained)
        if record.get("system"):
            messages.insert(0, {"role": "system", "content": _string(record["system"], "system")})
            untrained = {place + 1 for place in untrained}
    elif "prompt" in record and "completion" in record:
        before = _half(record["prompt"], "prompt", "user", set())
        after = _half(record["completion"], "completion", "assistant", untrained)
        untrained = {place + len(before) for place in untrained}
        untrained |= {place for place, message in enumerate(before) if message["role"] == "assistant"}
        messages = before + after
    else:
        keys = one_line(", ".join(map(str, record))) or "no key"
        raise NoConversationError("no conversation", f"{keys} given; allowed: {ALLOWED}")
    _check(messages, untrained)
    if given is not None:
        check_declared(messages, tools)
    return Conversation(messages=messages, tools=tools, untrained=frozenset(untrained))


def begun(record: Any) -> Conversation:
    """A conversation up to where the assistant is asked. Raises NoConversationError."""
    if not isinstance(record, dict):
        raise NoConversationError("no conversation", f"{kind_of(record)} given; allowed: an object with messages")
    tools = parse_tools(record["tools"]) if record.get("tools") else None
    messages = _messages(record.get("messages"), "messages", set())
    _check_order(messages)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        last = f"{messages[-1]['role']} given last" if messages else "no message given"
        raise NoConversationError("mixed-up order", f"{last}; allowed: a user's words, or a tool's result")
    check_declared(messages, tools)
    return Conversation(messages=messages, tools=tools)


def _check(messages: list[Message], untrained: set[int]) -> None:
    _check_order(messages)
    if not any(one["role"] == "assistant" and place not in untrained for place, one in enumerate(messages)):
        raise NoConversationError(
            "no assistant turn", "no turn of the assistant to learn from, so not one token would be trained"
        )


def _check_order(messages: list[Message]) -> None:
    before = ""
    for place, message in enumerate(messages):
        role = message["role"]
        if role not in FOLLOWERS[before]:
            there = f"after {before} (message {place})" if before else "first"
            allowed = " or ".join(FOLLOWERS[before])
            raise NoConversationError("mixed-up order", f"{role} given {there}; allowed there: {allowed}")
        if role == "tool" and before == "assistant" and not messages[place - 1].get("tool_calls"):
            raise NoConversationError(
                "mixed-up order", f"a tool's result given (message {place + 1}), and no call before it"
            )
        if role == "assistant" and not (message["content"].strip() or message.get("tool_calls")):
            raise NoConversationError(
                "empty assistant turn", f"message {place + 1} of the assistant has neither text nor calls"
            )
        before = role


# --- messages ---------------------------------------------------------------------------------------------------------


def _half(given: Any, key: str, role: str, untrained: set[int]) -> list[Message]:
    """A prompt or a completion: text is one message of that role."""
    return [{"role": role, "content": given}] if isinstance(given, str) else _messages(given, key, untrained)


def _messages(given: Any, key: str, untrained: set[int]) -> list[Message]:
    """Messages of either form; the places of those that say they are not to be learned go to `untrained`."""
    if not isinstance(given, list):
        raise NoConversationError("no conversation", f"{key}: {kind_of(given)} given; allowed: a list of messages")
    messages = []
    for place, one in enumerate(given):
        where = f"{key}[{place}]"
        if not isinstance(one, dict):
            raise NoConversationError("no conversation", f"{where}: {kind_of(one)} given; allowed: an object")
        present = {name: value for name, value in one.items() if value is not None}
        is_sharegpt = "from" in present and "role" not in present
        messages.append((_sharegpt_message if is_sharegpt else _openai_message)(present, where))
        if "weight" in present and _weight(present["weight"], where) == 0:
            untrained.add(place)
    return messages


def _openai_message(given: Mapping[str, Any], where: str) -> Message:
    role = _role(given.get("role"), ROLES | OLD_ROLES, f"{where}.role")
    calls = given.get("tool_calls") or ([given["function_call"]] if given.get("function_call") else [])
    content = given.get("content", "" if role == "assistant" else None)
    message: Message = {"role": role, "content": _string(content, f"{where}.content")}
    if calls:
        message["tool_calls"] = _calls(calls, role, f"{where}.tool_calls")
    if (name := next((one for one in REASONING if given.get(one)), None)) is not None:
        message[REASONING[0]] = _string(given[name], f"{where}.{name}")
    return message | {name: _string(given[name], f"{where}.{name}") for name in KEPT_KEYS if name in given}


def _sharegpt_message(given: Mapping[str, Any], where: str) -> Message:
    role = _role(given["from"], SHAREGPT_ROLES, f"{where}.from")
    value = given.get("value")
    if given["from"] != "function_call":
        return {"role": role, "content": _string(value, f"{where}.value")}
    calls = _json(_string(value, f"{where}.value"), f"{where}.value") if isinstance(value, str) else value
    listed = calls if isinstance(calls, list) else [calls]
    return {"role": role, "content": "", "tool_calls": _calls(listed, role, f"{where}.value")}


def _role(given: Any, roles: Mapping[str, str], where: str) -> str:
    if not isinstance(given, str) or given not in roles:
        raise NoConversationError("unknown role", f"{where}: {quoted(given)} given; allowed: {', '.join(roles)}")
    return roles[given]


def _weight(given: Any, where: str) -> int:
    if given not in (0, 1):
        raise NoConversationError(
            "weight", f"{where}.weight: {quoted(given)} given; allowed: 0 (not to be learned) or 1"
        )
    return int(given)


# --- calls and tools --------------------------------------------------------------------------------------------------


def _calls(given: Any, role: str, where: str) -> list[dict[str, Any]]:
    if role != "assistant":
        raise NoConversationError("mixed-up order", f"{where}: calls given of {role}; allowed: of the assistant")
    if not isinstance(given, list):
        raise NoConversationError("no arguments", f"{where}: {kind_of(given)} given; allowed: a list of calls")
    return [_call(one, f"{where}[{place}]") for place, one in enumerate(given)]


def _call(given: Any, where: str) -> dict[str, Any]:
    function = given.get("function", given) if isinstance(given, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise NoConversationError(
            "no arguments", f'{where}: {kind_of(given)} given; allowed: {{"name": "...", "arguments": {{...}}}}'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{where}.arguments")
    if not isinstance(arguments, dict):
        twice = " in JSON (encoded twice?)" if isinstance(function.get("arguments"), str) else ""
        raise NoConversationError(
            "no arguments", f"{where}.arguments: {kind_of(arguments)}{twice} given; allowed: an object, or its JSON"
        )
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return call | ({"id": _string(given["id"], f"{where}.id")} if given.get("id") is not None else {})


def parse_tools(given: Any) -> list[dict[str, Any]] | None:
    """Tools from a list, or the JSON of one. Raises NoConversationError."""
    listed = _json(given, "tools", reason="tools") if isinstance(given, str) else given
    if not isinstance(listed, list):
        raise NoConversationError("tools", f"tools: {kind_of(listed)} given; allowed: a list of tools, or its JSON")
    tools: list[dict[str, Any]] = []
    for place, one in enumerate(listed):
        function = one.get("function", one) if isinstance(one, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise NoConversationError(
                "tools", f'tools[{place}]: {kind_of(one)} given; allowed: {{"name": "...", "parameters": {{...}}}}'
            )
        others = [tool["function"]["name"] for tool in tools]
        if wrong := wrong_with_tool(function, others, f"tools[{place}]"):
            raise NoConversationError("tools", wrong)
        tools.append({"type": "function", "function": function})
    return tools or None


def check_declared(messages: list[Message], tools: list[dict[str, Any]] | None) -> None:
    """Raise NoConversationError for a call to what is not among the tools."""
    declared = [tool["function"]["name"] for tool in tools or ()]
    for place, message in enumerate(messages):
        for call in message.get("tool_calls", ()):
            if (name := call["function"]["name"]) not in declared:
                allowed = named(declared) or "no call, as it has no tools"
                raise NoConversationError(
                    "undeclared tool", f"message {place + 1} calls {quoted(name)}; allowed: {allowed} (its tools)"
                )


# --- values -----------------------------------------------------------------------------------------------------------


def _string(given: Any, where: str) -> str:
    if not isinstance(given, str):
        raise NoConversationError("content is no text", f"{where}: {kind_of(given)} given; allowed: text")
    return given


def _json(given: str, where: str, *, reason: str = "no arguments") -> Any:
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise NoConversationError(
            reason, f"{where}: {quoted(given)} given, which is not JSON ({one_line(error)})"
        ) from None
