"""Objects below one fsspec URL: a directory, a shared file system, S3, GCS, Azure. No torch.

Every write is atomic and nothing is ever overwritten: a reader sees a whole object or none, and two writers of one
name cannot both succeed.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
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
        return bool(self._fs.exists(self._path(name)))

    def read(self, name: str) -> bytes:
        """The bytes of a small object. Raises FileNotFoundError."""
        return bytes(self._fs.cat_file(self._path(name)))

    def names(self, prefix: str) -> list[str]:
        """Sorted last parts of the names directly below `prefix`; empty if there are none."""
        try:
            listed = self._fs.ls(self._path(prefix), detail=False, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except TypeError:  # file systems without a listings cache have no `refresh`
            listed = self._fs.ls(self._path(prefix), detail=False)
        names = [str(path).rstrip("/").rsplit("/", 1)[-1] for path in listed]
        return sorted(name for name in names if not name.startswith(".") and name != prefix.rsplit("/", 1)[-1])

    def write(self, name: str, data: bytes) -> None:
        """Write a small new object. Raises FileExistsError if the name is taken."""
        with self._saying_what_failed(name):
            if not self._local:
                self._fs.pipe_file(self._path(name), data, mode="create")
                return
            with self._new_local_file(name) as temporary:
                temporary.write_bytes(data)

    def upload(self, file: Path, name: str) -> None:
        """Copy a local file to a new object. Raises FileExistsError if the name is taken."""
        with self._saying_what_failed(name):
            if not self._local:
                self._fs.put_file(str(file), self._path(name), mode="create")
                return
            with self._new_local_file(name) as temporary:
                shutil.copyfile(file, temporary)

    def download(self, name: str, file: Path) -> tuple[str, int]:
        """Copy an object to a local file, block by block; returns sha256 and size of what was read."""
        digest, num_bytes = hashlib.sha256(), 0
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._fs.open(self._path(name), "rb") as source, file.open("wb") as target:
            while block := source.read(BLOCK_BYTES):
                digest.update(block)
                num_bytes += len(block)
                target.write(block)
        return digest.hexdigest(), num_bytes

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        with self._saying_what_failed(name):
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

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
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _saying_what_failed(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileExistsError as error:
            # A parent that is a file, not a directory, reads as "exists" too; only the object itself is a clash.
            if not self._local or Path(self._path(name)).exists():
                raise FileExistsError(f"{self.url}/{name} exists already; nothing is ever overwritten") from None
            raise ConfigError(f"exchange.url: {self.url} given; {name} cannot be written: {error}") from None
        except OSError as error:
            raise ConfigError(f"exchange.url: {self.url} given; {name} cannot be written: {error}") from None
