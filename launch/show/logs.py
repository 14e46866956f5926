"""`atoll logs`: what the processes of a run's newest start have printed."""

import time
from collections.abc import Iterator
from pathlib import Path

from pretrain.config.errors import ConfigError

POLL_SECONDS = 0.5


def read_logs(directory: Path, names: list[str], *, num_lines: int, follow: bool) -> Iterator[str]:
    """The last lines of each log, or of those of `names`, and with `follow` all that come, those of later starts too.

    Raises ConfigError if there are none.
    """
    latest = directory / "logs" / "latest"
    while not (found := sorted(path.stem for path in latest.glob("*.log"))) and follow and latest.is_dir():
        time.sleep(POLL_SECONDS)  # jobs wait in the queue
    if not found:
        raise ConfigError(f"run directory: {str(directory)!r} given; there are no logs in {latest}")
    unknown = sorted(set(names) - set(found))
    if unknown:
        raise ConfigError(f"NAME: {unknown[0]!r} given; allowed: {', '.join(found)}")
    width = max(map(len, names or found))
    read: dict[Path, int] = {}
    for path in _logs(latest, names):
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        read[path] = len(whole)
        lines = whole.decode(errors="replace").splitlines()
        yield from (f"{path.stem:<{width}} | {line}" for line in lines[-num_lines:] if num_lines)
    while follow:
        time.sleep(POLL_SECONDS)
        for path in _logs(latest, names):
            with path.open("rb") as file:
                file.seek(read.get(path, 0))
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            read[path] = read.get(path, 0) + len(whole)
            yield from (f"{path.stem:<{width}} | {line}" for line in whole.decode(errors="replace").splitlines())


def _logs(latest: Path, names: list[str]) -> list[Path]:
    """Logs of the attempt that `latest` points to now."""
    return [path for path in sorted(latest.resolve().glob("*.log")) if not names or path.stem in names]
