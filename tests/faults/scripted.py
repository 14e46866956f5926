"""Run the aggregator or a silo with scripted faults at (silo, round or step, point).

    python -m tests.faults.scripted pretrain.aggregate DIRECTORY '[["before_merge", 2], ...]' [the module's arguments]

A fault is a list: the point, the number of the round, version or step there (0 where there is none), the rank, the
action and its amount; rank 0 and "kill" are meant where it ends before. The actions:

    kill     SIGKILL
    pause    SIGSTOP; a helper process sends SIGCONT some seconds later
    slow     sleep some seconds, there and at every larger number
    fill     a file takes all room that is left in a folder
    times    what the call returns is multiplied
    drop     nothing is done, there and at every second larger number; for the point `delivering`
    nan      the first value of a silo's local parameters becomes NaN; for the point `sending`, as the rest
    flip     the silo sends the opposite of its pseudo-gradient, there and at every larger number
    scale    and this sends a multiple of it
    noise    and this adds normal noise to it, of a multiple of its size
    shuffle  the tokens of what the silo trains on are in a random order, there and at every larger number; for the
             point `reading`

Two points have a fault of their own: `corrupt_payload` flips a bit in what was just delivered, `corrupt_version`
changes a value in what was just merged. A fault leaves an empty file DIRECTORY/POINT-NUMBER before it strikes, so that
a test can assert that it did; those of all larger numbers strike again, no other does, in later starts of the process
neither.
"""

import contextlib
import dataclasses
import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.start.local import CommandBuilder, local_commands
from launch.start.processes import ChildCommand
from pretrain.config.keys import RunConfig

if TYPE_CHECKING:
    from tests.distributed.federation import Outcome

Faults = dict[str, list[tuple[Any, ...]]]
"""Silo, or `aggregator`, to its faults."""
FILLER = "filler"
LASTING = ("slow", "flip", "scale", "noise", "shuffle")

# point: (module, attribute, before or after the call, number of the round, version or step from the call's arguments)
Point = tuple[str, str, str, Callable[..., int | None]]
OBJECTS = "pretrain.exchange.objects"
STORE = "pretrain.exchange.store"
HISTORY = "pretrain.exchange.history"
AGGREGATE, MERGER = "pretrain.aggregate", "pretrain.merge.merger"
SILO_SYNC, PRACTICE = "pretrain.sync.silo_sync", "pretrain.sync.practice"
THROUGH_STORE = "pretrain.sync.through_store"
ELASTIC, DATA = "pretrain.sync.elastic", "pretrain.silo.data"
OWN_LEDGER = "pretrain.sync.own_ledger"

SIGNING: Point = (OBJECTS, "Objects.write", "before", lambda self, name, data: signature(name))
SILO_POINTS: dict[str, Point] = {
    "signing": SIGNING,
    "joining": (THROUGH_STORE, "ThroughStore.join", "before", lambda self: 0),
    "named": (STORE, "StoreExchange.claim_name", "after", lambda self, silo, identity: 0),
    "step": ("pretrain.train", "learning_rate", "before", lambda step, inner: step),
    "gathering": (SILO_SYNC, "SiloSync.deliver", "before", lambda self, engine, progress, version: version),
    "sending": (SILO_SYNC, "SiloSync._code", "before", lambda self, version, *facts: version),
    "practising": (PRACTICE, "Practice._tried", "before", lambda self, place, point, asked: point),
    "practised": (PRACTICE, "Practice._begin", "before", lambda self, practice: practice[-1]["rounds"]),
    "coded": (SILO_SYNC, "save_tensors", "after", lambda coded, file, **_: int(file.stem)),
    "delivering": (THROUGH_STORE, "ThroughStore.deliver", "before", lambda self, sent: sent.manifest.version),
    "before_payload": (OBJECTS, "Objects.upload", "before", lambda self, file, name: delivery(name)),
    "corrupt_payload": (OBJECTS, "Objects.upload", "after", lambda self, file, name: delivery(name)),
    "before_shares": (OBJECTS, "Objects.write", "before", lambda self, name, data: of_sum("shares", name)),
    "answering": (OBJECTS, "Objects.write", "before", lambda self, name, data: of_sum("answer", name)),
    "answered": (OBJECTS, "Objects.write", "after", lambda self, name, data: of_sum("answer", name)),
    "before_manifest": (OBJECTS, "Objects.write", "before", lambda self, name, data: manifest(name)),
    "after_manifest": (OBJECTS, "Objects.write", "after", lambda self, name, data: manifest(name)),
    "waiting": (THROUGH_STORE, "ThroughStore._wait_for_commit", "before", lambda self, version, sent: version),
    "fetching": (STORE, "StoreExchange.fetch", "before", lambda self, folder, *more: number(r"global/(\d{6})", folder)),
    "downloaded": (THROUGH_STORE, "ThroughStore._download", "after", lambda self, version, base: version),
    "adopting": (SILO_SYNC, "SiloSync._take_over", "before", lambda self, received: received.commit.version),
    "adopted": (SILO_SYNC, "SiloSync._record", "before", lambda self, progress, flight, received: progress.version),
    "before_saving": ("pretrain.silo.engine", "Engine.save", "before", lambda self, path: int(path.name[6:14])),
    "saving": ("pretrain.silo.engine", "Engine.save", "after", lambda self, directory: int(directory.name[6:14])),
    "marking": (STORE, "StoreExchange.mark_resumable", "before", lambda self, silo, version: version),
    "marked": (STORE, "StoreExchange.mark_resumable", "after", lambda self, silo, version: version),
    "before_keep": (OWN_LEDGER, "OwnLedger.keep", "before", lambda self, version, kept: version),
    "after_keep": (OWN_LEDGER, "OwnLedger.keep", "after", lambda self, version, kept: version),
    "before_publish": (OWN_LEDGER, "OwnLedger.publish", "before", lambda self, draft, files: draft.version),
    "after_publish": (OWN_LEDGER, "OwnLedger.publish", "after", lambda self, draft, files: draft.version),
    "corrupt_version": (
        "pretrain.sync.among_silos",
        "AmongSilos._apply",
        "after",
        lambda self, merged, parts, base, values: self._ledger.newest + 1,
    ),
}

AGGREGATOR_POINTS: dict[str, Point] = {  # as its loop comes to them
    "lease_taken": ("pretrain.exchange.lease", "Lease._take", "after", lambda self: 0),
    "starting": (AGGREGATE, "Aggregator.start", "before", lambda self: 0),
    "contract_read": (STORE, "StoreExchange.read_contract", "after", lambda self: 0),
    "before_contract": (OBJECTS, "Objects.write", "before", lambda self, name, data: contract(name)),
    "after_contract": (OBJECTS, "Objects.write", "after", lambda self, name, data: contract(name)),
    "signing": SIGNING,
    "agreed": (AGGREGATE, "Aggregator._agree", "after", lambda self: 0),
    "version_read": (OBJECTS, "Objects.download", "after", lambda self, name, file, limit_bytes: version(name)),
    "replaying": (  # what is to be replayed is known, and none of it done
        MERGER,
        "Merger.replay",
        "before",
        lambda self, state, commits, snapshots: commits[-1].version if commits else None,
    ),
    "version_loaded": (AGGREGATE, "Aggregator._load", "after", lambda self, newest: newest),
    "collecting": (AGGREGATE, "Aggregator.collect", "before", lambda self, state: state.version),
    "reading_delivery": (  # nothing is read yet
        OBJECTS,
        "Objects._blocks",
        "after",
        lambda self, name, limit_bytes: delivery(name),
    ),
    "delivery_read": (OBJECTS, "Objects.download", "after", lambda self, name, file, limit_bytes: delivery(name)),
    "verified": (MERGER, "Merger.verify", "after", lambda self, silo, data, state, version, *over: version),
    "before_refusal": (OBJECTS, "Objects.write", "before", lambda self, name, data: refusal(name)),
    "before_survivors": (OBJECTS, "Objects.write", "before", lambda self, name, data: survivors(name)),
    "after_survivors": (OBJECTS, "Objects.write", "after", lambda self, name, data: survivors(name)),
    "before_merge": (AGGREGATE, "Aggregator.merge", "before", lambda self, state, deliveries: state.version),
    "merging": (  # the first elements are merged; their fragment's outer steps are counted
        "pretrain.outer.blocks",
        "_Work.add",
        "after",
        lambda self, *found: self.rule.count,
    ),
    "after_merge": (AGGREGATE, "Aggregator.merge", "after", lambda self, state, deliveries: state.version),
    "before_upload": (OBJECTS, "Objects.upload", "before", lambda self, file, name: version(name)),
    # What is linked was copied whole, under another name.
    "uploading": ("os", "link", "before", lambda copied, final, **more: version(linked(final, **more))),
    "mid_publish": (OBJECTS, "Objects.upload", "after", lambda self, file, name: version(name)),
    "velocity_uploaded": (OBJECTS, "Objects.upload", "after", lambda self, file, name: version(name, "velocity-")),
    "target_uploaded": (OBJECTS, "Objects.upload", "after", lambda self, file, name: version(name, "target-")),
    "before_snapshot": (OBJECTS, "Objects.write", "before", lambda self, name, data: snapshot(name)),
    "before_commit": (OBJECTS, "Objects.write", "before", lambda self, name, data: commit(name)),
    "committing": ("os", "link", "before", lambda written, final, **more: commit(linked(final, **more))),
    "after_commit": (OBJECTS, "Objects.write", "after", lambda self, name, data: commit(name)),
    "noted": (AGGREGATE, "Aggregator._publish", "after", lambda self, commit, payloads: commit.version),
    "before_pruning": (HISTORY, "History.prune", "before", lambda self, roster, newest, most, **settings: newest),
    "delivery_pruned": (OBJECTS, "Objects.delete", "after", lambda self, name: pruned(self, name, delivery(name))),
    "pruning": (OBJECTS, "Objects.delete", "after", lambda self, name: pruned(self, name, version(name))),
    "after_pruning": (HISTORY, "History.prune", "after", lambda self, roster, newest, most, **settings: newest),
    "releasing": ("pretrain.exchange.lease", "Lease.release", "before", lambda self: 0),
    "finishing": (
        "pretrain.host.journal",
        "Journal.record",
        "before",
        lambda self, kind, **values: 0 if kind == "aggregator" else None,
    ),
}

# Where a contract has a gate, and where a silo's text is spoiled.
GATE_POINTS: dict[str, Point] = {
    "reading": (DATA, "Batches.__next__", "after", lambda self: self.state() // self.global_batch_sequences),
    "judging": (ELASTIC, "ElasticSync.judged", "before", lambda self, version, *found: version),
    "judged": (ELASTIC, "ElasticSync.judged", "after", lambda self, version, *found: version),
    "before_decision": (OBJECTS, "Objects.write", "before", lambda self, name, data: decision(name)),
    "after_decision": (OBJECTS, "Objects.write", "after", lambda self, name, data: decision(name)),
}

POINTS = SILO_POINTS | AGGREGATOR_POINTS | GATE_POINTS


def scripted(module: str, faults: Sequence[tuple[Any, ...]], directory: Path) -> list[str]:
    """What follows `python -m` to run a module with faults, which leave their files in `directory`."""
    return ["tests.faults.scripted", module, str(directory), json.dumps(faults)]


def with_faults(faults: Faults, directory: Path) -> CommandBuilder:
    """A command builder that runs each process with its faults, which leave their files in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)

    def build(config: RunConfig, config_path: Path) -> list[ChildCommand]:
        commands = []
        for command in local_commands(config, config_path):
            module = "pretrain.aggregate" if command.name == "aggregator" else "pretrain.train"
            at = command.argv.index(module)
            words = scripted(module, faults.get(command.name, []), directory)
            argv = command.argv[:at] + words + command.argv[at + 1 :]
            commands.append(dataclasses.replace(command, argv=argv))
        return commands

    return build


def check_struck(faults: Faults, directory: Path) -> None:
    """Every one of these faults, which leave their files in `directory`, has struck."""
    expected = {f"{point}-{when}" for chain in faults.values() for point, when, *_ in chain}
    struck = {path.name for path in directory.iterdir()}
    assert struck == expected, f"has not struck: {sorted(expected - struck)}; nobody's: {sorted(struck - expected)}"


def federate_with(faults: Faults, config: RunConfig, directory: Path, *, max_restarts: int = 0) -> "Outcome":
    """`federate` a run in which every one of these faults strikes; `directory` is where they say so."""
    from tests.distributed.federation import federate  # not for the processes that run this module

    run = federate(config, max_restarts=max_restarts, build_commands=with_faults(faults, directory))
    check_struck(faults, directory)
    return run


def number(pattern: str, name: str) -> int | None:
    """The six digits in an object's name that fits `pattern`."""
    found = re.fullmatch(pattern, name)
    return int(found[1]) if found else None


def delivery(name: str) -> int | None:
    return number(r"silos/[^/]+/(\d{6})/\d{6}\.safetensors", name)


def manifest(name: str) -> int | None:
    return number(r"silos/[^/]+/(\d{6})/manifest\.json", name)


def of_sum(what: str, name: str) -> int | None:
    return number(rf"silos/[^/]+/(\d{{6}})/{what}\.json", name)


def survivors(name: str) -> int | None:
    return number(r"sums/(\d{6})\.json", name)


def refusal(name: str) -> int | None:
    return number(r"silos/[^/]+/(\d{6})/refused-\d+\.json", name)


def version(name: str, stem: str = "") -> int | None:
    return number(rf"global/(\d{{6}})/{stem}.*\.safetensors", name)


def commit(name: str) -> int | None:
    return number(r"global/(\d{6})/commit\.json", name)


def decision(name: str) -> int | None:
    return number(r"global/(\d{6})/gate\.json", name)


def signature(name: str) -> int | None:
    return 0 if name.startswith("signatures/") else None


def snapshot(name: str) -> int | None:
    return number(r"snapshots/(\d{6})\.json", name)


def contract(name: str) -> int | None:
    return 0 if name == "contract.json" else None


def linked(final: str, *, dst_dir_fd: int, **more: Any) -> str:
    """The name of an object in a folder of three levels, which a directory store is about to link there."""
    return "/".join(Path(os.readlink(f"/proc/self/fd/{dst_dir_fd}"), final).parts[-3:])


def pruned(objects: Any, name: str, version: int | None) -> int | None:
    """`version`, if it is committed: what is deleted of another is a leftover of somebody who died."""
    committed = version is not None and objects.exists(f"global/{version:06d}/commit.json")
    return version if committed else None


def arm(point: str, when: int, fired: Path, action: str, amount: Any) -> None:
    """Replace the point's function by one that strikes before or after the call whose number is `when`."""
    module_name, path, side, number_of = POINTS[point]
    owner: Any = importlib.import_module(module_name)
    *outer, attribute = path.split(".")
    for name in outer:
        owner = getattr(owner, name)
    original, known = getattr(owner, attribute), inspect.signature(number_of).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())

    def is_due(found: int | None) -> bool:
        if found is None or action in (*LASTING, "drop"):
            return found is not None and found >= when and (action != "drop" or (found - when) % 2 == 0)
        return found == when and not fired.exists()

    def faulty(*args: Any, **kwargs: Any) -> Any:
        asked = {name: value for name, value in kwargs.items() if name in known or takes_all}
        due = is_due(number_of(*args, **asked))
        if due and action == "drop":
            fired.touch()
            return args[1].to_bytes()  # as if it had come through
        if due and side == "before" and action != "times":
            strike(action, amount, fired, args)
        result = original(*args, **kwargs)
        if due and point == "corrupt_payload":
            corrupt(fired, Path(args[0]._path(args[2])))
        elif due and point == "corrupt_version":
            fired.touch()
            next(iter(result.values())).view(-1)[0] += 1
        elif due and action == "times":
            fired.touch()
            return result * amount
        elif due and action == "shuffle":
            fired.touch()
            return shuffled(result)
        elif due and side == "after":
            strike(action, amount, fired, args)
        return result

    setattr(owner, attribute, faulty)


def strike(action: str, amount: Any, fired: Path, args: tuple[Any, ...]) -> None:
    fired.touch()
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "pause":
        stopped = f"grep -q '^State:.T' /proc/{os.getpid()}/status"  # SIGCONT before that would leave it so for ever
        wake = f"until {stopped}; do sleep 0.05; done; sleep {amount}; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", wake], start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "slow":
        time.sleep(amount)
    elif action == "fill":
        fill(Path(amount))
    elif action == "lie":
        lie(amount, args)
    else:
        sync, _, local, *_ = args  # of SiloSync._code
        for name, value in local.items():
            spoil(action, amount, value, sync.global_parameters[name])


def shuffled(batch: Any) -> Any:
    """The tokens of each sequence in another order, the same whenever it is read."""
    import torch

    tokens = torch.cat([batch.inputs[:, :1], batch.targets], dim=1)
    generator = torch.Generator().manual_seed(int(tokens.sum()))
    tokens = tokens[:, torch.randperm(tokens.shape[1], generator=generator)]
    return batch._replace(inputs=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous())


def lie(about: str, args: tuple[Any, ...]) -> None:
    """Change in place what a silo is to code (of SiloSync._code), or to sign and deliver (of ThroughStore.deliver)."""
    if about == "tokens":
        object.__setattr__(args[1].manifest, "tokens", 10**6)
    elif about == "speed":
        args[1].manifest.metrics["seconds_per_step"] = 1e-300
    elif about == "range":
        next(iter(args[2].values())).view(-1)[0] = -3.4e38
    else:
        part, factor = {"second moments": ("rows", 1e30), "mean gradients": ("scales", 1e6)}[about]
        for parts in args[3].values():
            if part in parts:
                parts[part].mul_(factor)


def fill(directory: Path) -> None:
    """Leave no room: of a block, then of single bytes."""
    with (directory / FILLER).open("wb", buffering=0) as filler:
        for data in (bytes(1 << 16), bytes(1)):
            with contextlib.suppress(OSError):
                while True:
                    filler.write(data)


def spoil(action: str, amount: float, local: Any, base: Any) -> None:
    """Change a tensor of a silo's local parameters, as trained from `base`, in place."""
    import torch

    change = local - base
    if action == "nan":
        local.view(-1)[0] = float("nan")
    elif action == "noise":
        local += torch.randn_like(change) * change.square().mean().sqrt() * amount
    else:
        local.copy_(base + change * (-1.0 if action == "flip" else amount))


def corrupt(fired: Path, payload: Path) -> None:
    fired.touch()
    data = bytearray(payload.read_bytes())
    data[-1] ^= 1
    payload.write_bytes(data)


def main() -> None:
    which, directory, faults, *arguments = sys.argv[1:]
    module = importlib.import_module(which)
    defaults: list[Any] = [None, None, 0, "kill", 0.0]
    for fault in json.loads(faults):
        point, when, rank, action, amount = fault + defaults[len(fault) :]
        if str(rank) == os.environ.get("RANK", "0"):
            arm(point, when, Path(directory) / f"{point}-{when}", action, amount)
    sys.argv = [which, *arguments]
    sys.exit(module.main())


if __name__ == "__main__":
    main()
