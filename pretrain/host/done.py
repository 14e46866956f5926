"""What is done already, in a file of JSON lines: the first says of what it is, and one process at a time adds to it."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config.errors import ConfigError, named
from pretrain.host.lock import lock_open


@dataclass(frozen=True, kw_only=True)
class Done:
    """A file that is held."""

    lines: list[Any]
    """What was there, without the first."""
    place: str
    """The file, for a message."""
    descriptor: int

    def add(self, line: Mapping[str, Any]) -> None:
        """Write one more. Raises ConfigError where there is no room for it."""
        try:
            _write(self.descriptor, line)
        except OSError as error:
            raise ConfigError(f"{self.place}; {error.strerror}; mend it (make room)") from None


@contextmanager
def going_on(file: Path, of: Mapping[str, Any], *, key: str, given: Path | None = None) -> Iterator[Done]:
    """Hold a file, new or from before, whose lines depend on `of`; a user has `given` it, or its folder, by `key`.

    What a process that was killed left of a line is cut off. Raises ConfigError for a file of something else, and for
    one that another process holds; it stays as it is.
    """
    place = f"{key}: {str(given or file)!r} given"
    with ExitStack() as held:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            held.callback(os.close, descriptor)
            if not lock_open(descriptor):
                raise ConfigError(f"{place}; another process writes to it; wait for that one, or give another")
            with open(descriptor, "rb", closefd=False) as stream:
                found = stream.read()
            whole = found[: found.rfind(b"\n") + 1]
            lines = _lines(whole, found, of, place)
            os.ftruncate(descriptor, len(whole))
            if not whole:
                _write(descriptor, of)
        except OSError as error:
            raise ConfigError(f"{place}; {error.strerror}; allowed: a new one") from None
        yield Done(lines=lines, place=place, descriptor=descriptor)


def _lines(whole: bytes, found: bytes, of: Mapping[str, Any], place: str) -> list[Any]:
    try:
        head, *lines = map(json.loads, whole.splitlines() or [_line(of)])
    except ValueError:
        head, lines = None, []
    if not isinstance(head, dict) or head.keys() != of.keys() or not (whole or _line(of).startswith(found)):
        raise ConfigError(f"{place}; it holds something else; allowed: a new one")
    if differing := [name for name in of if head[name] != of[name]]:
        raise ConfigError(
            f"{place}; it was begun with other {named(differing)}; allowed: a new one, or what it was begun with"
        )
    return lines


def _line(given: Mapping[str, Any]) -> bytes:
    return (json.dumps(given) + "\n").encode()


def _write(descriptor: int, given: Mapping[str, Any]) -> None:
    line = _line(given)
    if os.write(descriptor, line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
