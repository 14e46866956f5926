"""A user's mistake, in one line."""

from collections.abc import Sequence

MOST_NAMED = 12  # silos in a line


class ConfigError(ValueError):
    """A user's mistake, said in one line: what was given, what is allowed, which key to change."""

    def __init__(self, message: object) -> None:
        """What is quoted may hold anything: a message stays a line."""
        super().__init__(printable(str(message)))


def printable(text: str) -> str:
    """Spells out all that `str.isprintable` denies: escapes, line ends, marks that turn the direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def named(names: Sequence[str]) -> str:
    """Names for a line: those of many silos are counted, not told."""
    if len(names) <= MOST_NAMED:
        return ", ".join(names)
    return f"{', '.join(names[:MOST_NAMED])}, ... ({len(names):,} in all)"


def require(ok: bool, key: str, given: object, allowed: str) -> None:
    """Raise ConfigError, about a key's value, unless it is `ok`."""
    if not ok:
        raise ConfigError(f"{key}: {given!r} given; allowed: {allowed}")
