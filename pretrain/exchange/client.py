"""Requests to a store in a network: each is limited in time, and large objects come and go in parts. No torch.

The libraries' own time limits begin anew with every byte that comes, so a server that sends one now and then would hold
whoever reads for ever.
"""

import asyncio
import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem

LEAST_BYTES = 1 << 18  # of an object have to come in `stall_seconds`
LEAST_SENT_BYTES = 1 << 20  # and to go: where many come side by side, one goes
FIRST_BYTES = 1 << 20  # the first part that is asked for
PART_BYTES = 8 << 20  # and the largest
PARTS_AT_ONCE = 8  # of one object; so many are in memory at most
CONNECTIONS = 256  # s3fs would have ten, and a few objects that come slowly would hold up all else
# Of an object in S3: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MOST_PARTS, MOST_BYTES = 10_000, 5 << 40
PAGES = 10  # a listing has many, and takes as many times as long as anything else
LOOK_SECONDS = 0.2


class StopWaitingError(Exception):
    """This end of the exchange was closed while it waited."""


class SlowError(OSError):
    """So little came, or went, that nobody would call the other end alive."""


class Client:
    """An fsspec file system of whatever kind, with a time limit where its library can be interrupted."""

    def __init__(self, fs: Any, stall_seconds: float, over: threading.Event | None = None) -> None:
        """Soon after `over` is set, whatever is waited for is broken off, StopWaitingError."""
        self._fs, self._stall_seconds, self._over = fs, stall_seconds, over
        self.is_limited = isinstance(fs, AsyncFileSystem)
        self.asked: Callable[[str], None] = lambda what: None
        """Is told of each request, by the file system's method; of a library's own tries nothing is known."""

    def call(self, verb: str, *arguments: Any, num_bytes: int = 0, times: int = 1, **options: Any) -> Any:
        """What the file system's method answers. Raises SlowError if it takes longer than `times` `stall_seconds`, and
        as long again for each LEAST_SENT_BYTES that it sends.
        """
        if not self.is_limited:
            self.asked(verb)
            return getattr(self._fs, verb)(*arguments, **options)
        limit_seconds = self._stall_seconds * (times + num_bytes / LEAST_SENT_BYTES)
        return self._wait(self._begin(verb, *arguments, **options), limit_seconds)

    def until(self, over: threading.Event) -> "Client":
        """The same until `over` is set."""
        bounded = Client(self._fs, self._stall_seconds, over)
        bounded.asked = self.asked
        return bounded

    def put(self, file: Path, path: str) -> None:
        """Copy a local file to a new object; of S3, in several parts at once.

        Raises SlowError if none gets there in time, OSError (EFBIG) for what S3 does not take as one object.
        """
        in_parts, num_bytes = {}, file.stat().st_size
        if "s3" in self._fs.protocol:
            if num_bytes > MOST_BYTES:
                raise OSError(errno.EFBIG, f"{num_bytes} bytes are more than the {MOST_BYTES} of one object in S3")
            part_bytes = part_bytes_of(num_bytes)
            at_once = max(1, PARTS_AT_ONCE * PART_BYTES // part_bytes)
            in_parts = {"chunksize": part_bytes, "max_concurrency": at_once}
            num_bytes = min(num_bytes, part_bytes * max(at_once, 2))  # of less than two parts all goes at once
        if not self.is_limited:
            self.asked("put_file")
            self._fs.put_file(str(file), path, mode="create")
            return
        told = fsspec.Callback()
        sent = self._begin("put_file", str(file), path, mode="create", callback=told, **in_parts)
        self._wait(sent, self._stall_seconds * (1 + num_bytes / LEAST_SENT_BYTES), progress=lambda: told.value)

    def blocks(self, path: str, limit_bytes: int) -> Iterator[bytes]:
        """What an object holds, up to one byte more than `limit_bytes`, in order; parts of it come at once.

        A part that takes too long is asked for again, alone and as small as can be. Raises SlowError if that is not
        there after `stall_seconds` either.
        """
        most = min(FIRST_BYTES, limit_bytes + 1)
        pace, parts = _Pace(self._stall_seconds), deque[tuple[Future[bytes], int, float]]()
        began = time.monotonic()
        begun = done = len(first := self._first(path, most))
        if first:
            pace.hear(time.monotonic() - began)
            yield first
        else:
            pace.fall()
        if 0 < done < most:
            return  # all of it, by one request
        size = min(self.call("info", path)["size"], limit_bytes + 1)
        try:
            while done < size:
                while begun < size and len(parts) < pace.at_once:
                    end = min(begun + pace.part_bytes, size)
                    parts.append((self._begin("cat_file", path, start=begun, end=end), end, time.monotonic()))
                    begun = end
                future, end, began = parts.popleft()
                try:
                    block = self._wait(future, began + self._stall_seconds - time.monotonic())
                except SlowError:
                    if pace.is_least:
                        raise SlowError(
                            f"less than {LEAST_BYTES >> 10} KiB came in {self._stall_seconds:g} s "
                            "(exchange.stall_seconds)"
                        ) from None
                    _cancel(parts)
                    pace.fall()
                    begun = done
                    continue
                if len(block) != end - done:
                    raise OSError(f"{len(block)} bytes came where {end - done} were asked for")
                pace.hear(time.monotonic() - began)
                done = end
                yield block
        finally:
            _cancel(parts)

    def has(self, path: str) -> bool:
        """Whether an object is there. Its first byte is asked for: of what is not there, `info` would ask twice, and
        the second time for a listing, which costs ten times as much in S3.
        """
        try:
            self.call("cat_file", path, start=0, end=1) if self.is_limited else self._fs.info(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            # fsspec's frame and its error hold each other and the frames above: what our callers have in hand, a
            # model perhaps, would stay in memory until the garbage collector comes by.
            error.with_traceback(None)
            return False
        except (SlowError, StopWaitingError):
            raise
        except Exception:  # an empty object has no first byte, of which each library says something else
            self.call("info", path)
        return True

    def _first(self, path: str, most: int) -> bytes:
        """An object's first bytes, as many as there are; none of what is empty, or comes so slowly that less is to be
        asked for.
        """
        try:
            first = self._wait(self._begin("cat_file", path, start=0, end=most), self._stall_seconds)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, StopWaitingError):
            raise
        except Exception:  # an empty object has no first byte, of which each library says something else
            return b""
        return bytes(first) if len(first) <= most else b""

    def _begin(self, verb: str, *arguments: Any, **options: Any) -> Future[Any]:
        self.asked(verb)
        started = getattr(self._fs, f"_{verb}")(*arguments, **options)
        return asyncio.run_coroutine_threadsafe(started, self._fs.loop)

    def _wait(self, future: Future[Any], limit_seconds: float, *, progress: Callable[[], int] = lambda: 0) -> Any:
        """The result; SlowError if it is not there in time, where all `progress` begins the time anew."""
        began, before = time.monotonic(), progress()
        try:
            while True:
                left_seconds = began + limit_seconds - time.monotonic()
                try:
                    return future.result(max(0.0, min(left_seconds, LOOK_SECONDS)))
                except TimeoutError:
                    if future.done():
                        return future.result()  # a time limit of the library's own, or just come
                if self._over and self._over.is_set():
                    raise StopWaitingError
                if (now := progress()) != before:
                    began, before = time.monotonic(), now
                elif left_seconds <= 0:
                    raise SlowError(f"no answer in {limit_seconds:g} s (exchange.stall_seconds)")
        finally:
            future.cancel()
            del future  # which holds its error, which holds this frame


def with_connections(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of s3fs, with as many connections as we need unless they say how many."""
    config = {"max_pool_connections": CONNECTIONS, **(options.get("config_kwargs") or {})}
    return {**options, "config_kwargs": config}


def is_too_large(error: BaseException) -> bool:
    """Whether a store, or the file system that it is in, does not take as much as one object."""
    return isinstance(error, OSError) and error.errno in (errno.EFBIG, errno.EMSGSIZE)  # s3fs' for EntityTooLarge


def part_bytes_of(num_bytes: int) -> int:
    """How large the parts are in which an object of a size is sent to S3."""
    return max(PART_BYTES, -(-num_bytes // MOST_PARTS))


class _Pace:
    """How large parts are, and how many are under way: more while they come quickly, fewer when they do not."""

    def __init__(self, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self.part_bytes, self.at_once = FIRST_BYTES, 1

    @property
    def is_least(self) -> bool:
        return self.part_bytes == LEAST_BYTES and self.at_once == 1

    def fall(self) -> None:
        self.part_bytes, self.at_once = LEAST_BYTES, 1

    def hear(self, seconds: float) -> None:
        """A part has come, so long after it was asked for."""
        if seconds < self._stall_seconds / 16:
            self.part_bytes, self.at_once = min(2 * self.part_bytes, PART_BYTES), min(2 * self.at_once, PARTS_AT_ONCE)
        elif seconds > self._stall_seconds / 4:
            self.part_bytes, self.at_once = max(self.part_bytes // 2, LEAST_BYTES), max(self.at_once // 2, 1)


def _cancel(parts: deque[tuple[Future[bytes], int, float]]) -> None:
    while parts:
        parts.pop()[0].cancel()
