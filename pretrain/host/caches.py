"""Where libraries keep what they compile when the home directory cannot be written, as on some nodes. No torch."""

import os
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


def _can_be_written(place: Path) -> bool:
    """Whether there is, or could be, a folder in which we may write."""
    try:
        while not place.exists():
            place = place.parent
    except OSError:  # not for us to see
        return False
    return os.access(place, os.W_OK | os.X_OK)
