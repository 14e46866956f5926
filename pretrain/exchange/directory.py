"""Objects in a directory that several accounts may write to. No torch.

An object is a regular file, in folders that are folders. Links, pipes and sockets are passed over: a link below the
store's own directory would lead what is read or deleted out of the store, and a pipe would hold its reader for ever.
So every part of a name is opened from the folder before it, without following links.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pretrain.host.foreign import shown

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # of a regular file, this does not wait
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
OTHERS_SHOWN = 100  # as many are named; somebody may make any number


class Directory:
    """Named objects below `root`, which itself may be reached through links: it is what the user named."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._passed_over: set[str] = set()

    def exists(self, name: str) -> bool:
        """Whether there is an object."""
        *folders, last = _parts(name)
        with self._folder(folders) as folder:
            mode = os.stat(last, dir_fd=folder, follow_symlinks=False).st_mode
            return self._is_ours(name, mode) and stat.S_ISREG(mode)

    def open(self, name: str) -> IO[bytes]:
        """An object to be read. Raises FileNotFoundError, NotADirectoryError."""
        *folders, last = _parts(name)
        try:
            with self._folder(folders) as folder:
                if not self._is_ours(name, os.stat(last, dir_fd=folder, follow_symlinks=False).st_mode):
                    raise FileNotFoundError(name)
                file = os.open(last, READ, dir_fd=folder)
        except FileNotFoundError as error:  # with the whole name, which the system has not been told
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from error
        mode = os.fstat(file).st_mode
        if not stat.S_ISREG(mode):  # exchanged since it was looked at, or a folder
            os.close(file)
            raise FileNotFoundError(name)
        return os.fdopen(file, "rb")

    def names(self, prefix: str) -> list[str]:
        """Objects and folders directly below a folder. Raises FileNotFoundError, NotADirectoryError."""
        with self._folder(_parts(prefix)) as folder, os.scandir(folder) as entries:
            found = []
            for entry in entries:
                if entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False):
                    found.append(entry.name)
                elif not entry.name.startswith("."):
                    with suppress(FileNotFoundError):
                        self._is_ours(f"{prefix}/{entry.name}".lstrip("/"), entry.stat(follow_symlinks=False).st_mode)
            return found

    def delete(self, name: str) -> None:
        """Delete an object. Raises FileNotFoundError, also for a folder and where a link is on the way."""
        *folders, last = _parts(name)
        try:
            with self._folder(folders) as folder:
                os.unlink(last, dir_fd=folder)
        except (NotADirectoryError, IsADirectoryError):
            raise FileNotFoundError(name) from None

    def create(
        self,
        name: str,
        temporary: str,
        fill: Callable[[IO[bytes]], object],
        *,
        make_root: bool,
        given: Path | None = None,
    ) -> None:
        """Write a temporary file beside the final name and link it there: atomic, and fails if that exists.

        A `given` file, which nobody writes to any more, is moved there where it lies on the same file system; if this
        fails in the end, it is where it was. Makes folders that are missing, but the store's own only if `make_root`.
        Raises OSError.
        """
        if make_root:
            Path(self._root).mkdir(parents=True, exist_ok=True)
        *folders, last = _parts(name)
        with self._folder(folders, make=True) as folder:
            moved = given is not None and _move(given, temporary, folder)
            try:
                if not moved:
                    with os.fdopen(os.open(temporary, CREATE, 0o666, dir_fd=folder), "wb") as file:
                        fill(file)
                        file.flush()
                        os.fsync(file.fileno())
                os.link(temporary, last, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
                os.fsync(folder)
            except BaseException:
                if given and moved:
                    os.rename(temporary, given, src_dir_fd=folder)
                raise
            finally:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)

    @contextmanager
    def _folder(self, parts: list[str], *, make: bool = False) -> Iterator[int]:
        """A folder below the store's own, open. Raises FileNotFoundError, or NotADirectoryError for a link, too."""
        folder = os.open(self._root or "/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for depth, part in enumerate(parts, 1):
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=folder)
                else:
                    self._is_ours("/".join(parts[:depth]), os.stat(part, dir_fd=folder, follow_symlinks=False).st_mode)
                inner = os.open(part, FOLDER, dir_fd=folder)
                os.close(folder)
                folder = inner
            yield folder
        finally:
            os.close(folder)

    def _is_ours(self, name: str, mode: int) -> bool:
        """Whether it is a regular file or a folder; says once what else it is."""
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            return True
        if name not in self._passed_over and len(self._passed_over) < OTHERS_SHOWN:
            self._passed_over.add(name)
            what = "a link" if stat.S_ISLNK(mode) else "a pipe" if stat.S_ISFIFO(mode) else "no regular file"
            print(f"{shown(self._root)}: {shown(name)} is {what}, no object of a store: passed over", flush=True)
        return False


def _move(given: Path, temporary: str, folder: int) -> bool:
    """Move a file, whose bytes are on the disk then; False where it cannot be moved.

    It has one name at any time: with two, whoever writes anew under the first would change the object.
    """
    with given.open("rb") as file:
        os.fsync(file.fileno())
    try:
        os.rename(given, temporary, dst_dir_fd=folder)
    except OSError:
        return False
    return True


def _parts(name: str) -> list[str]:
    parts = name.split("/") if name else []
    assert not {"", ".", ".."} & set(parts), name
    return parts
