"""Objects below one fsspec URL: a directory, a shared file system, S3, GCS, Azure. No torch.

Every write is atomic and nothing is ever overwritten: a reader sees a whole object or none, and two writers of one
name cannot both succeed.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pretrain.config import ConfigError

BLOCK_BYTES = 1 << 20


class Objects:
    """Named objects below `url`; names are relative, with / between their parts."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError if the URL's kind of file system is unknown or its package is missing."""
        self.url = url
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"exchange.url: {url!r} given; {error}") from None
        self._local = isinstance(self._fs, LocalFileSystem)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        """Whether the object is there."""
        with self._saying_what_failed(name, "read"):
            return bool(self._fs.exists(self._path(name)))

    def read(self, name: str) -> bytes:
        """The bytes of a small object. Raises FileNotFoundError."""
        with self._saying_what_failed(name, "read"):
            return bytes(self._fs.cat_file(self._path(name)))

    def names(self, prefix: str) -> list[str]:
        """Sorted last parts of the names directly below `prefix`; empty if there are none."""
        fresh = {} if self._local else {"refresh": True}  # never from a cache
        try:
            with self._saying_what_failed(prefix, "listed"):
                listed = self._fs.ls(self._path(prefix), detail=False, **fresh)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = [str(path).rstrip("/").rsplit("/", 1)[-1] for path in listed]
        return sorted(name for name in names if not name.startswith(".") and name != prefix.rsplit("/", 1)[-1])

    def write(self, name: str, data: bytes) -> None:
        """Write a small new object. Raises FileExistsError if the name is taken."""
        with self._saying_what_failed(name, "written"):
            if not self._local:
                self._fs.pipe_file(self._path(name), data, mode="create")
                return
            with self._new_local_file(name) as temporary:
                temporary.write_bytes(data)

    def upload(self, file: Path, name: str) -> None:
        """Copy a local file to a new object. Raises FileExistsError if the name is taken."""
        with self._saying_what_failed(name, "written"):
            if not self._local:
                self._fs.put_file(str(file), self._path(name), mode="create")
                return
            with self._new_local_file(name) as temporary:
                shutil.copyfile(file, temporary)

    def download(self, name: str, file: Path, *, limit_bytes: int) -> tuple[str, int]:
        """Copy an object to a local file, block by block; returns sha256 and size of what was read.

        Stops soon after `limit_bytes`: what is longer than announced must not fill the disk. Raises FileNotFoundError.
        """
        digest, num_bytes = hashlib.sha256(), 0
        file.parent.mkdir(parents=True, exist_ok=True)
        with (
            self._saying_what_failed(name, "read"),
            self._fs.open(self._path(name), "rb") as source,
            file.open("wb") as target,
        ):
            while num_bytes <= limit_bytes and (block := source.read(BLOCK_BYTES)):
                digest.update(block)
                num_bytes += len(block)
                target.write(block)
        return digest.hexdigest(), num_bytes

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        with suppress(FileNotFoundError), self._saying_what_failed(name, "deleted"):
            self._fs.rm_file(self._path(name))

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

    @contextmanager
    def _saying_what_failed(self, name: str, verb: str) -> Iterator[None]:
        """One line for whatever a file system raises: every kind has exceptions of its own, few of them OSErrors."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            if verb != "written":
                raise
            raise self._error(name, verb, error) from None
        except FileExistsError as error:
            # A parent that is a file, not a directory, reads as "exists" too; only the object itself is a clash.
            if not self._local or Path(self._path(name)).exists():
                raise FileExistsError(f"{self.url}/{name} exists already; nothing is ever overwritten") from None
            raise self._error(name, verb, error) from None
        except Exception as error:
            raise self._error(name, verb, error) from error

    def _error(self, name: str, verb: str, error: Exception) -> ConfigError:
        what = " ".join(str(error).split()) or type(error).__name__
        return ConfigError(f"exchange.url: {self.url} given; {name} cannot be {verb}: {what}")
