"""One process per folder of a run directory: the kernel drops the lock when its holder dies, however it dies."""

import fcntl
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain.config.errors import ConfigError
from pretrain.host.foreign import shown


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that has locked a folder."""

    process: int
    elsewhere: bool
    """Whether it is not, or no more, among the processes of this machine; as far as /proc tells."""


def lock_open(descriptor: int) -> bool:
    """Hold an open file until it is closed; False if another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_directory(directory: Path, what: str) -> int:
    """Hold `directory` for this process until it ends. Raises ConfigError that names the process which has it."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    if not lock_open(descriptor):
        raise ConfigError(
            f"directory: {str(directory)!r} given; {what} runs there already (process {shown(_written(descriptor))}); "
            "stop it, or name another directory"
        )
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def lock_holder(directory: Path) -> Holder | None:
    """Who has locked a folder; None if nobody has."""
    try:
        descriptor = os.open(directory / "lock", os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        if lock_open(descriptor):
            return None
        written = _written(descriptor)  # by whoever may write here
        process = int(written) if re.fullmatch(r"[0-9]{1,10}", written) else 0
        return Holder(process=process, elsewhere=not _has_open(process, directory / "lock"))
    finally:
        os.close(descriptor)


def _written(descriptor: int) -> str:
    return os.pread(descriptor, 32, 0).decode(errors="replace").strip()


def _has_open(process: int, file: Path) -> bool:
    """Whether a process has a file open: a number alone may be another process's by now, or another machine's."""
    if not Path("/proc/self/fd").is_dir():
        return True
    with suppress(OSError):
        return any(os.path.realpath(link) == str(file.resolve()) for link in Path(f"/proc/{process}/fd").iterdir())
    return False
