"""Where libraries keep what they compile, so that later starts find it, and on a read-only home, too. No torch."""

import os
import platform
import zlib
from pathlib import Path

HOME_CACHES = {"XDG_CACHE_HOME": "~/.cache", "TRITON_CACHE_DIR": "~/.triton", "MPLCONFIGDIR": "~/.config"}
"""Environment variables that say so, and where it is without them."""


def use_writable_caches(directory: Path) -> str:
    """Have this process and its children keep caches below `directory`, where the home directory cannot be written.

    What is set in the environment stays as it is. Returns a line that says so, or "".
    """
    moved = []
    for variable, usual in HOME_CACHES.items():
        place = Path(os.path.expanduser(usual))
        if variable not in os.environ and not _can_be_written(place):
            os.environ[variable] = str((directory / "caches").absolute())
            moved.append(str(place))
    return f"{', '.join(moved)} cannot be written: caches go to {directory / 'caches'}" if moved else ""


def keep_compiled() -> Path:
    """Have torch.compile keep what it makes where later starts of any run find it; returns where.

    By itself it takes /tmp, which a machine or a batch job begins with anew. Each kind of processor has a folder of its
    own, as homes are shared and what is compiled for one may not run on another. TORCHINDUCTOR_CACHE_DIR, if it is set,
    stays as it is.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(HOME_CACHES["XDG_CACHE_HOME"]))
    place = home / "atoll" / f"compiled-{platform.machine()}-{zlib.crc32(_processor().encode()):08x}"
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(place)))


def _processor() -> str:
    """What tells one kind from another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def _can_be_written(place: Path) -> bool:
    """Whether there is, or could be, a folder in which we may write."""
    try:
        while not place.exists():
            place = place.parent
    except OSError:  # not for us to see
        return False
    return os.access(place, os.W_OK | os.X_OK)
