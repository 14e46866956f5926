"""What a store's objects are called, how large they are and when they were written, all at one moment."""

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import fsspec

from pretrain.config.errors import ConfigError
from pretrain.config.keys import ExchangeConfig
from pretrain.exchange.client import PAGES, Client
from pretrain.exchange.options import distrust, is_of_another_time
from pretrain.host.clock import DAY_SECONDS, by_this_machine
from pretrain.host.foreign import shown

LAST_NUMBER = re.compile(r"(.*?)([0-9]{1,15})([^0-9]*)")
READ_AT_ONCE = 500  # objects, within one limit of time
LIMIT_BYTES = 4 << 20  # of one object; the largest, a commit of MAX_SILOS, has 2 MB

Numbered = dict[int, str]
"""Number to path, of objects of one kind."""


class Listed:
    """A store's objects as they were when it was listed."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        """Raises whatever the URL's kind of file system raises."""
        self.url = url
        filesystem, root = fsspec.core.url_to_fs(url, **(options or {}))
        filesystem.invalidate_cache()
        self._client = Client(filesystem, ExchangeConfig.stall_seconds)
        self._prefix = root.rstrip("/") + "/"
        self._sizes: dict[str, int] = {}
        self.times: dict[str, float | None] = {}
        """Every object, to when it was written, in unix seconds of the store's clock if that tells."""
        self._numbered: defaultdict[str, Numbered] = defaultdict(dict)
        for full_path, entry in sorted(self._client.call("find", root, times=PAGES, detail=True).items()):
            # Links and pipes are no objects: one leads out of the store, one never ends.
            is_object = entry.get("type", "file") == "file" and not entry.get("islink")
            if full_path.startswith(self._prefix) and is_object:
                path = full_path.removeprefix(self._prefix)
                self._sizes[path] = int(entry.get("size") or 0)
                self.times[path] = _modified(entry)
                if match := LAST_NUMBER.fullmatch(path):
                    self._numbered[f"{match[1]}#{match[3]}"][int(match[2])] = path
        # Whoever writes into a shared directory can give a file any time, and one in the future would age all others.
        latest = time.time() + DAY_SECONDS
        ahead = [path for path, when in self.times.items() if when is not None and when > latest]
        self.ahead = ahead if len(ahead) < sum(when is not None for when in self.times.values()) else []
        """Objects that are of a time to come by this machine's clock, unless all are."""
        self.now = self.newest(self.times.keys() - self.ahead)

    def newest(self, paths: Iterable[str]) -> float | None:
        """When the newest of these was written; None if there is none, or the store tells no times."""
        return max((when for path in paths if (when := self.times[path]) is not None), default=None)

    def numbered(self, pattern: str) -> Numbered:
        """Objects whose last number is where # is, in their order."""
        return self._numbered.get(pattern, {})

    def last(self, pattern: str) -> list[str]:
        """That with the largest number, if there is one."""
        return list(self.numbered(pattern).values())[-1:]

    def is_too_large(self, path: str) -> bool:
        """Whether an object is none that any party of ours has written."""
        return self._sizes[path] > LIMIT_BYTES

    def stamp(self, path: str) -> tuple[int, float | None]:
        """What an object is known again by: its size, and when it was written."""
        return self._sizes[path], self.times[path]

    def read(self, paths: Iterable[str]) -> dict[str, bytes]:
        """Objects by path, without those that are too large or were deleted since the listing. Raises ConfigError."""
        full = [self._prefix + path for path in paths if path in self.times and not self.is_too_large(path)]
        found: dict[str, bytes] = {}
        try:
            for start in range(0, len(full), READ_AT_ONCE):
                found |= self._client.call("cat", full[start : start + READ_AT_ONCE], on_error="omit")
        except Exception as error:
            raise cannot_be_read(self.url, error) from None
        return {full_path.removeprefix(self._prefix): content for full_path, content in found.items()}


def cannot_be_read(url: str, error: Exception) -> ConfigError:
    """One line for whatever exception a kind of store raises."""
    reason = distrust(error) or " ".join(str(error).split()) or type(error).__name__
    reason += f"; {by_this_machine()}" if is_of_another_time(error) else ""
    return ConfigError(f"store: {url!r} given; it cannot be read: {shown(reason)}")


def _modified(entry: dict[str, Any]) -> float | None:
    # Each backend has its own key: directories, S3, GCS, Azure, memory.
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = entry.get(key)
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value.replace("Z", "+00:00"))
            except ValueError:
                continue
        if isinstance(value, datetime):
            return value.timestamp()
    return None
