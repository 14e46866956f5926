"""Being asked to stop, as launchers and schedulers do it: SIGTERM, SIGINT and SIGUSR1. No torch."""

import signal
from collections.abc import Callable

STOPPED = 75  # EX_TEMPFAIL, the exit code: stopped on request, nothing is lost; start it again to go on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequested(BaseException):
    """Whoever catches errors to try again must let this pass."""


def note_signals() -> Callable[[], bool]:
    """From now on signals are only noted; returns what tells whether one came."""
    asked: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda received, frame: asked.append(received))
    return lambda: bool(asked)


def raise_at_signals() -> None:
    """From now on the first signal raises StopRequested in the main thread, at whatever point it is."""

    def stop(received: int, frame: object) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the way out is not interrupted
        raise StopRequested

    for number in SIGNALS:
        signal.signal(number, stop)
