"""A silo's own tasks: JSON lines, each with a `prompt` and whatever its verifier wants to know beside it. No torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.conversations import NoConversationError, normalised
from pretrain.config.errors import ConfigError
from pretrain.host.foreign import shown


@dataclass(frozen=True, kw_only=True)
class Task:
    """Something that a model can try."""

    record: dict[str, Any]
    """The line, as the verifier is told it."""
    messages: list[dict[str, Any]]
    """The conversation up to the turn that is to be tried."""
    tools: list[dict[str, Any]] | None
    """What may be called in it."""


def read_tasks(file: Path, *, key: str = "--tasks") -> list[Task]:
    """All tasks of a file. Raises ConfigError, one line that names the line, for what is none."""
    try:
        # A byte order mark may come first; splitlines also does where a text has U+2028 or U+0085.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"{key}: {str(file)!r} given; {error.strerror}; allowed: a file of JSON lines") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{key}: {str(file)!r} given; it is no text in UTF-8; allowed: JSON lines") from None
    tasks = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                tasks.append(_task(line))
            except (NoConversationError, ValueError, RecursionError) as error:
                why = error.what if isinstance(error, NoConversationError) else f"not JSON ({error})"
                raise ConfigError(
                    f'{key}: {file}, line {number}: {shown(why)}; allowed: {{"prompt": text or messages, ...}}'
                ) from None
    if not tasks:
        raise ConfigError(f'{key}: {str(file)!r} given; it has no task; allowed: lines of {{"prompt": ...}}')
    return tasks


def _task(line: str) -> Task:
    record = json.loads(line)
    if not isinstance(record, dict) or "prompt" not in record:
        given = named_keys(record) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise NoConversationError("no task", f"{given} given, and no prompt")
    # What a conversation is, is said in one place; an answer has to be there to ask it.
    whole = {"prompt": record["prompt"], "completion": "x", "tools": record.get("tools")}
    found = normalised(whole)
    return Task(record=record, messages=found.messages[:-1], tools=found.tools)


def named_keys(record: dict[str, Any]) -> str:
    """The keys of a record, for a line."""
    return ", ".join(map(str, record)) or "no key"
