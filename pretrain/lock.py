"""One process per folder of a run directory: the kernel drops the lock when its holder dies, however it dies."""

import fcntl
import os
from pathlib import Path

from pretrain.config import ConfigError


def lock_directory(directory: Path, what: str) -> int:
    """Hold `directory` for this process until it ends. Raises ConfigError that names the process which has it."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode(errors="replace").strip()
        raise ConfigError(
            f"directory: {str(directory)!r} given; {what} runs there already (process {holder}); "
            "stop it, or name another directory"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor
