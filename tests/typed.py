"""Lines that begin with `atoll`, as a person would type them, and whether the command takes them."""

import re
import shlex
from collections.abc import Iterator
from typing import Any

import typer

from launch import cli
from launch.version import with_version

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What follows belongs to the shell: a redirection, a pipe, another command.
SHELL = re.compile(r"\s(?:[<>|]|&&)\s.*")
ROOT = with_version(typer.main.get_command(cli.app))


def in_blocks(markdown: str) -> list[str]:
    """The lines of a page's blocks, fenced or indented, that begin with `atoll`."""
    fenced = [line for _, block in FENCE.findall(markdown) for line in block.splitlines()]
    indented = [line[4:] for line in FENCE.sub("", markdown).splitlines() if line.startswith("    ")]
    return [line for line in (*fenced, *indented) if line.startswith("atoll ")]


def in_sentences(markdown: str) -> list[str]:
    """What sentences of a page quote of a command; a quotation may go over the end of a line."""
    return [" ".join(span.split()) for span in re.findall(r"`(atoll\s[^`]+)`", FENCE.sub("", markdown))]


def in_help() -> Iterator[str]:
    """The examples in the help of all commands."""
    for command in _all(ROOT):
        yield from re.findall(r"\[bold\]Example:\[/bold\] (atoll .*)", command.help or "")


def check_whole(line: str) -> None:
    """The command exists, with these options, and so many arguments, of these kinds. Nothing is run.

    Raises click's UsageError for what the command would not take.
    """
    command, words = _command(SHELL.sub("", line))
    assert not hasattr(command, "commands"), f"{line}: no such command"
    context = command.make_context(line, words)
    for change in context.params.get("overrides") or []:
        assert "=" in change, f"{line}: {change!r}"


def check_part(line: str) -> None:
    """The command exists, and so do the options; "..." and what is missing is the reader's to think of."""
    command, words = _command(line)
    known = {option for parameter in command.params for option in (*parameter.opts, "--help")}
    assert {word.partition("=")[0] for word in words if re.match("--?[a-z]", word)} <= known, line
    if hasattr(command, "commands"):
        assert all(word.startswith(("-", "...")) for word in words), f"{line}: no such command"


def _command(line: str) -> tuple[Any, list[str]]:
    words = shlex.split(line, comments=True)
    assert words.pop(0) == "atoll"
    command: Any = ROOT
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    return command, words


def _all(command: Any) -> Iterator[Any]:
    yield command
    for inner in getattr(command, "commands", {}).values():
        yield from _all(inner)
