"""This machine's clock in words, where another's, or a date, is said beside it. No torch.

Nothing is decided by it that can be decided without: leases, signs of life, deadlines and order go by monotonic clocks
and by numbers.
"""

import time

DAY_SECONDS = 86_400


def utc(unix_seconds: float) -> str:
    """A time of whatever clock: 2026-11-29 12:00:00 UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix_seconds))
    except (OverflowError, ValueError, OSError):  # files of others have any
        return "a time beyond all calendars"


def by_this_machine() -> str:
    """What time it is here."""
    return f"by this machine's clock it is {utc(time.time())}"
