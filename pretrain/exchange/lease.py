"""One aggregator for one store: a lease that its holder renews, and that others may take when it falls silent.

    aggregator/000003.json           term 3: who holds it; whoever creates this has the lease
    aggregator/000003.beat-000017    a sign of life, replaced by the next one
    aggregator/000003.ended          the holder has ended

How old a sign of life is, is measured by the reader's own clock from when it first saw it; no two clocks are compared.
"""

import json
import os
import socket
import threading
import time
from itertools import count
from pathlib import Path

from pretrain.config import ConfigError
from pretrain.exchange.objects import Objects, StopWaitingError

FOLDER = "aggregator"
BEATS = 5  # signs of life in the time after which a holder counts as gone


class Lease:
    """The right to commit. Raises ConfigError if another living aggregator has it."""

    def __init__(self, objects: Objects, *, seconds: float) -> None:
        self._objects, self._seconds, self._closing = objects, seconds, threading.Event()
        host, pid = socket.gethostname(), os.getpid()
        self._holder = {"holder": f"{host}, process {pid}", "machine": f"{host} {boot_id()}", "pid": pid}
        self._term = self._take()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")
        self._thread.start()

    def check(self) -> None:
        """Raise ConfigError if somebody has taken the lease from us, as after a long pause of this process."""
        newest, holder = self._newest()
        if newest != self._term:
            raise ConfigError(
                f"exchange.url: {self._objects.url} given; the aggregator at {holder['holder']} has taken over here"
            )

    def release(self) -> None:
        """Let the next one start at once."""
        self._closing.set()
        self._thread.join()
        self._objects.write(f"{FOLDER}/{self._term:06d}.ended", b"{}\n")

    def _take(self) -> int:
        while True:
            newest, holder = self._newest()
            if newest and not self._has_ended(newest, holder):
                self._wait_for_silence(newest, holder)
            try:
                self._objects.write(f"{FOLDER}/{newest + 1:06d}.json", json.dumps(self._holder).encode())
            except FileExistsError:
                continue  # somebody was faster: look who
            for name in self._objects.names(FOLDER):
                if int(name[:6]) < newest:
                    self._objects.delete(f"{FOLDER}/{name}")
            return newest + 1

    def _newest(self) -> tuple[int, dict[str, object]]:
        terms = [name for name in self._objects.names(FOLDER) if name.endswith(".json")]
        if not terms:
            return 0, {}
        return int(terms[-1][:6]), json.loads(self._objects.read(f"{FOLDER}/{terms[-1]}"))

    def _has_ended(self, term: int, holder: dict[str, object]) -> bool:
        if self._objects.exists(f"{FOLDER}/{term:06d}.ended"):
            return True
        if holder["machine"] != self._holder["machine"]:
            return False
        pid = holder["pid"]
        return pid == os.getpid() or not Path(f"/proc/{pid}").exists()

    def _wait_for_silence(self, term: int, holder: dict[str, object]) -> None:
        who = f"the aggregator at {holder['holder']}"
        print(f"{who} holds this store: waiting {self._seconds:g} s for a sign of life", flush=True)
        first, end = self._signs(term), time.monotonic() + self._seconds
        while time.monotonic() < end:
            time.sleep(self._seconds / BEATS / 4)
            signs = self._signs(term)
            if f"{term:06d}.ended" in signs:
                return
            if signs != first:
                raise ConfigError(
                    f"exchange.url: {self._objects.url} given; {who} works on this store; stop it first, or name "
                    "another store"
                )
        print(f"{who} has been silent for {self._seconds:g} s: taking over", flush=True)

    def _signs(self, term: int) -> list[str]:
        return [name for name in self._objects.names(FOLDER) if name.startswith(f"{term:06d}.")]

    def _beat(self) -> None:
        """Renew; a store in trouble only makes us look silent."""
        last = ""
        for beat in count():
            name = f"{FOLDER}/{self._term:06d}.beat-{beat:06d}"
            try:
                self._objects.write(name, b"{}\n")
                if last:
                    self._objects.delete(last)
                last = name
            except (ConfigError, StopWaitingError):
                pass
            if self._closing.wait(self._seconds / BEATS):
                return


def boot_id() -> str:
    """Tells this start of this machine from all others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
