"""Conversations made from the installed Python itself, as three institutions might have them, and public ones.

docs asks what a function does, and answers from its docstring; code asks for a function, and answers with its source;
calls has a function described as a tool, and calls it. No function is in two of them. The public ones, from which a
base learns what a turn is, are of the language reference.
"""

import ast
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.corpora import (
    NOT_SOURCE_FOLDERS,
    TEST_FOLDERS,
    parsed,
    python_files,
    read_source,
    reference_topics,
    site_packages,
    standard_library,
)
from pretrain.config.errors import ConfigError
from pretrain.silo.shards import atomic_path

PUBLIC = "reference"
# Of each institution: about as many as the standard library alone has.
MAX_CONVERSATIONS = 1_200
MIN_CONVERSATIONS = 200
ANSWER_CHARACTERS = (24, 240)
CODE_CHARACTERS = (40, 320)
# What a call is about is drawn from these.
VALUES: dict[str, tuple[Any, ...]] = {
    "string": ("blue", "notes.txt", "Bonn", "seven", "a b c", "/tmp/x", "river", "index.html"),
    "integer": (1, 2, 3, 5, 8, 10, 12, 40, 100),
    "number": (0.5, 1.5, 2.25, 10.0),
    "boolean": (True, False),
}
KINDS = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "Path": "string"}
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z`])")
Record = dict[str, Any]


@dataclass(kw_only=True, frozen=True)
class Function:
    """A function with a docstring, as a file has it."""

    module: str
    """Its module's last name, or its class's."""
    name: str
    arguments: tuple[tuple[str, str, bool], ...]
    """Name, kind as JSON schemas have it, and whether it must be given."""
    signature: str
    """As one would write the call: gcd(a, b)."""
    summary: str
    """The first sentences of its docstring."""
    code: str
    """Its source without the docstring."""

    @property
    def sentence(self) -> str:
        """The first sentence of its docstring, by which it is known."""
        return SENTENCE.split(self.summary)[0]


def write_conversations(output: Path, *, limit: int = MAX_CONVERSATIONS) -> dict[str, Path]:
    """Make docs, code and calls, and the public ones, each as `output`/NAME.jsonl; returns name -> file.

    Equal installations give equal bytes; a file that is there already is left as it is. Raises ConfigError where the
    installed Python has too little.
    """
    makers: dict[str, Callable[[Function], Record]] = {"docs": _asked, "code": _written, "calls": _called}
    files = {name: output / f"{name}.jsonl" for name in (*makers, PUBLIC)}
    if all(file.is_file() for file in files.values()):
        return files
    found: dict[str, list[Record]] = {name: [] for name in makers}
    seen: set[str] = set()
    for function in _functions():
        allowed = [name for name in makers if _can_be(function, name) and len(found[name]) < limit]
        if allowed and function.sentence not in seen:
            name = allowed[_number(function.code) % len(allowed)]
            found[name].append(makers[name](function))
            seen.add(function.sentence)
        if all(len(records) == limit for records in found.values()):
            break
    found[PUBLIC] = [*_explained()][:limit]
    for name, records in found.items():
        if len(records) < min(limit, MIN_CONVERSATIONS):
            raise ConfigError(f"conversations: the installed Python has {len(records)} for {name}, too few")
        with atomic_path(files[name]) as temporary:
            temporary.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return files


def _can_be(function: Function, institution: str) -> bool:
    shortest, longest = CODE_CHARACTERS
    is_short = shortest <= len(function.code) <= longest and "NotImplementedError" not in function.code
    return {"code": is_short, "calls": bool(function.arguments)}.get(institution, True)


# --- institutions -----------------------------------------------------------------------------------------------------


def _asked(function: Function) -> Record:
    """What a function does and, of every second one, which arguments it takes."""
    turns = [f"What does {function.signature} of {function.module} do?", function.summary]
    if function.arguments and _number(function.summary) % 2:
        names = ", ".join(name for name, *_ in function.arguments)
        turns += ["Which arguments does it take?", f"It takes {names}."]
    return _record(*turns)


def _written(function: Function) -> Record:
    return _record(f"Write {function.signature}: {function.summary}", function.code)


def _called(function: Function) -> Record:
    """A call of a tool with the values that were asked for, its result, and what is said of it."""
    drawn = random.Random(function.code)
    chosen = [one for one in function.arguments if one[2] or drawn.random() < 0.5] or [function.arguments[0]]
    arguments = {name: drawn.choice(VALUES[kind]) for name, kind, _ in chosen[:3]}
    wanted = " and ".join(f"{name} {json.dumps(value)}" for name, value in arguments.items())
    result = json.dumps(drawn.choice([*VALUES["string"], *VALUES["integer"]]))
    properties = {name: {"type": kind} for name, kind, _ in function.arguments}
    required = [name for name, _, must in function.arguments if must]
    schema = {"type": "object", "properties": properties, "required": required}
    told = {"name": function.name, "description": function.sentence, "parameters": schema}
    call = {"type": "function", "function": {"name": function.name, "arguments": arguments}}
    messages = [
        {"role": "user", "content": f"Call {function.name} with {wanted}."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": function.name, "content": result},
        {"role": "assistant", "content": f"{function.name} gave {result}."},
    ]
    return {"messages": messages, "tools": [{"type": "function", "function": told}]}


def _explained() -> Iterator[Record]:
    """Of every paragraph of the language reference that is prose: what comes after its first sentence."""
    for topic in reference_topics():
        title = topic.split("\n", 1)[0].strip()
        for paragraph in topic.split("\n\n")[1:]:
            sentences = SENTENCE.split(_one_line(paragraph))
            answer = " ".join(sentences[1:])
            if paragraph.startswith((" ", "*", "|", "[")) or not _fits(answer):
                continue
            yield _record(f"{title}: {sentences[0]} What else?", answer)


def _record(*turns: str) -> Record:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[place % 2], "content": text} for place, text in enumerate(turns)]}


# --- functions --------------------------------------------------------------------------------------------------------


def _functions() -> Iterator[Function]:
    """Of the standard library and the installed packages, without their tests."""
    for root in (standard_library(), *site_packages()):
        for path in python_files(root, excluded_folders=NOT_SOURCE_FOLDERS | TEST_FOLDERS):
            yield from functions_of(path)


def functions_of(path: Path) -> Iterator[Function]:
    """The public functions and methods of a file that have a docstring to quote; none if it does not parse."""
    source = read_source(path)
    if (tree := parsed(source)) is None:
        return
    module = path.parent.name if path.name == "__init__.py" else path.stem
    lines = source.splitlines()
    owners: list[ast.Module | ast.ClassDef] = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
    for owner in owners:
        for node in owner.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                found = _function(node, getattr(owner, "name", module), lines)
                if found:
                    yield found


def _function(node: ast.FunctionDef, module: str, lines: list[str]) -> Function | None:
    summary = _summary(ast.get_docstring(node) or "")
    given = node.args
    if not _fits(summary) or len(node.body) < 2 or given.vararg or given.kwarg or given.posonlyargs:
        return None
    positional = [one for one in given.args if one.arg not in ("self", "cls")]
    num_required = len(positional) - len(given.defaults)
    arguments = [(one.arg, _kind(one), place < num_required) for place, one in enumerate(positional)]
    named = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    arguments += [(one.arg, _kind(one), default is None) for one, default in named]
    if len(arguments) > 4:
        return None
    begin, first, last = node.lineno - 1, node.body[1].lineno - 1, node.end_lineno or node.lineno
    head = lines[begin : node.body[0].lineno - 1]
    indent = " " * node.col_offset
    code = "\n".join(line.removeprefix(indent) for line in [*head, *lines[first:last]])
    signature = f"{node.name}({', '.join(name for name, *_ in arguments)})"
    return Function(
        module=module, name=node.name, arguments=tuple(arguments), signature=signature, summary=summary, code=code
    )


def _kind(argument: ast.arg) -> str:
    return KINDS.get(ast.unparse(argument.annotation) if argument.annotation else "", "string")


def _summary(docstring: str) -> str:
    """The first sentence of a docstring, and the next ones of its paragraph that fit."""
    found = ""
    for sentence in SENTENCE.split(_one_line(docstring.split("\n\n", maxsplit=1)[0])):
        if len(found) + len(sentence) > ANSWER_CHARACTERS[1]:
            break
        found = f"{found} {sentence}".strip()
    return found


def _fits(text: str) -> bool:
    """Whether a text is one to be answered with: prose of some length, in letters."""
    shortest, longest = ANSWER_CHARACTERS
    letters = sum(character.isalpha() for character in text)
    return shortest <= len(text) <= longest and text.isascii() and letters >= 0.7 * len(text) and text[0].isupper()


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
