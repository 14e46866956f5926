"""A signed record of another party under its name: read, compared with what it has to be of, its signature checked."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from pretrain.exchange.objects import Objects
from pretrain.host.foreign import shown
from pretrain.trust.ledger import RECORD_BYTES, Record, RefusedError
from pretrain.trust.members import Members

R = TypeVar("R", bound=Record)


def checked(
    objects: Objects,
    kind: type[R],
    name: str,
    author: str,
    members: Members,
    *,
    of: Mapping[str, object],
    at: int | None = None,
    limit_bytes: int = RECORD_BYTES,
) -> R:
    """A record whose fields are as `of` says, by its author's key at version `at`, or at its own.

    Raises FileNotFoundError, and RefusedError for what is no such record.
    """
    try:
        record = kind.from_bytes(objects.read(name, limit_bytes=limit_bytes))
    except (IsADirectoryError, NotADirectoryError):
        raise FileNotFoundError(name) from None
    for field, wanted in of.items():
        if (found := getattr(record, field)) != wanted:
            raise RefusedError(f"its {field} is {shown(found)}, not {wanted}: it was made for another place, or run")
    members.check(author, record, version=at)
    return record


def heard(
    objects: Objects,
    kind: type[R],
    name: str,
    author: str,
    members: Members,
    *,
    of: Mapping[str, object],
    pass_over: Callable[[str, object], None],
    at: int | None = None,
    limit_bytes: int = RECORD_BYTES,
) -> R | None:
    """The same, if it is there; None, and a line by `pass_over`, for what is no such record."""
    try:
        return checked(objects, kind, name, author, members, of=of, at=at, limit_bytes=limit_bytes)
    except FileNotFoundError:
        return None
    except RefusedError as error:
        pass_over(name, error)
        return None
