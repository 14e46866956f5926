"""What is on the disk for good; and a full one, said in one line: every library says it in its own way. No torch."""

import errno
import os
import shutil
from pathlib import Path

FULL_BYTES = 1 << 20  # what is left when a write of any size may have failed for want of room


def is_full(error: BaseException) -> bool:
    """Whether the operating system says that there is no room."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def full_disk(error: BaseException, directory: str) -> str:
    """One line if `error` came of a disk without room below `directory`, else nothing."""
    says_so = is_full(error) or "No space left on device" in str(error)
    # torch and DeepSpeed only say that a write failed.
    if says_so or shutil.disk_usage(directory).free < FULL_BYTES:
        return (
            f"directory: {directory!r} given; there is no space left on its disk; make room and start again: "
            "everything up to the last checkpoint is there"
        )
    return ""


def to_disk(path: Path) -> None:
    """Return when a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
