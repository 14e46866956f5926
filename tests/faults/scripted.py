"""Run the aggregator or a silo with scripted faults at (silo, round or step, point).

    python -m tests.faults.scripted pretrain.aggregate DIRECTORY '[["before_merge", 2], ...]' [the module's arguments]

A fault is a list: the point, the number of the round, version or step there (0 where there is none), the rank, the
action and its seconds; rank 0 and "kill" are meant where it ends before. The actions:

    kill    SIGKILL
    pause   SIGSTOP; a helper process sends SIGCONT some seconds later
    slow    sleep some seconds, there and at every larger number
    nan     the first value of a silo's local parameters becomes NaN; for the point `sending`

Two points have a fault of their own: `corrupt_payload` flips a bit in what was just delivered, `corrupt_version`
changes a value in what was just merged. A fault leaves an empty file DIRECTORY/POINT-NUMBER before it strikes, so that
a test can assert that it did; only `slow` strikes again, no other does, in later starts of the process neither.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# point: (module, attribute, before or after the call, number of the round, version or step from the call's arguments)
Point = tuple[str, str, str, Callable[..., int | None]]
OBJECTS = "pretrain.exchange.objects"
STORE = "pretrain.exchange.store"
AGGREGATE = "pretrain.aggregate"

SILO_POINTS: dict[str, Point] = {
    "step": ("pretrain.train", "learning_rate", "before", lambda step, inner: step),
    "sending": ("pretrain.sync", "SiloSync._code", "before", lambda self, version, *facts: version),
    "before_payload": (OBJECTS, "Objects.upload", "before", lambda self, file, name: delivery(name)),
    "corrupt_payload": (OBJECTS, "Objects.upload", "after", lambda self, file, name: delivery(name)),
    "before_manifest": (OBJECTS, "Objects.write", "before", lambda self, name, data: manifest(name)),
    "after_manifest": (OBJECTS, "Objects.write", "after", lambda self, name, data: manifest(name)),
    "adopting": ("pretrain.sync", "SiloSync._take_over", "before", lambda self, received: received.commit.version),
    "saving": ("pretrain.silo.engine", "Engine.save", "after", lambda self, directory: int(directory.name[6:14])),
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
}

AGGREGATOR_POINTS: dict[str, Point] = {  # as its loop comes to them
    "lease_taken": ("pretrain.exchange.lease", "Lease._take", "after", lambda self: 0),
    "starting": (AGGREGATE, "Aggregator.start", "before", lambda self: 0),
    "contract_read": (STORE, "StoreExchange.read_contract", "after", lambda self: 0),
    "before_contract": (OBJECTS, "Objects.write", "before", lambda self, name, data: contract(name)),
    "after_contract": (OBJECTS, "Objects.write", "after", lambda self, name, data: contract(name)),
    "version_read": (OBJECTS, "Objects.download", "after", lambda self, name, file, limit_bytes: version(name)),
    "version_loaded": (AGGREGATE, "Aggregator._load", "after", lambda self, newest: newest),
    "reading_delivery": (  # the first block is read and not written yet
        "fsspec.implementations.local",
        "LocalFileOpener.read",
        "after",
        lambda self, *size: delivery(below_store(self.path, 4)),
    ),
    "delivery_read": (OBJECTS, "Objects.download", "after", lambda self, name, file, limit_bytes: delivery(name)),
    "verified": (AGGREGATE, "Aggregator._verify", "after", lambda self, silo, data, state, version: version),
    "before_refusal": (OBJECTS, "Objects.write", "before", lambda self, name, data: refusal(name)),
    "before_merge": (AGGREGATE, "Aggregator.merge", "before", lambda self, state, deliveries: state.version),
    "merging": (  # the first tensor is merged; its fragment's outer steps are counted
        "pretrain.outer.state",
        "OuterTensors.step",
        "after",
        lambda self, name, merged, optimizer, lr, count, codec: count,
    ),
    "after_merge": (AGGREGATE, "Aggregator.merge", "after", lambda self, state, deliveries: state.version),
    "before_upload": (OBJECTS, "Objects.upload", "before", lambda self, file, name: version(name)),
    # What is linked was copied whole, under another name.
    "uploading": ("os", "link", "before", lambda copied, final, **more: version(below_store(final, 3))),
    "mid_publish": (OBJECTS, "Objects.upload", "after", lambda self, file, name: version(name)),
    "velocity_uploaded": (OBJECTS, "Objects.upload", "after", lambda self, file, name: version(name, "velocity-")),
    "target_uploaded": (OBJECTS, "Objects.upload", "after", lambda self, file, name: version(name, "target-")),
    "before_commit": (OBJECTS, "Objects.write", "before", lambda self, name, data: commit(name)),
    "committing": ("os", "link", "before", lambda written, final, **more: commit(below_store(final, 3))),
    "after_commit": (OBJECTS, "Objects.write", "after", lambda self, name, data: commit(name)),
    "before_pruning": (STORE, "StoreExchange.prune", "before", lambda self, roster, newest, *settings: newest),
    "delivery_pruned": (OBJECTS, "Objects.delete", "after", lambda self, name: pruned(self, name, delivery(name))),
    "pruning": (OBJECTS, "Objects.delete", "after", lambda self, name: pruned(self, name, version(name))),
    "after_pruning": (STORE, "StoreExchange.prune", "after", lambda self, roster, newest, *settings: newest),
    "releasing": ("pretrain.exchange.lease", "Lease.release", "before", lambda self: 0),
    "finishing": (
        "pretrain.journal",
        "Journal.record",
        "before",
        lambda self, kind, **values: 0 if kind == "aggregator" else None,
    ),
}

POINTS = SILO_POINTS | AGGREGATOR_POINTS


def number(pattern: str, name: str) -> int | None:
    """The six digits in an object's name that fits `pattern`."""
    found = re.fullmatch(pattern, name)
    return int(found[1]) if found else None


def delivery(name: str) -> int | None:
    return number(r"silos/[^/]+/(\d{6})/\d{6}\.safetensors", name)


def manifest(name: str) -> int | None:
    return number(r"silos/[^/]+/(\d{6})/manifest\.json", name)


def refusal(name: str) -> int | None:
    return number(r"silos/[^/]+/(\d{6})/refused-\d+\.json", name)


def version(name: str, stem: str = "") -> int | None:
    return number(rf"global/(\d{{6}})/{stem}.*\.safetensors", name)


def commit(name: str) -> int | None:
    return number(r"global/(\d{6})/commit\.json", name)


def contract(name: str) -> int | None:
    return 0 if name == "contract.json" else None


def below_store(path: str | Path, num_parts: int) -> str:
    """The name of the object that lies at `path`, `num_parts` folders and file deep in its store."""
    return "/".join(Path(path).parts[-num_parts:])


def pruned(objects: Any, name: str, version: int | None) -> int | None:
    """`version`, if it is committed: what is deleted of another is a leftover of somebody who died."""
    committed = version is not None and objects.exists(f"global/{version:06d}/commit.json")
    return version if committed else None


def arm(point: str, when: int, fired: Path, action: str, seconds: float) -> None:
    """Replace the point's function by one that strikes before or after the call whose number is `when`."""
    module_name, path, side, number_of = POINTS[point]
    owner: Any = importlib.import_module(module_name)
    *outer, attribute = path.split(".")
    for name in outer:
        owner = getattr(owner, name)
    original = getattr(owner, attribute)

    def is_due(found: int | None) -> bool:
        if action == "slow":
            return found is not None and found >= when
        return found == when and not fired.exists()

    def faulty(*args: Any, **kwargs: Any) -> Any:
        due = is_due(number_of(*args, **kwargs))
        if due and side == "before":
            strike(action, seconds, fired, args)
        result = original(*args, **kwargs)
        if due and point == "corrupt_payload":
            corrupt(fired, Path(args[0]._path(args[2])))
        elif due and point == "corrupt_version":
            fired.touch()
            next(iter(result.values())).view(-1)[0] += 1
        elif due and side == "after":
            strike(action, seconds, fired, args)
        return result

    setattr(owner, attribute, faulty)


def strike(action: str, seconds: float, fired: Path, args: tuple[Any, ...]) -> None:
    fired.touch()
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "pause":
        subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"], start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "slow":
        time.sleep(seconds)
    else:
        assert action == "nan", action
        _, _, local, *_ = args  # of SiloSync._send
        next(iter(local.values())).view(-1)[0] = float("nan")


def corrupt(fired: Path, payload: Path) -> None:
    fired.touch()
    data = bytearray(payload.read_bytes())
    data[-1] ^= 1
    payload.write_bytes(data)


def main() -> None:
    which, directory, faults, *arguments = sys.argv[1:]
    module = importlib.import_module(which)
    for point, when, *more in json.loads(faults):
        rank, action, seconds = [*more, *(0, "kill", 0.0)[len(more) :]]
        if str(rank) == os.environ.get("RANK", "0"):
            arm(point, when, Path(directory) / f"{point}-{when}", action, seconds)
    sys.argv = [which, *arguments]
    sys.exit(module.main())


if __name__ == "__main__":
    main()
