"""Run the aggregator or a silo with scripted faults at (silo, round or step, point), each once.

    python -m tests.faults.scripted pretrain.aggregate DIRECTORY '[["before_merge", 2], ...]' [the module's arguments]

A fault is SIGKILL, or for `corrupt_payload` a flipped bit in what was just delivered, or for `corrupt_version` another
value in what was just merged. It leaves an empty file DIRECTORY/POINT-NUMBER before it strikes: the test asserts that
it fired.
"""

import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

POINTS: dict[str, tuple[str, str, str, Callable[..., int | None]]] = {
    # point: (module, attribute, before or after the call, number of the round or step from the call's arguments)
    "step": ("pretrain.train", "learning_rate", "before", lambda step, inner: step),
    "before_payload": (
        "pretrain.exchange.objects",
        "Objects.upload",
        "before",
        lambda self, file, name: delivery(name),
    ),
    "corrupt_payload": (
        "pretrain.exchange.objects",
        "Objects.upload",
        "after",
        lambda self, file, name: delivery(name),
    ),
    "before_manifest": (
        "pretrain.exchange.objects",
        "Objects.write",
        "before",
        lambda self, name, data: manifest(name),
    ),
    "after_manifest": ("pretrain.exchange.objects", "Objects.write", "after", lambda self, name, data: manifest(name)),
    "adopting": ("pretrain.sync", "SiloSync._take_over", "before", lambda self, received: received.commit.version),
    "saving": ("pretrain.silo.engine", "Engine.save", "after", lambda self, directory: int(directory.name[6:14])),
    "before_contract": (
        "pretrain.exchange.objects",
        "Objects.write",
        "before",
        lambda self, name, data: contract(name),
    ),
    "after_contract": ("pretrain.exchange.objects", "Objects.write", "after", lambda self, name, data: contract(name)),
    "before_merge": ("pretrain.aggregate", "Aggregator.merge", "before", lambda self, state, deliveries: state.version),
    "after_merge": ("pretrain.aggregate", "Aggregator.merge", "after", lambda self, state, deliveries: state.version),
    "mid_publish": ("pretrain.exchange.objects", "Objects.upload", "after", lambda self, file, name: version(name)),
    "before_commit": ("pretrain.exchange.objects", "Objects.write", "before", lambda self, name, data: commit(name)),
    "after_commit": ("pretrain.exchange.objects", "Objects.write", "after", lambda self, name, data: commit(name)),
    "before_keep": ("pretrain.own_ledger", "OwnLedger.keep", "before", lambda self, version, kept: version),
    "after_keep": ("pretrain.own_ledger", "OwnLedger.keep", "after", lambda self, version, kept: version),
    "before_publish": ("pretrain.own_ledger", "OwnLedger.publish", "before", lambda self, draft, files: draft.version),
    "after_publish": ("pretrain.own_ledger", "OwnLedger.publish", "after", lambda self, draft, files: draft.version),
    "corrupt_version": (
        "pretrain.sync_collective",
        "AmongSilos._apply",
        "after",
        lambda self, merged, parts, base: self._ledger.newest + 1,
    ),
    "pruning": ("pretrain.exchange.objects", "Objects.delete", "after", lambda self, name: version(name)),
}


def number(pattern: str, name: str) -> int | None:
    """The six digits in an object's name that fits `pattern`."""
    found = re.fullmatch(pattern, name)
    return int(found[1]) if found else None


def delivery(name: str) -> int | None:
    return number(r"silos/[^/]+/(\d{6})/\d{6}\.safetensors", name)


def manifest(name: str) -> int | None:
    return number(r"silos/[^/]+/(\d{6})/manifest\.json", name)


def version(name: str) -> int | None:
    return number(r"global/(\d{6})/.*\.safetensors", name)


def commit(name: str) -> int | None:
    return number(r"global/(\d{6})/commit\.json", name)


def contract(name: str) -> int | None:
    return 0 if name == "contract.json" else None


def arm(point: str, when: int, fired: Path) -> None:
    """Replace the point's function by one that strikes before or after the call whose number is `when`."""
    module_name, path, side, number_of = POINTS[point]
    owner: Any = importlib.import_module(module_name)
    *outer, attribute = path.split(".")
    for name in outer:
        owner = getattr(owner, name)
    original = getattr(owner, attribute)

    def dying(*args: Any, **kwargs: Any) -> Any:
        due = number_of(*args, **kwargs) == when and not fired.exists()
        if due and side == "before":
            die(fired)
        result = original(*args, **kwargs)
        if due and point == "corrupt_payload":
            corrupt(fired, Path(args[0]._path(args[2])))
        elif due and point == "corrupt_version":
            fired.touch()
            next(iter(result.values())).view(-1)[0] += 1
        elif due:
            die(fired)
        return result

    setattr(owner, attribute, dying)


def die(fired: Path) -> None:
    fired.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def corrupt(fired: Path, payload: Path) -> None:
    fired.touch()
    data = bytearray(payload.read_bytes())
    data[-1] ^= 1
    payload.write_bytes(data)


def main() -> None:
    which, directory, faults, *arguments = sys.argv[1:]
    module = importlib.import_module(which)
    rank = os.environ.get("RANK", "0")
    for point, when, *ranks in json.loads(faults):
        if rank == str(ranks[0] if ranks else 0):
            arm(point, when, Path(directory) / f"{point}-{when}")
    sys.argv = [which, *arguments]
    sys.exit(module.main())


if __name__ == "__main__":
    main()
