"""Conversations and tokenizers for tests of chat templates."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from data_tools.chat import ChatEncoder, ChatJob
from data_tools.chat_template import Template
from data_tools.encode import Encoded
from data_tools.formats import WHOLE
from data_tools.sources import Block, Part

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


RESULT = {"role": "tool", "name": "weather", "content": "12 C"}
ONE = [user("Hi"), assistant("Hello.")]
TURNS = [*ONE, user("And then?"), assistant("Bye.")]
# Of each kind of conversation one record.
RECORDS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": ONE},
    "turns": {"messages": TURNS},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, *TURNS]},
    "calls": {
        "messages": [user("Is it cold?"), assistant("", tool_calls=[CALL]), RESULT, assistant("Cold.")],
        "tools": [TOOL],
    },
    "text and call": {
        "messages": [user("Is it cold?"), assistant("Looking.", tool_calls=[CALL]), RESULT, assistant("Cold.")],
        "tools": [TOOL],
    },
    "reasoning": {
        "messages": [
            *(user("Hi"), assistant("Hello.", reasoning_content="Greet.")),
            *(user("And then?"), assistant("Bye.", reasoning_content="Part.")),
        ]
    },
}
NAME = re.compile(r"<[^<>\s{}%'\"]{1,40}>|\[/?[A-Z_]+\]")


def names_in(template: str) -> set[str]:
    """What looks like a token in a template's text."""
    return set(NAME.findall(template))


def with_tokens(tokenizer_file: Path, names: Iterable[str], output: Path) -> Path:
    """The tokenizer with these special tokens, too."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in sorted(names)])
    output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output))
    return output


def template(source: str, name: str = "template") -> Template:
    special = (("bos_token", "<|endoftext|>"), ("eos_token", "<|endoftext|>"))
    return Template(source=source, name=name, special_tokens=special, date="2026-01-02")


def encoder(
    tokenizer_file: Path, chosen: Template, *, sequence_tokens: int = 4096, too_long: str = "stop"
) -> ChatEncoder:
    job = ChatJob(
        tokenizer=tokenizer_file, template=chosen, sequence_tokens=sequence_tokens, too_long=too_long, held_out=0.0
    )
    return ChatEncoder(job)


def block(*records: Any) -> Block:
    raw = "".join(json.dumps(record) + "\n" for record in records).encode()
    part = Part(path="chats.jsonl", kind="jsonl", text=WHOLE)
    return Block(part=part, first=1, raw=raw, next=(len(raw), len(records)), bytes_read=len(raw))


def learned(encoded: Encoded, tokenizer_file: Path) -> list[list[str]]:
    """Of each conversation the runs of learned tokens as text."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    assert encoded.trained is not None
    found, begin = [], 0
    for length in encoded.document_tokens:
        runs: list[list[int]] = []
        before = False
        for token, bit in zip(
            encoded.tokens[begin : begin + length], encoded.trained[begin : begin + length], strict=True
        ):
            if bit:
                if not before:
                    runs.append([])
                runs[-1].append(int(token))
            before = bool(bit)
        found.append([tokenizer.decode(run, skip_special_tokens=False) for run in runs])
        begin += length
    return found
