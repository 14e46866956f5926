"""Somebody who can write to the store, and has no key, forges all it can while a signed federation runs."""

import re
from pathlib import Path

import pytest

from pretrain.config.keys import OPERATOR
from pretrain.exchange.words import Beat, Damaged, Done, Holder, Identity, Membership, Refusal, Resumable, Waiting, Word
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome
from tests.faults.beside import federate_beside
from tests.faults.test_kills import check_same, make_config

LAST = 3
HOLDER = Holder(holder="me", machine="", pid=0, lease_seconds=1e9, nonce="0")


def words(version: int) -> dict[str, Word]:
    found: dict[str, Word] = {
        f"aggregator/{version + 1:06d}.json": HOLDER,
        "aggregator/000001.ended": Done(),
        "aggregator/000001.beat-999999": Done(),
        f"waiting/{version:06d}.json": Waiting(silos=[], deadline_seconds=0.0),
        "rollbacks/000001.done": Done(),
    }
    for silo in ("alpha", "beta"):
        found |= {
            f"silos/{silo}/identity.json": Identity(identity="me"),
            f"silos/{silo}/membership/{version:06d}.json": Membership(left=True, version=version),
            f"silos/{silo}/resumable/{100 + version:06d}": Resumable(num_rollbacks=0),
            f"silos/{silo}/beats/{999_990 + version:06d}": Beat(lease_seconds=1e9),
            f"silos/{silo}/{version:06d}/refused-0.json": Refusal(reason="no", final=True),
            f"damaged/{version - 1:06d}/{silo}": Damaged(reason="no", nonce="0"),
        }
    return found


def forge(store: Path) -> int:
    """Everything for every version that is not made yet, where nothing is yet; returns how many objects were forged."""
    num_forged = 0
    newest = max((int(path.parent.name) for path in store.glob("global/*/commit.json")), default=-1)
    commit = store / "global" / "000000" / "commit.json"
    forged = {name: word.to_bytes() for version in range(1, LAST + 1) for name, word in words(version).items()}
    for version in range(max(1, newest + 1), LAST + 1):
        if commit.is_file():
            forged[f"global/{version:06d}/commit.json"] = commit.read_bytes()  # signed, and in another place
        forged[f"snapshots/{version:06d}.json"] = b"{}"
        for silo in ("alpha", "beta"):
            earlier = store / "silos" / silo / f"{version - 1:06d}" / "manifest.json"
            name = f"silos/{silo}/{version:06d}/manifest.json"
            forged[name] = earlier.read_bytes() if earlier.is_file() else b"{}"
    for silo in ("alpha", "beta", OPERATOR):
        forged[f"signatures/{silo}.json"] = b"{}"
    forged["rollbacks/000001.json"] = b"{}"
    for name, data in forged.items():
        file = store / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = store / "forged.tmp"
            temporary.write_bytes(data)
            try:
                file.hardlink_to(temporary)
                num_forged += 1
            except FileExistsError:
                pass
            temporary.unlink()
    return num_forged


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_run_comes_to_the_bits_of_an_undisturbed_one(
    undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    run, logs = federate_beside(make_config(tiny_config, tmp_path), forge)
    check_same(run, undisturbed)
    named = set(re.findall(r"([a-z0-9/.-]+) is passed over", logs))
    assert {"aggregator/000002.json", "silos/alpha/000001/manifest.json", "silos/beta/identity.json"} <= named, named
