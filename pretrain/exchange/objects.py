"""Objects below one fsspec URL: a directory, a shared file system, S3, GCS, Azure. No torch.

Every write is atomic and nothing is ever overwritten: a reader sees a whole object or none, and two writers of one
name cannot both succeed. What fails for a reason that may pass is tried again.
"""

import hashlib
import os
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pretrain.config import ConfigError

BLOCK_BYTES = 1 << 20
LONGEST_PAUSE_SECONDS = 10.0
# What will not be better in a minute; by name, as the packages that raise them may not be there.
CERTAIN = ("PermissionError", "NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidURL")


class StoreTroubleError(ConfigError):
    """The store cannot be reached, or does not do what it should, for a reason that may pass."""


class StopWaitingError(Exception):
    """This end of the exchange was closed while it waited."""


class Objects:
    """Named objects below `url`; names are relative, with / between their parts.

    Every verb raises ConfigError in one line for what a user must change, and StoreTroubleError for what did not pass
    within `retry_seconds`; StopWaitingError if `closing` is set meanwhile.
    """

    def __init__(self, url: str, *, retry_seconds: float = 0.0, closing: threading.Event | None = None) -> None:
        """Raises ConfigError if the URL's kind of file system is unknown or its package is missing."""
        self.url, self._retry_seconds, self._closing = url, retry_seconds, closing or threading.Event()
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"exchange.url: {url!r} given; {error}") from None
        self._local = isinstance(self._fs, LocalFileSystem)
        self._was_there = False

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        """Whether the object is there."""
        return self._until_it_works(name, "read", lambda: bool(self._fs.exists(self._path(name))))

    def read(self, name: str) -> bytes:
        """The bytes of a small object. Raises FileNotFoundError."""
        return self._until_it_works(name, "read", lambda: bytes(self._fs.cat_file(self._path(name))))

    def names(self, prefix: str) -> list[str]:
        """Sorted last parts of the names directly below `prefix`; empty if there are none."""
        fresh = {} if self._local else {"refresh": True}  # never from a cache
        try:
            listed = self._until_it_works(
                prefix, "listed", lambda: self._fs.ls(self._path(prefix), detail=False, **fresh)
            )
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = [str(path).rstrip("/").rsplit("/", 1)[-1] for path in listed]
        return sorted(name for name in names if not name.startswith(".") and name != prefix.rsplit("/", 1)[-1])

    def write(self, name: str, data: bytes) -> None:
        """Write a small new object. Raises FileExistsError if the name is taken."""

        def create() -> None:
            if not self._local:
                self._fs.pipe_file(self._path(name), data, mode="create")
                return
            with self._new_local_file(name) as temporary:
                temporary.write_bytes(data)

        self._until_it_works(name, "written", create, is_ours=lambda: self.read(name) == data)

    def upload(self, file: Path, name: str) -> None:
        """Copy a local file to a new object. Raises FileExistsError if the name is taken."""

        def create() -> None:
            if not self._local:
                self._fs.put_file(str(file), self._path(name), mode="create")
                return
            with self._new_local_file(name) as temporary:
                shutil.copyfile(file, temporary)

        def is_ours() -> bool:
            with file.open("rb") as ours, self._fs.open(self._path(name), "rb") as theirs:
                return hashlib.file_digest(ours, "sha256").digest() == hashlib.file_digest(theirs, "sha256").digest()

        self._until_it_works(name, "written", create, is_ours=is_ours)

    def download(self, name: str, file: Path, *, limit_bytes: int) -> tuple[str, int]:
        """Copy an object to a local file, block by block; returns sha256 and size of what was read.

        Stops soon after `limit_bytes`: what is longer than announced must not fill the disk. Raises FileNotFoundError.
        """
        file.parent.mkdir(parents=True, exist_ok=True)

        def copy() -> tuple[str, int]:
            digest, num_bytes = hashlib.sha256(), 0
            with self._fs.open(self._path(name), "rb") as source, file.open("wb") as target:
                while num_bytes <= limit_bytes and (block := source.read(BLOCK_BYTES)):
                    digest.update(block)
                    num_bytes += len(block)
                    target.write(block)
            return digest.hexdigest(), num_bytes

        return self._until_it_works(name, "read", copy)

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        with suppress(FileNotFoundError):
            self._until_it_works(name, "deleted", lambda: self._fs.rm_file(self._path(name)))

    @contextmanager
    def _new_local_file(self, name: str) -> Iterator[Path]:
        """A temporary file beside the final name, linked to it when the block ends: atomic, and fails if it exists."""
        final = Path(self._path(name))
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.link(temporary, final)
            directory = os.open(final.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
        finally:
            temporary.unlink(missing_ok=True)

    def _until_it_works(
        self, name: str, verb: str, attempt: Callable[[], Any], *, is_ours: Callable[[], bool] = lambda: False
    ) -> Any:
        """Try again with growing pauses, drawn at random so that not all come back at once.

        A create that seemed to fail may have succeeded: `is_ours` then tells our object from another's.
        """
        began, pause, num_failed = time.monotonic(), 0.1, 0
        while True:
            try:
                with self._saying_what_failed(name, verb):
                    result = attempt()
                break
            except FileExistsError:
                if num_failed and is_ours():
                    result = None
                    break
                raise
            except StoreTroubleError as error:
                if time.monotonic() - began >= self._retry_seconds:
                    raise
                if not num_failed:
                    print(f"{error}; trying again for {self._retry_seconds:g} s", flush=True)
                num_failed += 1
            if self._closing.wait(random.uniform(0, pause)):
                raise StopWaitingError
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
        if num_failed:
            print(f"{name} was {verb} after {time.monotonic() - began:.1f} s", flush=True)
        return result

    @contextmanager
    def _saying_what_failed(self, name: str, verb: str) -> Iterator[None]:
        """One line for whatever a file system raises: every kind has exceptions of its own, few of them OSErrors.

        A directory that was there and is gone, as when a disk is not mounted, is trouble, and is not made anew.
        """
        try:
            self._check_directory()
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            self._check_directory()
            if verb != "written":
                raise
            raise self._error(name, verb, error) from None
        except FileExistsError as error:
            # A parent that is a file, not a directory, reads as "exists" too; only the object itself is a clash.
            if not self._local or Path(self._path(name)).exists():
                raise FileExistsError(f"{self.url}/{name} exists already; nothing is ever overwritten") from None
            raise self._error(name, verb, error) from None
        except StoreTroubleError:
            raise
        except Exception as error:
            raise self._error(name, verb, error) from error

    def _check_directory(self) -> None:
        if self._local:
            is_there = Path(self._root).is_dir()
            if self._was_there and not is_there:
                raise StoreTroubleError(f"exchange.url: {self.url} given; this directory is not there any more")
            self._was_there = is_there

    def _error(self, name: str, verb: str, error: Exception) -> ConfigError:
        what = " ".join(str(error).split()) or type(error).__name__
        kinds = {kind.__name__ for kind in type(error).__mro__}
        no_bucket = isinstance(error, FileNotFoundError) and not self._local
        certain = no_bucket or isinstance(error, ValueError | TypeError | ImportError) or kinds & set(CERTAIN)
        kind = ConfigError if certain else StoreTroubleError
        return kind(f"exchange.url: {self.url} given; {name} cannot be {verb}: {what}")
