"""Objects below one fsspec URL: a directory, a shared file system, S3, GCS, Azure. No torch.

Every write is atomic and nothing is ever overwritten: a reader sees a whole object or none, and two writers of one
name cannot both succeed, unless they write the same.
"""

import copy
import os
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

import fsspec
from blake3 import blake3
from fsspec.implementations.local import LocalFileSystem

from pretrain.config.errors import ConfigError
from pretrain.config.keys import ExchangeConfig
from pretrain.exchange.client import PAGES, Client, SlowError, StopWaitingError, is_too_large, with_connections
from pretrain.exchange.directory import Directory
from pretrain.exchange.options import OF_S3, distrust, is_of_another_time
from pretrain.host.clock import by_this_machine
from pretrain.host.disk import is_full
from pretrain.trust.egress import Egress, blake3_of
from pretrain.trust.ledger import RECORD_BYTES, RefusedError

BLOCK_BYTES = 1 << 20
# Exponential back-off with full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter
FIRST_DELAY_SECONDS = 0.25
LONGEST_DELAY_SECONDS = 10.0
ANSWERS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
CERTAIN = (PermissionError, ValueError, TypeError, ImportError, NotImplementedError)
# Of botocore and google.auth, which may not be there.
CERTAIN_NAMES = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ParamValidationError")

T = TypeVar("T")


class StoreTroubleError(ConfigError):
    """The store could not be used for a reason that may pass, however long it was tried again."""


class StoreSlowError(StoreTroubleError):
    """The same, of an object that came too slowly; others may come as they should."""


class Objects:
    """Named objects below `url`; names are relative, with / between their parts.

    With `retry_seconds`, whatever may pass (unreachable, slow, throttled, out of space) is tried again for so long,
    counted from a call's first failure, and then raises StoreTroubleError. After a failure, and where a library has
    retries of its own, an object that is there already with the very bytes to be written counts as written: an earlier
    try got through unnoticed. Once `closing` is set, nothing is tried again and StopWaitingError is raised.

    In a network, what takes longer than `stall_seconds` is in trouble, too (client.py).
    """

    def __init__(
        self,
        url: str,
        *,
        options: Mapping[str, Any] | None = None,
        anchor: str = "",
        retry_seconds: float = 0.0,
        stall_seconds: float = ExchangeConfig.stall_seconds,
        closing: threading.Event | None = None,
        key: str = "exchange.url",
    ) -> None:
        """`options` go to fsspec; `anchor` is an object that nobody ever deletes: a directory that had it and now has
        not is in trouble. `key` is what a user has given the URL as.

        Raises ConfigError if the URL's kind of file system is unknown, its package is missing or an option is unknown.
        """
        self.url, self._retry_seconds, self._closing = url, retry_seconds, closing or threading.Event()
        self._anchor, self._key = anchor, key
        self._over: threading.Event | None = None
        self._jitter = random.Random()  # not the one whose state belongs to training
        if fsspec.core.split_protocol(url)[0] in OF_S3:
            options = with_connections(options or {})
        try:
            fs, self._root = fsspec.core.url_to_fs(url, **{**(options or {}), "use_listings_cache": False})
        except (ValueError, TypeError, ImportError) as error:
            raise ConfigError(f"{key}: {url!r} given; {error}") from None
        self._fs, self._client = fs, Client(fs, stall_seconds)
        self._directory = Directory(self._root) if isinstance(fs, LocalFileSystem) else None
        self._was_there = threading.Event()  # for copies, too: one that has nothing to do for long must know
        self._egress: Egress | None = None
        self._egress_kind = ""

    def told_to(self, egress: Egress, *, kind: str = "") -> None:
        """From now on, for copies made later, too, nothing leaves before the ledger has a line of it.

        Of a `kind`, or of what kind its name says.
        """
        self._egress, self._egress_kind = egress, kind
        self._client.asked = egress.asked

    def close_egress(self) -> None:
        """The ledger's last counts, if there is one."""
        if self._egress:
            self._egress.close(self.url)

    def at_once(self) -> "Objects":
        """The same objects, without retries."""
        quick = copy.copy(self)
        quick._retry_seconds = 0.0
        return quick

    def until(self, over: threading.Event) -> "Objects":
        """The same objects until `over` is set: what is waited for or read then is broken off, StopWaitingError."""
        bounded = copy.copy(self)
        bounded._closing = bounded._over = over
        bounded._client = self._client.until(over)
        return bounded

    def exists(self, name: str) -> bool:
        """Whether the object is there."""

        def ask() -> bool:
            if not self._directory:
                return self._client.has(self._path(name))
            try:
                return self._directory.exists(name)
            except (FileNotFoundError, NotADirectoryError):
                return False

        return self._try(name, "read", ask)

    def read(self, name: str, *, limit_bytes: int = RECORD_BYTES) -> bytes:
        """The bytes of a small object. Raises FileNotFoundError, and RefusedError for what is larger than the limit."""

        def read_it() -> bytes:
            if self._directory:
                with self._directory.open(name) as source:
                    return source.read(limit_bytes + 1)
            return b"".join(self._blocks(name, limit_bytes))

        data = self._try(name, "read", read_it)
        if len(data) > limit_bytes:
            raise RefusedError(f"{name} has more than the {limit_bytes} bytes that it may have")
        return data

    def read_if_there(self, name: str, *, limit_bytes: int = RECORD_BYTES) -> bytes | None:
        """The same, by one request; None if there is no such object."""
        try:
            return self.read(name, limit_bytes=limit_bytes)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            error.with_traceback(None)  # see client.py
            return None

    def names(self, prefix: str) -> list[str]:
        """Sorted last parts of the names directly below `prefix`; empty if there are none."""

        def list_it() -> list[str]:
            if self._directory:
                return self._directory.names(prefix)
            path = self._path(prefix)
            return list(self._client.call("ls", path, times=PAGES, detail=False, refresh=True))  # never from a cache

        try:
            listed = self._try(prefix, "listed", list_it)
        except (FileNotFoundError, NotADirectoryError) as error:
            error.with_traceback(None)  # see client.py
            return []
        names = [str(path).rstrip("/").rsplit("/", 1)[-1] for path in listed]
        return sorted(name for name in names if not name.startswith(".") and name != prefix.rsplit("/", 1)[-1])

    def replace(self, name: str, data: bytes) -> None:
        """Have a small object hold these bytes; what lies there with others gives way. Raises as `read` and `write`."""
        if (found := self.read_if_there(name)) == data:
            return
        if found is not None:
            self.delete(name)
        self.write(name, data)

    def write(self, name: str, data: bytes, *, of: Mapping[str, float] | None = None) -> None:
        """Write a small new object. Raises FileExistsError if the name is taken.

        `of` tells the egress ledger what it was made of.
        """

        def is_same() -> bool:
            return b"".join(self._blocks(name, len(data))) == data

        self._create(
            name,
            lambda temporary: temporary.write(data),
            lambda path: self._client.call("pipe_file", path, data, num_bytes=len(data), mode="create"),
            is_same,
            leave=lambda: self._leave(name, len(data), blake3_of(data), of),
        )

    def give(self, file: Path, name: str, *, digest: str = "", of: Mapping[str, float] | None = None) -> None:
        """Make a local file that nobody writes to or needs any more a new object, uncopied where that can be.

        Then the file is gone. Raises FileExistsError if the name is taken. See `upload`.
        """
        self._upload(file, name, digest, of, given=file)
        file.unlink(missing_ok=True)  # copied

    def upload(self, file: Path, name: str, *, digest: str = "", of: Mapping[str, float] | None = None) -> None:
        """Copy a local file to a new object. Raises FileExistsError if the name is taken.

        The egress ledger is told its BLAKE3, `digest`, where that is known, and what it was made of.
        """
        self._upload(file, name, digest, of)

    def _upload(
        self, file: Path, name: str, digest: str, of: Mapping[str, float] | None, *, given: Path | None = None
    ) -> None:

        def leave() -> None:
            known = digest
            if self._egress and not known:
                with file.open("rb") as ours:
                    known = _digest(_blocks(ours, file.stat().st_size)).hex()
            self._leave(name, file.stat().st_size, known, of)

        def is_same() -> bool:
            size = file.stat().st_size
            with file.open("rb") as ours:
                return _digest(self._blocks(name, size)) == _digest(_blocks(ours, size))

        def copy_it(temporary: IO[bytes]) -> None:
            with file.open("rb") as ours:
                shutil.copyfileobj(ours, temporary, BLOCK_BYTES)

        self._create(
            name,
            copy_it,
            lambda path: self._client.put(file, path),
            is_same,
            leave=leave,
            given=given,
        )

    def download(self, name: str, file: Path, *, limit_bytes: int) -> tuple[str, int]:
        """Copy an object to a local file, block by block; returns BLAKE3 and size of what was read.

        Stops soon after `limit_bytes`: what is longer than announced must not fill the disk. Raises FileNotFoundError.
        """

        def copy_it() -> tuple[str, int]:
            digest, num_bytes = blake3(), 0
            with _removed_if_broken_off(file) as target:
                for block in self._blocks(name, limit_bytes):
                    digest.update(block)
                    num_bytes += len(block)
                    target.write(block)
            return digest.hexdigest(), num_bytes

        return self._try(name, "read", copy_it)

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        with suppress(FileNotFoundError):
            self._try(name, "deleted", lambda: self._rm(name))

    def _blocks(self, name: str, limit_bytes: int) -> Iterator[bytes]:
        """What an object holds, until soon after `limit_bytes`."""
        if self._client.is_limited:
            yield from self._client.blocks(self._path(name), limit_bytes)
            return
        with self._directory.open(name) if self._directory else self._fs.open(self._path(name), "rb") as source:
            for block in _blocks(source, limit_bytes):
                if self._over and self._over.is_set():
                    raise StopWaitingError
                yield block

    def _rm(self, name: str) -> None:
        self._directory.delete(name) if self._directory else self._client.call("rm_file", self._path(name))

    # ---- creating

    def _leave(self, name: str, num_bytes: int, digest: str, of: Mapping[str, float] | None) -> None:
        """Have the ledger say it before a byte leaves, and wait until a day's bytes are not used up any more."""
        said, kind = False, self._egress_kind
        while self._egress and (seconds := self._egress.leaves(self.url, name, num_bytes, digest, of=of, kind=kind)):
            if not said:
                said = True
                print(f"{name} waits {seconds:.0f} s: the policy's bytes_a_day have left today", flush=True)
            if self._closing.wait(min(seconds, LONGEST_DELAY_SECONDS)):
                raise StopWaitingError

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _create(
        self,
        name: str,
        fill: Callable[[IO[bytes]], object],
        put: Callable[[str], object],
        is_same: Callable[[], bool],
        *,
        leave: Callable[[], None],
        given: Path | None = None,
    ) -> None:
        temporary = f".{name.rsplit('/', 1)[-1]}.{uuid.uuid4().hex}.tmp"  # one for all tries, so the last one clears up

        num_tries = 0
        leave()

        def create() -> None:
            nonlocal num_tries
            num_tries += 1
            if num_tries > 1:
                leave()  # once more
            try:
                if self._directory:
                    # The store's own directory only at first: one that is gone must not be made anew.
                    make_root = not self._was_there.is_set()
                    self._directory.create(name, temporary, fill, make_root=make_root, given=given)
                else:
                    put(self._path(name))
            except FileExistsError:
                may_be_ours = self._retry_seconds and (num_tries > 1 or not self._directory)
                with suppress(FileNotFoundError):  # it was there, and whoever reads it has just deleted it
                    if may_be_ours and is_same():
                        return
                raise

        self._try(name, "written", create)

    # ---- trouble

    def _try(self, name: str, verb: str, attempt: Callable[[], T]) -> T:
        """What `attempt` returns or raises in the end; one line when trouble begins and one when it is over.

        Every kind of file system has exceptions of its own, few of them OSErrors: all but answers become a ConfigError.
        """
        began, num_failures = 0.0, 0
        while True:
            try:
                answer = self._answer(attempt)
            except ANSWERS as error:
                self._say_over(name, verb, num_failures, began)
                self._raise_answer(name, verb, error)
            except StopWaitingError:
                raise
            except Exception as error:
                if verb == "read" and is_full(error):
                    raise  # our own disk, on which it was written
                line, now = self._line(name, verb, error), time.monotonic()
                is_certain = isinstance(error, CERTAIN) or type(error).__name__ in CERTAIN_NAMES
                if is_certain or distrust(error) or is_of_another_time(error) or is_too_large(error):
                    raise ConfigError(line) from error
                began = began if num_failures else now
                left_seconds = began + self._retry_seconds - now
                if left_seconds <= 0:
                    tried = f"; tried for {self._retry_seconds:g} s (exchange.retry_seconds)"
                    kind = StoreSlowError if isinstance(error, SlowError) else StoreTroubleError
                    raise kind(line + tried if self._retry_seconds else line) from error
                if not num_failures:
                    print(f"{line}; trying again for {self._retry_seconds:g} s", flush=True)
                self._pause(num_failures, left_seconds)
                num_failures += 1
            else:
                self._say_over(name, verb, num_failures, began)
                return answer

    def _answer(self, attempt: Callable[[], T]) -> T:
        """What `attempt` answers; a no of a directory that was there and now is not is none."""
        if not self._directory:
            return attempt()
        self._check_is_there()
        try:
            answer = attempt()
        except OSError:
            self._check_is_there()
            raise
        if not answer:
            self._check_is_there()
        return answer

    def _check_is_there(self) -> None:
        """Raise OSError if the store's directory was moved away or its file system is not mounted any more."""
        was_there = self._was_there.is_set()  # before we look: another thread may make it right after
        try:
            os.stat(f"{self._root}/{self._anchor}")
        except (FileNotFoundError, NotADirectoryError):
            if was_there:
                raise OSError("this directory is not there any more") from None
        else:
            self._was_there.set()

    def _pause(self, num_failures: int, left_seconds: float) -> None:
        longest = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** min(num_failures, 10))
        if self._closing.wait(min(self._jitter.uniform(0, longest), left_seconds)):
            raise StopWaitingError

    def _say_over(self, name: str, verb: str, num_failures: int, began: float) -> None:
        if num_failures:
            print(f"{name or self.url} was {verb} after {time.monotonic() - began:.1f} s", flush=True)

    def _raise_answer(self, name: str, verb: str, error: Exception) -> NoReturn:
        if not isinstance(error, FileExistsError):
            if verb != "written":
                raise error
            raise ConfigError(self._line(name, verb, error)) from None
        # A store's directory that is a file reads as "exists", too; of an object, which may be gone again, it is true.
        if self._directory and not os.path.isdir(self._root):
            raise ConfigError(self._line(name, verb, error)) from None
        raise FileExistsError(f"{self.url}/{name} exists already; nothing is ever overwritten") from None

    def _line(self, name: str, verb: str, error: Exception) -> str:
        # Of a write, `name` says all; the path of a temporary file would only mislead.
        short = error.strerror if verb == "written" and isinstance(error, OSError) else ""
        if reason := distrust(error):
            short = reason
        if is_of_another_time(error):
            short = f"{short or error}; {by_this_machine()}"
        if is_too_large(error):
            short = f"{short or error}; with more outer.num_fragments objects are smaller"
        what = " ".join((short or str(error)).split()) or type(error).__name__
        return f"{self._key}: {self.url} given; {name} cannot be {verb}: {what}"


def _blocks(source: IO[bytes] | Any, limit_bytes: int) -> Iterator[bytes]:
    """What can be read, until soon after `limit_bytes`."""
    num_bytes = 0
    while num_bytes <= limit_bytes and (block := source.read(BLOCK_BYTES)):
        num_bytes += len(block)
        yield block


def _digest(blocks: Iterator[bytes]) -> bytes:
    digest = blake3()
    for block in blocks:
        digest.update(block)
    return digest.digest()


@contextmanager
def _removed_if_broken_off(file: Path) -> Iterator[IO[bytes]]:
    """A new local file, away again unless the block ends well. A full disk is named: it is this machine's."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file.open("wb") as target:
            yield target
    except BaseException as error:
        if file.is_file():  # and not /dev/null, where what is only compared goes
            file.unlink()
        if isinstance(error, OSError) and is_full(error):
            raise OSError(error.errno, error.strerror, str(file)) from None
        raise
