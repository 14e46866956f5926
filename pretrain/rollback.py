"""Roll a run's ledger back to a version whose state is still kept, recorded for ever.

    rollbacks/000001.json        from and to which version, why, and the sha256 of every commit that it discards
    rolled-back/000001/...       the discarded commits, manifests and refusals; their tensors are deleted

Whoever is killed in between leaves a record, and `finish_rollbacks` completes it; until then every version that has a
commit has its tensors.
"""

import json
import re
from itertools import takewhile
from typing import Any

from pretrain.config import ConfigError
from pretrain.exchange.base import History
from pretrain.exchange.store import StoreExchange, version_path
from pretrain.trust.ledger import sha256_bytes

RECORDS = "rollbacks"


def roll_back(exchange: StoreExchange, to: int, reason: str) -> None:
    """Make `to` the newest version; the run must be stopped. Raises ConfigError if its state is not there any more."""
    contract = exchange.read_contract()
    if contract is None:
        raise ConfigError(f"store: {exchange.objects.url!r} given; there is no run in it (no contract.json)")
    finish_rollbacks(exchange)
    newest, num_fragments = exchange.newest_version(), json.loads(contract)["outer"]["num_fragments"]
    before = range(newest - 1, -1, -1)
    kept = sorted(takewhile(lambda version: _is_kept(exchange, version, num_fragments), before))
    if to not in kept:
        allowed = f"{', '.join(map(str, kept))}, the versions before {newest} that are kept" if kept else "none is kept"
        raise ConfigError(f"--to: {to} given; allowed: {allowed}")
    names = exchange.objects.names(RECORDS)
    previous = sha256_bytes(exchange.objects.read(f"{RECORDS}/{names[-1]}")) if names else None
    record = {
        "format": 1,
        "from": newest,
        "to": to,
        "reason": reason,
        "previous": previous,
        "commit_sha256": sha256_bytes(exchange.commit_bytes(to)),
        "discarded": [sha256_bytes(exchange.commit_bytes(version)) for version in range(to + 1, newest + 1)],
    }
    number = int(names[-1][:6]) + 1 if names else 1
    exchange.objects.write(f"{RECORDS}/{number:06d}.json", (json.dumps(record, indent=1) + "\n").encode())
    finish_rollbacks(exchange)


def _is_kept(exchange: StoreExchange, version: int, num_fragments: int) -> bool:
    state = exchange.newest_state(version, num_fragments)
    return all(exchange.objects.exists(f"{version_path(changed)}/{payload.file}") for changed, payload in state)


def finish_rollbacks(exchange: StoreExchange) -> None:
    """Complete the newest rollback, if it was interrupted; the aggregator calls this when it starts."""
    objects = exchange.objects
    names = objects.names(RECORDS)
    if not names or objects.exists(f"rolled-back/{names[-1][:6]}/done"):
        return
    record, kept_in = json.loads(objects.read(f"{RECORDS}/{names[-1]}")), f"rolled-back/{names[-1][:6]}"
    roster = json.loads(objects.read("contract.json"))["roster"]
    for version in range(record["from"], record["to"], -1):  # newest first, so that no commit stands without the next
        folders = [version_path(version), *(f"silos/{silo}/{version:06d}" for silo in roster)]
        for folder in folders:
            # The commit goes first: a version without tensors must not look committed.
            for name in sorted(objects.names(folder), key=lambda name: name != "commit.json"):
                _discard(exchange, f"{folder}/{name}", kept_in)
        objects.delete(f"waiting/{version:06d}.json")
    for silo in roster:
        for name in objects.names(f"silos/{silo}/resumable"):
            if int(name) > record["to"]:
                objects.delete(f"silos/{silo}/resumable/{name}")
    objects.write(f"{kept_in}/done", b"{}\n")


def _discard(exchange: StoreExchange, name: str, kept_in: str) -> None:
    if name.endswith(".json"):
        data, copy = exchange.objects.read(name), f"{kept_in}/{name}"
        if not exchange.objects.exists(copy):
            exchange.objects.write(copy, data)
    exchange.objects.delete(name)


def explain(exchange: StoreExchange, version: int, commit_sha256: str) -> History:
    """What a commit that somebody has seen is to this store."""
    try:
        if sha256_bytes(exchange.commit_bytes(version)) == commit_sha256:
            return "same"
    except FileNotFoundError:
        pass
    discarded = {sha256 for record in records(exchange) for sha256 in record["discarded"]}
    return "rolled back" if commit_sha256 in discarded else "foreign"


def records(exchange: StoreExchange) -> list[dict[str, Any]]:
    """All rollbacks of a run, oldest first."""
    names = [name for name in exchange.objects.names(RECORDS) if re.fullmatch(r"\d{6}\.json", name)]
    return [json.loads(exchange.objects.read(f"{RECORDS}/{name}")) for name in names]
